"""Report heads that go wrong during training, and stop the training if wanted."""

from __future__ import annotations

from typing import Any, TypedDict

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from surgery.console import say
from surgery.errors import ConfigError

from .head_conditions import CONDITIONS, REMEMBERED, HeadCondition, find_conditions
from .head_logging import find_wandb_run
from .head_monitor import HeadMonitor, Observation

ACTIONS = ("log", "alert", "stop")
LISTED = 8


class Alarm(TypedDict):
    """One head in a bad condition, and the step at which it was noticed."""

    alarm: str
    step: int
    layer: int
    head: int
    value: float
    threshold: float


class HeadAlarms(Callback):
    """Reads what the monitors observed, and raises alarms for heads that stay in a bad condition.

    A head raises an alarm once, and again only after it has recovered. All ranks of a run read the
    same figures, and so stop at the same step. It logs `alarms/<kind>`: the number of heads in
    that condition.

    Args:
        collapse: `normalized_entropy` is at or below this fraction of its highest value so far.
        uniform: `normalized_entropy` is at or above this value.
        logits: `max_logit` is at or above this value.
        dead: `output_norm` is at or below this fraction of its highest value so far, or of the
            layer's median. ``None`` for any of these four: no such alarm.
        patience: consecutive observations in that condition before an alarm.
        warmup_steps: observations before this step are ignored.
        action: log: print a line | alert: also send a W&B alert | stop: also end the training.

    Raises:
        ConfigError: an option is invalid.
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
                valid = "0 or more" if kind == "logits" else "in [0, 1]"
                raise ConfigError(
                    f"{self.name}.{kind}",
                    f"must be {valid}",
                    given=threshold,
                    valid=f"a number {valid}, or null for no such alarm",
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
                f"{self.name}.action", "unknown action", given=self.action, valid=ACTIONS
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        observed = {name for monitor in _find_monitors(trainer) for name in monitor.metrics}
        blind = [
            f"{kind} ({metric})"
            for kind, metric in CONDITIONS.items()
            if self.thresholds[kind] is not None and metric not in observed
        ]
        if blind:
            say(f"{self.name}: no monitor observes the metrics of: {', '.join(blind)}")
        if self.action == "alert" and not any(find_wandb_run(x) for x in trainer.loggers):
            say(f"{self.name}: action=alert needs logger=wandb; alarms are only printed")

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        for monitor in _find_monitors(trainer):
            fresh = monitor.observations[self._judged.get(monitor.name, 0) :]
            self._judged[monitor.name] = len(monitor.observations)
            for observation in fresh:
                if observation["step"] >= self.warmup_steps:
                    self._judge(trainer, observation)

    def _judge(self, trainer: pl.Trainer, observation: Observation) -> None:
        for metric in set(REMEMBERED) & observation["metrics"].keys():
            now, before = observation["metrics"][metric], self._highest.get(metric)
            known = before is not None and before.shape == now.shape
            self._highest[metric] = torch.fmax(before, now) if known else now  # type: ignore[arg-type]
        counts = {}
        conditions = find_conditions(observation, self.thresholds, self._highest)
        for kind, condition in conditions.items():
            fresh = self._remember(kind, condition)
            counts[f"alarms/{kind}"] = float(self._alarmed[kind].sum())
            if fresh.any():
                self._raise(trainer, kind, observation, condition, fresh)
        for logger in trainer.loggers if counts else ():
            logger.log_metrics(counts, step=observation["step"])

    def _remember(self, kind: str, condition: HeadCondition) -> torch.Tensor:
        """Count the observations in a condition; return the heads with a new alarm, bool."""
        streak = self._streaks.get(kind)
        if streak is None or streak.shape != condition.bad.shape:
            streak = torch.zeros(condition.bad.shape, dtype=torch.long)
            self._alarmed[kind] = torch.zeros_like(condition.bad)
        # Heads that were not observed keep their count.
        streak = torch.where(condition.known, torch.where(condition.bad, streak + 1, 0), streak)
        self._streaks[kind] = streak
        now = streak >= self.patience
        fresh = now & ~self._alarmed[kind]
        self._alarmed[kind] = now
        return fresh

    def _raise(
        self,
        trainer: pl.Trainer,
        kind: str,
        observation: Observation,
        condition: HeadCondition,
        fresh: torch.Tensor,
    ) -> None:
        step = observation["step"]
        places = [(i, h) for i, count in enumerate(observation["heads"]) for h in range(count)]
        value = condition.value.nan_to_num()  # JSON has no infinity
        alarms = [
            Alarm(
                alarm=kind,
                step=step,
                layer=places[index][0],
                head=places[index][1],
                value=value[index].item(),
                threshold=condition.threshold[index].item(),
            )
            for index in fresh.nonzero().flatten().tolist()
        ]
        self.alarms += alarms
        text = _format_alarms(kind, alarms)
        say(f"{self.name}: step {step}: {text}")
        if self.action != "log" and trainer.is_global_zero:
            for run in filter(None, map(find_wandb_run, trainer.loggers)):
                run.alert(f"{kind} at step {step}", text, level="WARN")
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


def _find_monitors(trainer: pl.Trainer) -> list[HeadMonitor]:
    return [c for c in trainer.callbacks if isinstance(c, HeadMonitor)]  # type: ignore[attr-defined]


def _format_alarms(kind: str, alarms: list[Alarm]) -> str:
    shown = ", ".join(f"{a['layer']}.{a['head']} ({a['value']:.3g})" for a in alarms[:LISTED])
    more = f" and {len(alarms) - LISTED} more" if len(alarms) > LISTED else ""
    limits = sorted({f"{a['threshold']:.3g}" for a in alarms}, key=float)
    limit = limits[0] if len(limits) == 1 else f"{limits[0]} to {limits[-1]}"
    heads = "1 head" if len(alarms) == 1 else f"{len(alarms)} heads"
    return f"{kind}: {CONDITIONS[kind]} past {limit} in {heads} (layer.head): {shown}{more}"
