"""The page as a person meets it: in a browser, by mouse, by keys, on a phone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from surgery.lab.report.html import write_report
from surgery.lab.report.quantities import MINUS
from tests.lab.report.making import (
    HEADS,
    LAYERS,
    STEPS,
    write_analysis,
    write_full_run,
    write_heads,
)
from tests.lab.report.test_page import NASTY
from tests.lab.report.viewing import Viewer

CELLS = "[data-draw=maps] td"
SECTIONS = [
    "remarks",
    "results",
    "healing",
    "samples",
    "plan",
    "maps",
    "roles",
    "importance",
    "probes",
    "calibration",
    "tasks",
    "loading",
    "circumstances",
]


def colours(viewer: Viewer) -> list[str]:
    return viewer.run(
        "return [...document.querySelectorAll(arguments[0])].map((c) => c.style.background)", CELLS
    )


def choose(viewer: Viewer, label: str) -> None:
    """A metric of the map, by its name."""
    viewer.run(
        "const s = document.getElementById('metric');"
        "s.value = [...s.options].find((o) => o.text === arguments[0]).value;"
        "s.dispatchEvent(new Event('change'))",
        label,
    )


def to_step(viewer: Viewer, place: int) -> None:
    viewer.run(
        "const s = document.getElementById('step'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input'))",
        place,
    )


def luminance(colour: str) -> float:
    return float(np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]))


def test_everything_is_there_and_nothing_goes_wrong(viewer: Viewer, report_file: Path) -> None:
    viewer.open(report_file)
    found = [section.get_attribute("id") for section in viewer.all("main > section")]
    assert found == SECTIONS
    assert all(part.rect["height"] > 60 for part in viewer.all("[data-draw]"))


def test_what_it_writes_stands_side_by_side(viewer: Viewer, report_file: Path) -> None:
    """In one line on a desk, one below the other on a phone; every letter as it was written."""
    columns = "#samples .sample:first-of-type .written > div"
    for width in (1120, 390):
        for dark in (False, True):
            viewer.open(report_file, width, dark)
            boxes = [column.rect for column in viewer.all(columns)]
            assert len(boxes) == 3
            lefts, tops = ({round(box[side]) for box in boxes} for side in ("x", "y"))
            assert (len(lefts), len(tops)) == ((3, 1) if width > 760 else (1, 3))
            assert len({round(box["width"]) for box in boxes}) == 1
            assert all(box["x"] + box["width"] <= width for box in boxes)
            assert viewer.run("return document.documentElement.scrollWidth") <= width
            colours = viewer.run(
                "const style = (name) => getComputedStyle(document.querySelector(name));"
                "return [style('.written p').color, style('#samples').backgroundColor]"
            )
            assert abs(luminance(colours[0]) - luminance(colours[1])) > 150
    written = viewer.texts("#samples .written p")
    assert written == ["\n    return x", "x" * 300, "(nothing)", "It is <b>", "a " * 90, "It is"]
    assert viewer.texts("#samples .prompt") == ["def f(x):", "What is it?\nSay."]
    shifts = viewer.run(
        "return performance.getEntriesByType('layout-shift').reduce((s, e) => s + e.value, 0)"
    )
    assert shifts == 0


def test_nothing_is_loaded(viewer: Viewer, report_file: Path) -> None:
    viewer.open(report_file)
    loaded = "return performance.getEntriesByType('resource').map((e) => e.name)"
    assert viewer.run(loaded) == []


def test_nothing_could_be_loaded(viewer: Viewer, report_file: Path) -> None:
    """The guard on the test above: what a page tries to load is refused by its own policy."""
    viewer.open(report_file)
    blocked = viewer.driver.execute_async_script(
        "const done = arguments[0];"
        "document.addEventListener('securitypolicyviolation', (e) => done(e.violatedDirective));"
        "const i = new Image(); i.src = 'http://localhost:9/x.png'; document.body.append(i);"
    )
    assert blocked == "img-src"
    viewer.errors()


def told(viewer: Viewer, metric: str = "entropy") -> list[float]:
    """The figures that the cells' labels name, in order."""
    labels = viewer.run(
        "return [...document.querySelectorAll(arguments[0])].map((c) => c.ariaLabel)", CELLS
    )
    figures = [label.partition(f"{metric}: ")[2].split()[0] for label in labels]
    return [float(figure.replace(MINUS, "-")) for figure in figures]


def test_the_map_shows_the_figures_of_the_step(
    viewer: Viewer, tmp_path: Path, report_file: Path
) -> None:
    written = write_heads(tmp_path, STEPS, LAYERS, HEADS)
    drawn = written["attention_entropy"]
    viewer.open(report_file)
    choose(viewer, "importance")  # heavy-tailed, and observed at every other step
    to_step(viewer, 1)
    expected = written["head_importance"][2].ravel()
    assert np.allclose(told(viewer, "importance"), expected, rtol=0.006)
    choose(viewer, "entropy")
    for place in (0, 4, len(STEPS) - 1):
        to_step(viewer, place)
        assert np.allclose(told(viewer), drawn[place].ravel(), rtol=0.006, atol=1e-4)
        assert viewer.find(".step").text.startswith(f"{STEPS[place]} of")


def test_the_slider_goes_by_keys_and_changes_the_map(viewer: Viewer, report_file: Path) -> None:
    viewer.open(report_file)
    choose(viewer, "entropy")
    slider = viewer.find("#step")
    last = colours(viewer)
    viewer.focus(slider)
    viewer.press(Keys.HOME)
    first = colours(viewer)
    assert viewer.run("return document.getElementById('step').value") == "0"
    viewer.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    third = colours(viewer)
    assert len({tuple(first), tuple(third), tuple(last)}) == 3
    assert slider.get_attribute("aria-valuetext") == f"step {STEPS[2]}"


def test_another_metric_is_another_map_of_the_same_step(viewer: Viewer, report_file: Path) -> None:
    viewer.open(report_file)
    choose(viewer, "entropy")
    to_step(viewer, 4)
    before = colours(viewer)
    choose(viewer, "distance")
    assert colours(viewer) != before
    assert viewer.find(".step").text.startswith(f"{STEPS[4]} of")
    choose(viewer, "redundancy")  # taken once, in the analysis
    assert not viewer.find(".time").is_displayed()


def test_more_is_further_from_the_paper(viewer: Viewer, report_file: Path) -> None:
    """Darker on light, lighter on dark: in order all the way, without telling hues apart."""
    for dark in (False, True):
        viewer.open(report_file, dark=dark)
        choose(viewer, "entropy")
        order = viewer.run(
            "return [...document.querySelectorAll(arguments[0])]"
            ".map((c) => [parseFloat(c.ariaLabel.split(': ')[2]), c.style.background])",
            CELLS,
        )
        light = [luminance(colour) for _, colour in sorted(order, key=lambda pair: pair[0])]
        assert light == sorted(light, reverse=not dark)


def test_tooltips_on_hover_and_on_focus(viewer: Viewer, report_file: Path) -> None:
    viewer.open(report_file)
    choose(viewer, "entropy")
    cell = viewer.all(CELLS)[2 * HEADS + 5]
    assert viewer.tip == ""
    viewer.hover(cell)
    assert "layer 2, head 5" in viewer.tip
    assert "entropy: 0." in viewer.tip
    assert "▲ collapse since step 40" in viewer.tip
    viewer.hover(viewer.find("h1"))
    assert viewer.tip == ""
    viewer.focus(viewer.find("[data-draw=roles] td"))
    assert "layer 0, head 0" in viewer.tip
    assert viewer.find("[data-draw=roles] td").get_attribute("aria-describedby") == "tip"
    viewer.press(Keys.ESCAPE)
    assert viewer.tip == ""


def test_an_alarm_is_marked_from_its_step_on(viewer: Viewer, report_file: Path) -> None:
    viewer.open(report_file)
    choose(viewer, "entropy")
    for place, marked in ((STEPS.index(30), 0), (STEPS.index(40), 1)):
        to_step(viewer, place)
        assert len(viewer.all(f"{CELLS}.marked")) == marked


def test_cells_are_walked_by_arrows(viewer: Viewer, report_file: Path) -> None:
    viewer.open(report_file)
    assert len(viewer.all(f"{CELLS}[tabindex='0']")) == 1  # one stop of Tab for the whole map
    viewer.focus(viewer.find(f"{CELLS}[tabindex='0']"))
    where = "const c = document.activeElement; return [c.layer, c.head]"
    assert viewer.run(where) == [0, 0]
    for keys, place in (
        ((Keys.ARROW_RIGHT,), [0, 1]),
        ((Keys.ARROW_DOWN, Keys.ARROW_DOWN), [2, 1]),
        ((Keys.END,), [2, HEADS - 1]),
        ((Keys.ARROW_RIGHT,), [2, HEADS - 1]),
        ((Keys.PAGE_UP,), [0, HEADS - 1]),
        ((Keys.HOME, Keys.ARROW_UP, Keys.ARROW_LEFT), [0, 0]),
    ):
        viewer.press(*keys)
        assert viewer.run(where) == place
        assert f"layer {place[0]}, head {place[1]}" in viewer.tip
    assert "Layer 0, head 0" in viewer.texts(".detail-head h3")  # drawn over time, beside the map


def test_tab_reaches_every_control_and_shows_where_it_is(viewer: Viewer, report_file: Path) -> None:
    viewer.open(report_file)
    viewer.run("document.activeElement.blur()")
    seen = []
    for _ in range(40):
        viewer.press(Keys.TAB)
        seen.append(
            viewer.run(
                "const e = document.activeElement;"
                "return [e.id || e.className || e.tagName, getComputedStyle(e).outlineStyle]"
            )
        )
        if seen[-1][0] == "BODY":
            break
    names = [name for name, _ in seen]
    assert {"theme", "metric", "step", "play", "frame", "copy"} <= set(names)
    assert all(outline != "none" for name, outline in seen if name != "BODY")


def test_charts_are_walked_by_arrows(viewer: Viewer, report_file: Path) -> None:
    viewer.open(report_file)
    frame = viewer.find("[data-draw=curve] .frame")
    viewer.focus(viewer.find("#theme"))
    while viewer.driver.switch_to.active_element != frame:
        viewer.press(Keys.TAB)
    assert "step 1\n" in viewer.tip
    viewer.press(Keys.END)
    assert "step 100\n" in viewer.tip
    assert "training loss: 1.208" in viewer.tip
    viewer.focus(viewer.find("[data-draw=ranking] .frame"))
    viewer.press(Keys.HOME)
    assert f"rank 1 of {LAYERS * HEADS}" in viewer.tip
    scores = json.loads((report_file.parent / "importance.json").read_text())["scores"]
    most = max(
        (score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row)
    )
    assert viewer.tip.startswith(f"layer {most[1]}, head {most[2]}\n{most[0]:.3g} ±")


def test_roles_are_told_by_letters_and_names(
    viewer: Viewer, tmp_path: Path, report_file: Path
) -> None:
    heads = write_analysis(tmp_path, LAYERS, HEADS)["heads"]
    viewer.open(report_file)
    letters = {
        "previous_token": "P",
        "first_token": "F",
        "induction": "I",
        "duplicate_token": "D",
        "broadcast": "B",
        "mixed": "·",
    }
    expected = [letters[head["role"]] for head in heads]
    assert viewer.texts("[data-draw=roles] td") == expected
    legend = viewer.texts(".roles-legend li")
    for role, letter in letters.items():
        count = expected.count(letter)
        assert f"{letter}{role.replace('_', ' ')} {count}" in legend


def test_light_and_dark(viewer: Viewer, report_file: Path) -> None:
    paper = "return getComputedStyle(document.body).backgroundColor"
    for dark in (False, True):
        viewer.open(report_file, dark=dark)
        as_system = viewer.run(paper)
        assert (luminance(as_system) < 128) is dark
        cells = colours(viewer)
        viewer.find("#theme").click()
        assert (luminance(viewer.run(paper)) < 128) is not dark
        assert colours(viewer) != cells
        viewer.find("#theme").click()
        assert viewer.run(paper) == as_system


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_can_be_read(viewer: Viewer, report_file: Path, dark: bool) -> None:
    """Contrast of at least 4.5 to 1 between text and what lies behind it (WCAG 2.2, 1.4.3)."""
    viewer.open(report_file, dark=dark)
    pale = viewer.run(_CONTRAST)
    assert pale == []


def test_a_phone_needs_no_sideways_scrolling(viewer: Viewer, report_file: Path) -> None:
    viewer.open(report_file, width=360)
    root = "document.documentElement"
    assert viewer.run(f"return [innerWidth, {root}.scrollWidth]") == [360, 360]
    sticking_out = viewer.run(
        "return [...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, pre')"
        " && !e.closest('.unseen') && e.getBoundingClientRect().right > 360.5)"
        ".map((e) => e.outerHTML.slice(0, 80))"
    )
    assert sticking_out == []
    # The other way round: what scrolls within itself can be scrolled by keys.
    reachable = viewer.run(
        "return [...document.querySelectorAll('.scroll')]"
        ".filter((e) => e.scrollWidth > e.clientWidth + 1 && !e.querySelector('[role=grid]'))"
        ".map((e) => e.tabIndex)"
    )
    assert reachable
    assert set(reachable) == {0}


def test_a_large_model_fits_a_phone(viewer: Viewer, tmp_path: Path) -> None:
    """Its figures are kept in 8 bits, and are read back as well as these allow."""
    write_full_run(tmp_path)
    drawn = write_heads(tmp_path, list(range(100)), 12, 64)["attention_entropy"]
    viewer.open(write_report(tmp_path), width=360)
    assert viewer.run("return document.documentElement.scrollWidth") == 360
    choose(viewer, "entropy")
    to_step(viewer, 50)
    step = int(viewer.find(".step").text.split()[0])
    off = np.abs(told(viewer) - drawn[step].ravel()).max()
    assert 1e-4 < off < 1 / 254 / 2 + 0.0006  # to three digits


def test_names_cannot_break_the_page(viewer: Viewer, tmp_path: Path) -> None:
    model = {"name": NASTY, "class": NASTY, "model_type": NASTY}
    write_full_run(tmp_path, model=model)
    path = tmp_path / "analysis" / "heads.json"
    path.write_text(path.read_text().replace("broadcast", NASTY.replace('"', '\\"')))
    path = tmp_path / "importance.json"
    path.write_text(path.read_text().replace("stdlib", NASTY.replace('"', '\\"')))
    viewer.open(write_report(tmp_path))
    assert viewer.find("h1").text == NASTY
    assert viewer.run("return window.hacked") is None
    assert "bold" not in viewer.texts("b")
    assert [s.get_attribute("id") for s in viewer.all("main > section")] == SECTIONS


def test_without_motion_nothing_moves(viewer: Viewer, report_file: Path) -> None:
    feature = {"name": "prefers-reduced-motion", "value": "reduce"}
    viewer.open(report_file)
    behaviour = "return getComputedStyle(document.documentElement).scrollBehavior"
    assert viewer.run(behaviour) == "smooth"
    viewer.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    assert viewer.run(behaviour) == "auto"


_CONTRAST = """
const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const over = (back, colour) => {  // what is seen of `colour` on `back`, whatever its notation
  canvas.globalCompositeOperation = 'copy';
  canvas.fillStyle = `rgb(${back})`;
  canvas.fillRect(0, 0, 1, 1);
  canvas.globalCompositeOperation = 'source-over';
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const behind = (e) => {
  const around = e.parentElement ? behind(e.parentElement) : [255, 255, 255];
  return over(around, getComputedStyle(e).backgroundColor);
};
const pale = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!own || !e.checkVisibility() || e.closest('script, style, .unseen, option')) continue;
  const back = behind(e);
  const drawn = e.namespaceURI.endsWith('svg');
  const text = over(back, getComputedStyle(e)[drawn ? 'fill' : 'color']);
  const [high, low] = [light(back), light(text)].sort((a, b) => b - a);
  const ratio = (high + 0.05) / (low + 0.05);
  const name = e.className.baseVal ?? e.className;
  if (ratio < 4.5) pale.push(`${e.tagName} ${name} "${e.textContent.slice(0, 30)}" ${ratio}`);
}
return [...new Set(pale)];
"""
