"""A page of one file: markup, style, script and data, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from surgery.lab.report import quantities
from surgery.lab.report.templates import make_environment

PACKAGE = "surgery.lab.report.html"


def render_page(template: str, data: Mapping[str, Any], view: Mapping[str, Any]) -> str:
    """The whole file.

    Args:
        template: in `templates`.
        data: what the script draws, as plain JSON; NaN is refused.
        view: what the template shows.
    """
    style = _join_files(".css", last="charts.css")
    script = f'(function () {{\n"use strict";\n{_join_files(".js", last="start.js")}\n}})();\n'
    own = {"data": data, "style": Markup(style), "script": Markup(script)}
    return _make_environment().get_template(template).render(view, **own)


@cache
def _make_environment() -> Environment:
    environment = make_environment(PACKAGE, escape=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {
        "change": quantities.format_change,
        "hash": _hash,
        "options": quantities.format_options,
        "signed": quantities.format_signed,
    }
    return environment


def _join_files(ending: str, last: str) -> str:
    """All files of this folder with that ending; `last` uses what the others define."""
    found = [file for file in files(PACKAGE).iterdir() if file.name.endswith(ending)]
    found.sort(key=lambda file: (file.name == last, file.name))
    return "\n".join(file.read_text(encoding="utf-8") for file in found)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
