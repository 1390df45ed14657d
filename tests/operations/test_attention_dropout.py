"""`attention_dropout`: attention probabilities are dropped, where asked, and nothing else is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from surgery.errors import ConfigError
from surgery.execute.live import apply_
from surgery.models.attributes import set_attributes
from surgery.models.dropout import find_holders
from surgery.models.sites import find_sites
from surgery.operations.attention_dropout import AttentionDropout
from surgery.operations.backend.operation import Backend
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations
from tests.operations.drafts import drafted, performed
from tests.operations.dropout_models import NAMES, OWN_ATTENTION, base_model, run, zero_contexts

# Nothing is left of a row of attention, except in one of a million cases.
ALL = 1 - 1e-6
# Where one config key says the attention dropout and something else besides.
RECORDED = {"falcon_alibi", "modernbert", "mpt", "t5"}


def dropouts(model: PreTrainedModel) -> dict[str, float]:
    """Each place of a model that holds a dropout of any kind, and what it says."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            found[path] = module.p
        else:
            values = vars(module).items()
            found |= {f"{path}.{k}": v for k, v in values if "drop" in k and isinstance(v, float)}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_all_of_attention_is_dropped_and_nothing_else(name: str) -> None:
    """The oracle: dropping everything is the model whose attention gives zero, to the bit."""
    model = base_model(name)
    sites = find_sites(model).sites
    handles = zero_contexts(model, [site.output.path for site in sites])
    expected = run(model)
    for handle in handles:
        handle.remove()
    before = run(model)
    performed(model, drafted(model, AttentionDropout(p=ALL)))
    assert torch.equal(run(model), before)
    assert torch.equal(run(model.train()), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_training_drops_and_evaluation_does_not(name: str, attention: str) -> None:
    if attention == "sdpa" and name in {"gemma2", "gpt_oss"} | OWN_ATTENTION:
        pytest.skip("has no sdpa to be set")
    model = base_model(name, attention)
    before = run(model)
    performed(model, drafted(model, AttentionDropout(p=0.5)))
    assert torch.equal(run(model), before)
    model.train()
    first, second = run(model, seed=1), run(model, seed=2)
    assert not torch.allclose(first, before)
    assert not torch.allclose(first, second)
    performed(model, drafted(model, AttentionDropout(p=0.0)))
    assert torch.equal(run(model, seed=1), run(model, seed=2))
    torch.testing.assert_close(run(model, seed=1), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_built_from_the_patched_config_drops_the_same(name: str) -> None:
    model = base_model(name)
    draft = drafted(model, AttentionDropout(p=0.3))
    assert draft.steps == []
    assert bool(draft.patch) == (name not in RECORDED)
    plan = make_plan(model, [AttentionDropout(p=0.3)])
    assert (plan.export.format == "record") == (name in RECORDED)
    performed(model, draft)
    with torch.device("meta"):
        reference = type(model)(copy.deepcopy(draft.config))
    if name not in RECORDED:
        assert dropouts(reference) == dropouts(model)
    else:  # the reload is told: the attributes say all
        set_attributes(reference, draft.find_attributes())
        assert dropouts(reference) == dropouts(model)


def test_every_holder_of_a_site_says_p() -> None:
    model = base_model("bart")
    performed(model, drafted(model, AttentionDropout(p=0.25)))
    for site in find_sites(model).sites:
        block = model.get_submodule(site.path)
        held = [getattr(block.get_submodule(h.path), h.name) for h in find_holders(block)]
        assert [getattr(value, "p", value) for value in held] == [0.25]
    rest = {k: v for k, v in dropouts(model).items() if "attn.dropout" not in k}
    assert set(rest.values()) == {0.0}


def test_chosen_layers_are_recorded_and_only_these_drop() -> None:
    model = base_model("llama")
    draft = drafted(model, AttentionDropout(p=0.3, layers=[1]))
    assert draft.patch == {}
    assert draft.find_attributes() == {"layers.1.self_attn": {"attention_dropout": 0.3}}
    assert draft.layers == {"layers.1.self_attn": {"dropout": "0.3"}}
    plan = make_plan(model, [AttentionDropout(p=0.3, layers=[1])])
    assert plan.export.format == "record"
    assert plan.outcomes == ("1 attribute",)
    assert json.loads(json.dumps(plan.attributes)) == draft.find_attributes()
    performed(model, draft)
    assert [layer.self_attn.attention_dropout for layer in model.layers] == [0.0, 0.3]


def test_what_one_layer_drops_ends_when_all_drop_nothing(tmp_path: Path) -> None:
    """Though the config has said 0 all along: what was recorded for the layer is gone."""
    model = base_model("llama")
    apply_(model, make_plan(model, [AttentionDropout(p=0.3, layers=[1])]))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert [layer.self_attn.attention_dropout for layer in loaded.layers] == [0.0, 0.3]
    plan = make_plan(loaded, [AttentionDropout(p=0.0)])
    assert plan.export.format == "native"
    apply_(loaded, plan)
    assert set(dropouts(loaded).values()) == {0.0}
    assert not hasattr(loaded.config, "quantization_config")


def test_a_plan_reads_no_weight() -> None:
    with torch.device("meta"):
        model = base_model("llama").to("meta")
    draft = drafted(model, AttentionDropout(p=0.3))
    assert draft.config.attention_dropout == 0.3
    performed(model, draft)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_what_is_no_share_is_refused(p: float) -> None:
    with pytest.raises(ConfigError, match=r"must be (finite|in \[0, 1\))") as caught:
        drafted(base_model("llama"), AttentionDropout(p=p))
    assert caught.value.key == "attention.attention_dropout.p"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("ctrl", {"n_embd": 32, "n_layer": 1, "n_head": 4, "dff": 48}),
        ("falcon", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}),
    ],
)
def test_a_site_without_attention_dropout_is_named(name: str, fields: dict[str, Any]) -> None:
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(name, vocab_size=61, **fields))
    with pytest.raises(ConfigError, match=r"h\.0\..* takes no attention dropout"):
        drafted(model, AttentionDropout(p=0.1))


def test_blocks_that_read_the_config_cannot_differ() -> None:
    model = base_model("persimmon")
    with pytest.raises(ConfigError, match="config all blocks share") as caught:
        drafted(model, AttentionDropout(p=0.1, layers=[0]))
    assert caught.value.key == "attention.attention_dropout.layers"


@pytest.mark.parametrize(
    "operations",
    [
        (Backend("flex_attention"), AttentionDropout(p=0.1)),
        (AttentionDropout(p=0.1), Backend("flex_attention")),
    ],
)
def test_flex_and_dropout_exclude_each_other(operations: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="has no dropout"):
        drafted(base_model("llama"), *operations)
    assert drafted(base_model("llama"), Backend("flex_attention"), AttentionDropout(p=0.0)).steps


def test_dropout_of_the_model_itself_excludes_flex_until_it_is_put_out() -> None:
    model = base_model("llama")
    model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"attention drops 0\.1"):
        drafted(model, Backend("flex_attention"))
    draft = drafted(model, AttentionDropout(p=0.0), Backend("flex_attention"))
    assert draft.steps
    performed(model, drafted(model, AttentionDropout(p=0.0)))
    assert set(dropouts(model).values()) == {0.0}


def test_it_is_declared_like_any_operation() -> None:
    (parsed,) = parse_operations({"attention_dropout": {"p": 0.2}})
    assert parsed.to_json() == {"operation": "attention_dropout", "p": 0.2, "layers": None}
