"""The kept figures on packed documents: nothing leaks, no type is missing, a sample is the same."""

from __future__ import annotations

import json

import pytest
import transformers

from benchmarks import packing
from benchmarks.coverage import zoo
from benchmarks.results_file import FOLDER

KEPT = json.loads((FOLDER / "packing.json").read_text(encoding="utf-8"))
# Another release has other types, and isolates others by itself.
SAME = KEPT["versions"]["transformers"] == transformers.__version__


def test_every_type_is_counted_and_none_leaks() -> None:
    assert sorted(KEPT["types"]) == zoo.model_types(packing.KIND) or not SAME
    for backend, counts in KEPT["counts"].items():
        assert counts == packing.count_outcomes(KEPT["types"], backend)
        assert counts[packing.LEAKING] == counts[packing.NEEDLESS] == 0


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "dbrx", "mamba", "musicgen"])
def test_a_sample_comes_out_as_it_is_kept(model_type: str) -> None:
    kept, found = KEPT["types"][model_type], packing.check_type(model_type)
    assert kept.keys() == found.keys()
    for backend in packing.BACKENDS:
        if backend in kept:
            outcome = found[backend]["outcome"]
            assert outcome == kept[backend]["outcome"] or not SAME
            assert outcome not in (packing.LEAKING, packing.NEEDLESS)


def test_a_leak_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is given positions alone, and needs a mask."""
    monkeypatch.setattr(packing, "make_inputs", lambda model, batch: {**batch, "use_cache": False})
    assert packing.check_type("opt")["eager"]["outcome"] == packing.LEAKING
