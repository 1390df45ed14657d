"""The step `share_kv`: eager attention that shares KV heads, where the own one cannot."""

from __future__ import annotations

from transformers import PreTrainedModel

from surgery.execute.steps import step
from surgery.models.share_kv import use_shared_kv


@step("share_kv")
def share_kv_(model: PreTrainedModel) -> None:
    """Let an eager model attend by `eager_shared_kv`; every other backend shares by itself."""
    use_shared_kv(model)
