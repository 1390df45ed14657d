"""What a patched config decides, told by the models that are built before and after."""

from __future__ import annotations

import pytest
from torch import nn

from surgery.errors import ConfigError
from surgery.models.reference import ReferenceModels
from tests.families import family, masked_lm, skeleton


def test_attributes_that_a_key_decides() -> None:
    references = ReferenceModels(skeleton(family("gemma2")))  # whose second layer has no window
    found = references.find_attributes({"sliding_window": 9, "attention_dropout": 0.3})
    assert found == {
        "model.layers.0.self_attn": {"attention_dropout": 0.3, "sliding_window": 9},
        "model.layers.1.self_attn": {"attention_dropout": 0.3},
    }


def test_a_key_that_nothing_reads_when_a_model_is_built() -> None:
    references = ReferenceModels(skeleton(family("llama")))
    assert references.find_attributes({"use_cache": False}) == {}


@pytest.mark.parametrize(
    ("layers", "told"), [(1, "remove model.layers.1"), (3, "add model.layers.2")]
)
def test_other_modules_with_tensors_are_refused(layers: int, told: str) -> None:
    references = ReferenceModels(skeleton(family("llama")))
    with pytest.raises(ConfigError, match=rf"a changed num_hidden_layers would {told}\."):
        references.find_attributes({"num_hidden_layers": layers})


def test_a_key_that_is_lost_once_the_config_is_saved_is_refused() -> None:
    references = ReferenceModels(skeleton(family("qwen3_moe")))
    with pytest.raises(ConfigError, match="does not keep sliding_window=5 when it is saved"):
        references.find_attributes({"sliding_window": 5, "use_sliding_window": False})
    references.find_attributes({"sliding_window": 5, "use_sliding_window": True})


def test_what_the_model_has_no_more_is_left_out() -> None:
    model = skeleton(masked_lm("bert"))
    patch = {"attention_probs_dropout_prob": 0.3}
    paths = [f"bert.encoder.layer.{n}.attention.self.dropout" for n in range(2)]
    assert list(ReferenceModels(model).find_attributes(patch)) == paths
    model.bert.encoder.layer[0].attention.self = nn.Identity()
    assert ReferenceModels(model).find_attributes(patch) == {paths[1]: {"p": 0.3}}
