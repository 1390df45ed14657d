"""What may become of the KV heads of one layer, tried one after the other."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from surgery.calibration.case import Calibration
from surgery.calibration.rows import put_parameter
from surgery.calibration.stream import Stream
from surgery.models.sites import Site
from surgery.operations.gqa.layerwise import calibrate_site
from surgery.operations.gqa.options import GQAOptions, list_divisors
from surgery.plan.choice import Choice


def list_counts(operation: GQAOptions, site: Site) -> list[Choice]:
    """List the numbers of KV heads that a site can be merged to, ascending."""
    return [
        Choice(
            operation.name,
            f"{count} KV head{'s' * (count > 1)}",
            replace(site, kv_heads=count),
            count,
        )
        for count in list_divisors(site.kv_heads)[:-1]
    ]


def try_counts(
    operation: GQAOptions, site: Site, original: Stream, working: Stream, options: Calibration
) -> Generator[Choice, None, None]:
    """Yield each of them while the working model computes it, calibrated as `options` say."""
    block = working.model.get_submodule(site.block)
    before = dict(block.named_parameters())
    for choice in list_counts(operation, site):
        merged = replace(operation, kv_heads=choice.given)
        calibrate_site(original, working, site, choice.given, merged, options, lambda _: None)
        try:
            yield choice
        finally:
            for name, parameter in before.items():
                put_parameter(block, name, parameter)
