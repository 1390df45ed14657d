"""How every forward pass over data is called."""

from __future__ import annotations

from transformers import PreTrainedModel


def no_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Options for a pass over whole windows: nothing is generated after it.

    Not only cheaper. transformers keeps packed documents apart (by `position_ids` that start
    again) only where no cache is built; with one, attention silently crosses their borders.
    """
    cached = getattr(model.config.get_text_config(), "use_cache", False)
    return {"use_cache": False} if cached else {}
