"""Whether devices can share the heads of a plan's result evenly."""

from __future__ import annotations

from typing import Any

import pytest

from surgery.errors import ConfigError
from tests.operations.zoo_models import build, plan_of

# Of four query heads in each of two layers.
PLANS: list[tuple[int, dict[str, Any]]] = [
    (4, {}),
    (2, {}),
    (1, {}),
    (4, {"gqa": {"kv_heads": 2}}),
    (1, {"gqa": {"kv_heads": 4}}),
    (4, {"gqa": {"kv_heads": [4, 2]}}),
    (4, {"prune_heads": {"heads": [0]}}),
    (4, {"prune_heads": {"heads": {0: [0], 1: [1, 2]}}}),
    (4, {"prune_heads": {"heads": {0: [0, 1, 2, 3]}, "remove_attention": True}}),
]


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize(("kv_heads", "attention"), PLANS)
def test_a_degree_must_divide_every_count(
    kv_heads: int, attention: dict[str, Any], degree: int
) -> None:
    plan = plan_of(build("causal-lm", "llama", kv_heads=kv_heads), attention)
    counts = [count for site in plan.after for count in (site.q_heads, site.kv_heads)]
    degrees = [n for n in range(1, 5) if all(count % n == 0 for count in counts)]
    if degree in degrees:
        plan.check_tensor_parallel(degree)
        return
    with pytest.raises(ConfigError, match="devices cannot share evenly") as caught:
        plan.check_tensor_parallel(degree)
    assert (caught.value.key, caught.value.given) == ("export.tensor_parallel", degree)
    assert str(caught.value.valid).startswith(f"{', '.join(map(str, degrees))}; or multiples of")


def test_the_layers_are_named() -> None:
    model = build("causal-lm", "llama")
    plan = plan_of(model, {"prune_heads": {"heads": {0: [0], 1: [1, 2]}}})
    with pytest.raises(ConfigError) as caught:
        plan.check_tensor_parallel(2)
    assert caught.value.problem == (
        "2 devices cannot share evenly: 3 query heads (layers 0), 3 KV heads (layers 0)"
    )
    with pytest.raises(ConfigError) as caught:
        plan.check_tensor_parallel(4)
    assert caught.value.problem == (
        "4 devices cannot share evenly: 2 query heads (layers 1), 3 query heads (layers 0), "
        "2 KV heads (layers 1), 3 KV heads (layers 0)"
    )


@pytest.mark.parametrize("degree", [0, -2, 1.5, True, "2"])
def test_what_is_no_number_of_devices(degree: Any) -> None:
    with pytest.raises(ConfigError, match="must be a number of devices") as caught:
        plan_of(build("causal-lm", "llama"), {}).check_tensor_parallel(degree)
    assert caught.value.valid == "at least 1"
