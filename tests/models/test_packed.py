"""Packed documents: each as it is alone, or the run is refused. Every type is asked, none named."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from packaging.version import Version
from transformers import PreTrainedModel

from benchmarks.coverage import zoo
from surgery.calibration.view import observe_site
from surgery.config.schema import ObjectiveConfig, ObjectiveName, Task
from surgery.data.collate import IGNORED, Batch, CausalCollator
from surgery.data.windows import make_windows
from surgery.errors import ConfigError
from surgery.execute.live import apply_
from surgery.importance import score_heads
from surgery.importance.work import compute_logits
from surgery.lab.analysis.watch import run_passes
from surgery.measure.loss import compute_mean_loss
from surgery.models.forward import get_forward_options
from surgery.models.packed import (
    Isolation,
    ask_model,
    ask_tiny_model,
    find_packing,
    make_document_masks,
    make_inputs,
)
from surgery.models.sites import find_sites
from surgery.models.tiny import build_tiny_model
from surgery.observe import AttentionCall, Tap
from surgery.observe.masks import find_visible_keys
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations
from surgery.training.objectives import compute_training_loss
from surgery.verify.first_batch import check_first_batch
from tests.data.making import data_config, documents, word_tokenizer
from tests.families import masked_lm

ROOT = Path(__file__).parents[2]
# Of the largest logit, in fp32.
ROUNDING = 1e-4
POSITIONS, MASK, NONE = Isolation.POSITIONS, Isolation.MASK, Isolation.NONE

# Masks made from positions or not, masks that differ by layer, learned positions, ALiBi.
ISOLATED = [
    "afmoe",
    "bert",
    "biogpt",
    "codegen",
    "cohere2",
    "falcon",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "llama",
    "llama4_text",
    "mistral",
    "mpt",
    "opt",
    "phi3",
    "qwen3",
    "xglm",
]
# A state that runs through the row, positions that do not start again, masks that are not taken.
# Releases of transformers make some of these isolated too.
OFTEN_REFUSED = [
    "bart",
    "bloom",
    "cpmant",
    "jamba",
    "mamba",
    "openai-gpt",
    "qwen3_next",
    "roberta",
    "rwkv",
    "xlnet",
    # Before 5.23 its positions in a packed row are others than alone.
    *(["llama4_text"] if Version(version("transformers")) < Version("5.23") else []),
]


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Packed rows, as the data module gives them."""
    cfg = data_config(path="", layout="packed", seq_len=24)
    # Some are longer than the windows of tiny models, one is a word.
    texts = datasets.Dataset.from_dict({"text": documents(12, longest=14)})
    tokenizer = word_tokenizer(eos_token="</s>", pad_token="<pad>")
    rows = list(make_windows(texts, tokenizer, cfg, Task.causal_lm))
    return CausalCollator(0)(rows[:3])


def build(model_type: str, attention: str = "eager") -> PreTrainedModel:
    return zoo.tiny_model("causal-lm", model_type, attention=attention)


def places(batch: Batch) -> list[tuple[int, slice]]:
    """(row, where) of every document."""
    found = []
    for row, positions in enumerate(batch["position_ids"]):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(positions)]
        found += [(row, slice(start, end)) for start, end in pairwise(starts)]
    return found


@torch.no_grad()
def run(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    inputs.pop("labels", None)
    return model(**inputs).logits.float()


def distance_from_alone(model: PreTrainedModel, batch: Batch, packed: torch.Tensor) -> float:
    """Largest difference of logits from those of the documents alone, of the largest logit."""
    options = get_forward_options(model)
    distance, largest = 0.0, 0.0
    for row, where in places(batch):
        alone = run(model, input_ids=batch["input_ids"][row, where][None], **options)[0]
        distance = max(distance, float((packed[row, where] - alone).abs().max()))
        largest = max(largest, float(alone.abs().max()))
    return distance / largest


def assert_alone(model: PreTrainedModel, batch: Batch, packed: torch.Tensor) -> None:
    assert distance_from_alone(model, batch, packed) <= ROUNDING


@pytest.mark.parametrize("model_type", sorted({*ISOLATED, *OFTEN_REFUSED}))
def test_documents_are_as_alone_or_refused(model_type: str, batch: Batch) -> None:
    model = build(model_type)
    asked = ask_tiny_model(type(model), model.config, "eager")
    assert asked is not None
    assert asked.isolation is not NONE or model_type in OFTEN_REFUSED
    by_positions = run(model, **batch, **get_forward_options(model))
    distance = distance_from_alone(model, batch, by_positions)
    # What is given besides positions is needed.
    assert (distance <= ROUNDING) == (asked.isolation is POSITIONS)
    if asked.isolation is NONE:
        assert distance > 100 * ROUNDING
        with pytest.raises(ConfigError, match=r"data\.isolate_documents: packed documents cannot"):
            make_inputs(model, batch)
        return
    assert_alone(model, batch, run(model, **make_inputs(model, batch)))


@pytest.mark.parametrize("model_type", ["afmoe", "falcon", "gemma3_text", "opt", "qwen2"])
def test_each_backend_gets_the_mask_that_it_takes(model_type: str, batch: Batch) -> None:
    model = build(model_type, "sdpa")
    assert_alone(model, batch, run(model, **make_inputs(model, batch)))
    model.set_attn_implementation("eager")  # asked again, and given another mask
    assert_alone(model, batch, run(model, **make_inputs(model, batch)))


def test_padded_rows_are_offered_only_where_they_are_exact() -> None:
    answers = {name: ask_model(build(name)) for name in ("bloom", "mamba", "cpmant")}
    assert all(answer.isolation is NONE for answer in answers.values())
    assert [answer.padded for answer in answers.values()] == [True, True, False]


def test_the_mask_has_the_window_of_the_operated_model(batch: Batch) -> None:
    model = build("gpt_oss")
    before = run(model, **make_inputs(model, batch))
    plan = make_plan(model, parse_operations({"sliding_window": {"size": 3}}))
    apply_(model, plan)
    after = run(model, **make_inputs(model, batch))
    assert_alone(model, batch, after)
    assert (after - before).abs().max() > 1e-2


def build_outsider() -> PreTrainedModel:
    """Build a model of which there is no tiny one."""
    model = build("opt")

    class Outsider(type(model)):  # type: ignore[misc]
        def __init__(self, config: Any, more: Any) -> None:
            super().__init__(config)

    model.__class__ = Outsider
    return model


def test_a_model_without_a_tiny_one_is_asked_itself(batch: Batch) -> None:
    model = build_outsider()
    assert ask_tiny_model(type(model), model.config, "eager") is None
    assert_alone(model, batch, run(model, **make_inputs(model, batch)))
    assert find_packing(model).isolation is MASK


@pytest.mark.parametrize("estimator", ["gate_gradient", "output_norm", "leave_one_out"])
def test_scores_of_a_model_that_is_asked_itself(
    estimator: str, batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hooks of the estimators do not see the question, and it does not see them."""
    expected = score_heads(build("opt"), [batch], estimator).to_json()["scores"]
    capsys.readouterr()
    assert score_heads(build_outsider(), [batch], estimator).to_json()["scores"] == expected
    assert "full pass" not in capsys.readouterr().out


def test_the_question_leaves_no_trace(batch: Batch) -> None:
    """No monitor sees it, no random number is drawn, precision and modes stay as they are."""
    model = build("opt").train()
    calls: list[AttentionCall] = []
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with Tap(model, calls.append), torch.autocast("cpu", torch.bfloat16):
            assert ask_model(model).isolation is MASK
            make_inputs(model, batch)
    finally:
        assert torch.get_default_dtype() is torch.bfloat16
        torch.set_default_dtype(torch.float32)
    assert not calls
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training for module in model.modules())


def test_only_packed_rows_are_changed(batch: Batch) -> None:
    model = build("bloom")
    ids = batch["input_ids"]
    whole = {"input_ids": ids, "position_ids": torch.arange(24).expand(3, -1)}
    padded = batch | {"attention_mask": torch.ones_like(ids)}
    for given in ({"input_ids": ids}, whole, padded):
        assert set(make_inputs(model, given)) == {*given, "use_cache"}
    encoder = masked_lm("bert")  # it sees both ways, and is never packed
    assert set(make_inputs(encoder, whole)) == {*whole, "use_cache"}


def measured(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    loss = compute_mean_loss(model, [batch], Task.causal_lm, total=1, label="")
    return torch.tensor(loss)


def trained(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    cfg = ObjectiveConfig(ObjectiveName.lm, 1.0, 0.0, 0.0, None)
    return compute_training_loss(model, None, batch, cfg, Task.causal_lm).total


def distilled(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    cfg = ObjectiveConfig(ObjectiveName.distill, 1.0, 1.0, 0.0, None)
    teacher = zoo.tiny_model("causal-lm", "opt", seed=1)
    return compute_training_loss(model, teacher, batch, cfg, Task.causal_lm).total


@pytest.mark.parametrize("compute", [measured, trained, distilled])
@torch.no_grad()
def test_losses_are_means_over_documents_alone(
    compute: Callable[[PreTrainedModel, Batch], torch.Tensor], batch: Batch
) -> None:
    model = build("opt")
    losses = []
    for row, where in places(batch):
        ids = batch["input_ids"][row, where]
        logits = run(model, input_ids=ids[None], use_cache=False)[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    expected = torch.cat(losses).mean()
    assert len(torch.cat(losses)) == (batch["labels"][:, 1:] != IGNORED).sum()
    torch.testing.assert_close(compute(model, batch), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_teacher_sees_documents_alone_too(batch: Batch) -> None:
    """The divergence from a teacher of another architecture, against documents one by one."""
    model, teacher = build("llama"), build("opt")
    cfg = ObjectiveConfig(ObjectiveName.distill, 1.0, 0.0, 0.0, None)
    actual = compute_training_loss(model, teacher, batch, cfg, Task.causal_lm).total
    divergences = []
    for row, where in places(batch):
        ids = batch["input_ids"][row, where][None]
        both = (run(one, input_ids=ids, use_cache=False)[0, :-1] for one in (teacher, model))
        log_p, log_q = (logits.log_softmax(-1) for logits in both)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
    torch.testing.assert_close(actual, torch.cat(divergences).mean(), rtol=0, atol=1e-5)


def scored(model: PreTrainedModel, batch: Batch, see: Callable[[AttentionCall], None]) -> None:
    with Tap(model, see):
        compute_logits(model, batch)


def analysed(model: PreTrainedModel, batch: Batch, see: Callable[[AttentionCall], None]) -> None:
    sites = find_sites(model).sites
    list(run_passes(model, [batch], sites, lambda _, call: see(call), ""))


def calibrated(model: PreTrainedModel, batch: Batch, see: Callable[[AttentionCall], None]) -> None:
    for site in find_sites(model).sites:
        view = observe_site(model, site, batch)
        assert view.call is not None
        see(view.call)


@pytest.mark.parametrize("pass_through", [scored, analysed, calibrated])
@pytest.mark.parametrize("model_type", ["opt", "gpt_oss"])
def test_no_query_sees_another_document(
    pass_through: Callable[..., None], model_type: str, batch: Batch
) -> None:
    model = build(model_type)
    starts = (batch["position_ids"] == 0).cumsum(-1)
    same = starts[:, :, None] == starts[:, None, :]
    seen: list[torch.Tensor] = []

    def see(call: AttentionCall) -> None:
        seen.append(find_visible_keys(call, torch.arange(24))[:, 0])

    pass_through(model, batch, see)
    assert len(seen) == len(find_sites(model).sites)
    for visible in seen:
        assert not (visible & ~same).any()
        assert visible.diagonal(dim1=1, dim2=2).all()
    # A layer without a window shows all of a document up to the query.
    causal = torch.ones(24, 24, dtype=torch.bool).tril()
    assert any(torch.equal(visible, same & causal) for visible in seen)


@pytest.mark.parametrize("model_type", ["opt", "afmoe"])
def test_the_first_batch_is_compared_under_its_mask(
    model_type: str, batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mask of sdpa is not what eager takes; afmoe has two of them."""
    model = build(model_type, "sdpa")
    check_first_batch(model)
    run(model, **make_inputs(model, batch))
    assert "first batch: logits differ" in capsys.readouterr().out


def test_a_mask_of_the_wrong_form_is_found(batch: Batch) -> None:
    """So the test above would fail without the conversion."""
    model = build("opt", "sdpa")
    masks = make_document_masks(model, batch["position_ids"])
    right = run(model, **batch, attention_mask=masks, use_cache=False)
    model.set_attn_implementation("eager")
    wrong = run(model, **batch, attention_mask=masks, use_cache=False)
    assert (wrong - right).abs().max() > 1e-2


def test_what_is_not_tiny_is_not_built() -> None:
    """A size under a name that is not known: the weights would fill the memory."""
    model = build("gpt_neo")
    model.config.vocab_size = 10**9
    with pytest.raises(ValueError, match="of tiny sizes has 32,0"):
        build_tiny_model(type(model), model.config, "eager")


def test_every_pass_over_data_is_fed_in_one_place() -> None:
    """`make_inputs`; the others feed inputs of their own, or what a model was given already."""
    users = {
        str(path.relative_to(ROOT))
        for room in ("surgery", "callbacks")
        for path in (ROOT / room).rglob("*.py")
        if "get_forward_options(" in path.read_text(encoding="utf-8")
    }
    fed_otherwise = {
        "surgery/models/forward.py",
        "surgery/models/probe.py",
        "surgery/verify/first_batch.py",
    }
    assert users == {"surgery/models/packed.py", *fed_otherwise}
