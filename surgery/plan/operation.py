"""What an operation is: one class that holds everything about one change to attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar, Protocol

from transformers import PreTrainedModel

from surgery.errors import ConfigError, ConversionError
from surgery.models.sites import Site
from surgery.plan.choice import Choice, Chosen
from surgery.plan.draft import Draft, Step
from surgery.plan.resolution import Resolution
from surgery.plan.sizes import Sizes
from surgery.transforms import Transform

# The step that `make_plan` adds: eager attention that shares KV heads, where the architecture's
# own cannot. It takes no arguments.
SHARE_KV = "share_kv"

# (model, **arguments) → None. Works on the meta device too; a second call changes nothing more.
StepFunction = Callable[..., None]


class Position(Enum):
    """Where an operation may stand among the others of a run."""

    FIRST = "first"
    ANYWHERE = "anywhere"
    LAST = "last"


@dataclass(frozen=True)
class Conversion:
    """A conversion to another architecture, exact or with other positions, before all else.

    Attributes:
        into: model type of the architecture.
        positions: what replaces learned positions: ``{"theta": base}`` or
            ``{"nope": True}``; ``None`` where the model has none.
    """

    into: str
    positions: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Outcome:
    """What an operation does in a plan.

    Attributes:
        tensors: how many tensor edits.
        config: dotted config keys that it set, with their values.
        attributes: how many attributes of modules it set that follow from no config key.
        steps: kinds of its steps, in order.
        into: the architecture it converted the model to; ``None`` for none.
    """

    tensors: int
    config: Mapping[str, Any]
    attributes: int
    steps: Sequence[str]
    into: str | None = None


@dataclass(frozen=True)
class Alternative:
    """Another way to do the same, for the comparison that `calibration.compare` asks for.

    Attributes:
        operation: the same change with better decisions.
        name: what to call it, short: ``merge=optimal``.
        advice: how to ask for it.
        figures: its settings, for `summary.json`.
    """

    operation: Operation
    name: str
    advice: str
    figures: Mapping[str, Any]


class TrainingDecision(Protocol):
    """What decides an operation while a model trains; made by `Operation.follow_training`.

    `trainer` is Lightning's. The decision depends only on the steps done, so a resumed training
    continues as if it had never stopped.
    """

    def attach(self, model: PreTrainedModel) -> None:
        """Start to act on this model; a second call changes nothing more."""

    def detach(self) -> None:
        """Stop acting on the model, and leave it as it is."""

    def follow(self, trainer: Any) -> None:
        """Bring the model to its state at the trainer's step. Raises: ConfigError."""

    def is_settled(self, trainer: Any) -> bool:
        """Whether nothing is left to decide or to change after the trainer's step."""

    def finish(self, trainer: Any) -> Any:
        """Detach and return the decision. Raises: SurgeryError, if it is not made yet."""

    def get_metrics(self) -> Mapping[str, float]:
        """Get what to log beside the loss."""

    def to_json(self) -> Mapping[str, Any]:
        """What was decided and when, as JSON for a summary."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data, for checkpoints."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Operation(ABC):
    """A declared change. Subclasses are dataclasses whose fields are the config keys.

    Only `name` and `plan` are required; everything else has a default that fits most operations.

    Attributes:
        name: the config key below `attention`, and the name of the YAML.
        position: where it may stand among the others.
        steps: kind → function that changes a live model beyond tensors, attributes and config.
        transforms: name → its own arithmetic on tensors, and the equivalent in the old shapes; see
            `surgery.transforms.register_transform`. Most operations need none of their own.
        runs_only: whether it changes how a model runs, but not what it computes.
        transient: whether its steps are undone before the model is saved (see `undo_`).
        searched: the options with which it can be searched over layer by layer (see
            `try_choices`); ``None`` if it cannot.
    """

    name: ClassVar[str]
    position: ClassVar[Position] = Position.ANYWHERE
    steps: ClassVar[Mapping[str, StepFunction]] = {}
    transforms: ClassVar[Mapping[str, tuple[Transform, Transform]]] = {}
    runs_only: ClassVar[bool] = False
    transient: ClassVar[bool] = False
    searched: ClassVar[Mapping[str, Any] | None] = None

    # --- planning -----------------------------------------------------------------------------

    def check_options(self) -> None:
        """Check options that depend on each other, without a model; ranges are checked before.

        Raises:
            ConfigError: naming the option.
        """

    @abstractmethod
    def plan(self, draft: Draft) -> None:
        """Add to `draft` what the operation does to the model that earlier operations give.

        Raises:
            ConfigError: it cannot be done to this model.
        """

    def choose_conversion(self, model: PreTrainedModel) -> Conversion | None:
        """Choose the architecture to which the model is converted before this operation is planned.

        Called only on the first operation; ``None``: no conversion.
        """
        return None

    def explain_conversion_error(self, error: ConversionError) -> ConfigError:
        """Make the error for a model that cannot be converted to that architecture."""
        return ConfigError(
            f"attention.{self.name}", error.problem, given=error.given, valid=error.valid
        )

    def adjust_sizes(self, sizes: Sizes, tokens: int) -> Sizes:
        """Adjust the sizes that follow from heads and windows, at `tokens` tokens."""
        return sizes

    # --- a live model -------------------------------------------------------------------------

    @classmethod
    def verify(cls, model: PreTrainedModel, plan: Any, probe: Mapping[str, Any] | None) -> None:
        """Check the plan on the model before anything is changed.

        The equivalence check covers changed heads already.

        Args:
            model: converted, where the plan converts it; not changed when this returns.
            plan: a `surgery.plan.plan.Plan`.
            probe: arguments for forward passes, for models that need more than token ids.

        Raises:
            PlanError: the result would not be what the plan says.
        """

    @classmethod
    def undo_(cls, model: PreTrainedModel) -> None:
        """Undo transient steps in place, exactly."""

    @classmethod
    def list_joined_tensors(cls, step: Step) -> Sequence[Sequence[str]]:
        """List the groups of tensors, by name, that one of its steps joins into one tensor."""
        return []

    # --- data and training --------------------------------------------------------------------

    @property
    def calibrated(self) -> bool:
        """Whether it leaves decisions to calibration; see `calibrate`."""
        return False

    @property
    def scored_by(self) -> str | None:
        """The estimator that scores heads for it; ``None`` if it needs no scores."""
        return None

    def choose_by(self, sites: Sequence[Site], scores: Any) -> dict[int, list[int]] | None:
        """Choose by scores the heads to remove, layer → query heads; ``None``: it removes none.

        Args:
            scores: a `surgery.importance.score_file.HeadScores` of these sites.

        Raises:
            ConfigError: that many heads cannot be removed.
        """
        return None

    def calibrate(self, case: Any) -> tuple[Operation, Resolution]:
        """Make the decisions that need data; the operation returned may have fewer open decisions.

        Args:
            case: a `surgery.calibration.case.Case`.

        Raises:
            ConfigError, SiteError: a site that cannot be calibrated.
        """
        raise NotImplementedError

    @property
    def fitted_jointly(self) -> bool:
        """Whether the tensors that calibration made are then fitted together with all others'.

        True only where they are nobody's published method, but as good as they can be.
        """
        return False

    def explain_calibration_error(self, path: str, why: str) -> ConfigError:
        """Make the error for a site that cannot be calibrated."""
        return ConfigError(f"attention.{self.name}", f"{path} cannot be calibrated: {why}")

    @property
    def chooses(self) -> bool:
        """Whether calibration puts other operations in its place; see `choose_operations`."""
        return False

    def choose_operations(self, case: Any) -> Chosen:
        """Choose the operations that take its place.

        Args:
            case: a `surgery.calibration.case.Case`.

        Raises:
            ConfigError: none can do what is asked for.
        """
        raise NotImplementedError

    def list_choices(self, site: Site) -> list[Choice]:
        """List what it may make of one layer, without data; see `searched`."""
        return []

    def try_choices(
        self, site: Site, original: Any, working: Any, options: Any
    ) -> Generator[Choice, None, None]:
        """Yield each of these, decided by data, while the working model computes it.

        Only the parameters of the site's block are exchanged, in their shapes. When the next one is
        asked for, and in the end, they are what they were.

        Args:
            original: a `surgery.calibration.stream.Stream` of the model that is aimed at.
            working: a stream of a copy, which may be changed in any layer.
            options: a `surgery.calibration.case.Calibration`.

        Raises:
            SiteError: the site cannot be calibrated.
        """
        yield from ()

    def join_choices(self, chosen: Mapping[int, Choice]) -> Operation:
        """Make the operation that does this, layer → choice, and nothing to other layers."""
        raise NotImplementedError

    def find_alternative(self) -> Alternative | None:
        """Find a better way to do the same, to compare with; ``None`` if there is none."""
        return None

    @property
    def deferred(self) -> bool:
        """Whether training decides on it; then it comes last, and is performed after training."""
        return False

    def check_run(self, run: Any) -> None:
        """Check that a run (`surgery.config.schema.RunConfig`) can do it.

        Raises:
            ConfigError: it cannot; the error names the key.
        """

    def follow_training(
        self,
        sites: Sequence[Site],
        options: Mapping[str, Any],
        task: Any,
        scorer: Any = None,
    ) -> TrainingDecision:
        """Make what decides a deferred operation while a model trains.

        Args:
            sites: of the model that is trained.
            options: plain data: ``importance`` (`importance.*`), ``seed``, and ``native``.
            task: a `surgery.config.schema.Task`.
            scorer: scores heads; ``None``: they are scored on training windows.
        """
        raise NotImplementedError

    def adopt_decision(self, decision: Any) -> Operation:
        """Return the operation with what training decided, and nothing left open."""
        raise NotImplementedError

    def adopt_decision_on(
        self, sites: Sequence[Site], model: PreTrainedModel, decision: Any
    ) -> Operation:
        """Do the same for the trained model, whose sites may have other numbers.

        Args:
            sites: of the model, with the numbers that the decision uses.
        """
        return self.adopt_decision(decision)

    # --- for people ---------------------------------------------------------------------------

    def describe(self, outcome: Outcome) -> str:
        """Describe what it does to this model in a few words, for the plan table and model card."""
        parts = [f"into {outcome.into}"] if outcome.into else []
        parts += [_format_count(outcome.tensors, "tensor")] if outcome.tensors else []
        parts += [f"config {key}={_shorten(value)}" for key, value in outcome.config.items()]
        parts += [_format_count(outcome.attributes, "attribute")] if outcome.attributes else []
        parts += list(dict.fromkeys(outcome.steps))
        return ", ".join(parts) or "changes nothing"

    def to_json(self) -> dict[str, Any]:
        spec = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {k: v.value if isinstance(v, Enum) else v for k, v in spec.items()}
        return {"operation": self.name, **plain}

    def get_key(self, field: str) -> str:
        """Get the config key of a field, for messages."""
        return f"attention.{self.name}.{field}"


def _format_count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _shorten(value: Any, limit: int = 40) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
