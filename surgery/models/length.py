"""How many positions a model is for, and what else beside its `max_position_embeddings` says it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import LARGE_INTEGER

LENGTH = "max_position_embeddings"
# Other names for the same number. Configs may hold several, and vLLM reads the smallest.
_ALSO = (
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_len",
    "seq_length",
    "model_max_length",
)


def read_length(config: PreTrainedConfig) -> int | None:
    """Read how many positions a text model is for; ``None`` if its config does not say.

    Dynamic scaling begins beyond `max_position_embeddings` and serves `factor` times as many.
    """
    text = config.get_text_config()
    length = getattr(text, LENGTH, None)
    if type(length) is not int:
        return None
    factors = [
        float(parameters.get("factor") or 1)
        for parameters in _list_rope_parameters(getattr(text, "rope_parameters", None))
        if parameters.get("rope_type") == "dynamic"
    ]
    return int(length * max([1.0, *factors]))


def _list_rope_parameters(held: Any) -> Iterator[Mapping[str, Any]]:
    """List the parameters for all layers, or those of each layer type."""
    if isinstance(held, Mapping):
        yield held
        yield from (below for below in held.values() if isinstance(below, Mapping))


def state_length_(model: PreTrainedModel, before: PreTrainedConfig) -> None:
    """Write a new length into what else says the old one: config keys and the generation config.

    Args:
        before: the config as it was.
    """
    old, new = read_length(before), read_length(model.config)
    if old is None or new is None or old == new:
        return
    text = model.config.get_text_config()
    aliases = getattr(text, "attribute_map", {})
    for config in {id(one): one for one in (model.config, text)}.values():
        for name in _ALSO:
            if name not in aliases and vars(config).get(name) == old:
                setattr(config, name, new)
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.max_length == old:
        generation.max_length = new


def state_tokenizer_length_(
    tokenizer: PreTrainedTokenizerBase, before: PreTrainedConfig, after: PreTrainedConfig
) -> None:
    """Let a tokenizer truncate where the model now ends.

    A tokenizer without a limit, and one whose model is for as many positions as before, stay as
    they are.

    Args:
        before, after: the configs of the original and of the result.
    """
    old, new = read_length(before), read_length(after)
    if old is None or new is None or old == new:
        return

    def restate(held: int) -> int:
        return new if old < new else min(held, new)

    if tokenizer.model_max_length <= LARGE_INTEGER:
        tokenizer.model_max_length = restate(tokenizer.model_max_length)
    # `tokenizer.json` may hold a limit of its own, which other software obeys.
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    truncation = getattr(backend, "truncation", None)
    if truncation is not None:
        held = restate(truncation["max_length"])
        backend.enable_truncation(**{**truncation, "max_length": held})
    stated = tokenizer.init_kwargs.get("max_length")
    if isinstance(stated, int):
        tokenizer.init_kwargs["max_length"] = restate(stated)
