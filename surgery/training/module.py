"""The LightningModule: a model operated in `configure_model`, healed by an objective."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from surgery.config.schema import ModelConfig, ObjectiveConfig, ObjectiveName, OptimConfig, Task
from surgery.data.collate import Batch
from surgery.errors import ConfigError, SurgeryError
from surgery.execute.live import apply_
from surgery.importance.estimate import Scorer
from surgery.models.packed import make_inputs
from surgery.models.source import ModelSource, build_model
from surgery.plan.operation import TrainingDecision
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_specs
from surgery.training.objectives import compute_training_loss, count_labelled
from surgery.training.optim import build_optimizer, make_warmup_cosine
from surgery.training.pairs import Pair, pair_with_original
from surgery.training.parameters import select_frozen
from surgery.training.teacher import load_teacher


class SurgeryModule(pl.LightningModule):
    """A model, what was done to it, and how it heals.

    All arguments are plain data, kept as hyperparameters: `load_from_checkpoint` rebuilds the
    operated structure from them alone and needs neither the original weights nor this config.

    Args:
        model: `model.*` of the original.
        model_config: the original architecture's config (`config.to_dict()`).
        plan: a plan as JSON.
        objective: `objective.*`.
        optim: `optim.*`.
        load_weights: whether `configure_model` starts from the original's weights; stored as
            ``False`` in checkpoints, whose own weights follow.
        pairs: output projections of the model and of its teacher, for `objective.attention_weight`;
            ``None``: those of the original (`surgery.training.pairs`).
        tensors: the plan's calibrated tensors, where it has any. They are no hyperparameters:
            checkpoints hold what became of them.
        deferred: what is left to training, as plain data: ``operation`` (its spec), and the options
            of `Operation.follow_training`. It is performed after training.
        scorer: who scores heads for it; no hyperparameter either.

    Attributes:
        decision: what decides on the deferred operation; ``None`` without one.
        trained: number of parameters that `optim.parameters` leaves trainable, set when the model
            is built (before it is sharded).

    Raises:
        ConfigError: attention that cannot be paired, or (`configure_model`) parameters that cannot
            be chosen.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        model_config: Mapping[str, Any],
        plan: Mapping[str, Any],
        objective: Mapping[str, Any],
        optim: Mapping[str, Any],
        load_weights: bool = True,
        pairs: Sequence[Sequence[str]] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        deferred: Mapping[str, Any] | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__()
        # No logger: the plan of a large model would fill a dashboard's table of runs.
        self.save_hyperparameters(ignore=["tensors", "scorer"], logger=False)
        self.plan = Plan.from_json(plan, tensors)
        self.objective = parse_section(ObjectiveConfig, objective)
        self.optim = parse_section(OptimConfig, optim)
        self.source = ModelSource(parse_section(ModelConfig, model))
        self.model: PreTrainedModel | None = None
        self.decision = self._make_decision(deferred, scorer)
        # Not a submodule: the original must appear in no checkpoint and no optimizer.
        self._teacher: list[PreTrainedModel] = _Shared()
        self._pairs = self._find_pairs(pairs) if self.objective.attention_weight > 0 else []
        self.trained: int | None = None
        self._frozen: list[nn.Parameter] | None = None
        self._computed: list[tuple[nn.Module, str, torch.Tensor]] | None = None
        self._held_out = (0.0, 0)  # sum of the label losses of all tokens, number of tokens

    @property
    def task(self) -> Task:
        return self.source.spec.task

    def _make_decision(
        self, deferred: Mapping[str, Any] | None, scorer: Scorer | None
    ) -> TrainingDecision | None:
        if deferred is None:
            return None
        (operation,) = parse_specs([deferred["operation"]])
        return operation.follow_training(self.plan.after, deferred, self.task, scorer)

    def _find_pairs(self, pairs: Sequence[Sequence[str]] | None) -> list[Pair]:
        if pairs is not None:
            return [(own, theirs) for own, theirs in pairs]
        if self.objective.teacher is not None:
            raise ConfigError(
                "objective.teacher",
                "needs pairs of attention blocks, the model's and the teacher's",
                valid="SurgeryModule(pairs=…)",
            )
        return pair_with_original(self.plan)

    def adopt(self, model: PreTrainedModel, teacher: PreTrainedModel | None = None) -> None:
        """Use a model that is operated already, and a teacher that is loaded already."""
        self.undo_freezing()
        if self.decision is not None:
            self.decision.detach()
        self.model, self._computed = model, None
        self._teacher = _Shared([] if teacher is None else [teacher.requires_grad_(False).eval()])

    def configure_model(self) -> None:
        """Build and operate the model, freeze what is not trained, load a teacher. Idempotent."""
        if self.model is None:
            # Weights that are about to be replaced prove nothing.
            whole = self.hparams["load_weights"]
            plan = self.plan if whole else self.plan.fill_zeros()
            self.model = apply_(self._load_original(), plan, check=whole)
        self.model.train()  # transformers hands models out in eval mode
        if self.decision is not None:
            self.decision.attach(self.model)
        if self._computed is None:
            self._computed = _copy_computed_buffers(self.model)
        if self._frozen is None:
            self._frozen = select_frozen(self.model, self.plan, self.optim.parameters)
            for parameter in self._frozen:
                parameter.requires_grad_(False)
            self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if self.objective.name is ObjectiveName.distill and not self._teacher and self._fitting:
            self._teacher = _Shared([load_teacher(self.source.spec, self.objective.teacher)])

    def undo_freezing(self) -> None:
        """Make trainable again what was frozen for `optim.parameters`; a further fit refreezes."""
        for parameter in self._frozen or []:
            parameter.requires_grad_(True)
        self._frozen = None

    def _load_original(self) -> PreTrainedModel:
        if self.hparams["load_weights"]:
            return self.source.load()
        fields = dict(self.hparams["model_config"])
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        config._attn_implementation = self.source.spec.attn_implementation
        dtype = self.source.spec.dtype.value
        if dtype != "auto":
            # Built in it, not cast to it: a cast would round RoPE's frequencies too.
            config.dtype = getattr(torch, dtype)
        return build_model(config, self.task)

    @property
    def _fitting(self) -> bool:
        return self._trainer is not None and self._trainer.state.fn == "fit"

    def on_fit_start(self) -> None:
        # A `*-true` precision has cast them by now, RoPE's frequencies among them: at bf16 the
        # angles of far positions are off by whole turns, and no checkpoint would remember why.
        self.restore_computed_buffers()
        for teacher in self._teacher:
            nn.Module.to(teacher, self.device)

    def _keep_computed_buffers(self) -> None:
        assert self.model is not None
        self._computed = _copy_computed_buffers(self.model)

    def restore_computed_buffers(self) -> None:
        """Undo what was done to buffers that are computed from the config."""
        for module, name, exact in self._computed or []:
            setattr(module, name, exact.to(self.device, copy=True))

    # Callbacks that average weights average buffers too, and so round what is computed. They write
    # into the model at the start of a validation's epoch and at the end of training.

    def on_validation_start(self) -> None:
        self._keep_computed_buffers()

    def on_train_epoch_end(self) -> None:
        self._keep_computed_buffers()

    def on_train_end(self) -> None:
        self.restore_computed_buffers()

    def on_train_start(self) -> None:
        if self.decision is not None:
            self.decision.follow(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Not before a batch: by then callbacks watch, and would see what is measured here.
        if self.decision is not None:
            self.decision.follow(self.trainer)

    def forward(self, **batch: torch.Tensor) -> Any:
        assert self.model is not None
        return self.model(**make_inputs(self.model, batch))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert self.model is not None
        teacher = self._teacher[0] if self._teacher else None
        loss = compute_training_loss(
            self.model, teacher, batch, self.objective, self.task, self._pairs
        )
        total, *parts = self._average_over_processes([loss.total, *loss.parts.values()])
        if not torch.isfinite(total):
            self._refuse_loss(total, batch)
        self.log("train/loss", total, prog_bar=True)
        for name, value in zip(loss.parts, parts, strict=True):
            self.log(f"train/{name}", value)
        if self.decision is not None:
            for name, number in self.decision.get_metrics().items():
                self.log(name, number)
        return loss.total

    def _refuse_loss(self, total: torch.Tensor, batch: Batch) -> NoReturn:
        """Raise an error for a loss that is no number; all processes call it in the same step."""
        unlabelled = total.new_tensor(float(count_labelled(batch, self.task) == 0))
        (share,) = self._average_over_processes([unlabelled])
        remedy = "lower optim.lr, or train in a wider trainer.precision"
        if share > 0:
            remedy = "no position of this batch carries a label; raise data.batch_size"
        raise SurgeryError(
            f"the training loss is {total.item()} at step {self.global_step}; {remedy}"
        )

    def _average_over_processes(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Average scalars over all processes, whose gradients are averaged in the same way.

        So each process judges the same loss, and all of them stop together if it is no number.
        """
        dtype = torch.promote_types(values[0].dtype, torch.float32)
        own = torch.stack([value.detach().to(self.device, dtype) for value in values])
        if self._trainer is None or self.trainer.world_size == 1:
            return list(own)
        mean = self.trainer.strategy.reduce(own, reduce_op="mean")
        assert isinstance(mean, torch.Tensor)
        return list(mean)

    def on_validation_epoch_start(self) -> None:
        self.restore_computed_buffers()
        self._held_out = (0.0, 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        count = count_labelled(batch, self.task)
        if count:
            nll, seen = self._held_out
            self._held_out = (nll + float(self(**batch).loss) * count, seen + count)

    def on_validation_epoch_end(self) -> None:
        loss = self.compute_held_out_loss()
        if loss is not None:
            mean = torch.tensor(loss, dtype=torch.float64)  # the same in all of them already
            self.log("val/loss", mean, prog_bar=True, sync_dist=True, batch_size=1)

    def compute_held_out_loss(self) -> float | None:
        """Compute the loss of this validation, the mean over the tokens of all processes.

        All processes must call it. ``None``: no token carried a label.
        """
        # Summed here, since Lightning's mean over processes rounds the number of tokens, and waits
        # for ever for a process whose windows carry no label.
        sums = torch.tensor(self._held_out, dtype=torch.float64)
        if self.trainer.world_size > 1:
            reduced = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
            assert isinstance(reduced, torch.Tensor)
            sums = reduced
        return float(sums[0] / sums[1]) if sums[1] > 0 else None

    def configure_optimizers(self) -> Any:
        assert self.model is not None
        if self.trainer.world_size > 1:  # only the first process has measured what it follows from
            self.optim.lr = self.trainer.strategy.broadcast(self.optim.lr)
        optimizer = build_optimizer(self.model.named_parameters(), self.optim)
        steps = self.trainer.estimated_stepping_batches
        total = int(steps) if steps != float("inf") else None
        schedule = make_warmup_cosine(optimizer, self.optim, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._fitting:
            _check_resumed(checkpoint["hyper_parameters"].get("deferred"), self.hparams["deferred"])
            _check_decided(checkpoint["hyper_parameters"]["plan"], self.hparams["plan"])
        if self.decision is not None:
            self.decision.load_state_dict(checkpoint["decision"])
        stored = checkpoint["hyper_parameters"]["optim"].get("parameters", "all")
        if self._fitting and stored != self.optim.parameters.value:
            raise ConfigError(
                "optim.parameters",
                "the checkpoint to resume from trained other parameters",
                given=self.optim.parameters.value,
                valid=stored,
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hyper_parameters"]["load_weights"] = False
        if self.decision is not None:
            checkpoint["decision"] = self.decision.state_dict()


def _check_resumed(stored: Mapping[str, Any] | None, current: Mapping[str, Any] | None) -> None:
    """Check that a resumed training decides as the one that was stopped.

    What does not change a decision may differ: the export's format, and how many windows run side
    by side.

    Args:
        stored, current: `SurgeryModule(deferred=…)` of the checkpoint and of this run.

    Raises:
        ConfigError: it does not; the error names the key that differs.
    """
    found = stored or current
    if found is None:
        return
    was, now = ((one or {}).get("operation", {}) for one in (stored, current))
    if was != now:
        differing = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        raise ConfigError(
            f"attention.{found['operation']['operation']}",
            "the checkpoint to resume from was trained with other options of it",
            given={name: now[name] for name in differing if name in now} or None,
            valid=str({name: was[name] for name in differing if name in was} or "none of it"),
        )
    was, now = (_list_run_options(one or {}) for one in (stored, current))
    for key in sorted({**was, **now}):
        if was.get(key) != now.get(key):
            raise ConfigError(
                key,
                "the checkpoint to resume from was trained with another value",
                given=now.get(key),
                valid=str(was.get(key)),
            )


def _check_decided(stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that a resumed training starts from the heads that the stopped one started from.

    Raises:
        ConfigError: calibration decided otherwise.
    """
    was, now = (json.dumps(plan["changes"], sort_keys=True) for plan in (stored, current))
    if was != now:
        raise ConfigError(
            "resume",
            "this run's plan takes other heads or tensors than that of the checkpoint",
            valid="the same operations, calibration.*, seed and data as in the run that wrote it",
        )


def _list_run_options(deferred: Mapping[str, Any]) -> dict[str, Any]:
    """List the options outside its operation that a decision depends on, by config key."""
    scoring = deferred.get("importance", {}).items()
    options = {f"importance.{name}": value for name, value in scoring if name != "memory_windows"}
    return {"seed": deferred.get("seed"), **options}


def _copy_computed_buffers(model: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """Copy the buffers that are computed from the config and never saved."""
    return [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    ]


class _Shared(list[PreTrainedModel]):
    """Models that a copy of the module shares with it: averaging weights copies the module."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


def parse_section(schema: Any, data: Mapping[str, Any]) -> Any:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(data)))
