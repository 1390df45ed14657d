"""One operation on one architecture: works, refused, or wrong."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.coverage import zoo
from benchmarks.coverage.caching import cache_bytes, cached_difference
from benchmarks.coverage.oracles import (
    attention_within,
    first_heads_shared,
    first_heads_written_,
    heads_silenced,
)
from surgery.errors import PlanError, SurgeryError
from surgery.execute.live import apply_
from surgery.models.share_kv import NAME
from surgery.models.sites import Site, find_sites
from surgery.operations.fuse_qkv.projections import is_fused, unfuse_qkv_
from surgery.plan.make import make_plan
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations

WORKS, REFUSED, WRONG = "works", "refused", "wrong"
# Relative to the size of the logits; sums in another order differ in their last bits.
TOLERANCE = 2e-4
RELOAD_TOLERANCE = 1e-6
WINDOW = 3
PADDED = ("causal-lm", "masked-lm", "seq2seq-lm")


@dataclass(frozen=True)
class Outcome:
    """What came of one operation.

    Attributes:
        status: works, refused, or wrong.
        reason: why it was refused, or what is wrong.
        export: the format of the plan's result.
        difference: largest difference of logits from the oracle's, relative to the largest logit.
    """

    status: str
    reason: str = ""
    export: str = ""
    difference: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in ("", None)}


class Case:
    """One architecture, built anew for every operation."""

    def __init__(self, kind: str, model_type: str, **fields: Any) -> None:
        self.kind, self.model_type, self.fields = kind, model_type, fields

    def model(self) -> PreTrainedModel:
        return zoo.tiny_model(self.kind, self.model_type, **self.fields)

    def inputs(self, model: PreTrainedModel) -> dict[str, Any]:
        """Two rows, the second of them padded where the type knows padding."""
        given = zoo.inputs(self.kind, model)
        mask = given.get("attention_mask")
        if self.kind in PADDED and isinstance(mask, Tensor) and mask.ndim == 2:
            mask[1, -3:] = 0
        return given

    def logits(self, model: PreTrainedModel) -> Tensor:
        return zoo.logits(model, self.inputs(model)).float()

    def operated(self, **attention: Any) -> tuple[PreTrainedModel, Plan]:
        model = self.model()
        plan = make_plan(model, parse_operations(attention), kv_bytes=4, tokens=zoo.LENGTH)
        try:
            return apply_(model, plan), plan
        except PlanError as error:
            if not any(
                words in str(error) for words in ("the model cannot be run", "took no part")
            ):
                raise
        # It needs more than token ids or pixels to run at all.
        return apply_(model, plan, probe=zoo.inputs(self.kind, model)), plan


def check_gqa(case: Case) -> Outcome:
    """Half as many KV heads in every site; ``first``, so that norms and RoPE change nothing."""
    return _outcome(lambda: _gqa(case))


def _gqa(case: Case) -> Outcome:
    original = case.model()
    sites = find_sites(original).sites
    if sites and all(site.kv_heads == 1 for site in sites):
        return Outcome(REFUSED, "it has one KV head as it is")
    try:
        half = [max(1, site.kv_heads // 2) for site in sites] or 1
        model, plan = case.operated(gqa={"kv_heads": half, "merge": "first"})
        note = ""
    except SurgeryError as refusal:
        try:
            model, plan = case.operated(gqa={"kv_heads": 1, "merge": "first"})
        except SurgeryError:
            raise refusal from None
        note = f"to one KV head only: {_line(refusal)}"
    groups = {site.path: after.kv_heads for site, after in zip(sites, plan.after, strict=True)}
    expected = _shared(case, sites, groups)
    outcome = _compared(case, model, plan, expected, original)
    return replace(outcome, reason=note) if outcome.status == WORKS else outcome


def _shared(case: Case, sites: Sequence[Site], groups: Mapping[str, int]) -> Tensor:
    """Logits of the original whose groups share their first head."""
    original = case.model()
    if any(site.k_norm is not None and site.k_norm.size != site.head_dim for site in sites):
        first_heads_written_(original, sites, groups)
        return case.logits(original)
    with first_heads_shared(original, groups) as calls:
        expected = case.logits(original)
    unseen = [site for site in sites if not calls[site.path]]
    if unseen:  # these attend in their own way, or not at all on these inputs
        first_heads_written_(original, unseen, groups)
        with first_heads_shared(original, groups):
            expected = case.logits(original)
    return expected


def check_prune(case: Case) -> Outcome:
    """One KV group less in every site; one query head less where there is one group."""
    return _outcome(lambda: _prune(case))


def _prune(case: Case) -> Outcome:
    original = case.model()
    sites = find_sites(original).sites
    heads = {site.layer: _going(site) for site in sites}
    model, plan = case.operated(prune_heads={"heads": heads})
    silenced = {site.path: heads[site.layer] for site in sites}
    with heads_silenced(original, sites, silenced):
        expected = case.logits(original)
    return _compared(case, model, plan, expected, original)


def _going(site: Site) -> list[int]:
    if site.kv_heads == 1:
        return [1] if site.q_heads > 1 else []
    size = site.group_size
    if site.packing is not None and site.packing.blocks > 1 and not site.packing.grouped:
        # CodeGen's heads come in equal blocks, so equal shares of them go.
        return list(range(site.packing.blocks)) if site.q_heads > site.packing.blocks else []
    return list(range(size, 2 * size))


def check_rope(case: Case) -> Outcome:
    """Positions interpolated by two; the reference is built by transformers from the new config."""
    return _outcome(lambda: _rope(case))


def _rope(case: Case) -> Outcome:
    original = case.model()
    model, plan = case.operated(rope={"type": "linear", "factor": 2.0})
    reference = type(original)(copy.deepcopy(model.config)).eval()
    reference.set_experts_implementation("eager")
    reference.load_state_dict(model.state_dict())
    return _compared(case, model, plan, case.logits(reference), original)


def check_backend(case: Case) -> Outcome:
    """sdpa gives what eager gives."""
    return _outcome(lambda: _backend(case))


def _backend(case: Case) -> Outcome:
    original = case.model()
    model, plan = case.operated(backend={"implementation": "sdpa", "check": False})
    return _compared(case, model, plan, case.logits(original), None)


def check_fuse(case: Case) -> Outcome:
    """One projection instead of three changes nothing, and can be undone to the bit."""
    return _outcome(lambda: _fuse(case))


def _fuse(case: Case) -> Outcome:
    original = case.model()
    model, plan = case.operated(fuse_qkv={})
    if not is_fused(model):
        return Outcome(REFUSED, "its projections are one as they are")
    fused = case.logits(model)
    unfuse_qkv_(model)
    before, after = original.state_dict(), model.state_dict()
    if not all(torch.equal(before[name], after[name]) for name in before):
        return Outcome(WRONG, "unfused, its weights are others")
    return _compared(case, model, plan, case.logits(original), None, fused)


def check_window(case: Case) -> Outcome:
    """A window of a few tokens in every layer; the oracle is told so by its masks alone."""
    return _outcome(lambda: _window(case))


def _window(case: Case) -> Outcome:
    original = case.model()
    model, plan = case.operated(sliding_window={"size": WINDOW})
    paths = [site.path for site in find_sites(original).sites if site.cached]
    with attention_within(original, paths, WINDOW) as called:
        expected = case.logits(original)
    unseen = set(paths) - set(called)
    if unseen:
        return Outcome(WRONG, f"the oracle never saw {sorted(unseen)[0]}")
    return _compared(case, model, plan, expected, original)


def check_dropout(case: Case) -> Outcome:
    """All but certain dropout silences every head, and nothing changes in eval mode."""
    return _outcome(lambda: _dropout(case))


def _dropout(case: Case) -> Outcome:
    original = case.model()
    sites = find_sites(original).sites
    model, plan = case.operated(attention_dropout={"p": 1 - 1e-9})
    calm = case.logits(model)
    if not torch.equal(calm, case.logits(original)):
        return Outcome(WRONG, "it changes logits in eval mode")
    for site in sites:
        model.get_submodule(site.path).train()
    torch.manual_seed(0)
    dropped = case.logits(model)
    model.eval()
    with heads_silenced(original, sites, {s.path: range(s.q_heads) for s in sites}):
        expected = case.logits(original)
    return _compared(case, model, plan, expected, case.model(), dropped)


def _compared(
    case: Case,
    model: PreTrainedModel,
    plan: Plan,
    expected: Tensor,
    original: PreTrainedModel | None,
    actual: Tensor | None = None,
) -> Outcome:
    """`original`, if given, must differ from the oracle, which would show nothing otherwise."""
    now = case.logits(model)
    actual = now if actual is None else actual
    scale = float(expected.abs().max())
    difference = float((actual - expected).abs().max()) / scale
    if not difference <= TOLERANCE:
        return Outcome(WRONG, f"its logits are off by {difference:.2g}", plan.export.format)
    if original is not None:
        before = case.logits(original)
        if float((before - expected).abs().max()) / scale <= TOLERANCE:
            return Outcome(WRONG, "the oracle equals the original, so it shows nothing")
    counted = sum(p.numel() for p in model.parameters())
    if counted != plan.sizes_after.parameters:
        return Outcome(
            WRONG, f"{counted} parameters, not the {plan.sizes_after.parameters} planned"
        )
    fault = _reload_fault(case, model, now) or _cache_fault(case, model, plan)
    if fault:
        return Outcome(WRONG, fault, plan.export.format)
    return Outcome(WORKS, export=plan.export.format, difference=difference)


def _cache_fault(case: Case, model: PreTrainedModel, plan: Plan) -> str:
    """Judged only where the original passes, whose own caches are not always kept so."""
    if case.kind != "causal-lm":
        return ""
    original = case.model()
    given = zoo.inputs(case.kind, original)
    try:
        caches = cached_difference(original, given) <= TOLERANCE
        counts = cache_bytes(original, given) == plan.sizes_before.kv_bytes
    except Exception:  # it takes no cache
        return ""
    difference = cached_difference(model, given) if caches else 0.0
    if not difference <= TOLERANCE:
        return f"with a cache, its logits are off by {difference:.2g}"
    if any(note.startswith("KV cache:") for note in plan.notes):
        return ""  # the plan says that this architecture's own cache keeps more
    planned = plan.sizes_after.kv_bytes
    held = cache_bytes(model, given) if counts else planned
    if held != planned:
        return f"{held} cached bytes after {plan.tokens} tokens, not the {planned} planned"
    return ""


def _reload_fault(case: Case, model: PreTrainedModel, actual: Tensor) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        # A model that shares KV heads is told so by its record.
        implementation = str(model.config._attn_implementation).replace(NAME, "eager")
        reloaded = type(model).from_pretrained(folder, attn_implementation=implementation)
        reloaded.set_experts_implementation("eager")
        difference = float((case.logits(reloaded.eval()) - actual).abs().max())
    # Experts add up their tokens in no fixed order; all else is equal to the bit.
    allowed = RELOAD_TOLERANCE * float(actual.abs().max()) if _has_experts(model) else 0.0
    return f"reloaded, its logits differ by {difference:.2g}" if difference > allowed else ""


def _has_experts(model: PreTrainedModel) -> bool:
    return any("expert" in name for name, _ in model.named_modules())


def _outcome(attempt: Callable[[], Outcome]) -> Outcome:
    try:
        return attempt()
    except PlanError as error:
        return Outcome(REFUSED, _line(error))
    except SurgeryError as error:
        return Outcome(REFUSED, _line(error))
    except Exception as error:
        return Outcome(WRONG, f"{type(error).__name__}: {_line(error)}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


CHECKS: dict[str, Callable[[Case], Outcome]] = {
    "gqa": check_gqa,
    "prune_heads": check_prune,
    "rope": check_rope,
    "backend": check_backend,
    "fuse_qkv": check_fuse,
    "attention_dropout": check_dropout,
    "sliding_window": check_window,
}


# Operations whose work depends on how an attention block is built.
STRUCTURAL = ("gqa", "prune_heads", "fuse_qkv")


@torch.no_grad()
def check(kind: str, model_type: str) -> dict[str, Outcome]:
    """Operation → outcome."""
    case = Case(kind, model_type)
    return {name: run(case) for name, run in CHECKS.items()}


@torch.no_grad()
def check_variant(kind: str, model_type: str, fields: dict[str, Any]) -> dict[str, Outcome]:
    """Operation → outcome, for a config with these fields; operations on heads alone.

    Empty for a config whose model does not run as it is.
    """
    case = Case(kind, model_type, **fields)
    try:
        case.logits(case.model())
    except Exception:  # an encoder-decoder without cross-attention, for one
        return {}
    return {name: CHECKS[name](case) for name in STRUCTURAL}
