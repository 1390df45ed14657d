"""Text of few windows: something is held out where it can be, and a line says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from surgery.data.module import TextData, share_short_text
from surgery.data.sources import is_held_out
from surgery.errors import ConfigError
from tests.data.making import all_rows, text_data, write_texts

# One document of each half, by the hash that decides.
FITTED, KEPT = (
    next(
        text for text in (f"w{n} w3 w4 w5 w6" for n in range(50)) if is_held_out(text, 0.5) is half
    )
    for half in (False, True)
)


def _data(folder: Path, text: str, windows: int, **fields: Any) -> TextData:
    """One document of so many windows (and an end token), which a hash puts into one half."""
    word = text.split()[0]
    document = next(
        long
        for n in range(200)
        if is_held_out(long := " ".join([word] * (8 * windows - 2) + [f"w{n % 50}"] * 1), 0.5)
        is is_held_out(text, 0.5)
    )
    path = write_texts(folder / "one.jsonl", [document])
    return text_data(path, **{"val_fraction": 0.5, **fields})


@pytest.mark.parametrize("half", [FITTED, KEPT])
@pytest.mark.parametrize(("windows", "held_out"), [(2, 1), (3, 2), (9, 4)])
def test_windows_are_held_out_where_no_document_can_be(
    half: str, windows: int, held_out: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _data(tmp_path, half, windows)
    rows = [all_rows(data, one) for one in ("train", "held_out")]
    assert [len(one) for one in rows] == [windows - held_out, held_out]
    said = capsys.readouterr().out
    assert "data.val_fraction=0.5" in said
    assert f"{windows} windows" in said
    assert f"{held_out} of them held out" in said
    assert data.count_training_rows() == windows - held_out


@pytest.mark.parametrize("half", [FITTED, KEPT])
def test_one_window_can_only_be_fitted(half: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no second window") as caught:
        _data(tmp_path, half, 1).setup()
    assert caught.value.key == "data.val_fraction"
    data = _data(tmp_path, half, 1)
    data.needs_held_out = False
    assert (data.count_training_rows(), data.count_held_out_rows()) == (1, 0)
    with pytest.raises(ConfigError, match="no second window"):
        next(data.load_held_out_batches(1, 1))


@pytest.mark.parametrize("half", [FITTED, KEPT])
def test_no_window_is_refused(half: str, tmp_path: Path) -> None:
    for needed in (True, False):
        data = text_data(write_texts(tmp_path / "a.jsonl", [half]), val_fraction=0.5)
        data.needs_held_out = needed
        with pytest.raises(ConfigError, match="shorter than one window") as caught:
            data.setup()
        assert caught.value.key == "data.path"


def test_a_share_of_none_holds_nothing_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _data(tmp_path, FITTED, 5, val_fraction=0.0).setup()
    assert (caught.value.key, caught.value.given) == ("data.val_fraction", 0.0)
    data = _data(tmp_path, FITTED, 5, val_fraction=0.0)
    data.needs_held_out = False
    assert (data.count_training_rows(), data.count_held_out_rows()) == (5, 0)


def test_halves_that_both_have_windows_stay_as_they_are() -> None:
    some, more, none = (datasets.Dataset.from_dict({"n": list(range(n))}) for n in (1, 7, 0))
    assert share_short_text(some, more, 0.5) == (some, more)
    for fraction in (0.0, 1.0):
        assert share_short_text(more, none, fraction) == (more, none)
    assert share_short_text(none, none, 0.5)[0]["n"] == []
