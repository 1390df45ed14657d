"""What is asked for and comes to nothing: refused where heads should go, said everywhere else."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from surgery.errors import ConfigError
from tests.operations.zoo_models import build, operated, plan_of

CUT = "attention.prune_heads.cut=queries"


def built(kv_heads: int | None) -> PreTrainedModel:
    """Eight query heads in each of two layers."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("kv_heads", "options", "least", "cut"),
    [
        (1, {"amount": 0.5}, None, "queries"),
        (1, {"amount": 0.2, "scope": "global"}, None, "queries"),
        (1, {"amount": 0.5, "uniform": True}, None, "queries"),
        (1, {"count": 4}, None, "queries"),
        (1, {"amount": 0.5, "schedule": "gradual"}, None, "queries"),
        (1, {"amount": 0.5, "schedule": "iterative"}, None, "queries"),
        (2, {"amount": 0.2}, 0.5, "queries"),
        (2, {"count": 3}, 4, "queries"),
        (2, {"count": 3, "scope": "global"}, 4, "queries"),
        (2, {"amount": 0.1, "scope": "global"}, 0.25, "queries"),
        (8, {"amount": 0.05}, 0.125, None),
        (8, {"amount": 0.05, "scope": "global", "uniform": True}, 0.125, None),
        (2, {"count": 1, "cut": "queries"}, 2, None),
        (4, {"amount": 0.2, "cut": "queries"}, 0.5, "groups"),
        (2, {"amount": 0.1, "protect": list(range(8))}, None, None),
    ],
)
def test_an_amount_that_removes_no_head_is_refused(
    kv_heads: int, options: dict[str, Any], least: float | None, cut: str | None
) -> None:
    given = {"estimator": "random", **options}
    way = "amount" if "amount" in options else "count"
    with pytest.raises(ConfigError, match="removes nothing") as caught:
        plan_of(built(kv_heads), {"prune_heads": given})
    assert caught.value.key == f"attention.prune_heads.{way}"
    assert caught.value.given == options[way]
    said = ([] if least is None else [f"at least {least:g}"]) + (
        [f"attention.prune_heads.cut={cut}"] if cut else []
    )
    assert caught.value.valid == (" or ".join(said) or "0: no head of these layers can go")
    remedies = ([] if least is None else [{way: least}]) + ([{"cut": cut}] if cut else [])
    for remedy in remedies:
        plan = plan_of(built(kv_heads), {"prune_heads": {**given, **remedy}})
        assert plan.after != plan.before


@pytest.mark.parametrize("options", [{"amount": 0.0}, {"count": 0}])
def test_none_of_them_is_no_mistake(options: dict[str, Any]) -> None:
    plan = plan_of(built(1), {"prune_heads": {"estimator": "random", **options}})
    assert plan.after == plan.before
    assert plan.notes == ("prune_heads: changes nothing, the model is so already",)


def test_half_of_a_multi_query_model_goes_by_single_heads() -> None:
    options = {"amount": 0.5, "estimator": "random", "cut": "queries"}
    plan = plan_of(built(1), {"prune_heads": options})
    assert [(site.q_heads, site.kv_heads) for site in plan.after] == [(4, 1)] * 2
    assert plan.notes == ()


def test_layers_that_keep_all_their_heads_are_named() -> None:
    """Groups of two in layer 0, and of eight in layer 1."""
    model, _ = operated(built(4), gqa={"kv_heads": [4, 1]})
    plan = plan_of(model, {"prune_heads": {"amount": 0.25, "estimator": "random"}})
    assert [site.q_heads for site in plan.after] == [6, 8]
    assert plan.notes == (
        "prune_heads: 2 of 16 heads go (12.5%) for amount=0.25",
        "prune_heads: amount=0.25 is less than what goes together in layers 1, which keep all "
        "their heads",
    )


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_all_of_the_only_group_names_the_cut_that_would_do(scope: str) -> None:
    options = {"amount": 1.0, "estimator": "random", "scope": scope}
    with pytest.raises(ConfigError, match="keeps at least one head") as caught:
        plan_of(built(1), {"prune_heads": options})
    assert str(caught.value.valid).endswith(CUT)


@pytest.mark.parametrize(
    ("attention", "note"),
    [
        ({"gqa": {"kv_heads": 4}}, "gqa: changes nothing, the model is so already"),
        ({"gqa": {"kv_heads": [4, 4]}}, "gqa: changes nothing, the model is so already"),
        ({"gqa": {"kv_heads": {"average": 4}}}, "gqa: KV heads of each layer"),
        ({"attention_dropout": {"p": 0.0}}, "attention_dropout: changes nothing"),
        ({"prune_heads": {"heads": []}}, "prune_heads: changes nothing"),
        ({"sliding_window": {"size": 64}}, "hides nothing, the model is for 64 positions"),
        ({"sliding_window": {"size": 99}}, "hides nothing, the model is for 64 positions"),
        ({"sliding_window": {"size": 63}}, None),
        ({"rope": {"type": "default", "theta": 10000.0}}, "has these positions already"),
        ({"rope": {"type": "linear", "factor": 1.5}}, None),
        ({"rope": {"type": "dynamic", "factor": 2.0}}, None),
        ({"gqa": {"kv_heads": 2}}, None),
    ],
)
def test_what_changes_nothing_says_so(attention: dict[str, Any], note: str | None) -> None:
    plan = plan_of(build("causal-lm", "llama"), attention)
    said = [*plan.notes, *plan.open_decisions]
    assert len(said) == (note is not None)
    if note is not None:
        assert note in said[0]
