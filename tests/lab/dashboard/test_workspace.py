"""The workspace holds together without a network, and grows with metrics, not with heads."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb_workspaces.workspaces as ws
from surgery.callbacks.head_conditions import CONDITIONS
from wandb_workspaces.workspaces.internal import WorkspaceViewspec

from surgery.lab.dashboard import names
from surgery.lab.dashboard.__main__ import main
from surgery.lab.dashboard.workspace import TITLES, build_workspace
from surgery.observe.statistics import STATISTICS


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home nobody has logged in from."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return json.loads(
        build_workspace("me", "p")._to_model().model_dump_json(by_alias=True, exclude_none=True)
    )


def panels(spec: dict[str, Any]) -> list[dict[str, Any]]:
    sections = spec["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def scalars(layers: int) -> set[str]:
    """Everything that a run may log of its training and heads, but pictures and tables."""
    per_layer = {
        names.name_of_layer(metric, layer, what)
        for metric, kinds in names.PER_LAYER.items()
        for what in kinds
        for layer in range(layers)
    }
    over_heads = {names.name_over_heads(metric) for metric in names.HEADS}
    others = {names.LOSS, names.HELD_OUT, *names.PARTS, names.OPEN_HEADS, "lr-AdamW/pg1"}
    return per_layer | over_heads | others | {names.name_alarm(kind) for kind in names.ALARMS}


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for one in value.values():
            yield from strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)
    elif isinstance(value, str):
        yield value


def test_wandb_reads_it_back_as_it_was(spec: dict[str, Any]) -> None:
    view = build_workspace("me", "p")._to_model()
    again = ws.Workspace._from_model(view)._to_model()
    sections = view.spec.section.panel_bank_config.model_dump(exclude_none=True)
    assert again.spec.section.panel_bank_config.model_dump(exclude_none=True) == sections
    assert WorkspaceViewspec.model_validate(spec["spec"])
    assert [section["name"] for section in sections["sections"]][:2] == ["Result", "Training"]
    assert spec["spec"]["section"]["settings"]["xAxis"] == names.STEP
    assert not spec["spec"]["section"]["settings"]["shouldAutoGeneratePanels"]


def test_every_scalar_has_a_panel_and_no_line_is_of_nothing(spec: dict[str, Any]) -> None:
    lines = [
        panel["config"] for panel in panels(spec) if panel["viewType"] == "Run History Line Plot"
    ]
    named = {metric for config in lines for metric in config.get("metrics", [])}
    patterns = [config["metricRegex"] for config in lines if config.get("useMetricRegex")]
    known = scalars(layers=3)
    assert named <= known
    for pattern in patterns:
        assert any(re.search(pattern, name) for name in known), pattern
    shown = named | {n for n in known if any(re.search(pattern, n) for pattern in patterns)}
    assert shown == known
    for config in lines:
        assert config["xAxis"] == names.STEP


def test_results_pictures_and_tables_have_a_panel(spec: dict[str, Any]) -> None:
    said = set(strings([panel["config"] for panel in panels(spec)]))
    said |= {one.split(":", 1)[-1] for one in said}  # `summary:result/loss`
    wanted = {"result/loss", "result/gap_closed", "result/kv_bytes_per_token", *names.LOSSES}
    wanted |= {names.SCORE_TABLE, names.SCORE_PICTURE, names.TASKS_PICTURE}
    wanted |= {names.name_heatmap(metric) for metric in names.HEADS}
    assert wanted <= said
    assert {one for one in said if one.startswith("result/")} <= set(names.RESULT)


def test_a_thousand_heads_make_few_charts(spec: dict[str, Any]) -> None:
    heads = 32 * 32 * len(names.HEADS)
    assert names.count_charts(layers=32) < 200 < heads
    assert len(panels(spec)) < 60


@pytest.mark.usefixtures("nobody")
def test_json_needs_no_login(capsys: pytest.CaptureFixture[str]) -> None:
    main(["me/p", "--json", "--name", "Mine"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["entity"], printed["project"], printed["displayName"]) == ("me", "p", "Mine")
    assert WorkspaceViewspec.model_validate(printed["spec"])


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["me/p"], "wandb login"),
        (["me"], "ENTITY/PROJECT"),
        (["me/p/x", "--json"], "must name a project"),
    ],
)
def test_what_cannot_be_is_one_message(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert said in err
    assert not out


def test_without_wandb_workspaces(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "surgery.lab.dashboard.workspace")
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)  # as Python marks what is not there
    with pytest.raises(SystemExit) as stopped:
        main(["me/p", "--json"])
    assert stopped.value.code == 2
    assert "attention-surgery[dashboard]" in capsys.readouterr().err


def test_names_are_those_of_the_statistics_and_of_the_alarms() -> None:
    assert names.STATISTICS == STATISTICS
    assert tuple(CONDITIONS) == names.ALARMS
    assert set(TITLES) == set(names.HEADS)


def test_the_page_on_dashboards_names_every_result() -> None:
    page = (Path(__file__).parents[3] / "docs/dashboards.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(result/\w+)`", page)) | {"operations", "export"} == set(names.RESULT)
    for section in build_workspace("me", "p").sections:
        assert f"| {section.name} |" in page
