"""Can a server split every attention block over several devices (tensor parallelism)?

Each device gets the same number of query heads and of KV heads (Megatron-LM, arXiv:1909.08053,
section 3), so the number of devices must divide both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from surgery.errors import ConfigError
from surgery.models.sites import Site

KEY = "export.tensor_parallel"


def check_tensor_parallel(sites: Sequence[Site], degree: int) -> None:
    """Check that `degree` devices can share the heads of every site evenly.

    Raises:
        ConfigError: they cannot; it names the layers, their heads, and the degrees that can.
    """
    if type(degree) is not int or degree < 1:
        raise ConfigError(KEY, "must be a number of devices", given=degree, valid="at least 1")
    undivided = [
        f"{count} {what} heads (layers {_list_layers(sites, attribute, count)})"
        for what, attribute in (("query", "q_heads"), ("KV", "kv_heads"))
        for count in sorted({getattr(site, attribute) for site in sites})
        if count % degree
    ]
    if not undivided:
        return
    shared = math.gcd(*(count for site in sites for count in (site.q_heads, site.kv_heads)))
    degrees = [n for n in range(1, shared + 1) if shared % n == 0]
    raise ConfigError(
        KEY,
        f"{degree} devices cannot share evenly: {', '.join(undivided)}",
        given=degree,
        valid=f"{', '.join(map(str, degrees))}; or multiples of {degree} heads in every layer (KV "
        "heads can be repeated up to the number of query heads)",
    )


def _list_layers(sites: Sequence[Site], attribute: str, count: int) -> str:
    return ", ".join(str(site.layer) for site in sites if getattr(site, attribute) == count)
