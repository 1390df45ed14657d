"""Weights that surgery cannot edit: refused with a remedy that works. Scores of them are right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import (
    parametrizations,
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

import surgery
from surgery.errors import ConfigError, PlanError, SurgeryError
from surgery.execute.live import apply_
from surgery.models.editable import find_obstacle
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations
from tests.families import family, logits, randomised, skeleton, tokens
from tests.tiny_models import FIELDS

PRUNING: dict[str, Any] = {"prune_heads": {"heads": {0: [1], 1: [2]}}}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj")


def plan_of(model: PreTrainedModel, attention: dict[str, Any] | None = None) -> surgery.Plan:
    return make_plan(model, parse_operations(attention or PRUNING))


@cache
def plan_of_plain() -> surgery.Plan:
    return plan_of(family("llama"))


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "o_proj") or hasattr(m, "c_attn")]


def put(names: tuple[str, ...], change: Callable[[nn.Module], Any]) -> Any:
    """Change projections in place; where `change` returns a module, that one takes the place."""

    def do(model: PreTrainedModel) -> PreTrainedModel:
        for block in blocks(model):
            for name in names:
                new = change(getattr(block, name))
                if isinstance(new, nn.Module):
                    setattr(block, name, new)
        return model

    return do


class Adapter(nn.Module):
    """The structure of PEFT's layers."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, base.out_features, bias=False)})
        self.to(base.weight.dtype)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    def merge_and_unload(self) -> nn.Module:
        with torch.no_grad():
            product = self.lora_B["default"].weight @ self.lora_A["default"].weight
            self.base_layer.weight += product
        return self.base_layer


class Adapted(nn.Linear):
    """The structure of loralib's layers: a Linear with more parameters and its own forward."""

    def __init__(self, base: Any) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, dtype=base.weight.dtype)
        self.weight = base.weight
        self.lora_A = nn.Parameter(torch.ones_like(base.weight[:4]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + nn.functional.linear(x, self.lora_A).sum(-1, keepdim=True)


def unprune(module: nn.Module) -> None:
    prune.remove(module, "weight")


def remove_all(module: nn.Module) -> None:
    parametrize.remove_parametrizations(module, "weight")


COMPUTED: dict[str, tuple[tuple[str, ...], Any, Any, str, str]] = {
    "masked": (
        ALL,
        lambda m: prune.l1_unstructured(m, "weight", amount=0.2) and None,
        unprune,
        "q_proj computes its weight from weight_orig and weight_mask",
        'torch.nn.utils.prune.remove(module, "weight") first',
    ),
    "masked keys": (
        ("k_proj",),
        lambda m: prune.l1_unstructured(m, "weight", amount=0.2) and None,
        unprune,
        "k_proj computes its weight from weight_orig and weight_mask",
        'torch.nn.utils.prune.remove(module, "weight") first',
    ),
    "weight_norm": (
        ("k_proj",),
        parametrizations.weight_norm,
        remove_all,
        "k_proj computes its weight (parametrization WeightNorm)",
        'torch.nn.utils.parametrize.remove_parametrizations(module, "weight") first',
    ),
    "spectral_norm": (
        ALL,
        parametrizations.spectral_norm,
        remove_all,
        "q_proj computes its weight (parametrization SpectralNorm)",
        'torch.nn.utils.parametrize.remove_parametrizations(module, "weight") first',
    ),
    "orthogonal": (
        ("v_proj",),
        parametrizations.orthogonal,
        remove_all,
        "v_proj computes its weight (parametrization Orthogonal)",
        'torch.nn.utils.parametrize.remove_parametrizations(module, "weight") first',
    ),
    "old weight_norm": (
        ("o_proj",),
        weight_norm,
        remove_weight_norm,
        "o_proj computes its weight from weight_g and weight_v",
        'torch.nn.utils.remove_weight_norm(module, "weight") first',
    ),
    "old spectral_norm": (
        ("k_proj",),
        spectral_norm,
        remove_spectral_norm,
        "k_proj computes its weight from weight_orig (spectral norm)",
        'torch.nn.utils.remove_spectral_norm(module, "weight") first',
    ),
    "adapter": (
        ("q_proj", "v_proj"),
        Adapter,
        Adapter.merge_and_unload,
        "q_proj is a Adapter, an adapter around its base_layer",
        "merge it into the weights first (PEFT: merge_and_unload()), or add it afterwards",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_refused_with_a_remedy_that_works(kind: str) -> None:
    names, wrap, unwrap, problem, remedy = COMPUTED[kind]
    model = put(names, wrap)(family("llama")).eval()
    before = logits(model)
    for attention in (PRUNING, {"gqa": {"kv_heads": 2}}):
        with pytest.raises(ConfigError) as caught:
            plan_of(model, attention)
        assert caught.value.key == "attention"
        assert caught.value.problem == f"model.layers.0.self_attn.{problem}"
        assert caught.value.given.endswith(" in model.layers.0.self_attn (LlamaAttention)")
        assert caught.value.valid == remedy
    with pytest.raises(PlanError) as refused:
        apply_(model, plan_of_plain())  # made before the weights were wrapped
    assert str(refused.value) == f"model.layers.0.self_attn.{problem}: {remedy}"
    assert torch.equal(logits(model), before)
    put(names, unwrap)(model)
    torch.testing.assert_close(logits(model), before)
    assert find_obstacle(model) is None
    assert apply_(model, plan_of(model)).model.layers[0].self_attn.q_proj.out_features == 56


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("estimator", ["output_norm", "leave_one_out", "gate_gradient"])
def test_scores_are_those_of_the_computed_weights(kind: str, estimator: str) -> None:
    _, wrap, unwrap, _, _ = COMPUTED[kind]
    model = put(("o_proj",), wrap)(family("llama")).eval()
    ids = tokens(2, 8)
    batches = [{"input_ids": ids, "labels": ids}]
    scores = surgery.score_heads(model, batches, estimator)
    expected = surgery.score_heads(put(("o_proj",), unwrap)(model), batches, estimator)
    assert scores.heads
    for one, other in zip(scores.heads, expected.heads or (), strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-6)


def float8(module: Any) -> None:
    module.weight = nn.Parameter(module.weight.data.to(torch.float8_e4m3fn), requires_grad=False)


class Packed(torch.Tensor):
    """The structure of torchao's tensors: a subclass that stands in a Parameter's place."""


def packed(module: Any) -> None:
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Packed))


def doubled(module: Any) -> None:
    module.forward = lambda x: nn.functional.linear(x, module.weight) * 2


def quantized(model: PreTrainedModel) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear}, dtype=torch.qint8)


def one_for_two(model: Any) -> nn.Module:
    model.model.layers[1].self_attn.k_proj = model.model.layers[0].self_attn.k_proj
    return model


def one_for_both(model: Any) -> nn.Module:
    model.model.layers[0].self_attn.v_proj = model.model.layers[0].self_attn.k_proj
    return model


def half_on_meta(model: Any) -> nn.Module:
    model.model.layers[1].mlp.to("meta")
    return model


Q = "model.layers.0.self_attn.q_proj"
OTHERS: dict[str, tuple[Any, str, str]] = {
    "loralib": (
        put(("q_proj",), Adapted),
        f"{Q} is a Adapted, not a plain Linear: it also holds lora_A",
        "plain Linear or Conv1D projections",
    ),
    "float8": (
        put(ALL, float8),
        f"{Q} has a weight that is stored as torch.float8_e4m3fn",
        "quantize them after surgery",
    ),
    "torchao": (
        put(ALL, packed),
        f"{Q} has a weight of type Packed, not a plain Parameter",
        "quantize them after surgery",
    ),
    "quantize_dynamic": (
        quantized,
        f"{Q} is a torch.ao.nn.quantized.dynamic.modules.linear.Linear, where the architecture "
        "has a Linear",
        "plain Linear or Conv1D projections",
    ),
    "wrapped": (
        put(("q_proj",), lambda m: nn.Sequential(m, nn.Identity())),
        f"{Q} is a Sequential, where the architecture has a Linear",
        "plain Linear or Conv1D projections",
    ),
    "replaced forward": (
        put(("q_proj",), doubled),
        f"{Q} has a forward that was put in the place of its own",
        'delattr(module, "forward") first',
    ),
    "shared by layers": (
        one_for_two,
        "model.layers.1.self_attn.k_proj is the same module as model.layers.0.self_attn.k_proj",
        "copy.deepcopy one of them",
    ),
    "shared by roles": (
        one_for_both,
        "model.layers.0.self_attn.v_proj is the same module as model.layers.0.self_attn.k_proj",
        "copy.deepcopy one of them",
    ),
    "partly on meta": (
        half_on_meta,
        "model.layers.1.mlp.gate_proj.weight is on the meta device, so it has no values",
        "or the whole model on the meta device, to plan only",
    ),
    "DataParallel": (
        nn.DataParallel,
        "DataParallel is not a model of transformers itself",
        "the model inside it, .module",
    ),
}


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("kind", OTHERS)
def test_other_weights_are_refused(kind: str) -> None:
    change, problem, remedy = OTHERS[kind]
    model = change(family("llama"))
    with pytest.raises(ConfigError) as caught:
        plan_of(model)
    assert caught.value.problem.startswith(problem)
    assert remedy in str(caught.value.valid)
    with pytest.raises(PlanError) as refused:
        apply_(model, plan_of_plain())
    assert str(refused.value).startswith(problem)


@pytest.mark.parametrize("attention", [PRUNING, {"backend": {"implementation": "eager"}}])
def test_norms_per_head_count_too(attention: dict[str, Any]) -> None:
    model = family("qwen3")
    for block in blocks(model):
        parametrize.register_parametrization(block.q_norm, "weight", nn.Identity())
    with pytest.raises(ConfigError, match="q_norm computes its weight"):
        plan_of(model, attention)


@pytest.mark.parametrize("kind", ["masked", "parametrized"])
def test_conv1d(kind: str) -> None:
    config = AutoConfig.for_model("gpt2", **FIELDS["gpt2"])
    model = randomised(AutoModelForCausalLM.from_config(config), 0, torch.float64)
    plan = plan_of(model)
    for block in blocks(model):
        if kind == "masked":
            prune.random_unstructured(block.c_attn, "bias", amount=0.1)
        else:
            parametrizations.weight_norm(block.c_attn)
    said = r"transformer\.h\.0\.attn\.c_attn computes its (bias from bias_orig|weight \(param)"
    with pytest.raises(ConfigError, match=said):
        plan_of(model)
    with pytest.raises(PlanError, match=said):
        apply_(model, plan)


def test_a_linear_of_the_architectures_own_class_is_plain() -> None:
    config = AutoConfig.for_model(
        "falcon",
        vocab_size=61,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        new_decoder_architecture=True,
        num_kv_heads=4,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert type(model.transformer.h[0].self_attention.dense) is not nn.Linear
    assert find_obstacle(model) is None


def test_a_tensor_that_two_layers_share_is_cut_for_each() -> None:
    model = family("llama")
    first, second = blocks(model)
    second.k_proj.weight = first.k_proj.weight
    alone = copy.deepcopy(model)
    blocks(alone)[1].k_proj.weight = nn.Parameter(first.k_proj.weight.detach().clone())
    apply_(model, plan_of(model))
    apply_(alone, plan_of(alone))
    assert torch.equal(logits(model), logits(alone))


def test_a_model_on_the_meta_device_is_planned_and_operated_but_not_scored() -> None:
    model = skeleton(family("llama"))
    apply_(model, plan_of(model))
    ids = tokens(1, 8)
    batches = [{"input_ids": ids, "labels": ids}]
    with pytest.raises(SurgeryError, match="on the meta device, so it has no values"):
        surgery.score_heads(model, batches, "gate_gradient")
    scored = parse_operations({"prune_heads": {"amount": 0.25, "estimator": "output_norm"}})
    with pytest.raises(SurgeryError, match="on the meta device, so it has no values"):
        surgery.make_calibrated_plan(skeleton(family("llama")), scored, batches)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    family("llama", dtype=torch.float32).save_pretrained(path)
    return path


def offloaded(saved: Path, kind: str, folder: Path) -> PreTrainedModel:
    accelerate = pytest.importorskip("accelerate")
    if kind == "cpu":
        return accelerate.cpu_offload(
            AutoModelForCausalLM.from_pretrained(saved), execution_device="cpu"
        )
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    return AutoModelForCausalLM.from_pretrained(saved, device_map=places, offload_folder=folder)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offloaded_weights_are_refused_and_untouched(
    kind: str, saved: Path, tmp_path: Path
) -> None:
    model = offloaded(saved, kind, tmp_path)
    before = logits(model)
    said = r"is offloaded: its weights are in place only while it runs"
    with pytest.raises(ConfigError, match=said) as caught:
        plan_of(model)
    assert "load the whole model into memory" in str(caught.value.valid)
    with pytest.raises(PlanError, match=said):
        apply_(model, plan_of_plain())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("estimator", ["output_norm", "leave_one_out", "gate_gradient"])
def test_offloaded_models_are_scored_and_stay_offloaded(
    kind: str, estimator: str, saved: Path, tmp_path: Path
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(saved)
    model = offloaded(saved, kind, tmp_path)
    ids = tokens(2, 8)
    batches = [{"input_ids": ids, "labels": ids}]
    hooked = [name for name, module in model.named_modules() if "forward" in vars(module)]
    scores = surgery.score_heads(model, batches, estimator)
    assert [n for n, m in model.named_modules() if "forward" in vars(m)] == hooked
    expected = surgery.score_heads(whole, batches, estimator)
    assert scores.heads
    for one, other in zip(scores.heads, expected.heads or (), strict=True):
        assert one.scores == pytest.approx(other.scores, abs=2e-5)
