"""Heads closed by gates while a model trains, for the cut that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities.seed import isolate_rng
from transformers import PreTrainedModel

from surgery.config.schema import ObjectiveName, Task
from surgery.console import say
from surgery.data.collate import Batch
from surgery.errors import ConfigError, SurgeryError
from surgery.importance import Gates, ScoreTable, score_heads
from surgery.importance.choice import Heads
from surgery.importance.estimate import Scorer, freezing
from surgery.importance.score_file import HeadScores
from surgery.models.sites import Site
from surgery.operations.prune_heads.closing import choose_closing
from surgery.operations.prune_heads.cut import check_cut
from surgery.operations.prune_heads.options import PruneOptions, Schedule
from surgery.operations.prune_heads.schedule import PruningSchedule, make_strategy_error
from surgery.plan.layers import keep_layers


@dataclass(frozen=True)
class ClosingRound:
    """The heads that one round closed.

    Attributes:
        step: from which on the gates of `heads` are 0.
        heads: layer → query heads that this round chose.
    """

    step: int
    heads: Heads


class GatedPruning:
    """Follows the schedule of `attention.prune_heads` in a training.

    Gates multiply what each head hands to the output projection, in training and in evaluation;
    a gate of 0 is the head cut. What is closed depends on the steps done alone, so a resumed
    training goes on as if it had never stopped.

    Args:
        operation: with a schedule.
        sites: of the model that is trained. They keep their numbers where an earlier operation
            took some away.
        options: plain data: ``importance`` (`importance.*`), ``seed``, and ``native``, whether the
            architecture's own config must be able to say the result.
        scorer: who scores heads; by default `surgery.importance.score_heads` on training windows.

    Attributes:
        rounds: taken place so far.
        events: those that chose any heads.
    """

    def __init__(
        self,
        operation: PruneOptions,
        sites: Sequence[Site],
        options: Mapping[str, Any],
        task: Task,
        scorer: Scorer | None = None,
    ) -> None:
        self.operation = operation
        self.options = options
        self.sites = tuple(sites)
        self.task = task
        self.rounds = 0
        self.events: list[ClosingRound] = []
        self._scorer = scorer
        self._schedule: PruningSchedule | None = None
        self._gate = 1.0
        self._gates: Gates | None = None
        # What the gates show: number of events, gate and device. The events only grow.
        self._shown: tuple[int, float, torch.device] | None = None

    @property
    def chosen(self) -> Heads:
        """Heads that are closed or closing."""
        found: dict[int, set[int]] = {}
        for event in self.events:
            for layer, heads in event.heads.items():
                found.setdefault(layer, set()).update(heads)
        return {layer: sorted(found[layer]) for layer in sorted(found)}

    @property
    def open_share(self) -> float:
        """Mean gate over all heads."""
        total = sum(site.q_heads for site in self.sites)
        return 1 - (1 - self._gate) * sum(map(len, self.chosen.values())) / total

    def attach(self, model: PreTrainedModel) -> None:
        """Gate this model. Does nothing if it is gated already."""
        if self._gates is None or self._gates.model is not model:
            self.detach()
            self._gates, self._shown = Gates(model, self.sites), None
            self._gates.open()
        self._set_gates()

    def detach(self) -> None:
        """Leave the model as it is without gates."""
        if self._gates is not None:
            self._gates.close()
        self._gates = None

    def follow(self, trainer: pl.Trainer) -> None:
        """Set the gates for the trainer's step, and score heads where a round is due.

        Raises:
            ConfigError: a schedule that this training cannot keep, or heads that cannot go.
        """
        schedule, step = self._get_schedule(trainer), trainer.global_step
        due = schedule.count_due_rounds(step)
        if due > self.rounds:
            found = self._decide(trainer, due / schedule.rounds) if trainer.is_global_zero else None
            found = trainer.strategy.broadcast(found)
            assert found is not None
            self._record_round(schedule, step, due, found)
        self._gate = schedule.compute_gate(step)
        self._set_gates()

    def _get_schedule(self, trainer: pl.Trainer) -> PruningSchedule:
        if self._schedule is None:
            if isinstance(
                trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
            ):
                raise make_strategy_error(self.operation, type(trainer.strategy).__name__)
            steps = trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise ConfigError(
                    "trainer.max_steps",
                    "must be set where heads are closed on a schedule",
                    given=trainer.max_steps,
                    valid="a number of steps",
                )
            self._schedule = PruningSchedule.from_operation(self.operation, int(steps))
        return self._schedule

    def is_settled(self, trainer: pl.Trainer) -> bool:
        """Whether every head that goes is closed."""
        return self._get_schedule(trainer).is_over(trainer.global_step)

    def finish(self, trainer: pl.Trainer) -> Heads:
        """Remove the gates once all heads are closed; return the heads, layer → query heads.

        Raises:
            SurgeryError: training ended before.
        """
        schedule, step = self._get_schedule(trainer), trainer.global_step
        if not schedule.is_over(step):
            raise SurgeryError(
                f"training ended at step {step}, before all heads were closed (step "
                f"{schedule.end}): resume it, or lower {self.operation.get_key('until')}"
            )
        self.detach()
        return self.chosen

    def get_metrics(self) -> dict[str, float]:
        return {"train/open_heads": self.open_share}

    def _decide(self, trainer: pl.Trainer, share: float) -> Heads:
        assert self._gates is not None
        model, estimator = self._gates.model, self.operation.estimator
        assert isinstance(model, PreTrainedModel)
        assert estimator is not None
        sites = keep_layers(self.sites, self.operation.layers)
        with isolate_rng(include_cuda=torch.cuda.is_available()), freezing(model):
            torch.manual_seed(self.options["seed"])
            scorer = self._scorer or self._make_scorer(trainer)
            table = scorer(model, sites, estimator, self.operation.unit)
        scores = HeadScores.from_table(table, sites)
        found, going = choose_closing(self.operation, sites, scores, self.chosen, share)
        check_cut(model, self.sites, self.operation, going, native=bool(self.options["native"]))
        return found

    def _make_scorer(self, trainer: pl.Trainer) -> Scorer:
        cfg = self.options["importance"]
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "draw_importance_batches"):
            raise ConfigError(
                self.operation.get_key("schedule"),
                "scores heads on batches, and this training has no TextData that gives them",
                valid="trainer.fit(…, datamodule=), or a scorer",
            )
        batches: list[Batch] = data.draw_importance_batches(cfg["windows"], cfg["batch_size"])

        def score(
            model: PreTrainedModel, sites: Sequence[Site], estimator: str, unit: str
        ) -> ScoreTable:
            return score_heads(
                model,
                batches,
                estimator,
                sites=sites,
                units=(unit,),
                task=self.task,
                objective=ObjectiveName(cfg["objective"]),
                seed=self.options["seed"],
                memory_rows=cfg["memory_windows"],
            )

        return score

    def _record_round(
        self, schedule: PruningSchedule, step: int, rounds: int, found: Heads
    ) -> None:
        before = self.chosen
        new = {
            layer: [head for head in heads if head not in before.get(layer, ())]
            for layer, heads in found.items()
        }
        new = {layer: heads for layer, heads in new.items() if heads}
        closed = schedule.find_closing_step(step)
        if new:
            self.events.append(ClosingRound(closed, new))
        self.rounds = rounds
        listed = "; ".join(f"layer {n}: {', '.join(map(str, heads))}" for n, heads in new.items())
        when = "closed" if closed == step else f"closing until step {closed}"
        say(f"  step {step}: heads {when}: {listed or 'none'}")

    def _set_gates(self) -> None:
        """Set the gates of the chosen heads; sites that lose nothing are not touched."""
        if self._gates is None:
            return
        device = next(self._gates.model.parameters()).device
        wanted = len(self.events), self._gate, device
        if wanted == self._shown:
            return
        heads, gates = self.chosen, {}
        for site in self.sites:
            if site.layer in heads:
                gate = torch.ones(site.q_heads, device=device)
                gate[heads[site.layer]] = self._gate
                gates[site.path] = gate
        self._gates.gates, self._shown = gates, wanted

    def to_json(self) -> dict[str, Any]:
        """Say what was done, for a summary."""
        operation = self.operation
        return {
            "schedule": operation.schedule.value,
            "estimator": operation.estimator,
            "rounds": operation.rounds if operation.schedule is Schedule.iterative else None,
            "events": self.state_dict()["events"],
        }

    def state_dict(self) -> dict[str, Any]:
        """Make plain data for checkpoints."""
        return {
            "rounds": self.rounds,
            "gate": self._gate,
            "events": [
                {"step": event.step, "closed": {str(k): list(v) for k, v in event.heads.items()}}
                for event in self.events
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds, self._gate = int(state["rounds"]), float(state["gate"])
        self.events = [
            ClosingRound(int(event["step"]), {int(k): list(v) for k, v in event["closed"].items()})
            for event in state["events"]
        ]
        self._shown = None
        self._set_gates()
