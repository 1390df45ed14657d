"""Tiny random models of every model type that transformers maps to a language or image head.

`python -m benchmarks.coverage.zoo [kind] [type]` builds and runs them all.
"""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from benchmarks.coverage import shrink
from benchmarks.coverage.exceptions import (
    DECODERS,
    EXCEPTIONS,
    NO_FP64,
    NONDETERMINISTIC,
    UNBUILDABLE,
)
from benchmarks.coverage.feeds import LENGTH, feed
from surgery.models.tiny import randomize_

__all__ = [
    "EXCEPTIONS",
    "KINDS",
    "LENGTH",
    "NONDETERMINISTIC",
    "NO_FP64",
    "UNBUILDABLE",
    "inputs",
    "logits",
    "model_types",
    "tiny_config",
    "tiny_model",
]

KINDS: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "image-classification": AutoModelForImageClassification,
}
_MAPPINGS = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq-lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}


def model_types(kind: str) -> list[str]:
    """Every model type that transformers maps for this kind, sorted."""
    return sorted(_MAPPINGS[kind])


def _class_name(kind: str, model_type: str) -> str:
    mapped = _MAPPINGS[kind][model_type]
    return mapped if isinstance(mapped, str) else mapped[0]


def tiny_config(kind: str, model_type: str, *, kv_heads: int | None = None) -> PreTrainedConfig:
    """The type's default config, shrunk; as many KV heads as query heads where possible."""
    several = not isinstance(_MAPPINGS[kind][model_type], str)  # classes: the config names one
    extra = {"architectures": [_class_name(kind, model_type)]} if several else {}
    config = shrink.tiny_config(model_type, decoder=kind == "causal-lm", kv_heads=kv_heads, **extra)
    return config.decoder if (kind, model_type) in DECODERS else config


def tiny_model(
    kind: str,
    model_type: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
    kv_heads: int | None = None,
) -> PreTrainedModel:
    """A random model in eval mode, the same at every call."""
    config = tiny_config(kind, model_type, kv_heads=kv_heads)
    state = torch.get_rng_state()
    torch.manual_seed(seed)  # buffers that are drawn when the model is built
    try:
        # torch's grouped matrix product knows no fp64.
        build = KINDS[kind].from_config
        if (kind, model_type) in DECODERS:
            build = getattr(transformers, _class_name(kind, model_type))._from_config
        model = build(config, attn_implementation=attention, experts_implementation="eager")
    finally:
        torch.set_rng_state(state)
    model = randomize_(model, seed).eval()
    _settle(kind, model)
    return model.to(dtype)


@torch.no_grad()
def _settle(kind: str, model: PreTrainedModel) -> None:
    """Batch norms take the statistics of random inputs: with others the signal dies in depth."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms or kind != "image-classification":
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model(**inputs(kind, model, batch=8, seed=2))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def inputs(
    kind: str, model: PreTrainedModel, *, batch: int = 2, length: int = LENGTH, seed: int = 0
) -> dict[str, Any]:
    """Forward arguments of `model`, the same at every call."""
    return feed(kind, model, batch=batch, length=length, seed=seed)


@torch.no_grad()
def logits(model: PreTrainedModel, given: dict[str, Any]) -> Tensor:
    """The main output."""
    output = model(**given)
    for name in ("logits", "probabilities", "last_hidden_state"):
        if (found := output.get(name)) is not None:
            return found
    raise TypeError(f"{type(output).__name__} has no logits")


def check(kind: str, model_type: str) -> str | None:
    """What is wrong with the tiny model of this type, if anything is."""
    model = tiny_model(kind, model_type)
    first = logits(model, inputs(kind, model))
    if not torch.isfinite(first).all():
        return "logits are not finite"
    if torch.equal(first, logits(model, inputs(kind, model, seed=1))):
        return "logits do not depend on the input"
    random = not torch.equal(first, logits(model, inputs(kind, model)))
    if random != ((kind, model_type) in NONDETERMINISTIC):
        return "random in eval mode" if random else "noted as random but is not"
    return None


def main(kinds: list[str], only: str | None, verbose: bool = False) -> int:
    """Check every type; print failures and counts."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    failures = 0
    for kind in kinds:
        built = []
        failed = []
        skipped = []
        for model_type in model_types(kind):
            if only is not None and model_type != only:
                continue
            if (kind, model_type) in UNBUILDABLE:
                skipped.append(model_type)
                print(f"{kind} {model_type}: cannot be built: {UNBUILDABLE[kind, model_type]}")
                continue
            start = time.perf_counter()
            try:
                problem = check(kind, model_type)
            except Exception as error:
                if only is not None:
                    traceback.print_exc()
                problem = f"{type(error).__name__}: {error}"
            if problem is None:
                built.append(model_type)
            else:
                failed.append(model_type)
                print(f"{kind} {model_type}: {problem[:300]}")
            if (seconds := time.perf_counter() - start) > 1:
                print(f"{kind} {model_type}: {seconds:.1f} s")
        print(f"{kind}: {len(built)} built, {len(failed)} failed, {len(skipped)} unbuildable")
        failures += len(failed)
    return failures


if __name__ == "__main__":
    arguments = sys.argv[1:]
    chosen = [each for each in arguments if each in KINDS] or list(KINDS)
    types = [each for each in arguments if each not in KINDS]
    sys.exit(main(chosen, types[0] if types else None) > 0)
