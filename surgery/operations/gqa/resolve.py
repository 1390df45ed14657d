"""What `gqa` leaves open: counts within a budget, groups, coefficients."""

from __future__ import annotations

from dataclasses import replace

from surgery.calibration.case import Case
from surgery.calibration.refusals import refuse_repeated, refuse_shared
from surgery.console import track_progress
from surgery.operations.gqa.budget import choose_counts
from surgery.operations.gqa.choices import list_counts
from surgery.operations.gqa.layerwise import PASSES, calibrate_sites
from surgery.operations.gqa.options import GQAOptions
from surgery.plan.layers import keep_layers
from surgery.plan.resolution import Resolution


def resolve_gqa(operation: GQAOptions, case: Case) -> tuple[GQAOptions, Resolution]:
    """Raises: ConfigError, for a site that cannot be calibrated."""
    model, batches, options = case.model, case.batches, case.options
    sites = keep_layers(case.sites, operation.layers)
    if operation.average is not None and case.native:
        operation = replace(operation, kv_heads=operation.list_counts(sites))
    if operation.average is not None:
        refuse_shared(model, sites)
        refuse_repeated(model, sites, batches[0])
        choices = sum(len(list_counts(operation, site)) for site in sites)
        with track_progress("choosing KV heads per layer", choices) as steps:

            def report(what: str) -> None:
                steps.describe(what)
                steps.advance()

            operation = choose_counts(model, sites, operation, batches, options, report)
    counts = operation.list_counts(sites)
    merged = [site for site, count in zip(sites, counts, strict=True) if site.kv_heads > count]
    if not operation.calibrated or not merged:
        return operation, {}
    refuse_shared(model, merged)
    refuse_repeated(model, sites, batches[0])
    with track_progress("calibration", PASSES * len(merged) * len(batches)) as steps:

        def advance(what: str) -> None:
            steps.describe(f"calibration, {what}")
            steps.advance()

        found = calibrate_sites(
            model, list(zip(sites, counts, strict=True)), operation, batches, options, advance
        )
    return operation, found
