"""Says which heads go wrong while they train, and ends the training if that is wanted."""

from __future__ import annotations

from typing import Any, TypedDict

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger

from surgery.console import say
from surgery.errors import ConfigError

from .head_conditions import CONDITIONS, REMEMBERED, Judged, conditions
from .head_monitor import HeadMonitor, Observation

ACTIONS = ("log", "alert", "stop")
LISTED = 8


class Alarm(TypedDict):
    """One head in one condition, from the step on at which it was noticed."""

    alarm: str
    step: int
    layer: int
    head: int
    value: float
    threshold: float


class HeadAlarms(Callback):
    """Reads what the monitors observed, and speaks up for heads that stay in a bad condition.

    A head alarms once, and again only after it has recovered in between. All ranks of a run read
    the same figures, and so stop at the same step. Logs `alarms/<kind>`, the number of heads in
    that condition.

    Args:
        collapse: `normalized_entropy` at or below this share of what it was at most.
        uniform: `normalized_entropy` at or above it.
        logits: `max_logit` at or above it.
        dead: `output_norm` at or below this share of what it was at most, or of the layer's median.
            ``None`` in place of any of these four: no such alarm.
        patience: consecutive observations in that condition before a head alarms.
        warmup_steps: what is observed before this step is neither judged nor remembered.
        action: log: a line on the console | alert: that, and an alert by W&B | stop: that, and the
            training ends.

    Raises:
        ConfigError: options that cannot be.
    """

    name = "head_alarms"

    def __init__(
        self,
        collapse: float | None = 0.02,
        uniform: float | None = 0.99,
        logits: float | None = 1000.0,
        dead: float | None = 0.01,
        patience: int = 3,
        warmup_steps: int = 0,
        action: str = "log",
    ) -> None:
        self.thresholds = {"collapse": collapse, "uniform": uniform, "logits": logits, "dead": dead}
        self.patience = patience
        self.warmup_steps = warmup_steps
        self.action = action
        self._check()
        self.alarms: list[Alarm] = []
        self._judged: dict[str, int] = {}
        self._streaks: dict[str, torch.Tensor] = {}
        self._alarmed: dict[str, torch.Tensor] = {}
        self._highest: dict[str, torch.Tensor] = {}

    def _check(self) -> None:
        for kind, threshold in self.thresholds.items():
            top = float("inf") if kind == "logits" else 1.0
            number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
            if threshold is not None and not (number and 0 <= threshold <= top):
                valid = "a number from 0" if kind == "logits" else "a number from 0 to 1"
                raise ConfigError(
                    f"{self.name}.{kind}",
                    "is no threshold",
                    given=threshold,
                    valid=f"{valid}, or null for no such alarm",
                )
        for option, least in (("patience", 1), ("warmup_steps", 0)):
            value = getattr(self, option)
            if type(value) is not int or value < least:
                raise ConfigError(
                    f"{self.name}.{option}",
                    f"must be a whole number, at least {least}",
                    given=value,
                )
        if self.action not in ACTIONS:
            raise ConfigError(
                f"{self.name}.action", "is no action", given=self.action, valid=ACTIONS
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        observed = {name for monitor in _monitors(trainer) for name in monitor.metrics}
        blind = [
            f"{kind} ({metric})"
            for kind, metric in CONDITIONS.items()
            if self.thresholds[kind] is not None and metric not in observed
        ]
        if blind:
            say(f"{self.name}: nothing observes what these would read: {', '.join(blind)}")
        if self.action == "alert" and not any(isinstance(x, WandbLogger) for x in trainer.loggers):
            say(f"{self.name}: action=alert needs logger=wandb; alarms are only printed")

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        for monitor in _monitors(trainer):
            fresh = monitor.observations[self._judged.get(monitor.name, 0) :]
            self._judged[monitor.name] = len(monitor.observations)
            for seen in fresh:
                if seen["step"] >= self.warmup_steps:
                    self._judge(trainer, seen)

    def _judge(self, trainer: pl.Trainer, seen: Observation) -> None:
        for metric in set(REMEMBERED) & seen["metrics"].keys():
            now, before = seen["metrics"][metric], self._highest.get(metric)
            known = before is not None and before.shape == now.shape
            self._highest[metric] = torch.fmax(before, now) if known else now  # type: ignore[arg-type]
        counts = {}
        for kind, judged in conditions(seen, self.thresholds, self._highest).items():
            fresh = self._remember(kind, judged)
            counts[f"alarms/{kind}"] = float(self._alarmed[kind].sum())
            if fresh.any():
                self._raise(trainer, kind, seen, judged, fresh)
        for logger in trainer.loggers if counts else ():
            logger.log_metrics(counts, step=seen["step"])

    def _remember(self, kind: str, judged: Judged) -> torch.Tensor:
        """Which heads alarm now: bool [heads of all layers]."""
        streak = self._streaks.get(kind)
        if streak is None or streak.shape != judged.bad.shape:
            streak = torch.zeros(judged.bad.shape, dtype=torch.long)
            self._alarmed[kind] = torch.zeros_like(judged.bad)
        # What was not observed is neither worse nor better than before.
        streak = torch.where(judged.known, torch.where(judged.bad, streak + 1, 0), streak)
        self._streaks[kind] = streak
        now = streak >= self.patience
        fresh = now & ~self._alarmed[kind]
        self._alarmed[kind] = now
        return fresh

    def _raise(
        self, trainer: pl.Trainer, kind: str, seen: Observation, judged: Judged, fresh: torch.Tensor
    ) -> None:
        step, places = seen["step"], [(i, h) for i, n in enumerate(seen["heads"]) for h in range(n)]
        value = judged.value.nan_to_num()  # JSON knows no infinity
        raised = [
            Alarm(
                alarm=kind,
                step=step,
                layer=places[index][0],
                head=places[index][1],
                value=value[index].item(),
                threshold=judged.threshold[index].item(),
            )
            for index in fresh.nonzero().flatten().tolist()
        ]
        self.alarms += raised
        text = _sentence(kind, raised)
        say(f"{self.name}: step {step}: {text}")
        if self.action != "log" and trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.experiment.alert(f"{kind} at step {step}", text, level="WARN")
        if self.action == "stop" and not trainer.should_stop:
            trainer.should_stop = True
            say(f"{self.name}: training ends after step {step}: action=stop, and {text}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "alarms": [dict(alarm) for alarm in self.alarms],
            "judged": self._judged,
            "streaks": self._streaks,
            "alarmed": self._alarmed,
            "highest": self._highest,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.alarms = list(state_dict["alarms"])
        self._judged = dict(state_dict["judged"])
        self._streaks = dict(state_dict["streaks"])
        self._alarmed = dict(state_dict["alarmed"])
        self._highest = dict(state_dict["highest"])


def _monitors(trainer: pl.Trainer) -> list[HeadMonitor]:
    return [c for c in trainer.callbacks if isinstance(c, HeadMonitor)]  # type: ignore[attr-defined]


def _sentence(kind: str, raised: list[Alarm]) -> str:
    shown = ", ".join(f"{a['layer']}.{a['head']} ({a['value']:.3g})" for a in raised[:LISTED])
    more = f" and {len(raised) - LISTED} more" if len(raised) > LISTED else ""
    limits = sorted({f"{a['threshold']:.3g}" for a in raised}, key=float)
    limit = limits[0] if len(limits) == 1 else f"{limits[0]} to {limits[-1]}"
    heads = "1 head" if len(raised) == 1 else f"{len(raised)} heads"
    return f"{kind}: {CONDITIONS[kind]} past {limit} in {heads} (layer.head): {shown}{more}"
