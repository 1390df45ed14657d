"""Maps: what is asked for, as the model attends, and nothing else."""

from __future__ import annotations

import pytest
import torch

from surgery.errors import ConfigError
from surgery.lab.analysis.maps import (
    LONGEST,
    check_heads,
    check_maps,
    compute_maps,
    pick_best_heads,
)
from surgery.lab.analysis.watch import find_self_attention
from surgery.models.source import make_byte_tokenizer
from tests.tiny_models import tiny_model


def test_maps_are_the_models_own() -> None:
    model = tiny_model("llama", attention="eager", vocab_size=259).eval()
    tokenizer = make_byte_tokenizer()
    found = compute_maps(
        model, tokenizer, find_self_attention(model), [(1, 3), (0, 2)], ["a b\n", "é"], ([1], [])
    )
    assert {(one.head, one.text) for one in found} == {
        ((1, 3), 0),
        ((0, 2), 0),
        ((1, 3), 1),
        ((0, 2), 1),
    }
    ids = torch.tensor([[1, *(byte + 3 for byte in b"a b\n")]])
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    for one in found:
        if one.text == 0:
            assert one.tokens == ("</s>", "a", "␣", "b", "↵")
            assert torch.allclose(one.p, maps[one.head[0]][0, one.head[1]], atol=1e-6)
        else:
            assert len(one.tokens) == 3


def test_a_long_text_is_clipped_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama", vocab_size=259, max_position_embeddings=128).eval()
    sites = find_self_attention(model)
    (one,) = compute_maps(model, make_byte_tokenizer(), sites, [(0, 0)], ["x" * 100])
    assert one.p.shape == (LONGEST, LONGEST)
    assert f"its first {LONGEST} of 100 tokens" in capsys.readouterr().out


def test_the_best_of_a_role_has_its_highest_score() -> None:
    roles = {(0, 0): "induction", (0, 1): "induction", (1, 0): "mixed"}
    assert pick_best_heads(roles, {(0, 0): 0.5, (0, 1): 0.8, (1, 0): 0.0}) == [(0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("heads", "texts", "key"),
    [
        (["2-3"], ["a"], "heads"),
        ("worst", ["a"], "heads"),
        (7, ["a"], "heads"),
        (["0.0"], [], "texts"),
        ("best", [], "texts"),
        (None, ["a"], "heads"),
        ([], ["a"], "heads"),
        (["0.0"], [""], "texts"),
    ],
)
def test_what_is_no_map_is_refused(heads: object, texts: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_maps(heads, texts)
    assert caught.value.key == f"analysis.maps.{key}"


def test_heads_that_are_not_there_are_refused() -> None:
    sites = find_self_attention(tiny_model("llama"))
    check_heads(["0.0", "1.3"], sites)
    check_heads("best", sites)
    for head in ("0.4", "2.0"):
        with pytest.raises(ConfigError, match="no such head"):
            check_heads([head], sites)
