"""The schema every composed config is held against.

Hydra's YAML files hold the defaults people read and override; these dataclasses hold the types.
A key that stands here and nowhere in `conf/` would be a default nobody can see, so
`tests/packaging/test_conf.py` holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from surgery.config.options import COUNT, option


class Task(Enum):
    causal_lm = "causal_lm"
    masked_lm = "masked_lm"
    sequence_classification = "sequence_classification"


class Dtype(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class DataKind(Enum):
    stdlib = "stdlib"
    text = "text"
    hub = "hub"


class Layout(Enum):
    packed = "packed"
    padded = "padded"


class Part(Enum):
    """Of the standard library: whole files, what runs, or what people read in it."""

    all = "all"
    code = "code"
    prose = "prose"


class Streaming(Enum):
    auto = "auto"
    always = "always"
    never = "never"


class ObjectiveName(Enum):
    lm = "lm"
    distill = "distill"


class OptimizerName(Enum):
    adamw = "adamw"
    muon = "muon"


class Trained(Enum):
    """Which parameters training changes."""

    all = "all"
    attention = "attention"
    changed = "changed"
    output = "output"


class LoggerKind(Enum):
    wandb = "wandb"
    csv = "csv"
    tensorboard = "tensorboard"


class LoggerMode(Enum):
    offline = "offline"
    online = "online"


class TaskMode(Enum):
    """What a run with several tasks makes of them."""

    compare = "compare"
    prune_each = "prune_each"
    output_projections = "output_projections"
    one_mask = "one_mask"


class Combine(Enum):
    """How the scores of several tasks become one."""

    worst = "worst"
    weighted = "weighted"


class ExportFormat(Enum):
    auto = "auto"
    native = "native"


class Stage(Enum):
    """In the order in which they run, whatever order they are given in."""

    plan = "plan"
    measure = "measure"
    score = "score"
    analyze = "analyze"
    calibrate = "calibrate"
    operate = "operate"
    train = "train"
    export = "export"
    report = "report"


@dataclass
class ModelConfig:
    path: str | None = MISSING
    revision: str | None = MISSING
    tokenizer: str | None = MISSING
    task: Task = MISSING
    dtype: Dtype = MISSING
    device: str = MISSING
    attn_implementation: str | None = MISSING
    num_labels: int | None = MISSING
    trust_remote_code: bool = MISSING
    scratch: dict[str, Any] | None = MISSING


@dataclass
class DataConfig:
    kind: DataKind = MISSING
    path: Any = MISSING
    val_path: Any = MISSING
    name: str | None = MISSING
    revision: str | None = MISSING
    split: str | None = MISSING
    val_split: str | None = MISSING
    val_fraction: float = MISSING
    text_column: str = MISSING
    label_column: str = MISSING
    sample_by: str = MISSING
    part: Part = MISSING
    layout: Layout = MISSING
    isolate_documents: bool = MISSING
    seq_len: int = MISSING
    batch_size: int = MISSING
    num_workers: int = MISSING
    mlm_probability: float = MISSING
    streaming: Streaming = MISSING
    stream_above_gb: float = MISSING
    shuffle_buffer: int = MISSING


@dataclass
class ObjectiveConfig:
    name: ObjectiveName = MISSING
    temperature: float = MISSING
    label_weight: float = MISSING
    attention_weight: float = MISSING
    teacher: str | None = MISSING


@dataclass
class OptimConfig:
    name: OptimizerName = MISSING
    parameters: Trained = MISSING
    lr: float | None = MISSING
    weight_decay: float = MISSING
    betas: list[float] = MISSING
    warmup_steps: int = MISSING
    final_lr_fraction: float = MISSING


@dataclass
class LoggerConfig:
    kinds: list[LoggerKind] = MISSING
    mode: LoggerMode = MISSING
    project: str = MISSING
    name: str | None = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING
    tags: list[str] = MISSING
    upload_export: bool = MISSING


@dataclass
class PlanConfig:
    tokens: int | None = option(
        MISSING, "length at which sizes are given; null: data.seq_len", range=COUNT
    )


@dataclass
class MeasureConfig:
    windows: int = MISSING
    batch_size: int = MISSING
    prefill_tokens: int = MISSING
    decode_tokens: int = MISSING
    repeats: int = MISSING


@dataclass
class CalibrationConfig:
    windows: int = MISSING
    batch_size: int = MISSING
    rows: int = MISSING
    refine_steps: int = MISSING
    keep_windows: int = MISSING
    refit: bool = MISSING
    ridge: float = MISSING
    compare: bool = MISSING


@dataclass
class ImportanceConfig:
    estimator: str = MISSING
    objective: ObjectiveName = MISSING
    windows: int = MISSING
    batch_size: int = MISSING
    memory_windows: int = MISSING


@dataclass
class RoleThresholdsConfig:
    """See `surgery.lab.analysis.roles.Thresholds`."""

    induction: float = MISSING
    duplicate_token: float = MISSING
    previous_token: float = MISSING
    positional: float = MISSING
    syntactic: float = MISSING
    first_token: float = MISSING
    broadcast: float = MISSING


@dataclass
class MapsConfig:
    # ``best``, or a list of "layer.head".
    heads: Any = MISSING
    texts: list[str] = MISSING


@dataclass
class AnalysisConfig:
    windows: int = MISSING
    batch_size: int = MISSING
    rows: int | None = MISSING
    repeats: int = MISSING
    repeat_length: int = MISSING
    probes: list[str] = MISSING
    probe_texts: int = MISSING
    cluster_distance: float = MISSING
    maps: MapsConfig = field(default_factory=MapsConfig)
    thresholds: RoleThresholdsConfig = field(default_factory=RoleThresholdsConfig)


@dataclass
class TasksConfig:
    mode: TaskMode = MISSING
    # Name of each task → the keys of `data` in which it differs.
    data: dict[str, Any] | None = MISSING
    combine: Combine = MISSING
    weights: dict[str, Any] | None = MISSING
    hurts: float = MISSING


@dataclass
class ExportConfig:
    format: ExportFormat = MISSING
    dtype: Dtype = MISSING
    max_shard_size: str = MISSING
    verify: bool = MISSING


@dataclass
class RunConfig:
    stages: list[Stage] = MISSING
    seed: int = MISSING
    threads: int | None = MISSING
    run_dir: str = MISSING
    resume: str | None = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    # One entry per operation, in the order in which they are performed; typed by
    # `surgery.operations`, whose registry knows the fields.
    attention: dict[str, Any] = field(default_factory=dict)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    # Lightning's own options, by Lightning's own names.
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    plan: PlanConfig = option(
        default_factory=PlanConfig, help="Sizes before and after: stages `plan` and `measure`."
    )
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
