"""How far a model's attention blocks are from its teacher's, by what they return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from surgery.errors import SurgeryError
from surgery.training.pairs import Pair


class Outputs:
    """What some modules of a model return in its next forward pass, call by call.

    Hooks are there only while it is open; gradients flow through what is kept.

    Attributes:
        cut_off: whether some output was computed where nothing is differentiated.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.cut_off = False
        # Per path and call: an output, and how often it had been written to.
        self._calls: dict[str, list[tuple[torch.Tensor, int]]] = {path: [] for path in paths}
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> Outputs:
        # Called after other hooks of the model, which may run it by themselves.
        self._handles.append(self._model.register_forward_pre_hook(self._clear))
        for path in self._calls:
            module = self._model.get_submodule(path)
            self._handles.append(module.register_forward_hook(self._make_hook(path)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def get_outputs(self, path: str) -> list[torch.Tensor]:
        """Get the outputs of the module at `path`, in the order of the calls.

        Raises:
            SurgeryError: the model has overwritten one since.
        """
        if any(output._version != version for output, version in self._calls[path]):
            raise SurgeryError(
                f"objective.attention_weight: {type(self._model).__name__} writes to the output of "
                f"{path}, so it cannot be matched"
            )
        return [output for output, _ in self._calls[path]]

    def _clear(self, model: nn.Module, args: Any) -> None:
        self.cut_off = False
        for outputs in self._calls.values():
            outputs.clear()

    def _make_hook(self, path: str) -> Any:
        def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self.cut_off |= not torch.is_grad_enabled()
            self._calls[path].append((output, output._version))

        return keep


def compute_attention_error(
    model: Outputs, teacher: Outputs, pairs: Sequence[Pair], mask: torch.Tensor | None
) -> torch.Tensor:
    """Compute the mean over sites of sum |y_s - y_t|^2 / sum |y_t|^2, in fp32.

    Matching of hidden states as in TinyBERT (Jiao et al. 2019, arXiv:1909.10351), at the end of
    attention: y are the outputs of the output projections, at real positions. A site that is called
    several times (shared layers) counts once, with all its calls. Where the teacher returns nothing
    but zeros, the error is not relative.

    Args:
        mask: [B, S], which positions are real; ``None``: all.

    Raises:
        SurgeryError: outputs that no gradient reaches, or that do not belong together.
    """
    if model.cut_off and torch.is_grad_enabled():
        raise SurgeryError(
            "objective.attention_weight: no gradient reaches attention under reentrant gradient "
            "checkpointing; use gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    errors = []
    for ours, theirs in pairs:
        outputs, targets = model.get_outputs(ours), teacher.get_outputs(theirs)
        if not outputs or len(outputs) != len(targets):
            raise SurgeryError(
                f"objective.attention_weight: {ours} is called {len(outputs)} times in a forward "
                f"pass, and {theirs} {len(targets)} times in the teacher's; each has to be called, "
                "and as often"
            )
        error = size = torch.zeros((), device=outputs[0].device)
        for output, target in zip(outputs, targets, strict=True):
            output, target = _select_real(output, mask, ours), _select_real(target, mask, theirs)
            if output.shape != target.shape:
                raise SurgeryError(
                    f"objective.attention_weight: {ours} gives {list(output.shape)} (positions, "
                    f"width), and {theirs} of the teacher {list(target.shape)}"
                )
            target = target.detach().float()
            error = error + (output.float() - target).square().sum()
            size = size + target.square().sum()
        errors.append(error / torch.where(size > 0, size, 1.0))
    return torch.stack(errors).mean()


def _select_real(output: torch.Tensor, mask: torch.Tensor | None, path: str) -> torch.Tensor:
    """Select [positions, width]: the real ones of [B, S, width], in any layout."""
    rows = output.reshape(-1, output.shape[-1])
    if mask is None:
        return rows
    if output.shape[:-1] == mask.shape or output.shape[:-1] == (mask.numel(),):
        return rows[mask.flatten().bool()]
    if output.ndim == 2 and len(rows) == int(mask.sum()):  # padding was taken out before
        return rows
    raise SurgeryError(
        f"objective.attention_weight: {path} returns {list(output.shape)} for a batch of "
        f"{list(mask.shape)}, so real positions cannot be distinguished from padding"
    )
