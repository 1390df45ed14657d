"""The weights with the lowest held-out loss that a training has seen, kept on disk."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from surgery.console import say
from surgery.errors import SurgeryError
from surgery.files import write_whole

SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


class Evaluation(NamedTuple):
    """One validation: the held-out loss (nats per token) of the weights after `step` steps.

    The last step may have two: a callback may average the weights when training ends.
    """

    step: int
    loss: float


class BestWeights(Callback):
    """Keeps the weights with the lowest held-out loss, as each validation of Lightning finds it.

    It comes first among the callbacks: at the end of a validation, those that average weights
    (`WeightAveraging`) put the trained weights back, and what is kept must be what was validated.
    Only trained parameters and saved buffers are written: the others stay as they are. While an
    operation is still decided by the training, nothing is kept, since the structure is not final.

    Args:
        file: where they are kept.
        keep: whether they are; if not, the losses are only remembered.
        resumed: the checkpoint that this training continues from.
        windows: says which windows are held out; losses on others are not compared with theirs.

    Attributes:
        evaluations: all validations so far, in order.
        first: the first one whose weights could be kept; ``None``: there was none.
        best: that of the weights that are kept; ``None``: none are.
    """

    def __init__(
        self, file: Path, *, keep: bool = True, resumed: str | None = None, windows: str = ""
    ) -> None:
        self.file = file
        self.keep = keep
        self.windows = windows
        self.evaluations: list[Evaluation] = []
        self.first: Evaluation | None = None
        self.best: Evaluation | None = None
        self._resumed = None if resumed is None else Path(resumed)
        self._earlier: Path | None = None
        self._validated: torch.Tensor | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, SHARDED) and self.keep:
            self.keep = False
            say("  the weights are sharded: the last are exported, whatever their held-out loss")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.keep:
            return
        found = self._take_earlier() if trainer.is_global_zero else None
        if not trainer.strategy.broadcast(found) and self.best is not None:
            say(f"  the best weights so far (step {self.best.step}) are not beside the checkpoint")
            self.first = self.best = None

    def _take_earlier(self) -> bool:
        """Bring the weights that a resumed training kept; remove what is left of another run."""
        places = [self.file]
        if self._resumed is not None:
            places += [folder / self.file.name for folder in self._resumed.resolve().parents[:2]]
        places += [self._earlier] if self._earlier is not None else []
        found = next((place for place in places if self._holds_best(place)), None)
        if found is None:
            self.file.unlink(missing_ok=True)
        elif found.resolve() != self.file.resolve():
            with write_whole(self.file) as draft:
                shutil.copyfile(found, draft)
        return found is not None

    def _holds_best(self, file: Path) -> bool:
        if self.best is None or not file.is_file():
            return False
        try:
            with safe_open(file, "pt") as opened:
                return (opened.metadata() or {}) == _describe(self.best)
        except (OSError, SafetensorError):
            return False

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        fix_averages_(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        fix_averages_(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        loss = pl_module.compute_held_out_loss()
        if loss is None:
            return
        now = Evaluation(trainer.global_step, loss)
        if now not in self.evaluations[-1:]:
            self.evaluations.append(now)
        is_final = pl_module.decision is None or pl_module.decision.is_settled(trainer)
        self._validated = compute_checksum(trainer, pl_module.model)
        better = is_final and (self.best is None or now.loss < self.best.loss)
        # All processes have the same loss, but only one writes: let it decide.
        better = trainer.strategy.broadcast(better and math.isfinite(loss))
        if is_final and self.first is None:
            self.first = now
        if better:
            self.best = now
            if self.keep and trainer.is_global_zero:
                self._write(pl_module.model)
        note = ", the lowest so far" if better else "" if is_final else "; the model is not final"
        say(f"  held-out loss at step {now.step}: {loss:.4f}{note}")

    def is_validated(self, trainer: pl.Trainer, model: nn.Module) -> bool:
        """Whether the last validation was of the weights that `model` has now."""
        now = compute_checksum(trainer, model)
        return (
            bool(self.evaluations)
            and self.evaluations[-1].step == trainer.global_step
            and (now is None or (self._validated is not None and torch.equal(now, self._validated)))
        )

    def _write(self, model: nn.Module) -> None:
        assert self.best is not None
        weights = {
            name: tensor.detach().cpu().contiguous() for name, tensor in list_trained(model).items()
        }
        try:
            with write_whole(self.file) as draft:
                save_file(weights, draft, _describe(self.best))
        except (OSError, SafetensorError) as error:
            raise SurgeryError(f"{self.file} cannot be written: {error}") from None

    @torch.no_grad()
    def restore_(self, model: nn.Module) -> None:
        """Give `model` the weights that were kept, in place; nothing if none were.

        Raises:
            SurgeryError: the file is not what was written.
        """
        if not self.keep or self.best is None:
            return
        if not self._holds_best(self.file):
            raise SurgeryError(f"{self.file} no longer holds the weights of step {self.best.step}")
        tensors = list_trained(model)
        with safe_open(self.file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                tensors[name].copy_(opened.get_tensor(name))

    def state_dict(self) -> dict[str, Any]:
        return {
            "evaluations": [list(one) for one in self.evaluations],
            "first": None if self.first is None else list(self.first),
            "best": None if self.best is None else list(self.best),
            "file": str(self.file.absolute()),
            "windows": self.windows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["windows"] != self.windows:
            say("  other windows are held out than before: earlier held-out losses do not count")
            return
        self.evaluations = [Evaluation(*one) for one in state_dict["evaluations"]]
        self.first, self.best = (
            None if state_dict[name] is None else Evaluation(*state_dict[name])
            for name in ("first", "best")
        )
        self._earlier = Path(state_dict["file"])


class FirstAndLastValidation(Callback):
    """Validates before the first step and after the last, where Lightning does not.

    It comes last among the callbacks: by then the weights are those that training ends with, also
    if a callback has averaged them (`StochasticWeightAveraging`).

    Args:
        best: where the losses are remembered.
        every_n_steps: of a resumed training that may have been stopped before a validation.
    """

    def __init__(self, best: BestWeights, every_n_steps: int | None = None) -> None:
        self.best = best
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if pl_module.decision is not None:  # as the module does, only later
            pl_module.decision.follow(trainer)
        known = any(one.step == step for one in self.best.evaluations)
        due = self.best.best is None or bool(self.every_n_steps and step % self.every_n_steps == 0)
        if due and not known:
            _validate(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.restore_computed_buffers()  # the last validation may have come before averaging
        if trainer.global_step and not self.best.is_validated(trainer, pl_module.model):
            _validate(trainer)


def _validate(trainer: pl.Trainer) -> None:
    """Run the validation that Lightning runs inside a fit."""
    if not trainer.enable_validation:
        return
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False  # else a resumed loop takes its first batches for done
    trainer.validating = True
    loop.run()
    trainer.training = True


@torch.no_grad()
def fix_averages_(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Undo what averaging did to parameters that are not trained: a mean of equals is rounded.

    Call it before a callback brings its averages into the module.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = callback._average_model if isinstance(callback, WeightAveraging) else None
        if average is None:
            continue
        pairs = zip(pl_module.parameters(), average.module.parameters(), strict=True)
        for own, averaged in pairs:
            if not own.requires_grad:
                averaged.copy_(own)


def list_trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """List what training may change: trainable parameters, and buffers that are saved."""
    found: dict[str, torch.Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[name] = buffer
    return found


@torch.no_grad()
def compute_checksum(trainer: pl.Trainer, model: nn.Module) -> torch.Tensor | None:
    """Compute a norm of each trained tensor, to tell weights apart; ``None`` where sharded."""
    if isinstance(trainer.strategy, SHARDED):
        return None
    return torch.stack([tensor.float().norm().cpu() for tensor in list_trained(model).values()])


def _describe(evaluation: Evaluation) -> dict[str, str]:
    return {"step": str(evaluation.step), "held_out_loss": repr(evaluation.loss)}
