"""What the page is made of, before any browser sees it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from contextlib import chdir
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from jinja2 import UndefinedError
from transformers import GPT2Tokenizer

import surgery.importance.table
import surgery.lab.analysis.result
import surgery.plan.plan
from surgery.execute.live import apply_
from surgery.lab.report.html import write_report
from surgery.lab.report.html.data import FORMATS, read_run
from surgery.lab.report.html.page import render_page
from surgery.lab.report.html.words import collect_remarks, write_headline, write_snippet
from surgery.lab.report.quantities import MINUS
from surgery.lab.report.summary import read_schema
from surgery.pipeline.report import report_again
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations
from surgery.plan.store import save_plan
from tests.lab.report.making import alarm, plan, summary, write_full_run, write_run
from tests.tiny_models import tiny_model, tokens

# The page goes by files alone; who writes them says in which format.
WRITTEN = {
    "plan.json": surgery.plan.plan.FORMAT,
    "importance.json": surgery.importance.table.FORMAT,
    "analysis/heads.json": surgery.lab.analysis.result.FORMAT,
}
COLUMNS = ["layers", "query heads", "", "KV heads", "which share"]
SMALLER = f"KV cache {MINUS}75%, parameters {MINUS}11%"
NASTY = "</script><b>bold</b><script>window.hacked = 1</script>\"'&amp;"


class Reader(HTMLParser):
    """Tags, text and attributes as an HTML parser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts.setdefault(self.inside[-1], []).append(data)


def layers_table(run: Path) -> str:
    """The markup of the table of layers, as it is on the page."""
    text = write_report(run).read_text(encoding="utf-8")
    return re.findall(r'aria-label="What changes in each layer">(.*?)</table>', text, re.DOTALL)[0]


def cells(markup: str) -> list[list[str]]:
    """Text of a table, line by line."""
    lines = re.findall(r"<tr>(.*?)</tr>", markup, re.DOTALL)
    return [
        [
            re.sub("<.*?>", "", cell, flags=re.DOTALL)
            for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", line, re.DOTALL)
        ]
        for line in lines
    ]


def write_plan(directory: Path, plan: dict[str, Any]) -> Path:
    """A run of which there is a plan, of one operation, and nothing else."""
    spec = {"operation": "gqa", "kv_heads": 2}
    (directory / "plan.json").write_text(json.dumps(plan | {"operations": [spec]}))
    return directory


def test_files_are_read_in_the_format_they_are_written_in() -> None:
    assert FORMATS == WRITTEN


def test_made_up_summaries_are_such_as_runs_write(tmp_path: Path) -> None:
    """So that what these tests show holds for real runs."""
    whole = json.loads((write_full_run(tmp_path) / "summary.json").read_text())
    for made in (summary(), whole):
        jsonschema.validate(made, json.loads(read_schema()))


def test_strings_of_the_run_stay_text(tmp_path: Path) -> None:
    model = {"name": NASTY, "class": NASTY, "model_type": NASTY}
    path = write_report(write_full_run(tmp_path, model=model))
    found = Reader(path.read_text(encoding="utf-8"))
    assert "bold" not in found.texts.get("b", [])
    assert len([name for name, _ in found.tags if name == "script"]) == 2  # data, and our own
    assert NASTY in found.texts["h1"]


def test_data_cannot_close_its_element() -> None:
    data = {"name": NASTY, "line": "a\u2028b", "amount": [1, 2.5, None]}
    view = {"title": "", "heading": "", "subtitle": "", "names": [], "rest": None}
    text = render_page("comparison.html.j2", data, view)
    held = text.partition('id="data">')[2].partition("</script>")[0]
    assert not set("<>&") & set(held)
    assert json.loads(held) == data


def test_data_that_is_no_json_is_refused() -> None:
    view = {"title": "", "heading": "", "subtitle": "", "names": [], "rest": None}
    with pytest.raises(ValueError, match="JSON"):
        render_page("comparison.html.j2", {"loss": float("nan")}, view)


def test_a_name_that_no_view_has_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="subtitle"):
        render_page("comparison.html.j2", {}, {"title": "", "heading": "", "names": []})


def test_attributes_are_escaped(tmp_path: Path) -> None:
    nasty = '"><script>'
    sites = {"model.layers.0.self_attn": {"keys": 0.5}}
    operations = [{"operation": nasty, "sites": sites}]
    calibration = {"batches": 2, "tokens": 512, "operations": operations}
    path = write_report(write_run(tmp_path, calibration=calibration))
    found = Reader(path.read_text(encoding="utf-8"))
    assert f"Errors of {nasty} by layer" in [a.get("aria-label") for _, a in found.tags]


def test_policy_names_the_very_script_and_style(report_file: Path) -> None:
    """Nothing from elsewhere, and no other script than the one that is there, can run."""
    found = Reader(report_file.read_text(encoding="utf-8"))
    policy = next(a["content"] for name, a in found.tags if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    for kind, text in (("style", found.texts["style"][0]), ("script", found.texts["script"][-1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    sources = {key for _, attributes in found.tags for key in attributes if key in ("src", "style")}
    assert not sources  # nothing to load, and no style that the policy would refuse


def test_what_changes_per_layer_is_read_off_the_plan(tmp_path: Path) -> None:
    found = layers_table(write_plan(tmp_path, plan()))
    assert cells(found) == [
        [*COLUMNS, "positions", "implementation", "attention"],
        ["0", "8", "", "8 → 2", "0 1 2 3 | 4 5 6 7", "", "sdpa", ""],
        ["1", "8 → 6", "", "8 → 2", "1 2 4 | 5 6 7", "", "sdpa", ""],
        ["2", "8", "", "8 → 2", "0 1 2 3 | 4 5 6 7", "none", "sdpa", ""],
        ["3", "8 → 0", "", "8 → 0", "", "", "sdpa", "removed"],
    ]
    paths = re.findall(r'd="([^"]*)"\s+class="gone"', found)
    drawn = [re.findall(r"M([\d.]+) 1.5", path) for path in paths]
    assert [[int(float(x) // 8) for x in path] for path in drawn] == [[], [0, 3], [], [*range(8)]]
    strips = re.findall(r'aria-label="(.*?)"', found)
    assert strips == [
        "all 8 query heads stay",
        "6 of 8 query heads stay",
        "all 8 query heads stay",
        "0 of 8 query heads stay",
    ]


def test_layers_that_fare_alike_share_a_line(tmp_path: Path) -> None:
    alike = plan()
    alike["source"] = alike["before"] = [alike["source"][0] | {"path": str(n)} for n in range(5)]
    alike["after"] = alike["source"]
    found = layers_table(write_plan(tmp_path, alike))
    assert [line[0] for line in cells(found)[1:]] == ["0\N{EN DASH}4"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, f"{SMALLER}, for +0.200 nats per token after healing"),
        ({"after_training": None}, f"{SMALLER}, for +1.500 nats per token before any healing"),
        (
            {"after_training": None, "after_surgery": None, "before": None},
            f"{SMALLER}: planned, not measured",
        ),
        (
            {"operations": [], "after_surgery": None},
            "Trained without surgery: +0.200 nats per token on held-out text",
        ),
        (
            {"operations": [], "after_surgery": None, "after_training": None, "before": None},
            "Nothing was changed: the model was looked at",
        ),
    ],
)
def test_headline_says_what_was_saved_and_what_it_cost(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    assert write_headline(read_run(write_run(tmp_path, **changes))) == said


def test_alarms_are_told_by_head(tmp_path: Path) -> None:
    alarms = [alarm("collapse", 20, 1, 2), alarm("collapse", 10, 1, 2), alarm("dead", 5, 0, 0)]
    run = write_run(tmp_path, training=summary()["training"] | {"alarms": alarms})
    first, second = collect_remarks(read_run(run))
    assert first.text == "Entropy collapsed in 1 head while training."
    assert "layer 1 head 2 at step 10 (0.01, threshold 0.05)" in first.detail
    assert second.text == "No output was left of 1 head while training."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"after_training": summary(loss=2.6)["after_training"]}, "Healing made it worse"),
        ({"planned": {"before": {}, "after": {"parameters": 5}}}, "that was planned"),
        ({"export": None}, "Nothing was exported"),
        (
            {"export": summary()["export"] | {"max_logit_difference_after_reload": None}},
            "was not loaded again",
        ),
        ({"export": summary()["export"] | {"format": "record"}}, "only after `import surgery`"),
        (
            {"export": summary()["export"] | {"without": {"vllm": "lists no X"}}},
            "vllm cannot serve",
        ),
    ],
)
def test_what_stands_in_the_way_is_said(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert collect_remarks(read_run(write_run(tmp_path / "sound"))) == []
    found = collect_remarks(read_run(write_run(tmp_path / "other", **changes)))
    assert any(said in remark.text for remark in found)


def test_what_an_earlier_run_left_is_not_shown(tmp_path: Path) -> None:
    write_full_run(tmp_path)
    whole = read_run(tmp_path)
    assert whole.importance
    assert whole.analysis
    assert whole.heads == tmp_path / "heads.parquet"

    write_run(tmp_path)  # as a run does that neither scores nor analyzes nor watches heads
    later = read_run(tmp_path)
    assert (later.importance, later.analysis, later.heads) == ({}, {}, None)
    assert later.plan == whole.plan
    write_run(tmp_path, training=None)
    assert read_run(tmp_path).heads is None


def test_the_table_of_heads_is_the_one_of_this_run(tmp_path: Path) -> None:
    write_full_run(tmp_path)
    (tmp_path / "heads-2.parquet").write_bytes((tmp_path / "heads.parquet").read_bytes())
    training = summary()["training"]
    write_run(tmp_path, training=training | {"heads": "heads-2.parquet"})
    assert read_run(tmp_path).heads == tmp_path / "heads-2.parquet"
    del training["heads"]  # earlier versions did not say it
    write_run(tmp_path, training=training)
    assert read_run(tmp_path).heads == tmp_path / "heads.parquet"


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    run = write_full_run(tmp_path)
    (run / "plan.json").write_text("{")
    (run / "importance.json").write_text('{"format": 99}')
    (run / "heads.parquet").write_text("no parquet")
    text = write_report(run).read_text(encoding="utf-8")
    for name in (
        "plan.json cannot be read",
        "importance.json is of format 99",
        "heads.parquet cannot be read",
    ):
        assert name in text


@pytest.mark.parametrize("file", ["plan.json", "heads.parquet", "analysis/heads.json"])
def test_any_file_alone_makes_a_report(file: str, tmp_path: Path) -> None:
    write_full_run(tmp_path)
    for path in tmp_path.rglob("*.*"):
        if path.is_file() and path != tmp_path / file:
            path.unlink()
    assert write_report(tmp_path).stat().st_size > 10_000


def test_a_real_plan_is_read(tmp_path: Path) -> None:
    """What the plan's own code writes, told again layer by layer."""
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=3)
    declared = {
        "prune_heads": {"heads": {1: [0, 2]}},
        "gqa": {"kv_heads": 2, "merge": "mean", "layers": [0, 1]},
        "rope": {"type": "none", "layers": [2]},
        "backend": {"implementation": "sdpa", "check": False},
    }
    save_plan(make_plan(model, parse_operations(declared)), tmp_path)
    found = layers_table(tmp_path)
    assert cells(found)[1:] == [
        ["0", "4", "", "4 → 2", "0 1 | 2 3", "", "sdpa"],
        ["1", "4 → 2", "", "4 → 2", "", "", "sdpa"],
        ["2", "4", "", "4", "", "none", "sdpa"],
    ]


def test_the_stage_writes_it_and_writes_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_full_run(tmp_path)
    report_again(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    report_again(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


@pytest.mark.parametrize(
    ("declared", "form"),
    [
        ({"gqa": {"kv_heads": 1, "merge": "mean"}}, "native"),
        ({"rehouse": {"into": "phi3"}}, "converted"),
        ({"prune_heads": {"heads": {1: [0, 1]}}}, "record"),
    ],
)
def test_the_code_shown_loads_the_export(
    declared: dict[str, Any], form: str, tmp_path: Path
) -> None:
    """Run as it stands, in the run directory: the logits are those of the operated model."""
    model = tiny_model("llama", tie_word_embeddings=False)
    plan_made = make_plan(model, parse_operations(declared))
    assert plan_made.export.format == form
    model = apply_(model, plan_made).eval()
    model.save_pretrained(tmp_path / "export")
    GPT2Tokenizer(vocab={"a": 0}, merges=[]).save_pretrained(tmp_path / "export")
    run = read_run(write_run(tmp_path, export=summary()["export"] | {"format": form}))
    code = write_snippet(run)
    assert ("import surgery" in code) is (form == "record")
    space: dict[str, Any] = {}
    with chdir(tmp_path):
        exec(code, space)
    batch = tokens(2, 7)
    with torch.no_grad():
        assert torch.equal(space["model"](batch).logits, model(batch).logits)
