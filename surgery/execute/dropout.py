"""The step `attention_dropout`: how much attention drops in training."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from surgery.architecture.dropouts import holders, set_dropout
from surgery.errors import PlanError
from surgery.execute.steps import step


@step("attention_dropout")
def set_attention_dropout(model: PreTrainedModel, p: float, sites: Sequence[str]) -> None:
    """Let the attention blocks at the paths `sites` drop a share `p` of their probabilities.

    Raises:
        PlanError: one of them has no dropout there.
    """
    blocks = {path: model.get_submodule(path) for path in sites}
    found = {path: holders(block) for path, block in blocks.items()}
    for path in sites:
        if not found[path]:
            raise PlanError(f"{path} takes no attention dropout")
    for path, block in blocks.items():
        for holder in found[path]:
            set_dropout(block, holder, p)
