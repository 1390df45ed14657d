"""Packed documents: several in one row, each of which must be as if it were alone.

A row says where its documents begin by `position_ids` that start again. Some models keep documents
apart by these alone. Others need a mask, and others let every document see the ones before it,
whatever they are given. Which one a model is follows from no name: it is asked. A tiny model of the
same class and config runs packed documents, and each of them alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from surgery.errors import ConfigError, get_first_line
from surgery.models.forward import evaluating, get_forward_options, get_vocabulary_size
from surgery.models.tiny import build_tiny_model, make_tiny_config, quiet

KEY = "data.isolate_documents"
# Lengths of the documents of two packed rows: the borders differ, one document is a single token,
# and some are longer than the windows of tiny models.
ROWS = ((7, 1, 9, 7), (3, 10, 11))
# Token ids, where the vocabulary has so many: no special ones, and no markers of images or audio.
FIRST, LAST = 8, 80
# Largest change of a document's logits by others, in units of the rounding of their dtype.
LEAK = 100

# On a model: the attention implementation with which it was asked, and the answer.
_MARK = "_surgery_packing"
_ANSWERS: dict[tuple[str, str, str], Packing | None] = {}
# The method before any monitor opens, which must not see the documents of the question.
_GET_INTERFACE = AttentionInterface.get_interface


class Isolation(Enum):
    """What keeps packed documents apart."""

    POSITIONS = "positions"  # position_ids that start again are enough
    MASK = "mask"  # these, and a mask in which documents see only themselves
    NONE = "none"  # nothing that the model takes


@dataclass(frozen=True)
class Packing:
    """How a model treats packed documents.

    Attributes:
        isolation: what keeps them apart.
        problem: why nothing does, a sentence without its end; "" where something does.
        padded: whether documents in rows of their own, with padding after them, are as alone.
    """

    isolation: Isolation
    problem: str = ""
    padded: bool = True


class Unaskable(Exception):  # noqa: N818  (not an error: another model may be asked)
    """The model cannot run even one document; the text says why."""


def make_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Make the arguments of a forward pass over whole windows: no cache, documents kept apart.

    Every pass over data goes through here, so that training, measuring, scoring, calibration and
    monitors see the same attention.

    Args:
        batch: input name → tensor; packed documents by `position_ids` [B, N] that start again.

    Raises:
        ConfigError: the model lets packed documents see each other.
    """
    inputs = {**batch, **get_forward_options(model)}
    positions = batch.get("position_ids")
    if positions is None or batch.get("attention_mask") is not None:
        return inputs
    known = _recall(model)
    if known is not None and known.isolation is Isolation.POSITIONS:
        return inputs
    if not _hold_documents(positions):
        return inputs
    packing = find_packing(model)
    if packing.isolation is Isolation.NONE:
        refuse_packing(type(model).__name__, packing)
    if packing.isolation is Isolation.MASK:
        inputs["attention_mask"] = make_document_masks(model, positions)
    return inputs


def find_packing(model: PreTrainedModel) -> Packing:
    """Find how `model` treats packed documents, as it is configured now; asked only once.

    Where no tiny model of its config can be built or run, the model itself is asked. Flash
    attention is not asked, since it does not run on a CPU: transformers keeps documents apart there
    by `position_ids`, in batches of one.
    """
    known = _recall(model)
    if known is not None:
        return known
    implementation = model.config._attn_implementation
    packing = ask_tiny_model(type(model), model.config, implementation)
    if packing is None:
        try:
            packing = ask_model(model)
        except Unaskable as reason:
            packing = Packing(Isolation.NONE, f"it cannot run a document by itself: {reason}")
    setattr(model, _MARK, (implementation, packing))
    return packing


def forget_packing(model: PreTrainedModel) -> None:
    """Ask again at the next packed batch, after a change of the model."""
    vars(model).pop(_MARK, None)


def refuse_packing(name: str, packing: Packing) -> None:
    """Refuse packed documents.

    Args:
        name: of the model, for people.

    Raises:
        ConfigError: always.
    """
    padded = "; or data.layout=padded, a document per row" if packing.padded else ""
    raise ConfigError(
        KEY,
        f"packed documents cannot be kept apart in {name}: {packing.problem}",
        given="true, with data.layout=packed",
        valid=f"{KEY}=false, where documents see those before them in their window{padded}",
    )


def ask_tiny_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, implementation: str | None
) -> Packing | None:
    """Ask a tiny model of this class and config; ``None`` if there is none that runs.

    The same question is answered only once per process.

    Args:
        implementation: of attention; ``None`` leaves the choice to transformers.
    """
    if is_flash(implementation):
        return Packing(Isolation.POSITIONS)
    # The code of any architecture runs here, which may raise anything.
    try:
        tiny = make_tiny_config(config)
        name = f"{model_class.__module__}.{model_class.__qualname__}"
        key = (name, tiny.to_json_string(use_diff=False), str(implementation))
    except Exception:
        return None
    if key not in _ANSWERS:
        try:
            _ANSWERS[key] = ask_model(build_tiny_model(model_class, tiny, implementation))
        except Exception:
            _ANSWERS[key] = None
    return _ANSWERS[key]


def is_flash(implementation: str | None) -> bool:
    return "flash" in str(implementation)


def ask_model(model: PreTrainedModel) -> Packing:
    """Run packed documents and each of them alone, and compare their logits.

    No monitor sees it, and it draws no random numbers.

    Raises:
        Unaskable: the model cannot run a document by itself.
    """
    with _asking(model):
        question = _Question(model)
        problem = question.find_problem(Isolation.POSITIONS)
        if not problem:
            return Packing(Isolation.POSITIONS)
        masked_problem = question.find_problem(Isolation.MASK)
        if not masked_problem:
            return Packing(Isolation.MASK)
        if question.failed:
            problem += ", and it takes no mask that hides them"
        else:
            problem = masked_problem
        return Packing(Isolation.NONE, problem, question.is_padding_exact())


class _Question:
    """Documents, and what a model computes for each of them alone.

    Attributes:
        failed: whether the model raised an error on the last packed rows.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.failed = False
        size = get_vocabulary_size(model.config)
        first, last = min(FIRST, size // 2), min(LAST, size)
        generator = torch.Generator().manual_seed(0)
        shape = len(ROWS), sum(ROWS[0])
        ids = torch.randint(first, last, shape, generator=generator)
        self.positions = torch.tensor([[i for n in row for i in range(n)] for row in ROWS])
        self.documents = [
            (row, slice(end - length, end))
            for row, lengths in enumerate(ROWS)
            for length, end in zip(lengths, accumulate(lengths), strict=True)
        ]
        # The same with every second document changed, each token of it.
        changed = ids.clone()
        for row, where in self.documents[::2]:
            changed[row, where] = first + (ids[row, where] - first + 1) % (last - first)
        device = model.device
        self.ids, self.changed = ids.to(device), changed.to(device)
        self.positions = self.positions.to(device)
        try:
            self.alone = [self._run(self.ids[row, where][None])[0] for row, where in self.documents]
        except Exception as error:
            raise Unaskable(get_first_line(error)) from None
        self.scale = max(float(logits.abs().max()) for logits in self.alone)
        rounding = torch.finfo(model.dtype).eps
        self.tolerance = rounding**0.5
        self.leak_tolerance = min(LEAK * rounding, self.tolerance)

    def _run(self, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Compute logits [B, N, V]."""
        options = get_forward_options(self.model)
        logits: torch.Tensor = self.model.forward(input_ids=ids, **inputs, **options).logits
        if logits.shape[:2] != ids.shape:
            raise ValueError(f"its logits are {list(logits.shape)} for {list(ids.shape)} tokens")
        return logits.float()

    def find_problem(self, isolation: Isolation) -> str:
        """Find what is wrong with rows packed in one way; "" if nothing is."""
        self.failed = False
        inputs: dict[str, Any] = {"position_ids": self.positions}
        try:
            if isolation is Isolation.MASK:
                inputs["attention_mask"] = make_document_masks(self.model, self.positions)
            packed, changed = (self._run(ids, **inputs) for ids in (self.ids, self.changed))
        except Exception as error:
            self.failed = True
            return f"it cannot run a row of them ({type(error).__name__}: {get_first_line(error)})"
        left = [packed[row, where] - changed[row, where] for row, where in self.documents[1::2]]
        if not self._is_small(left, self.leak_tolerance):
            return "a document changes the predictions of others in its row"
        if not self._is_small(self._compare(packed), self.tolerance):
            return "a document is not predicted as it is alone: its positions are others"
        return ""

    def _compare(self, packed: torch.Tensor) -> list[torch.Tensor]:
        return [
            packed[row, where] - alone
            for (row, where), alone in zip(self.documents, self.alone, strict=True)
        ]

    def is_padding_exact(self) -> bool:
        """Whether documents in padded rows of their own are predicted as they are alone."""
        longest = max(len(logits) for logits in self.alone)
        lengths = torch.tensor([len(logits) for logits in self.alone], device=self.ids.device)
        mask = torch.arange(longest, device=self.ids.device) < lengths[:, None]
        rows = self.ids.new_zeros(mask.shape)
        for number, (row, where) in enumerate(self.documents):
            rows[number, : lengths[number]] = self.ids[row, where]
        try:
            padded = self._run(rows, attention_mask=mask.long())
        except Exception:
            return False
        pairs = zip(padded, self.alone, strict=True)
        return self._is_small([row[: len(a)] - a for row, a in pairs], self.tolerance)

    def _is_small(self, differences: list[torch.Tensor], tolerance: float) -> bool:
        # Not-a-number is not small.
        return all(float(d.abs().max()) <= tolerance * self.scale for d in differences)


def make_document_masks(model: PreTrainedModel, position_ids: torch.Tensor) -> Any:
    """Make masks in which every document sees only itself, as the model's backend takes them.

    They are causal, and have the windows that the config says: one mask, or a dict by kind of
    layer. They are made by transformers' own function, from the positions.

    Args:
        position_ids: [B, N], which start again with each document.
    """
    like = torch.empty(*position_ids.shape, 0, dtype=model.dtype, device=position_ids.device)
    return create_masks_for_generate(
        config=model.config,
        inputs_embeds=like,
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids,
    )


def _hold_documents(positions: torch.Tensor) -> bool:
    """Whether some row of positions [B, N] starts again."""
    return positions.ndim == 2 and bool((positions.diff(dim=-1) != 1).any())


def _recall(model: PreTrainedModel) -> Packing | None:
    """Recall the answer, unless the model attends in another way by now."""
    implementation, packing = getattr(model, _MARK, (None, None))
    return packing if implementation == model.config._attn_implementation else None


@contextmanager
def _asking(model: PreTrainedModel) -> Iterator[None]:
    """Run without dropout, gradients, autocast, compiling, monitors and messages."""
    interface = AttentionInterface.get_interface
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(model.device.type, enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(quiet())
        if "torch._dynamo" in sys.modules or "flex" in str(model.config._attn_implementation):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # else: minutes
        AttentionInterface.get_interface = _GET_INTERFACE  # type: ignore[method-assign]
        try:
            yield
        finally:
            AttentionInterface.get_interface = interface  # type: ignore[method-assign]
