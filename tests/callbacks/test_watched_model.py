"""Which model is watched, and what is refused because nothing could be seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from surgery.callbacks import AttentionStatistics, HeadImportance
from torch import nn
from transformers import AttentionInterface

from surgery.errors import TapError
from tests.callbacks.fitting import Batch, OwnModule, by_layer, fit, padded, unpadded
from tests.callbacks.gates import importance
from tests.tiny_models import tiny_model, tokens

ORIGINAL = AttentionInterface.get_interface


@pytest.mark.parametrize("monitor", [AttentionStatistics(1, 1), HeadImportance(1, 1)])
def test_attention_that_never_comes_by_ends_the_training(
    monitor: AttentionStatistics | HeadImportance, tmp_path: Path
) -> None:
    with pytest.raises(TapError, match="BloomForCausalLM was never called") as caught:
        fit(
            OwnModule(tiny_model("bloom", "eager")),
            [unpadded(tokens(2, 6))] * 2,
            [monitor],
            tmp_path,
        )
    assert str(caught.value).endswith(f"set callbacks.{monitor.name}=null")
    assert AttentionInterface.get_interface is ORIGINAL


def test_no_transformers_model_at_all(tmp_path: Path) -> None:
    class Linear(OwnModule):
        def __init__(self) -> None:
            super().__init__(nn.Linear(2, 2))  # type: ignore[arg-type]

    with pytest.raises(TapError, match="Linear holds no transformers model"):
        fit(Linear(), [unpadded(tokens(2, 6))], [AttentionStatistics(1, 1)], tmp_path)


class Distilled(OwnModule):
    """A teacher first, as a submodule: both run in every step."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__(student)  # type: ignore[arg-type]
        del self.net
        self.teacher = teacher.requires_grad_(False)
        self.net = student

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.teacher(**batch)
        return self.net(**batch).loss


def test_the_model_that_learns_is_watched_and_not_its_teacher(tmp_path: Path) -> None:
    student = tiny_model("llama", num_attention_heads=2)
    batch = unpadded(tokens(2, 6))
    monitor = HeadImportance(1, 1)
    expected = importance(student, batch, heads=2)
    fit(Distilled(tiny_model("llama"), student), [batch], [monitor], tmp_path)
    got = torch.stack(by_layer(monitor.observations[0], "head_importance"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_batches_need_not_be_dictionaries(tmp_path: Path) -> None:
    class Tuples(OwnModule):
        def training_step(self, batch: tuple[torch.Tensor, ...], batch_idx: int) -> torch.Tensor:
            return self.net(input_ids=batch[0], labels=batch[1]).loss

    ids = tokens(2, 6)
    importances, entropy = HeadImportance(1, 1), AttentionStatistics(1, 1)
    fit(Tuples(tiny_model("llama")), [(ids, ids)], [importances, entropy], tmp_path)
    expected = importance(tiny_model("llama"), unpadded(ids))
    got = torch.stack(by_layer(importances.observations[0], "head_importance"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    assert len(entropy.observations) == 1


def test_layers_may_differ_in_their_number_of_heads(tmp_path: Path) -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.q_proj = nn.Linear(32, 16, bias=False)  # two heads of eight
    attention.k_proj, attention.v_proj = (nn.Linear(32, 8, bias=False) for _ in range(2))
    attention.o_proj = nn.Linear(16, 32, bias=False)
    importances, entropy = HeadImportance(1, 1), AttentionStatistics(1, 1)
    fit(OwnModule(model), [padded(torch.full((2, 6), 5), 6, 3)], [importances, entropy], tmp_path)
    for monitor in (importances, entropy):
        observation = monitor.observations[0]
        assert observation["heads"] == [4, 2]
        for figures in observation["metrics"].values():
            assert figures.shape == (6,)
            assert torch.isfinite(figures).all()


def test_a_batch_that_is_skipped_later_on_is_said_and_passed_over(tmp_path: Path) -> None:
    class Choosy(OwnModule):
        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor | None:
            loss = self.net(**batch).loss
            return None if batch_idx == 1 else loss

    monitor = HeadImportance(1, 1)
    with pytest.warns(UserWarning, match="head_importance: attention ran at step 1"):
        fit(Choosy(tiny_model("llama")), [unpadded(tokens(2, 6))] * 3, [monitor], tmp_path)
    assert [observation["step"] for observation in monitor.observations] == [0, 2]


def test_lightning_modules_are_not_changed(tmp_path: Path) -> None:
    """Same weights after training, watched or not."""

    def trained(callbacks: list[pl.Callback]) -> dict[str, torch.Tensor]:
        module = OwnModule(tiny_model("llama"), lr=0.5)
        fit(module, [unpadded(tokens(2, 6, seed=i)) for i in range(4)], callbacks, tmp_path)
        return module.state_dict()

    plain = trained([])
    watched = trained([HeadImportance(1, 1), AttentionStatistics(1, 1, rows=3)])
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
