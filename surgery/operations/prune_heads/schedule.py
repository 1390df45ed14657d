"""When heads are closed while a model trains: in rounds, or along a curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery.config.schema import Stage, Trained
from surgery.errors import ConfigError
from surgery.operations.prune_heads.options import PruneOptions, Schedule


@dataclass(frozen=True)
class PruningSchedule:
    """Steps are optimizer steps, counted from 0: step t is the one that makes update t + 1.

    gradual: heads are chosen at step 0, and their gates are (1 - t / end)^3 at step t, 0 from
    `end` on: what is left open by Zhu & Gupta 2017 (arXiv:1710.01878, eq. 1) from sparsity 0.
    iterative: round k of n = `rounds` (from 1) takes place at step (k - 1) end / n, rounded down,
    and closes heads at once until k / n of all that are to go are closed.

    Attributes:
        end: steps that closing is spread over.
    """

    kind: Schedule
    rounds: int
    end: int

    @classmethod
    def from_operation(cls, operation: PruneOptions, total: int) -> PruningSchedule:
        """Make the schedule of `attention.prune_heads` in a training of `total` steps.

        Raises:
            ConfigError: there are more rounds than steps.
        """
        end = max(1, round(operation.until * total))
        rounds = operation.rounds if operation.schedule is Schedule.iterative else 1
        if rounds > end:
            raise ConfigError(
                operation.get_key("rounds"),
                f"more rounds than steps: {operation.until:g} of {total} training steps",
                given=rounds,
                valid=f"1 to {end}",
            )
        return cls(operation.schedule, rounds, end)

    def count_due_rounds(self, step: int) -> int:
        """Count the rounds that have taken place when `step` begins, its own included."""
        return sum(number * self.end // self.rounds <= step for number in range(self.rounds))

    def compute_gate(self, step: int) -> float:
        """Compute the gate at `step` of a head that was chosen."""
        if self.kind is Schedule.iterative:
            return 0.0
        return max(0.0, 1 - step / self.end) ** 3

    def is_over(self, step: int) -> bool:
        """Whether every head that is to go is closed before `step`."""
        return self.count_due_rounds(step) == self.rounds and self.compute_gate(step) == 0

    def find_closing_step(self, step: int) -> int:
        """Find the step from which on the gates of heads chosen at `step` are 0."""
        return step if self.kind is Schedule.iterative else max(step, self.end)


def check_schedule(operation: PruneOptions, run: Any) -> None:
    """Refuse a run (`surgery.config.schema.RunConfig`) that cannot close heads while it trains.

    Raises:
        ConfigError: no training, a strategy that shards the model, more rounds than steps, or
            `optim.parameters` that are known only after the cut.
    """
    key = operation.get_key("schedule")
    if Stage.operate in run.stages and Stage.train not in run.stages:
        raise ConfigError(
            "stages",
            f"{key}={operation.schedule.value} closes heads while the model trains",
            given=[stage.value for stage in run.stages],
            valid=f"add `train`, or {key}=one_shot",
        )
    if Stage.train not in run.stages:
        return
    degree = run.export.tensor_parallel
    if degree is not None and operation.together and not operation.uniform:
        raise ConfigError(
            operation.get_key("scope"),
            f"training decides how many heads each layer keeps, so {degree} devices "
            "(export.tensor_parallel) may not share them evenly",
            given=operation.scope.value,
            valid="layer, uniform: true, or export.tensor_parallel: null",
        )
    strategy = str(run.trainer.get("strategy"))
    if strategy.startswith(("fsdp", "deepspeed")):
        raise make_strategy_error(operation, strategy)
    steps = run.trainer.get("max_steps")
    if isinstance(steps, int) and steps > 0:
        PruningSchedule.from_operation(operation, steps)
    if run.optim.parameters is Trained.changed:
        raise ConfigError(
            "optim.parameters",
            f"which tensors {key}={operation.schedule.value} changes is decided while they train",
            given=Trained.changed.value,
            valid="all, attention, output",
        )


def make_strategy_error(operation: PruneOptions, strategy: str) -> ConfigError:
    """Make the error for a strategy that shards the model."""
    key = operation.get_key("schedule")
    return ConfigError(
        "trainer.strategy",
        f"shards the model, and {key}={operation.schedule.value} scores the heads of a whole one "
        "while it trains",
        given=strategy,
        valid=f"ddp, auto, or {key}=one_shot",
    )
