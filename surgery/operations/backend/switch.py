"""Which code computes attention, compared with eager on the first batch."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedConfig, PreTrainedModel

from surgery.errors import PlanError
from surgery.verify.first_batch import check_first_batch


def set_backend(
    model: PreTrainedModel, implementation: str, check: bool = True, tolerance: float | None = None
) -> None:
    """Let `model` compute attention with `implementation`.

    Args:
        check: compare with eager on the first batch that the model sees (`check_first_batch`).
        tolerance: for that comparison.

    Raises:
        PlanError: transformers refuses it, or does not do it.
    """
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        raise PlanError(
            f"attention backend {implementation}: {' '.join(str(error).split())}"
        ) from error
    for path, config in _iterate_configs(model):
        held = config._attn_implementation
        if held != implementation:
            raise PlanError(
                f"attention backend {implementation}: {path or type(model).__name__} keeps {held}"
            )
    if check:
        check_first_batch(model, tolerance)


def _iterate_configs(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield the config of the model and of every model within it, each once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            yield path, module.config
