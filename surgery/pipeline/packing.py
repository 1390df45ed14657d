"""Check before anything is written that every model of a run keeps packed documents apart."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from transformers import PreTrainedConfig, PreTrainedModel

from surgery.config.schema import DataConfig, Layout, ObjectiveName, RunConfig, Stage, Task
from surgery.console import say
from surgery.models.config import apply_patch
from surgery.models.convert.config import convert_config, get_model_class
from surgery.models.packed import Isolation, ask_tiny_model, is_flash, refuse_packing
from surgery.plan.plan import Plan
from surgery.training.teacher import locate_teacher, naming_teacher

# What becomes a tiny model: its class, its config, and the attention implementation.
_Described = tuple[type[PreTrainedModel], PreTrainedConfig, str | None]


def check_packing(run: RunConfig, data: DataConfig, skeleton: PreTrainedModel, plan: Plan) -> None:
    """Ask tiny models of the original, the result and the teacher.

    A model of which no tiny one can be built is asked at its first packed batch
    (`surgery.models.packed`).

    Args:
        data: the packed data.
        skeleton: the original, which may live on the meta device.
        plan: from the original to the result.

    Raises:
        ConfigError: documents that are to be isolated would see each other.
    """
    packed = data.layout is Layout.packed and run.model.task is Task.causal_lm
    if not (packed and data.isolate_documents):
        return
    for name, (model_class, config, implementation) in _list_models(run, skeleton, plan):
        if is_flash(implementation):
            say(
                f"{name}: {implementation} keeps packed documents apart by their positions; "
                "this is transformers' word, and was not tried"
            )
            continue
        packing = ask_tiny_model(model_class, config, implementation)
        if packing is not None and packing.isolation is Isolation.NONE:
            refuse_packing(f"{name} ({config.model_type}, {implementation or 'default'})", packing)


def _list_models(
    run: RunConfig, skeleton: PreTrainedModel, plan: Plan
) -> Iterator[tuple[str, _Described]]:
    implementation = run.model.attn_implementation
    yield "the model", (type(skeleton), skeleton.config, implementation)
    if plan.changes_anything:
        yield "the planned result", _describe_result(skeleton, plan, implementation)
    distilled = Stage.train in run.stages and run.objective.name is ObjectiveName.distill
    if distilled and run.objective.teacher is not None:
        with naming_teacher(run.objective.teacher):
            teacher = locate_teacher(run.model, run.objective.teacher).build_meta_model()
        yield "the teacher", (type(teacher), teacher.config, implementation)


def _describe_result(
    skeleton: PreTrainedModel, plan: Plan, implementation: str | None
) -> _Described:
    model_class, config = type(skeleton), copy.deepcopy(skeleton.config)
    if plan.conversion is not None:
        config = convert_config(config, **plan.conversion)
        model_class = get_model_class(config)
    apply_patch(config, {**plan.head_patch, **plan.config_patch})
    return model_class, config, plan.implementation or implementation
