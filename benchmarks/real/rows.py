"""The rows: what is run, what is read from it, and what it may cost.

Commands are words; these stand for what only a run knows:
<model> the override of the untouched model, <teacher> its path, <run> the folder of this row and
seed, <need> that of the row it starts from, <seed>.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from benchmarks.real import read
from benchmarks.real.sizes import Sizes
from benchmarks.real.subject import Subject
from benchmarks.shared.overrides import QUIET
from benchmarks.shared.settings import warmup_steps
from surgery.training.rate import FULL_RATE

Figures = dict[str, Any]
Command = tuple[str, ...]

ORIGINAL = "original"
# Those that score heads beforehand, for any amount.
ESTIMATORS = ("leave_one_out", "gate_gradient", "output_norm", "random")
ELIMINATION = "elimination"
# What the targets are about, and what differs most from seed to seed.
REPEATED = ("leave_one_out", "random")
AMOUNTS = (10, 20, 40)
BACKENDS = ("sdpa", "flex_attention")
RATES = (0.1, 0.3, 1.0, 10.0)

EXPORT = "cut/export"


@dataclass(frozen=True)
class Row:
    """One figure, or a few that come from the same run.

    Attributes:
        section: of the page.
        what: in a few words.
        commands: in order; the words after `python`.
        read: the figures, from the folder of the row.
        work: tokens of a forward pass that it takes as long as.
        needs: rows that come first; the folder of the first one is <need>.
        seeded: whether something is drawn that is worth several seeds; other rows have the first.
        keeps: what other rows use of its folder; other weights are removed when it is done.
        seen: tokens of text that its longest stage looks at, each once.
    """

    name: str
    section: str
    what: str
    commands: tuple[Command, ...]
    read: Callable[[Path], Figures]
    work: float
    needs: tuple[str, ...] = ()
    seeded: bool = False
    keeps: tuple[str, ...] = ()
    seen: int = 0


def list_rows(subject: Subject, sizes: Sizes) -> list[Row]:
    """All rows, the most informative first; a row comes after those that it needs."""
    make = _Maker(subject, sizes)
    pruned = {estimator: list(make.prune(estimator)) for estimator in ESTIMATORS}
    return [
        make.measure_original(),
        *make.merge(),
        *pruned["gate_gradient"],
        *pruned["random"],
        make.find_roles(),
        make.fuse(),
        make.switch_backend("sdpa"),
        *pruned["leave_one_out"],
        *make.eliminate(),
        *pruned["output_norm"],
        make.watch(),
        make.switch_backend("flex_attention"),
        *make.calibrate_on_itself(),
        *make.heal_for_targets(),
        *make.compare_objectives(),
        *make.compare_rates(),
        *make.heal_others(),
        *make.extend(),
    ]


@dataclass(frozen=True)
class _Maker:
    subject: Subject
    sizes: Sizes

    def train(self, folder: str, *overrides: str, quiet: bool = True) -> Command:
        usual = (*QUIET, "seed=<seed>") if quiet else ("seed=<seed>",)
        return ("train.py", *overrides, *usual, f"hydra.run.dir=<run>/{folder}")

    def measure(self, model: str, *, tokens: int = 0, timed: bool = False) -> Command:
        """Measure the held-out loss, the same windows each time.

        Args:
            tokens: of one window, in place of the usual ones.
            timed: whether its speed is worth the time.
        """
        sizes = self.sizes
        batch, windows = (1, 1) if tokens else (2, sizes.held_out)
        speed = _TIMED if timed else _UNTIMED
        return self.train(
            "measure",
            model,
            "data=stdlib",
            f"data.seq_len={tokens or sizes.seq_len}",
            "stages=[plan,measure]",
            f"measure.windows={windows}",
            f"measure.batch_size={batch}",
            f"measure.prefill_tokens={min(PROMPT, sizes.seq_len)}" if timed else _SHORT_PROMPT,
            *speed,
        )

    @property
    def held_out_work(self) -> float:
        return self.sizes.held_out * self.sizes.seq_len + 500

    def measure_original(self) -> Row:
        return Row(
            ORIGINAL,
            "original",
            "the model as it is",
            (self.measure("<model>", timed=True),),
            read.read_loss,
            self.held_out_work + 12 * PROMPT,
            seen=self.sizes.held_out * self.sizes.seq_len,
        )

    def cut(
        self, name: str, section: str, what: str, overrides: Command, work: float, **more: Any
    ) -> Row:
        """Change the model, export it, and measure the export: the original is measured once."""
        return Row(
            name,
            section,
            what,
            (
                self.train(
                    "cut",
                    "<model>",
                    "data=stdlib",
                    *overrides,
                    "stages=[plan,calibrate,operate,export]",
                ),
                self.measure(f"model.path=<run>/{EXPORT}"),
            ),
            read.read_cut,
            work + self.held_out_work,
            **more,
        )

    def merge(self) -> Iterator[Row]:
        heads = self.subject.kv_heads
        for name, what, overrides, calibration, work, seen in self._merges():
            yield self.cut(
                name,
                "gqa",
                f"{heads} → {what}",
                ("attention=[gqa]", *overrides, *calibration),
                work,
                seeded=bool(calibration),
                keeps=(EXPORT,),
                seen=seen,
            )

    def _merges(self) -> Iterator[tuple[str, str, Command, Command, float, int]]:
        """Name, what, options of the merge and of calibration, work, and tokens looked at."""
        yield "gqa-mean", "1, mean pooling", ("attention.gqa.kv_heads=1",), (), 0.0, 0
        optimal = ("attention.gqa.merge=optimal", "attention.gqa.grouping=similarity")
        for windows, tokens in (self.sizes.few, self.sizes.many):
            yield (
                f"gqa-optimal-{windows}x{tokens}",
                f"1, optimal, {windows} windows of {tokens} tokens",
                ("attention.gqa.kv_heads=1", *optimal),
                _calibrate(windows, tokens),
                _CALIBRATED * windows * tokens,
                windows * tokens,
            )
        windows, tokens = self.sizes.many
        yield (
            "gqa-average-2",
            f"2 on average, optimal, {windows} windows of {tokens} tokens",
            ("attention.gqa.kv_heads={average:2}", *optimal),
            _calibrate(windows, tokens),
            _CALIBRATED * windows * tokens,
            windows * tokens,
        )

    @property
    def best_merge(self) -> str:
        windows, tokens = self.sizes.many
        return f"gqa-optimal-{windows}x{tokens}"

    def eliminate(self) -> Iterator[Row]:
        """Heads that go in rounds, with a refit after each."""
        sizes = self.sizes
        for amount in AMOUNTS:
            yield self.cut(
                name_cut(ELIMINATION, amount, refit=True),
                "prune",
                f"{amount}% of the heads by {ELIMINATION}",
                (
                    "attention=[prune_heads]",
                    f"attention.prune_heads.amount={amount / 100:g}",
                    "attention.prune_heads.scope=global",
                    f"attention.prune_heads.estimator={ELIMINATION}",
                    *_calibrate(sizes.refitted, sizes.seq_len),
                ),
                _ELIMINATED * sizes.seq_len,
                keeps=_keep_healed(name_cut(ELIMINATION, amount, refit=True)),
                seen=sizes.refitted * sizes.seq_len,
            )

    def prune(self, estimator: str) -> Iterator[Row]:
        sizes = self.sizes
        scores = f"scores-{estimator}"
        windows = sizes.left_out if estimator == "leave_one_out" else sizes.scored
        yield Row(
            scores,
            "scores",
            f"every head scored by {estimator}, {windows} windows of {sizes.seq_len} tokens",
            (
                self.train(
                    "score",
                    "<model>",
                    "data=stdlib",
                    f"data.seq_len={sizes.seq_len}",
                    "attention=[]",
                    "stages=[plan,score]",
                    f"importance.estimator={estimator}",
                    f"importance.windows={windows}",
                    f"importance.batch_size={min(2, windows)}",
                    f"importance.memory_windows={4 * min(2, windows)}",
                ),
            ),
            read.read_scores,
            _SCORED[estimator] * windows * sizes.seq_len,
            seeded=estimator in REPEATED,
            keeps=("score/importance.json",),
            seen=windows * sizes.seq_len,
        )
        # The amounts that matter most come first.
        for amount in sorted(AMOUNTS, key=(20, 40, 10).index):
            for refit in (True, False):
                calibration = _calibrate(sizes.refitted, sizes.seq_len) if refit else ()
                yield self.cut(
                    name_cut(estimator, amount, refit),
                    "prune",
                    f"{amount}% of the heads by {estimator}" + (", refit" if refit else ""),
                    (
                        "attention=[prune_heads]",
                        f"attention.prune_heads.amount={amount / 100:g}",
                        "attention.prune_heads.scope=global",
                        "attention.prune_heads.scores=<need>/score/importance.json",
                        f"attention.prune_heads.refit={str(refit).lower()}",
                        *calibration,
                    ),
                    3.0 * sizes.refitted * sizes.seq_len * refit,
                    needs=(scores,),
                    seeded=estimator in REPEATED,
                    keeps=_keep_healed(name_cut(estimator, amount, refit)),
                    seen=sizes.refitted * sizes.seq_len * refit,
                )

    def fuse(self) -> Row:
        return Row(
            "fused",
            "speed",
            "projections of queries, keys and values in one matrix, exported as Phi-3",
            (
                self.train(
                    "fused",
                    "<model>",
                    "data=stdlib",
                    "attention=[rehouse,fuse_qkv]",
                    "attention.rehouse.into=phi3",
                    "attention.fuse_qkv.keep=true",
                    "stages=[plan,measure,operate,export]",
                    *self._timed(),
                ),
            ),
            read.read_exchange,
            2 * self._timed_work,
        )

    def switch_backend(self, backend: str) -> Row:
        return Row(
            f"backend-{backend}",
            "speed",
            f"eager → {backend}, logits compared on the first batch",
            (
                self.train(
                    "backend",
                    "<model>",
                    "model.attn_implementation=eager",
                    "data=stdlib",
                    "attention=[backend]",
                    f"attention.backend.implementation={backend}",
                    "stages=[plan,measure,operate]",
                    *self._timed(),
                ),
            ),
            read.read_exchange,
            2 * self._timed_work,
        )

    def _timed(self) -> Command:
        sizes = self.sizes
        return (
            f"data.seq_len={sizes.seq_len}",
            "measure.windows=4",
            "measure.batch_size=1",
            f"measure.prefill_tokens={sizes.seq_len}",
            "measure.decode_tokens=32",
            "measure.repeats=5",
        )

    @property
    def _timed_work(self) -> float:
        return 4 * self.sizes.seq_len + 8 * (self.sizes.seq_len + 32 * 10)

    def watch(self) -> Row:
        sizes = self.sizes
        return Row(
            "monitors",
            "speed",
            "a training step with both head monitors / its neighbour without",
            (
                (
                    "-m",
                    "benchmarks.monitors",
                    f"--pairs={sizes.pairs}",
                    "--keep=<run>/monitors/monitors.json",
                    "<model>",
                    "data=stdlib",
                    f"data.seq_len={min(256, sizes.seq_len)}",
                    "data.batch_size=2",
                ),
            ),
            read.read_monitors,
            _LM * 2 * min(256, sizes.seq_len) * (6 + 2 * sizes.pairs),
        )

    def find_roles(self) -> Row:
        sizes = self.sizes
        return Row(
            "roles",
            "roles",
            "what each head attends to",
            (
                self.train(
                    "analyze",
                    "<model>",
                    "data=stdlib",
                    f"data.seq_len={min(256, sizes.seq_len)}",
                    "attention=[]",
                    "stages=[plan,analyze]",
                    f"analysis.windows={sizes.analyzed}",
                    "analysis.batch_size=2",
                    f"analysis.repeats={sizes.analyzed}",
                    f"analysis.probe_texts={sizes.probed}",
                ),
            ),
            read.read_roles,
            3.0 * (2 * sizes.analyzed + sizes.probed) * min(256, sizes.seq_len),
            seen=(2 * sizes.analyzed + sizes.probed) * min(256, sizes.seq_len),
        )

    def heal(
        self,
        name: str,
        what: str,
        start: str,
        tokens: int,
        *overrides: str,
        section: str = "heal",
        seeded: bool = False,
    ) -> Row:
        steps = self.sizes.count_steps(tokens)
        per_token = _LM if "objective=lm" in overrides else _DISTILLED
        sizes = self.sizes
        return Row(
            name,
            section,
            what,
            (
                self.train(
                    "heal",
                    f"model.path=<need>/{EXPORT}",
                    "data=stdlib",
                    f"data.seq_len={sizes.seq_len}",
                    f"data.batch_size={sizes.batch}",
                    "attention=[]",
                    *overrides,
                    f"trainer.max_steps={steps}",
                    "trainer.precision=bf16-mixed",
                    f"optim.warmup_steps={warmup_steps(steps)}",
                    f"validation.windows={sizes.held_out}",
                    _HEALED_STAGES,
                    f"measure.windows={sizes.held_out}",
                    "measure.batch_size=2",
                    _SHORT_PROMPT,
                    *_UNTIMED,
                ),
            ),
            read.read_healing,
            per_token * steps * sizes.batch * sizes.seq_len
            + 11 * sizes.held_out * sizes.seq_len
            + 2 * self.held_out_work,
            needs=(start,),
            seeded=seeded,
            seen=steps * sizes.batch * sizes.seq_len,
        )

    def heal_for_targets(self) -> Iterator[Row]:
        for start, tokens in (
            (self.best_merge, self.sizes.healed),
            ("gqa-average-2", self.sizes.healed),
            *((start, self.sizes.healed_pruned) for start in HEALED_PRUNINGS),
        ):
            yield self.heal(
                f"heal-{start}",
                f"{start}, distilled on {self._count(tokens)} tokens",
                start,
                tokens,
                *DISTILL,
                seeded=True,
            )

    def heal_others(self) -> Iterator[Row]:
        windows, tokens = self.sizes.few
        for start in ("gqa-mean", f"gqa-optimal-{windows}x{tokens}"):
            yield self.heal(
                f"heal-{start}",
                f"{start}, distilled on {self._count(self.sizes.healed)} tokens",
                start,
                self.sizes.healed,
                *DISTILL,
            )

    def compare_objectives(self) -> Iterator[Row]:
        for name, what, overrides in (
            ("lm", "the text's own loss", ("objective=lm",)),
            ("distill", "distillation from the original", DISTILL),
            (
                "distill-attention",
                "distillation, and what each attention block returns",
                ("objective=distill_attention", "objective.teacher=<teacher>"),
            ),
            (
                "attention-alone",
                "distillation, of attention's parameters alone",
                (*DISTILL, "optim.parameters=attention"),
            ),
        ):
            yield self.heal(
                f"objective-{name}",
                f"{what}, {self._count(self.sizes.compared)} tokens",
                self.best_merge,
                self.sizes.compared,
                *overrides,
                section="objectives",
            )

    def compare_rates(self) -> Iterator[Row]:
        base = FULL_RATE / self.subject.width
        yield self.heal(
            "rate-default",
            f"the default, {self._count(self.sizes.rated)} tokens",
            self.best_merge,
            self.sizes.rated,
            *DISTILL,
            section="rates",
        )
        for times in RATES:
            yield self.heal(
                f"rate-{times:g}",
                f"{times:g} x {FULL_RATE:g} / width, {self._count(self.sizes.rated)} tokens",
                self.best_merge,
                self.sizes.rated,
                *DISTILL,
                f"optim.lr={times * base:.3g}",
                section="rates",
            )

    def _count(self, tokens: int) -> str:
        steps = self.sizes.count_steps(tokens)
        return f"{steps * self.sizes.batch * self.sizes.seq_len:,}"

    def calibrate_on_itself(self) -> Iterator[Row]:
        """The same merge, and healing, on text that the original wrote, if runs have such data."""
        if not files("surgery.conf.data").joinpath("self.yaml").is_file():
            return
        sizes = self.sizes
        windows, tokens = sizes.many
        row = self.cut(
            "gqa-optimal-self",
            "gqa",
            f"{self.subject.kv_heads} → 1, optimal, {windows} windows of {tokens} tokens that the "
            "original wrote",
            (
                "attention=[gqa]",
                "attention.gqa.kv_heads=1",
                "attention.gqa.merge=optimal",
                "attention.gqa.grouping=similarity",
                *_calibrate(windows, tokens),
            ),
            3 * _CALIBRATED * windows * tokens,
            seeded=True,
            seen=windows * tokens,
        )
        first, *rest = row.commands
        own = tuple("data=self" if word == "data=stdlib" else word for word in first)
        yield replace(row, commands=(own, *rest), keeps=(EXPORT,))
        healed = self.heal(
            "heal-gqa-optimal-self",
            f"gqa-optimal-self, distilled on {self._count(sizes.compared)} tokens that the "
            "original wrote",
            row.name,
            sizes.compared,
            *DISTILL,
        )
        # Its loss is that of the common held-out text, so it is exported and measured there.
        words = [
            {"data=stdlib": "data=self", _HEALED_STAGES: "stages=[plan,train,export]"}.get(w, w)
            for w in healed.commands[0]
        ]
        yield replace(
            healed,
            commands=(tuple(words), self.measure("model.path=<run>/heal/export")),
            read=read.read_healing_elsewhere,
        )

    def extend(self) -> Iterator[Row]:
        """One long window; the loss of its parts says what position costs."""
        if not self.subject.positions:
            return
        longest = self.sizes.extended * self.subject.positions
        plain = (f"attention.rope.max_position_embeddings={longest}",)
        factor = (f"attention.rope.factor={self.sizes.extended}",)
        # Where LongRoPE's search starts (Ding et al. 2024, section 3.3): nothing was searched here.
        pairs = self.subject.head_dim // 2
        scaled = [self.sizes.extended ** (pair / max(1, pairs - 1)) for pair in range(pairs)]
        divisors = (
            f"attention.rope.short_factor=[{','.join(['1.0'] * pairs)}]",
            f"attention.rope.long_factor=[{','.join(f'{one:.4f}' for one in scaled)}]",
        )
        for name, what, group, overrides in (
            ("none", "as it is", "rope", plain),
            ("yarn", "YaRN", "rope_yarn", factor),
            ("dynamic", "NTK-aware, dynamic", "rope_dynamic", factor),
            ("llama3", "Llama 3.1's", "rope_llama3", factor),
            ("longrope", "LongRoPE, NTK-aware divisors", "rope_longrope", (*factor, *divisors)),
            ("linear", "position interpolation", "rope_linear", factor),
        ):
            yield Row(
                f"rope-{name}",
                "rope",
                f"{what}, {self.subject.positions:,} → {longest:,} tokens, one window",
                (
                    self.train(
                        "cut",
                        "<model>",
                        f"attention=[{group}]",
                        *overrides,
                        "stages=[plan,operate,export]",
                    ),
                    self.measure(f"model.path=<run>/{EXPORT}", tokens=longest),
                ),
                read.read_cut,
                # Attention's share grows with the length: a token of 512 costs about 300 of them.
                longest * (1 + longest / 8192),
            )


_HEALED_STAGES = "stages=[plan,measure,train]"
# Tokens of the prompt whose time tells how long a forward pass takes.
PROMPT = 256
_TIMED = ("measure.decode_tokens=16", "measure.repeats=3")
_SHORT_PROMPT = "measure.prefill_tokens=32"
_UNTIMED = ("measure.decode_tokens=2", "measure.repeats=1")
DISTILL = ("objective=distill", "objective.teacher=<teacher>")
# Passes that a stage takes as long as, per token that it looks at.
_CALIBRATED = 8.0
_LM, _DISTILLED = 3.0, 4.0
_ELIMINATED = 600.0
_SCORED = {"leave_one_out": 180.0, "gate_gradient": 3.0, "output_norm": 1.5, "random": 0.1}


def name_cut(estimator: str, amount: int, refit: bool) -> str:
    return f"prune-{estimator}-{amount}" + ("-refit" if refit else "")


HEALED_PRUNINGS = tuple(name_cut(one, 20, refit=True) for one in (ELIMINATION, "leave_one_out"))


def _keep_healed(name: str) -> tuple[str, ...]:
    return (EXPORT,) if name in HEALED_PRUNINGS else ()


def _calibrate(windows: int, tokens: int) -> Command:
    return (
        f"data.seq_len={tokens}",
        f"calibration.windows={windows}",
    )


def is_healing(row: Row) -> bool:
    return row.section in ("heal", "objectives", "rates")
