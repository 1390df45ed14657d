"""Records and plans of others: all of them is checked before any of it is done."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from surgery.errors import ConfigError, PlanError
from surgery.execute.live import apply_
from surgery.models.reference import get_shapes
from surgery.plan.store import PLAN, load_plan
from tests.hostile.bases import CONFIG, Bases
from tests.models.sources import source
from tests.tiny_models import tiny_model

SITE = "model.layers.0.self_attn"
K = f"{SITE}.k_proj.weight"


@pytest.fixture
def export(bases: Bases, tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """An export whose record has other parts."""

    def make(parts: dict[str, Any]) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(bases.recorded["gqa"], folder)
        config = json.loads((folder / CONFIG).read_text())
        record = config["quantization_config"]
        attributes = parts.get("attributes")
        if isinstance(attributes, dict):  # besides those that it has
            for path, values in attributes.items():
                if isinstance(values, dict):
                    record["attributes"].setdefault(path, {}).update(values)
                else:
                    record["attributes"][path] = values
        else:
            record |= parts
        (folder / CONFIG).write_text(json.dumps(config))
        return folder

    return make


def attribute(path: str, name: str, value: Any) -> dict[str, Any]:
    return {"attributes": {path: {name: value}}}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"format": True}, "a record of format True; this version reads 1"),
        ({"format": None}, "a record of format None"),
        ({"hooks": []}, "a key 'hooks' that this version does not know"),
        ({"steps": "melt"}, "steps: must be a list, not 'melt'"),
        ({"steps": ["melt"]}, "steps[0]: must be a list, not 'melt'"),
        ({"steps": [{"kind": "x"}]}, "steps[0]: must be a list"),
        ({"steps": [5]}, "steps[0]: must be a list, not 5"),
        ({"steps": [None]}, "steps[0]: must be a list, not None"),
        ({"steps": [["remove_attention"]]}, "steps[0]: must be a list of 2"),
        ({"steps": [[5, {}]]}, "steps[0][0]: must be a text, not 5"),
        ({"steps": [["melt", {}]]}, "'melt', which does not exist here"),
        ({"steps": [["remove_attention", [SITE]]]}, "steps[0][1]: must be a mapping"),
        ({"steps": [["remove_attention", {}]]}, "sites: is missing"),
        ({"steps": [["remove_attention", {"sites": SITE}]]}, "sites: must be a list"),
        ({"steps": [["remove_attention", {"sites": [5]}]]}, "sites[0]: must be a text"),
        ({"steps": [["remove_attention", {"sites": [], "x": 1}]]}, "no argument 'x'"),
        ({"steps": [["backend", {"implementation": "owner/kernel"}]]}, "which no plan records"),
        ({"steps": [["fuse_qkv", {"sites": []}]]}, "which no plan records"),
        ({"steps": [["site_rope", {"sites": {"model": None}}]]}, "no attention block model"),
        (
            {"steps": [["site_rope", {"sites": {SITE: {"partial_rotary_factor": 1e5}}}]]},
            "partial_rotary_factor: must be in (0, 1], not 100000.0",
        ),
        ({"steps": [["site_rope", {"sites": {SITE: {"rope_theta": "x"}}}]]}, "must be a number"),
        ({"tensors": [K]}, "tensors: must be a mapping"),
        ({"tensors": {K: 8}}, "must be a list, not 8"),
        ({"tensors": {K: [-8, 32]}}, "must be at least 1, not -8"),
        ({"tensors": {K: [8.0, 32]}}, "must be a whole number, not 8.0"),
        ({"tensors": {K: [8, 32, 1]}}, "it has 2 dimensions, not 3"),
        ({"tensors": {K: [2**40, 2**40]}}, "larger than any tensor"),
        ({"tensors": {f"{SITE}.forward": [8]}}, "forward"),
        ({"tensors": {"config": [8]}}, "config"),
        ({"attributes": [1]}, "attributes: must be a mapping"),
        ({"attributes": {SITE: 5}}, "must be a mapping of names, not 5"),
        (attribute("", "vocab_size", 5), "no plan sets it on the whole model"),
        (
            attribute("", "config", {}),
            "LlamaForCausalLM.config: no plan sets it",
        ),
        (attribute("lm_head", "out_features", 5), "is not an attention block"),
        (attribute("model.norm", "variance_epsilon", 1.0), "is not an attention block"),
        (attribute("model.layers.9", "x", 5), "the model has no such module"),
        (attribute(SITE, "forward", "x"), f"{SITE}.forward: the module has no such value"),
        (attribute(SITE, "config", {}), "no plan sets a LlamaConfig"),
        (attribute(SITE, "layer_idx", 1), "no plan sets it"),
        (attribute(SITE, "training", True), "no plan sets it"),
        (attribute(SITE, "_forward_hooks", {}), "no plan sets it"),
        (attribute(SITE, "__class__", "x"), "no plan sets it"),
        (attribute(SITE, "k_proj", 5), "the module has no such value"),
        (attribute(SITE, "attention_dropout", 2), "must be a number in [0, 1], not 2"),
        (attribute(SITE, "attention_dropout", math.nan), "must be a number in [0, 1], not nan"),
        (attribute(SITE, "attention_dropout", -1), "must be a number in [0, 1], not -1"),
        (attribute(SITE, "attention_dropout", None), "must be a number in [0, 1], not None"),
        (attribute(SITE, "scaling", math.inf), "must be a finite number"),
        (attribute(SITE, "is_causal", 0), "must be a bool"),
        (attribute(SITE, "num_key_value_groups", 0), "must be a whole number from 1 on"),
        (attribute(SITE, "num_key_value_groups", "4"), "must be a whole number from 1 on"),
        (attribute(SITE, "num_key_value_groups", 2**40), "must be a whole number from 1 on"),
        (attribute(SITE, "num_key_value_groups", 3), "it is 3, but the tensors are for 4"),
        (
            attribute(f"{SITE}.k_proj", "out_features", 9),
            "k_proj is a Linear that holds a weight of [8, 32], not [9, 32]",
        ),
    ],
)
def test_a_record_sets_only_what_plans_write(
    export: Callable[[dict[str, Any]], Path], parts: dict[str, Any], said: str
) -> None:
    folder = export(parts)
    for action in (source(folder).build_meta_model, source(folder).load):
        with pytest.raises(ConfigError) as caught:
            action()
        assert caught.value.key == "model.path"
        assert said in caught.value.problem
    with pytest.raises(PlanError) as told:  # without this project's command line
        AutoModelForCausalLM.from_pretrained(folder)
    assert said in str(told.value)


def test_a_record_as_it_was_written_is_accepted(bases: Bases) -> None:
    for folder in bases.recorded.values():
        source(folder).load()


def change(plan: dict[str, Any], *path: Any, to: Any) -> dict[str, Any]:
    changed = copy.deepcopy(plan)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = to
    return changed


EDIT = ("changes", 0, "edits", 0)


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        (("format",), True, "a plan of format True"),
        (("format",), 99, "a plan of format 99"),
        (("more",), 1, "unknown key 'more'"),
        (("steps",), None, "steps: must be a list, not None"),
        (("steps",), ["melt"], "steps[0]: must be a mapping"),
        (("steps",), {"a": 1}, "steps: must be a list"),
        (("steps", 0, "kind"), "melt", "'melt', which does not exist here"),
        (("steps", 0, "arguments"), {"sites": 5}, "step fuse_qkv: sites: must be a list"),
        (("tokens",), -1, "tokens: must be at least 1, not -1"),
        (("source",), "x", "source: must be a list"),
        (("source", 0, "q_heads"), 0, "source[0].q_heads: must be at least 1, not 0"),
        (("source", 0, "query", "unit"), "8", "source[0].query.unit: must be a whole number"),
        ((*EDIT, "results", 0, "shape"), [-1], "shape[0]: must be at least 0, not -1"),
        ((*EDIT, "results", 0, "shape"), 5, "shape: must be a list, not 5"),
        ((*EDIT, "transform"), "os.system", "os.system cannot be done"),
        ((*EDIT, "arguments", "axis"), 7, "cannot be done"),
        ((*EDIT, "arguments", "unit"), 0, "cannot be done"),
        ((*EDIT, "arguments", "parts"), [["x"]], "parts[0][0]: must be a whole number"),
        ((*EDIT, "sources", 0, "name"), "lm_head.weight", "lm_head.weight is"),
        (("attributes",), {"": {"forward": 1}}, "LlamaForCausalLM.forward: the module has no such"),
        (("attributes",), {SITE: {"config": None}}, "no plan sets a LlamaConfig"),
        (("attributes",), {SITE: {"attention_dropout": 2}}, "must be a number in [0, 1]"),
        (("config_patch",), {"_attn_implementation": "x"}, "no plan sets this key"),
        (("config_patch",), {"quantization_config": {}}, "quantization_config"),
        (("config_patch",), {"auto_map": {}}, "auto_map"),
        (("config_patch",), {"to_dict": 5}, "to_dict: no plan sets this key"),
        (("config_patch",), {"vision.x": 5}, "the config has no part vision"),
        (("config_patch",), {"num_attention_heads": "x"}, "does not accept"),
        (("conversion",), {"into": "nowhere"}, "nowhere"),
        (("conversion",), {"from": 5}, "conversion"),
        (("after",), [], "the operated model is not what the plan predicted"),
        (("after", 0, "window"), 3, "the operated model is not what the plan predicted"),
        (("operations", 0, "operation"), {"x": 1}, "operations[0]: must be a text"),
        (("operations", 0), {}, "operations[0]: must be a text, not None"),
        (("operations", 0, "operation"), "melt", "the plan needs the operation 'melt'"),
    ],
)
def test_a_plan_does_only_what_plans_do(
    bases: Bases, tmp_path: Path, path: tuple[Any, ...], to: Any, said: str
) -> None:
    changed = change(bases.plans["several"], *path, to=to)
    (tmp_path / PLAN).write_text(json.dumps(changed))
    model = tiny_model("llama")
    shapes, config = get_shapes(model), model.config.to_dict()
    values = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(PlanError) as caught:
        apply_(model, load_plan(tmp_path))
    assert said in str(caught.value)
    assert get_shapes(model) == shapes
    assert model.config.to_dict() == config
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
