"""A second model that shares every tensor with the first, until it is given others."""

from __future__ import annotations

import copy
from itertools import chain

from transformers import PreTrainedModel


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose modules are its own and whose tensors are the model's, in eval mode."""
    memo: dict[int, object] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo).eval()
