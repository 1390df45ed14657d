"""The step `backend`, and the comparison with eager on the first batch that follows it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from surgery.errors import PlanError, SurgeryError
from surgery.observe import AttentionCall, Tap
from surgery.operations.backend.switch import set_backend
from surgery.plan.registry import run_step
from surgery.verify.first_batch import TOLERANCES, _FirstBatch, check_first_batch
from tests.families import family, tokens
from tests.tiny_models import tiny_model
from tests.verify.batches import packed, padded


def pending(model: nn.Module) -> int:
    return sum(isinstance(hook, _FirstBatch) for hook in model._forward_pre_hooks.values())


def forgetful(*names: str) -> Any:
    """sdpa that is not given some of its arguments."""

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> Any:
        if "attention_mask" in names:
            attention_mask = None
        options = {name: value for name, value in options.items() if name not in names}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    return attention


@pytest.fixture
def registered() -> Iterator[Any]:
    """Registers a backend for one test."""
    added = []

    def register(name: str, attention: Any) -> None:
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, sdpa_mask)
        added.append(name)

    yield register
    for name in added:
        del AttentionInterface._global_mapping[name]
        del AttentionMaskInterface._global_mapping[name]


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("attention")]


def measured(line: str) -> float:
    return float(line.split("eager's by ")[1].split(" ")[0])


def test_the_backend_is_set_everywhere_and_setting_it_again_does_no_more() -> None:
    model = tiny_model("t5", "eager")
    arguments = {"implementation": "sdpa", "check": True, "tolerance": None}
    for _ in range(2):
        run_step("backend", model, arguments)
        assert model.encoder.config._attn_implementation == "sdpa"
        assert model.decoder.config._attn_implementation == "sdpa"
        assert pending(model) == 1
    run_step("backend", model, {"implementation": "eager"})
    assert pending(model) == 0
    assert model.encoder.config._attn_implementation == "eager"


def test_it_works_without_weights() -> None:
    with torch.device("meta"):
        model = tiny_model("llama", "eager").to("meta")
    set_backend(model, "sdpa")
    model(input_ids=torch.zeros(1, 4, dtype=torch.long, device="meta"))
    assert pending(model) == 1  # nothing can be compared there


def test_what_transformers_refuses_or_ignores_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"attention backend sdpa: .* does not support"):
        set_backend(tiny_model("gpt_oss", "eager"), "sdpa")
    with pytest.raises(PlanError, match="BloomForCausalLM keeps eager"):
        set_backend(tiny_model("bloom", "eager"), "flex_attention")
    with pytest.raises(PlanError, match="flash_attention_2"):
        set_backend(tiny_model("llama", "eager"), "flash_attention_2")


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2", "bert", "modernbert", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_batch_is_compared_once_and_said_in_one_line(
    name: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(name).to(dtype)
    batch = padded(rows=3)
    expected = copy.deepcopy(model)(**batch).logits
    set_backend(model, "sdpa")
    assert torch.equal(model(**batch).logits, expected)
    (line,) = said(capsys)
    assert line.startswith("attention backend sdpa, first batch: logits differ from eager's by ")
    assert "2 of 3 rows, 12 of 12 tokens" in line
    assert measured(line) <= (1e-5 if dtype is torch.float32 else 0.2)
    model(**batch)
    assert said(capsys) == []
    assert pending(model) == 0


def test_a_mask_left_out_is_found(registered: Any) -> None:
    registered("maskless", forgetful("attention_mask"))
    model = tiny_model("bert").to(torch.bfloat16)
    set_backend(model, "maskless")
    with pytest.raises(SurgeryError, match=r"attention backend maskless, .* \(allowed: "):
        model(**padded())


def test_a_position_bias_left_out_is_found(registered: Any) -> None:
    registered("biasless", forgetful("position_bias"))
    model = tiny_model("t5")
    set_backend(model, "biasless")
    with pytest.raises(SurgeryError, match="logits differ from eager's by"):
        model(input_ids=tokens(2, 8), labels=tokens(2, 8))


def test_borders_between_packed_documents_are_seen(registered: Any) -> None:
    registered("borderless", forgetful("attention_mask"))
    model = tiny_model("llama")
    set_backend(model, "borderless")
    with pytest.raises(SurgeryError, match="logits differ from eager's by"):
        model(**packed(), use_cache=False)
    model = tiny_model("llama")
    set_backend(model, "sdpa")
    model(**packed(), use_cache=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_compared(
    side: str, registered: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A backend may give anything for queries that are no text."""

    def wild(module: nn.Module, *args: Any, **options: Any) -> Any:
        output, weights = sdpa_attention_forward(module, *args, **options)
        batch = padded(side)["attention_mask"][: output.shape[0], : output.shape[1]]
        return output + 100.0 * (batch == 0)[:, :, None, None], weights

    registered("wild", wild)
    model = tiny_model("llama")
    set_backend(model, "wild")
    batch = padded(side)
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert measured(said(capsys)[0]) <= TOLERANCES[torch.float32]


def test_a_tolerance_of_ones_own_is_kept_to() -> None:
    model = tiny_model("llama")
    set_backend(model, "sdpa", tolerance=1e-12)
    with pytest.raises(SurgeryError, match=r"\(allowed: 1e-12;"):
        model(input_ids=tokens(2, 8))


def test_without_the_check_nothing_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    set_backend(model, "sdpa", check=False)
    model(input_ids=tokens(2, 8))
    assert said(capsys) == []


def test_attention_that_does_not_come_by_is_an_error() -> None:
    model = tiny_model("bloom", "eager")
    model.config._attn_implementation = "sdpa"
    check_first_batch(model)
    with pytest.raises(SurgeryError, match="no attention of BloomForCausalLM used it"):
        model(input_ids=tokens(2, 8))


def test_depth_and_routing_may_multiply_rounding(capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve layers of wide weights in bf16: eager is as far from itself in fp32."""
    model = family("llama", dtype=torch.bfloat16, num_hidden_layers=12)
    set_backend(model, "sdpa")
    with torch.no_grad():
        model(input_ids=tokens(2, 48))
    (line,) = said(capsys)
    assert measured(line) > TOLERANCES[torch.bfloat16]


# --- what it must leave as it was ---


def training_step(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], autocast: bool
) -> dict[str, Any]:
    torch.manual_seed(0)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    return {
        "loss": loss.detach(),
        "random": torch.rand(4),
        **{name: p.grad.clone() for name, p in model.named_parameters()},
    }


@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_step_with_dropout_is_the_same_to_the_bit(autocast: bool) -> None:
    """The graph, the gradients, the dropout masks, the random numbers after it, every mode."""
    model = tiny_model("llama", attention_dropout=0.2)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    expected = training_step(model, padded(), autocast)
    set_backend(model, "sdpa")
    found = training_step(model, padded(), autocast)
    assert pending(model) == 0
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_an_open_tap_sees_the_batch_once() -> None:
    model = tiny_model("llama")
    set_backend(model, "sdpa")
    seen: list[AttentionCall] = []
    with Tap(model, seen.append):
        model(**padded())
    assert [call.implementation for call in seen] == ["sdpa", "sdpa"]
    assert seen[0].query.shape[0] == 3
    assert pending(model) == 0
    assert AttentionInterface.get_interface.__qualname__ == "AttentionInterface.get_interface"


def test_hooks_of_its_own_run_in_both_and_stay() -> None:
    model = tiny_model("llama")
    handle = model.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, output: (output[0] * 2, *output[1:])
    )
    set_backend(model, "sdpa")
    model(**padded())
    assert handle.id in model.model.layers[0].self_attn._forward_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_compares_for_itself(copied: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    set_backend(model, "sdpa")
    other = copied(model)
    other(**padded())
    assert (pending(other), pending(model)) == (0, 1)
    assert len(said(capsys)) == 1


def test_generation_is_compared_on_its_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama").eval()
    expected = model.generate(tokens(1, 6), max_new_tokens=4, do_sample=False)
    set_backend(model, "sdpa")
    found = model.generate(tokens(1, 6), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)
    assert "1 of 1 rows, 6 of 6 tokens" in said(capsys)[0]


def test_positional_arguments_and_tuples(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("bert")
    set_backend(model, "sdpa")
    batch = padded()
    model(batch["input_ids"], batch["attention_mask"], return_dict=False)
    assert "2 of 3 rows" in said(capsys)[0]


def test_in_a_lightning_fit_beside_a_monitor(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import pytorch_lightning as pl
    from surgery.callbacks import AttentionStatistics

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_model("llama", attention_dropout=0.1)
            set_backend(self.model, "sdpa")

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.model(**batch, use_cache=False).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monitor = AttentionStatistics(every_n_steps=1, heatmap_every_n_steps=100)
    module = Module()
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor],
        default_root_dir=tmp_path,
        precision="bf16-mixed",
    )
    trainer.fit(module, torch.utils.data.DataLoader([padded()] * 2, batch_size=None))
    assert len([line for line in said(capsys) if "first batch" in line]) == 1
    assert len(monitor.observations) == 2
    assert pending(module.model) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", "flash_attention_2"])
def test_on_a_gpu(implementation: str, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import is_flash_attn_2_available

    if implementation == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    fields = {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8}
    model = tiny_model("llama", "eager", **fields).to("cuda", torch.bfloat16)
    set_backend(model, implementation)
    batch = {name: value.to("cuda") for name, value in padded().items()}
    model(**batch).loss.backward()
    assert implementation in said(capsys)[0]
