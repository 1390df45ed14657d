"""The report of one run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from surgery.files import write_text
from surgery.lab.report.html import sections, verdict
from surgery.lab.report.html.charts import charts
from surgery.lab.report.html.data import RunFiles, read_run
from surgery.lab.report.html.loading import loading
from surgery.lab.report.html.markup import Markup, join, section, tag
from surgery.lab.report.html.page import page
from surgery.lab.report.html.quantities import options
from surgery.lab.report.html.remarks import Remark, anchor, remarks, remarks_list

REPORT = "report.html"
# What a page may weigh, in bytes; and what is first tried for the figures of heads.
LIMIT = 5_000_000
_ROOM = 2_400_000


def write_report(run_dir: Path) -> Path:
    """Make `report.html` of what lies in `run_dir`, without anything else.

    Returns:
        where it is.
    """
    path = run_dir / REPORT
    write_text(path, report_page(read_run(run_dir)))
    return path


def report_page(run: RunFiles, limit: int = LIMIT) -> str:
    """The page, at most `limit` bytes: figures of heads are thinned until it is."""
    room = min(_ROOM, limit // 2)
    while True:
        text = _page(run, room)
        if len(text.encode("utf-8")) <= limit or room == 0:
            return text
        room = room // 2 if room > 1000 else 0


def _page(run: RunFiles, room: int) -> str:
    drawn, undrawn = charts(run, room)
    found = remarks(run, undrawn)
    body = join(_header(run, found), tag("main", _sections(run, drawn, found)), _footer())
    return page(f"{run.name}: attention surgery", body, drawn)


def _header(run: RunFiles, found: list[Remark]) -> Markup:
    model = run.summary.get("model") or run.plan.get("model") or {}
    kinds = [f"{spec['operation']}({options(spec)})" for spec in run.operations]
    what = " · ".join(filter(None, [str(model.get("class") or ""), *kinds[:3]]))
    more = f" · and {len(kinds) - 3} more" if len(kinds) > 3 else ""
    explanation = verdict.explanation(run)
    return tag(
        "header",
        tag("div", tag("p", "Attention surgery", class_="eyebrow"), toggle(), class_="top"),
        tag("h1", run.name),
        tag("p", what, more, class_="quiet subtitle"),
        tag(
            "div",
            tag(
                "div",
                tag("p", verdict.headline(run), class_="headline"),
                tag("p", explanation) if explanation else None,
                verdict.losses(run),
                tag("p", anchor(found), class_="counts") if found else None,
            ),
            verdict.cards(run),
            class_="verdict",
        ),
    )


def toggle() -> Markup:
    return tag("button", "dark", type="button", id="theme", class_="toggle", hidden=True)


def _sections(run: RunFiles, drawn: Collection[str], found: list[Remark]) -> list[Markup]:
    return [
        section("remarks", "Before you ship", remarks_list(found)),
        section("results", "Before and after", sections.results(run)),
        section(
            "healing",
            "Healing",
            drawing("curve") if "curve" in drawn else None,
            sections.training(run),
        ),
        section("plan", "What was done", sections.plan(run)),
        section("maps", "Every head", drawing("maps") if "maps" in drawn else None),
        section("roles", "What heads do", drawing("roles") if "roles" in drawn else None),
        section(
            "importance", "Which heads matter", drawing("ranking") if "ranking" in drawn else None
        ),
        section("probes", "Relations that heads find", sections.probes(run)),
        section("calibration", "Calibration", sections.calibration(run)),
        section("tasks", "Tasks", sections.tasks(run)),
        section("loading", "How to load it", loading(run)),
        section("circumstances", "How it was run", sections.circumstances(run)),
    ]


def drawing(name: str) -> Markup:
    """A place for the script to draw in."""
    told = tag("noscript", tag("p", "This picture needs JavaScript.", class_="quiet"))
    return tag("div", told, data_draw=name, class_=f"drawing {name}")


def _footer() -> Markup:
    return tag("footer", "Made from the run's files alone; this page loads nothing.")
