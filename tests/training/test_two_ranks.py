"""Two processes train one model, and log the mean of what both computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.data.collate import IGNORED
from surgery.measure.loss import compute_mean_loss
from tests.training.making import operated, options, small_data
from tests.training.two_ranks_best import STEPS as STEPS_OF_BEST
from tests.training.two_ranks_best import WINDOWS
from tests.training.two_ranks_losses import STEPS, make_batch
from tests.two_processes import run_script


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where both have written down what they know, and what they printed."""
    root = tmp_path_factory.mktemp("ranks")
    return root, run_script("tests.training.two_ranks", root)


@pytest.fixture(scope="module")
def root(trained: tuple[Path, str]) -> Path:
    return trained[0] / "losses"


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[dict[str, Any]]:
    return [torch.load(root / f"rank{rank}.pt") for rank in (0, 1)]


def test_they_close_the_same_heads(trained: tuple[Path, str]) -> None:
    """One measures; both follow, and go on averaging their gradients after it."""
    one, other = (torch.load(trained[0] / f"heads/rank{rank}.pt") for rank in (0, 1))
    assert one["decision"] == other["decision"]
    assert [event["step"] for event in one["decision"]["events"]] == [0, 2]
    assert trained[1].count("heads closed") == 2
    for name, tensor in one["weights"].items():
        assert torch.equal(tensor, other["weights"][name]), name


def test_training_losses_are_means_over_processes(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    means = [(a + b) / 2 for a, b in zip(first["own"], second["own"], strict=True)]
    assert len(means) == STEPS
    for of_rank in ranks:
        logged = [metrics["train/loss"] for metrics in of_rank["logged"]]
        assert logged == pytest.approx(means, rel=1e-6)
        assert [loss for _, loss in of_rank["curve"]] == pytest.approx(means, rel=1e-6)
        for own, mean in zip(of_rank["own"], means, strict=True):
            assert abs(own - mean) > 1e-3  # else the test could not fail


def test_parts_of_the_objective_are_means_over_processes(
    root: Path, ranks: list[dict[str, Any]]
) -> None:
    """Before the first step, against the model and its teacher run on each process's batch."""
    module = operated(root / "model", objective=options("objective", "distill", label_weight=0.5))
    module.configure_model()
    assert module.model is not None
    with torch.no_grad():
        losses = [module.model(**make_batch(rank, 2)).loss.item() for rank in (0, 1)]
    for of_rank in ranks:
        assert of_rank["logged"][0]["train/label_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
        for step in of_rank["logged"]:
            total = 0.5 * step["train/kl"] + 0.5 * step["train/label_loss"]
            assert step["train/loss"] == pytest.approx(total, rel=1e-5)


def test_validation_loss_is_the_mean_over_the_tokens_of_all(
    root: Path, ranks: list[dict[str, Any]]
) -> None:
    """8 + 2·3 tokens of the first process; the second holds out rows that label nothing."""
    module = operated(root / "model")
    module.configure_model()
    assert module.model is not None
    module.model.load_state_dict(ranks[0]["held_out"]["weights"])
    model, nll, count = module.model.eval(), 0.0, 0
    for batch in (make_batch(90, 1), make_batch(91, 2, labelled=4), make_batch(92, 3, labelled=1)):
        labels = batch["labels"][:, 1:]
        with torch.no_grad():
            log_p = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        known = labels != IGNORED
        nll -= float(log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0][known].sum())
        count += int(known.sum())
    assert count == 14
    for of_rank in ranks:
        assert of_rank["held_out"]["loss"] == pytest.approx(nll / count, rel=1e-5)


def test_a_loss_that_is_no_number_in_one_stops_both(root: Path) -> None:
    said = [(root / f"refused{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "loss is nan at step 1; no position of this batch carries a label" in said[0]


def test_both_keep_the_same_best_weights(trained: tuple[Path, str]) -> None:
    """One writes them, both get them back; the loss is that of all windows together."""
    root = trained[0] / "best"
    first, second = (torch.load(root / f"rank{rank}.pt") for rank in (0, 1))
    assert first["evaluations"] == second["evaluations"]
    assert first["best"] == second["best"] == min(first["evaluations"], key=lambda one: one[1])
    assert [step for step, _ in first["evaluations"]] == list(range(STEPS_OF_BEST + 1))
    assert trained[1].count("held-out loss at step") == STEPS_OF_BEST + 1
    module = operated(root / "model")
    module.configure_model()
    assert module.model is not None
    for step, loss in first["evaluations"]:
        module.model.load_state_dict(first["seen"][step])
        data = small_data(root)
        data.validation_windows = WINDOWS
        batches = data.load_validation_batches(WINDOWS)
        model = module.model.eval()
        alone = compute_mean_loss(model, batches, module.task, total=1, label="alone")
        assert loss == pytest.approx(alone, rel=1e-5)
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
        assert torch.equal(tensor, first["seen"][first["best"][0]][name]), name
