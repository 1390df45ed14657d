"""A page in the browser, and what a test wants to know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.remote.webelement import WebElement


class Viewer:
    """Opens files; every page has to come up without an error."""

    def __init__(self, driver: WebDriver) -> None:
        self.driver = driver

    def open(self, path: Path, width: int = 1120, dark: bool = False) -> None:
        """Load a page in a window of this width, and check that nothing went wrong."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get_log("browser")
        self.driver.get(path.resolve().as_uri())
        assert self.run("return document.documentElement.dataset.ready") == "true", self.errors()
        assert self.errors() == []

    def errors(self) -> list[dict[str, Any]]:
        """What the console was told since the last look, but for remarks of no weight."""
        return [e for e in self.driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)",
            selector,
        )

    def focus(self, element: WebElement) -> None:
        self.run("arguments[0].focus()", element)

    def press(self, *keys: str) -> None:
        """Real key strokes, wherever the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def hover(self, element: WebElement) -> None:
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        ActionChains(self.driver).move_to_element(element).perform()

    @property
    def tip(self) -> str:
        """What the tooltip says; "" while there is none."""
        return self.run(
            "const t = document.getElementById('tip'); return t.hidden ? '' : t.innerText"
        )
