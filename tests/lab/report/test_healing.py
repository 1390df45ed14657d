"""What healing came to, in sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from surgery.lab.report.healing import describe_gap, describe_healing
from surgery.lab.report.html.data import read_run
from surgery.lab.report.html.report import render_report
from surgery.lab.report.summary import read_schema
from surgery.lab.report.table import tabulate_result
from tests.lab.report.making import summary, write_run

HELD_OUT = {
    "every_n_steps": 10,
    "windows": 32,
    "losses": [[0, 2.5], [10, 1.25], [20, 1.5]],
    "first_step": 0,
    "best_step": 10,
    "best_loss": 1.25,
    "last_loss": 1.5,
    "kept": "best",
    "kept_step": 10,
}
LOOKED = "looked at every 10 steps on 32 windows"


def healed(**changes: Any) -> dict[str, Any]:
    made = summary()
    return made | {"training": made["training"] | {"held_out": HELD_OUT | changes}}


CASES = {
    "in between": (
        {},
        [
            "the weights of step 10 are exported: held-out loss 1.2500 at step 10 is the lowest, "
            f"1.5000 at the end (step 20), {LOOKED}"
        ],
    ),
    "untrained": (
        {"best_step": 0, "best_loss": 1.0, "kept_step": 0},
        [
            "healing did not help; the untrained weights are exported: held-out loss 1.0000 at "
            f"step 0 is the lowest, 1.5000 at the end (step 20), {LOOKED}"
        ],
    ),
    "to the end": (
        {"best_step": 20, "best_loss": 1.5, "kept_step": 20},
        [f"the last weights are exported: held-out loss 1.5000 at step 20 is the lowest, {LOOKED}"],
    ),
    "averaged at the end": (
        {"best_step": 20, "best_loss": 1.25, "kept_step": 20},
        [
            "the weights of step 20 are exported: held-out loss 1.2500 at step 20 is the lowest, "
            f"1.5000 at the end (step 20), {LOOKED}"
        ],
    ),
    "the last, wanted": (
        {"kept": "last", "kept_step": 20, "every_n_steps": None},
        [
            "the last weights are exported: held-out loss 1.5000 at step 20, looked at as "
            "trainer.* says on 32 windows",
            "held-out loss 1.2500 at step 10 was the lowest; validation.keep=best keeps such "
            "weights",
        ],
    ),
    "the last, worse": (
        {"kept": "last", "kept_step": 20, "best_step": 0, "best_loss": 1.0},
        [
            f"the last weights are exported: held-out loss 1.5000 at step 20, {LOOKED}",
            "healing ended worse than it began; held-out loss 1.0000 at step 0 was the lowest; "
            "validation.keep=best keeps such weights",
        ],
    ),
    "no number": (
        {
            "losses": [[20, None]],
            "first_step": None,
            "best_step": None,
            "best_loss": None,
            "last_loss": None,
            "kept": "last",
            "kept_step": 20,
        },
        [f"no held-out loss was a number; the weights of step 20 are exported, {LOOKED}"],
    ),
}


def test_what_is_said_of_weights_that_were_given_up(tmp_path: Path) -> None:
    """In the table, on the page and in the card alike; the selection's losses would mislead."""
    reverted = {"step": 10, "loss": 2.75, "untrained_loss": 2.5}
    made = healed()
    made["training"] = made["training"] | {"reverted": reverted}
    jsonschema.validate(made, json.loads(read_schema()))
    said = (
        "healing did not help; the untrained weights are exported: on the measured windows their "
        "loss is 2.5000, that of step 10 2.7500"
    )
    assert list(describe_healing(made["training"], exported=True)) == [said]
    page = render_report(read_run(write_run(tmp_path, **made)))
    assert f"H{said[1:]}." in page
    made["training"]["reverted"] = reverted | {"loss": None}
    assert next(describe_healing(made["training"], exported=True)).endswith("step 10 no number")


@pytest.mark.parametrize("case", CASES)
def test_what_is_said(case: str) -> None:
    changes, said = CASES[case]
    made = healed(**changes)
    jsonschema.validate(made, json.loads(read_schema()))
    assert list(describe_healing(made["training"], exported=True)) == said
    caption = str(tabulate_result(made).caption).splitlines()
    rate = "learning rate 0.003, 1 of 0.75 / hidden_size: the reason"
    assert caption == ["healing closed 87% of the gap in 100 steps", rate, *said]
    kept = [line.replace("are exported", "are kept") for line in said]
    assert list(describe_healing(made["training"], exported=False)) == kept


def test_nothing_is_said_where_nothing_was_looked_at() -> None:
    assert list(describe_healing(summary()["training"], exported=True)) == []
    assert list(describe_healing({}, exported=True)) == []


def test_losses_stand_where_a_share_would_be_noise(tmp_path: Path) -> None:
    made = healed()
    opened = made["after_surgery"] | {"loss": 1.002}
    made |= {"after_surgery": opened, "gap_noise": 0.01, "gap_closed": None}
    said = describe_gap(made)
    assert said == (
        "surgery opened 0.0020 nats per token, less than 2 standard errors (2 x 0.0100), so no "
        "share is given; loss 1.0000 before, 1.0020 after surgery, 1.2000 after healing"
    )
    assert str(tabulate_result(made).caption).splitlines()[0] == said
    page = render_report(read_run(write_run(tmp_path, **made)))
    assert f"S{said[1:]}." in page
    assert "% of it" not in page


def test_no_gap_at_all() -> None:
    made = healed() | {"gap_closed": None}
    made["after_surgery"] = made["after_surgery"] | {"loss": 1.0}
    assert "no gap to close; loss 1.0000 before" in str(describe_gap(made))
    assert describe_gap(made | {"after_training": None}) is None


def test_the_page_says_it(tmp_path: Path) -> None:
    page = render_report(read_run(write_run(tmp_path, **healed(best_step=0, kept_step=0))))
    assert "Healing did not help; the untrained weights are exported" in page
