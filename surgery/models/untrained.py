"""Find weights that a checkpoint did not have, so that loading left them random."""

from __future__ import annotations

from transformers import PreTrainedModel

from surgery.models.sites import find_sites

# transformers sets it on the tensors that it loads, and not on those that it initializes instead.
_LOADED = "_is_hf_initialized"


def list_random_weights(model: PreTrainedModel) -> list[str]:
    """List the parameters outside attention that `from_pretrained` did not find.

    Training since then cannot be seen. Nothing is listed for a model that was not loaded so.
    """
    parameters = dict(model.named_parameters())
    if not any(getattr(parameter, _LOADED, False) for parameter in parameters.values()):
        return []
    # An operation makes the tensors of attention anew.
    blocks = tuple(f"{site.block}." for site in find_sites(model).sites)
    return [
        name
        for name, parameter in parameters.items()
        if not getattr(parameter, _LOADED, False) and not name.startswith(blocks)
    ]
