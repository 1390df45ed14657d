"""The score table through JSON and parquet."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery import SurgeryError
from surgery.importance.table import GROUPS, HEADS, ScoreTable, SiteScores

_number = st.floats(allow_nan=False, allow_infinity=False, width=64)
_text = st.text(st.characters(codec="utf-8"), max_size=8)


@st.composite
def tables(draw: st.DrawFn) -> ScoreTable:
    layers = draw(st.lists(st.tuples(st.integers(0, 99), _text), min_size=1, max_size=4))

    def sites() -> tuple[SiteScores, ...]:
        found = []
        for layer, path in layers:
            scores = draw(st.lists(_number, min_size=1, max_size=5))
            errors = [draw(st.one_of(_number, st.just(math.nan))) for _ in scores]
            found.append(SiteScores(layer, path, tuple(scores), tuple(errors)))
        return tuple(found)

    which = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    heads, groups = (sites() if wanted else None for wanted in which)
    return ScoreTable(
        estimator=draw(_text),
        objective=draw(_text),
        heads=heads,
        groups=groups,
        model=draw(_text),
        data=draw(_text),
        batches=draw(st.integers(0, 9)),
        tokens=draw(st.integers(0, 2**40)),
        seed=draw(st.integers(0, 2**31)),
        loss=draw(st.one_of(st.none(), _number)),
        unit_of_scores=draw(_text),
    )


@given(table=tables())
def test_json_gives_the_table_back(table: ScoreTable) -> None:
    text = json.dumps(table.to_json(), allow_nan=False)
    # NaN is equal to nothing; as text it is.
    assert repr(ScoreTable.from_json(json.loads(text))) == repr(table)


@given(table=tables())
def test_arrow_has_a_line_for_every_score(table: ScoreTable) -> None:
    lines = [tuple(line.values()) for line in table.to_arrow().to_pylist()]
    expected = [
        (site.layer, site.site, unit, index, score, error)
        for unit, sites in ((HEADS, table.heads), (GROUPS, table.groups))
        for site in sites or ()
        for index, (score, error) in enumerate(zip(site.scores, site.errors, strict=True))
    ]
    assert repr(lines) == repr(expected)


def test_both_files(tmp_path: Path) -> None:
    sites = (SiteScores(0, "a", (1.0, 2.0), (0.5, math.nan)),)
    table = ScoreTable("leave_one_out", "lm", sites, None, loss=1.0)
    table.save(tmp_path / "scores.json")
    read = ScoreTable.from_json(json.loads((tmp_path / "scores.json").read_text()))
    assert repr(read) == repr(table)
    assert pq.read_table(tmp_path / "scores.parquet").column("score").to_pylist() == [1.0, 2.0]


def test_what_is_no_table() -> None:
    table = ScoreTable("random", "lm", (SiteScores(0, "a", (1.0,), (0.0,)),), None)
    whole = table.to_json()
    with pytest.raises(SurgeryError, match="format 7"):
        ScoreTable.from_json({**whole, "format": 7})
    for name in ("sites", "scores", "group_scores", "seed", "standard_errors"):
        with pytest.raises(SurgeryError, match="an incomplete score table"):
            ScoreTable.from_json({key: value for key, value in whole.items() if key != name})
    with pytest.raises(SurgeryError, match="no scores of groups"):
        table.get_scores(GROUPS)
