"""A page of one file: markup, style, script and data, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from surgery.lab.report.html.markup import Markup, join, tag

STYLES = ("page.css", "charts.css")
# In this order: later ones use what earlier ones define.
SCRIPTS = (
    "dom.js",
    "tips.js",
    "theme.js",
    "axes.js",
    "lines.js",
    "colours.js",
    "grid.js",
    "maps.js",
    "roles.js",
    "ranking.js",
    "tables.js",
    "scatter.js",
    "start.js",
)


def page(title: str, body: Markup, data: Mapping[str, Any]) -> str:
    """The whole file.

    Args:
        data: what the script draws, as plain JSON; NaN is refused.
    """
    style = "\n".join(_own(name) for name in STYLES)
    script = '(function () {\n"use strict";\n' + "\n".join(map(_own, SCRIPTS)) + "\n})();\n"
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    held = tag("script", Markup(embedded(data)), type="application/json", id="data")
    whole = tag(
        "html", head, tag("body", join(body, held, tag("script", Markup(script)))), lang="en"
    )
    return f"<!doctype html>\n{whole}\n"


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that no HTML parser can take for markup, whatever the strings in it are."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _own(name: str) -> str:
    return files("surgery.lab.report.html").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
