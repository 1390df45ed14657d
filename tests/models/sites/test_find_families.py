"""Sites of real architectures, against their configs and their modules."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from surgery.models.sites import Site, find_sites
from tests.families import SEPARATE, family, family_config, masked_lm, skeleton

FLAT_NORM = {"olmo2", "olmoe"}
HEAD_NORM = {"qwen3", "qwen3_moe", "gemma3", "exaone4", "phi_normed"}
BIASED = {
    "llama_biased",
    "glm4",
    "gpt_oss",
    "phi",
    "phi_normed",
    "qwen2",
    "qwen2_moe",
    "seed_oss",
    "stablelm",
    "starcoder2",
}


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("name", SEPARATE)
def test_counts_are_the_configs(name: str, kv_heads: int) -> None:
    config = family_config(name, num_key_value_heads=kv_heads)
    with torch.device("meta"):
        anatomy = find_sites(AutoModelForCausalLM.from_config(config))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // 8
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * 2
    assert len(anatomy.sites) == sum(kind != "linear_attention" for kind in kinds)
    assert anatomy.unreadable == ()
    for number, site in enumerate(anatomy.sites):
        assert (site.q_heads, site.kv_heads, site.head_dim) == (8, kv_heads, head_dim)
        assert (site.layer, site.hidden_size) == (number, config.hidden_size)
        assert site.group_size == 8 // kv_heads
        assert (site.cross, site.cached, site.config_prefix) == (False, True, "")
        assert (site.block, site.value_dim, site.packing) == (site.path, head_dim, None)


@pytest.mark.parametrize("name", SEPARATE)
def test_a_site_states_the_shapes_of_its_modules(name: str) -> None:
    model = family(name, num_key_value_heads=4)
    for site in find_sites(model).sites:
        for projection in (site.query, site.key, site.value, site.output):
            module = model.get_submodule(projection.path)
            assert module.weight.shape == (projection.out_features, projection.in_features)
            assert (module.bias is not None) == projection.bias
            assert projection.parameters == sum(p.numel() for p in module.parameters())
        for norm in (site.q_norm, site.k_norm):
            if norm is not None:
                tensors = dict(model.get_submodule(norm.path).named_parameters())
                assert set(tensors) == set(norm.tensors)
                assert all(tensor.shape == (norm.size,) for tensor in tensors.values())


@pytest.mark.parametrize("name", SEPARATE)
def test_biases_and_norms_are_the_architectures(name: str) -> None:
    for site in find_sites(family(name, num_key_value_heads=4)).sites:
        assert site.key.bias == (name in BIASED)
        sizes = (site.q_norm and site.q_norm.size, site.k_norm and site.k_norm.size)
        if name in FLAT_NORM:
            assert sizes == (8 * site.head_dim, 4 * site.head_dim)
        elif name in HEAD_NORM:
            assert sizes == (site.head_dim, site.head_dim)
        else:
            assert sizes == (None, None)


@pytest.mark.parametrize("name", SEPARATE)
def test_weights_are_not_needed(name: str) -> None:
    model = family(name)
    assert find_sites(skeleton(model)) == find_sites(model)


def test_a_site_written_as_json_reads_back_as_itself() -> None:
    for site in (*find_sites(family("olmo2")).sites, *find_sites(family("phi_normed")).sites):
        assert Site.from_json(site.to_json()) == site


def test_an_encoder_caches_nothing() -> None:
    (first, second) = find_sites(masked_lm("eurobert")).sites
    assert not first.cached
    assert not second.cached
