"""Output projections solved anew: what the heads that stay make up for."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from surgery.calibration.view import observe_site
from surgery.errors import ConfigError
from surgery.execute.live import apply_
from surgery.models.sites import find_sites
from surgery.plan.make import make_plan
from surgery.plan.store import load_plan, save_plan
from tests.calibration.models import made, unseen
from tests.calibration.on_file import performed
from tests.calibration.pruned import (
    OPTIONS,
    SCORES,
    assert_same,
    batches,
    parsed,
    planned,
    table_of,
)
from tests.calibration.rewriting import Heads
from tests.families import logits

# Closed-form, so exact where nothing is lost.
EXACT = replace(OPTIONS, ridge=1e-10)
KINDS = ("llama", "gpt2", "phi3", "bert", "opt")


def site_errors(
    model: PreTrainedModel,
    changed: PreTrainedModel,
    layer: int,
    data: Any = None,
    *,
    relative: bool = False,
) -> float:
    """Of what the site puts out on the calibration data, as a share of its size.

    Args:
        relative: to the size of the stream that the output is added to, position by position.
    """
    off = size = 0.0
    for batch in batches() if data is None else data:
        found = []
        for one in (model, changed):
            view = observe_site(one, find_sites(one).sites[layer], batch, attention=False)
            assert view.output is not None
            found.append(view.output if view.real is None else view.output[view.real])
        weight = torch.ones(()).double()
        if relative:
            stream = get_entering(model, batch, layer)
            stream = stream if view.real is None else stream[view.real]
            weight = 1 / (stream + found[0]).double().square().mean(-1, keepdim=True)
        size += float((found[0].double().square() * weight).sum())
        off += float(((found[1] - found[0]).double().square() * weight).sum())
    return (off / size) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_another_can_stand_for_costs_nothing(kind: str) -> None:
    model = made(kind)
    with torch.no_grad():
        for site in find_sites(model).sites:
            for role in ("query", "key", "value"):  # each is read in its own way
                Heads(model, site).copy_(role, 2, 5)
    expected = logits(model, unseen())
    data = batches(8 if kind == "bert" else 4, 8)
    cut = apply_(copy.deepcopy(model), make_plan(model, parsed({"heads": [5]})))
    plan = planned(model, {"heads": [5], "refit": True}, data=data, options=EXACT)
    assert set(plan.wanted) == set(plan.resolved)
    assert float((logits(cut, unseen()) - expected).abs().max()) > 0.01
    assert_same(apply_(model, plan), expected)


# A Phi-3's layers all have as many heads.


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "phi3"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_sites_own_output_is_never_further_off(kind: str, layer: int) -> None:
    """Least squares, so the heads as they were are one of the solutions it may choose."""
    model = made(kind, dtype=torch.float32)
    data = batches()
    data[0]["attention_mask"] = torch.ones_like(data[0]["input_ids"])
    data[0]["attention_mask"][1, 12:] = 0
    named = {"heads": {layer: [1, 4, 6]}}
    plan = planned(model, {**named, "refit": True}, data=data)
    cut = apply_(copy.deepcopy(model), make_plan(model, parsed(named)))
    refit = apply_(copy.deepcopy(model), plan)
    errors = [site_errors(model, one, layer, data) for one in (cut, refit)]
    assert errors[1] < 0.95 * errors[0]
    assert plan.calibration is not None
    figures = list(plan.calibration["operations"][0]["sites"].values())[layer]
    if layer:
        errors = [site_errors(model, one, layer, data, relative=True) for one in (cut, refit)]
        assert errors[1] < 0.95 * errors[0]
    assert errors == pytest.approx(
        [figures["output_error_cut"], figures["output_error_refit"]], rel=1e-3
    )


def get_entering(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], layer: int
) -> torch.Tensor:
    """Get what enters a layer."""
    seen: list[torch.Tensor] = []
    parent, _, _ = find_sites(model).sites[layer].path.rpartition(".")
    handle = model.get_submodule(parent).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**{name: value for name, value in batch.items() if name != "labels"})
    handle.remove()
    return seen[0]


def test_later_layers_make_up_for_those_below() -> None:
    """Fitted layer by layer by hand: the second on a model whose first is done."""
    model = made("llama")
    some = replace(OPTIONS, ridge=1e-3)
    first = planned(model, {"heads": {0: [1, 2]}, "refit": True}, options=some)
    one = apply_(copy.deepcopy(model), first)
    second = planned(model, {"heads": [1, 2], "refit": True}, options=some)
    both = apply_(copy.deepcopy(model), second)
    for name, tensor in both.state_dict().items():
        if "layers.0." in name:
            assert torch.equal(tensor, one.state_dict()[name])
    path = find_sites(model).sites[1].output
    kept = [n for n in range(64) if n // 8 not in (1, 2)]
    rows, aims, scales = [], [], []
    for batch in batches():
        seen = observe_site(one, find_sites(one).sites[1], batch, attention=False)
        aim = observe_site(model, find_sites(model).sites[1], batch, attention=False)
        assert seen.inputs is not None
        assert aim.output is not None
        rows.append(seen.inputs.flatten(0, 1)[:, kept])
        stream, now = get_entering(model, batch, 1), get_entering(one, batch, 1)
        aims.append((aim.output + stream - now).flatten(0, 1))
        sizes = [x.pow(2).mean(-1).sqrt().flatten() for x in (stream + aim.output, now)]
        scales.append(1 / torch.maximum(*sizes))
    x, y, scale = torch.cat(rows), torch.cat(aims), torch.cat(scales)[:, None]
    weight = model.get_parameter(f"{path.path}.weight")[:, kept].detach()
    bias = model.get_parameter(f"{path.path}.bias").detach()
    wide = torch.cat([x, torch.ones(len(x), 1)], 1) * scale
    y, prior = y * scale, torch.cat([weight, bias[:, None]], 1)
    square = wide.T @ wide
    ridge = 1e-3 * square.diagonal()[:-1].mean()
    solved = torch.linalg.solve(
        square + ridge * torch.eye(len(square)), wide.T @ y + ridge * prior.T
    ).T
    torch.testing.assert_close(
        both.get_parameter(f"{path.path}.weight"), solved[:, :-1], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("prune", "kv_heads"),
    [
        ({"heads": [1, 4]}, 8),
        ({"scores": "FILE", "count": 2}, 8),
        ({"estimator": "random", "amount": 0.25}, 8),
        ({"estimator": "random", "count": 4, "cut": "queries"}, 4),
        ({"heads": {0: list(range(8)), 1: [0]}, "remove_attention": True}, 8),
    ],
)
def test_whoever_chose_the_heads(prune: dict[str, Any], kv_heads: int, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"scores": SCORES}))
    if "scores" in prune:
        prune = prune | {"scores": str(path)}
    model = made("llama", dtype=torch.float32, num_key_value_heads=kv_heads)
    plain = planned(model, prune, scorer=table_of())
    assert plain.resolved == {}
    plan = planned(model, {**prune, "refit": True}, scorer=table_of())
    assert plan.after == plain.after
    assert plan.is_resolved
    fitted = [change.before.path for change in plan.changes]
    assert set(plan.resolved) == {
        f"0.{p}.{what}" for p in fitted for what in ("output", "output_bias")
    }
    cut, refit = (apply_(copy.deepcopy(model), one) for one in (plain, plan))
    for name, tensor in refit.state_dict().items():
        assert torch.equal(tensor, cut.state_dict()[name]) == (
            "self_attn.o_proj" not in name or not any(name.startswith(one) for one in fitted)
        ), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_and_a_file_get_the_same_bits(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made(kind, dtype=dtype)
    prune = {"count": 2, "estimator": "random", "refit": True}
    plan = planned(model, prune, scorer=table_of())
    again = planned(made(kind, dtype=dtype), prune, scorer=table_of())
    assert again.to_json() == plan.to_json()
    save_plan(plan, tmp_path)
    loaded = load_plan(tmp_path)
    assert loaded == plan
    named = {n: t.contiguous() for n, t in model.named_parameters()}
    save_file(named, tmp_path / "model.safetensors")
    apply_(model, plan)
    made_of_it = performed(loaded, tmp_path / "model.safetensors")
    assert made_of_it
    for name, tensor in made_of_it.items():
        assert torch.equal(tensor, model.get_parameter(name)), name


def test_the_model_itself_is_left_as_it_was() -> None:
    model = made("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    planned(model, {"count": 2, "estimator": "random", "refit": True}, scorer=table_of())
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def test_layers_that_share_their_weights_are_not_refitted() -> None:
    model = made("llama")
    one, two = (find_sites(model).sites[n].output.path for n in (0, 1))
    model.get_submodule(two).weight = model.get_submodule(one).weight
    with pytest.raises(ConfigError, match="shares its weights with") as caught:
        planned(model, {"heads": [1], "refit": True})
    assert caught.value.key == "attention.prune_heads.refit"
    assert caught.value.valid == "false"


def test_activations_that_are_no_numbers_are_refused() -> None:
    model = made("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("inf")
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn.*its activations are not finite"):
        planned(model, {"heads": [1, 2], "refit": True})
