"""The base of all head monitors: when to observe, what to sum, where to log."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, TypedDict

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn
from transformers import PreTrainedModel

from surgery.data.collate import IGNORED
from surgery.errors import ConfigError, TapError
from surgery.observe import AttentionCall, Tap
from surgery.observe.head_sums import HeadSums

from .forward_passes import ForwardPasses
from .head_logging import HeadGrid, log_heatmap, log_scalars


class Observation(TypedDict):
    """What was observed at one step.

    Attributes:
        heads: number of heads of each layer.
        metrics: metric → the values of all heads, layer by layer: [sum of `heads`]. This is one
            tensor, since the checkpoint of a long run holds thousands. NaN: not observed.
    """

    step: int
    heads: list[int]
    metrics: dict[str, torch.Tensor]


class HeadMonitor(Callback):
    """Observes every `every_n_steps`-th optimizer step, starting with the first.

    Subclasses name their `metrics` and define how an attention call adds to them. A step may have
    several batches, and a batch several forward passes; all of them are observed, each with the
    masks and tokens that the model was called with.

    Attributes:
        metrics: names; each is one scalar over all heads, one picture and a column of the table.
        maxima: metrics whose value is a maximum, over rows and over heads.
        roots: metrics whose value is the square root of a mean.
        by_layer: metric → its scalars per layer: mean, min, max.
        blind: end of the message if nothing was observed.

    Args:
        every_n_steps: cadence of observation; steps in between are not slowed down.
        heatmap_every_n_steps: cadence of the [layers × heads] picture; a multiple of the above.
    """

    name: str
    metrics: tuple[str, ...]
    maxima: Collection[str] = ()
    roots: Collection[str] = ()
    by_layer: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    blind: str = "nothing was observed"

    def __init__(self, every_n_steps: int, heatmap_every_n_steps: int) -> None:
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ConfigError(
                f"{self.name}.every_n_steps",
                "must be a whole number, at least 1",
                given=every_n_steps,
            )
        if (
            not isinstance(heatmap_every_n_steps, int)
            or heatmap_every_n_steps < 1
            or heatmap_every_n_steps % every_n_steps
        ):
            raise ConfigError(
                f"{self.name}.heatmap_every_n_steps",
                f"must be a multiple of every_n_steps ({every_n_steps})",
                given=heatmap_every_n_steps,
            )
        self.every_n_steps = every_n_steps
        self.heatmap_every_n_steps = heatmap_every_n_steps
        self.observations: list[Observation] = []
        self._sums = HeadSums(self.metrics, self.maxima, self.roots)
        self._tap: Tap | None = None
        self._passes: ForwardPasses | None = None
        self._batch: Any = None
        self._step: int | None = None

    @abstractmethod
    def observe(self, call: AttentionCall) -> None:
        """Add one attention call to `self._sums`."""

    def start_step(self, trainer: pl.Trainer, batch: Mapping[str, Any], step: int) -> None:
        """Called once per observed batch, before the forward pass."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = find_watched_model(pl_module)
        self._model = model
        self._tap = Tap(model, self._observe_call)
        self._passes = ForwardPasses(model, self._begin_pass)
        self._order = {path: index for index, (path, _) in enumerate(model.named_modules())}
        self._sums.clear()
        self._step = None

    def _observe_call(self, call: AttentionCall) -> None:
        # Every observed block has a row, even without a value: so layers keep their numbers if
        # lower ones are frozen.
        self._sums.start(call.site, call.query.shape[1], call.query.device)
        self.observe(call)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps:
            return
        assert self._tap is not None
        assert self._passes is not None
        self._step = step if self._step is None else self._step
        self._batch = batch
        self.start_step(trainer, batch, step)
        self._tap.open(*_get_query_masks(batch), *_get_tokens(batch, self._model))
        self._passes.open()

    def _begin_pass(self, module: torch.nn.Module, arguments: Mapping[str, Any]) -> None:
        """Look at the rows that the model is called with, which need not be those of the batch."""
        if module is not self._model and self._model.config.is_encoder_decoder:
            return  # its encoder or its decoder alone: their arguments have other meanings
        known = {name: value for name, value in arguments.items() if value is not None}
        if isinstance(self._batch, Mapping) and _are_rows_of(self._batch, known):
            known = {**self._batch, **known}
        assert self._tap is not None
        self._tap.open(*_get_query_masks(known), *_get_tokens(known, self._model))

    @property
    def _is_complete(self) -> bool:
        """Whether nothing that was observed waits for an optimizer step."""
        return True

    def _close(self) -> None:
        if self._tap is not None:
            self._tap.close()
        if self._passes is not None:
            self._passes.close()
        self._batch = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._step is None:
            return
        assert self._tap is not None
        self._close()
        try:
            self._tap.require_calls()
        except TapError as error:
            remedy = f"its heads cannot be watched; set callbacks.{self.name}=null"
            raise TapError(f"{error}: {remedy}") from None
        if trainer.global_step > self._step and self._is_complete:  # its last micro-batch
            self._flush(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()  # the last batch of an epoch that was cut short does not end

    def _flush(self, trainer: pl.Trainer) -> None:
        if trainer.world_size > 1:
            self._sums.gather()
        step, empty, figures = self._step, self._sums.empty, self._sums.summarize()
        self._sums.clear()
        self._step = None
        assert step is not None
        if empty:
            text = f"{self.name}: attention ran at step {step}, but {self.blind}"
            if not self.observations:
                raise TapError(text)
            rank_zero_warn(text)
            return
        sites = sorted(figures, key=self._order.__getitem__)
        heads = [len(figures[site][self.metrics[0]]) for site in sites]
        metrics = {
            name: torch.cat([figures[site][name] for site in sites]) for name in self.metrics
        }
        self.observations.append({"step": step, "heads": heads, "metrics": metrics})
        if trainer.is_global_zero:
            self._log(trainer, self.observations[-1])

    def _log(self, trainer: pl.Trainer, observation: Observation) -> None:
        step, heads = observation["step"], observation["heads"]
        grids = [
            HeadGrid(name, step, list(figures.split(heads)))
            for name, figures in observation["metrics"].items()
        ]
        scalars: dict[str, float] = {}
        for grid in grids:
            overall = "max" if grid.metric in self.maxima else "mean"
            scalars |= grid.to_scalars(overall, self.by_layer.get(grid.metric, ()))
        log_scalars(trainer, scalars, step)
        if step % self.heatmap_every_n_steps == 0:
            for grid in grids:
                log_heatmap(trainer, grid)

    def state_dict(self) -> dict[str, Any]:
        return {"observations": self.observations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.observations = list(state_dict["observations"])


def find_watched_model(pl_module: torch.nn.Module) -> PreTrainedModel:
    """Find the transformers model that a LightningModule trains: the first that is not frozen.

    Raises:
        TapError: there is none.
    """
    models = [module for module in pl_module.modules() if isinstance(module, PreTrainedModel)]
    if not models:
        raise TapError(f"{type(pl_module).__name__} holds no transformers model to watch")
    trained = (m for m in models if any(p.requires_grad for p in m.parameters()))
    return next(trained, models[0])


def _are_rows_of(batch: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether a forward pass reads the very rows of a batch, all of them."""
    ids, embeddings = batch.get("input_ids"), known.get("inputs_embeds")
    if "input_ids" in known:
        return known["input_ids"] is ids
    return ids is not None and embeddings is not None and embeddings.shape[:2] == ids.shape


def _get_query_masks(batch: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Get the masks of real queries, of the model and of its decoder (if it is separate)."""
    if not isinstance(batch, Mapping):
        return None, None
    decoder = batch.get("decoder_attention_mask")
    if decoder is None and batch.get("labels") is not None:
        decoder = batch["labels"] != IGNORED
    return _keep_row_mask(batch.get("attention_mask")), _keep_row_mask(decoder)


def _get_tokens(
    batch: Any, model: PreTrainedModel
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Get the token ids of the model and of its decoder (if it is separate)."""
    if not isinstance(batch, Mapping):
        return None, None
    decoder = batch.get("decoder_input_ids")
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if decoder is None and batch.get("labels") is not None and shift is not None:
        decoder = shift(labels=batch["labels"])
    return batch.get("input_ids"), decoder


def _keep_row_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    # A mask with more dimensions says which query sees which key, not which tokens are real.
    return mask if mask is not None and mask.ndim == 2 else None
