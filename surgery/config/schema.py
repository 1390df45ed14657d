"""The schema of the config.

These dataclasses hold the type, the range and the meaning of every key; Hydra's YAML files hold the
defaults that people read and override, with comments that `make conf` writes from here. A default
that is here and not in `conf/` would be hidden, so `tests/packaging/test_conf.py` checks that both
have the same keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from surgery.config.options import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Range, option


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
    self = "self"


class Layout(Enum):
    packed = "packed"
    padded = "padded"


class Part(Enum):
    """Which part of the standard library: whole files, code, or docstrings and comments."""

    all = "all"
    code = "code"
    prose = "prose"


class LossOn(Enum):
    """Which tokens of a text are learnt: all, or those that the assistant says."""

    all = "all"
    assistant = "assistant"


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
    disabled = "disabled"


class TaskMode(Enum):
    """What a run with several tasks does with them."""

    compare = "compare"
    prune_each = "prune_each"
    output_projections = "output_projections"
    one_mask = "one_mask"


class Combine(Enum):
    """How the scores of several tasks are combined."""

    worst = "worst"
    weighted = "weighted"


class Kept(Enum):
    """Which of the trained weights are measured and exported."""

    best = "best"
    last = "last"


class ExportFormat(Enum):
    auto = "auto"
    native = "native"


class Stage(Enum):
    """The stages, in the order in which they always run."""

    plan = "plan"
    measure = "measure"
    score = "score"
    analyze = "analyze"
    calibrate = "calibrate"
    operate = "operate"
    train = "train"
    export = "export"
    report = "report"


_AT_LEAST_TWO = Range(low=2)
_SEED = Range(low=0, high=2**32 - 1)  # what numpy takes


@dataclass
class ModelConfig:
    path: str | None = option(
        MISSING, "embedded | smollm2 | minilm | a directory | a .gguf file | a hub id"
    )
    revision: str | None = option(MISSING, "of the hub: a branch, a tag or a commit")
    tokenizer: str | None = option(
        MISSING,
        "null: the model's | bytes: a token per byte | of another model",
    )
    task: Task = option(MISSING)
    dtype: Dtype = option(MISSING)
    device: str = option(MISSING, "where to measure: auto | cpu | cuda | cuda:1 | mps")
    attn_implementation: str | None = option(
        MISSING, "any that transformers knows; null leaves the choice to it"
    )
    num_labels: int | None = option(
        MISSING,
        "sequence_classification only; null: as the checkpoint says",
        range=Range(1, 100_000),
    )
    trust_remote_code: bool = option(MISSING, "run Python code that comes with the model")
    scratch: dict[str, Any] | None = option(
        MISSING, "a config to initialise at random instead of loading weights"
    )


@dataclass
class SelfConfig:
    """How text is sampled from the original model (LLM-QAT, arXiv:2305.17888, section 2.1)."""

    windows: int = option(MISSING, "how many are sampled, of data.seq_len tokens", range=COUNT)
    temperature: float = option(
        MISSING, "logits are divided by it; 1: the original's own distribution", range=POSITIVE
    )
    top_p: float = option(
        MISSING,
        "sampled from the likeliest tokens that reach this probability; 1: from all",
        range=Range(0, 1, low_open=True),
    )
    greedy_tokens: int | None = option(
        MISSING,
        "first tokens of a document that are the likeliest; null: 4 after a token of the "
        "vocabulary, else 0",
        range=NOT_NEGATIVE,
    )
    prompts: Any = option(
        MISSING,
        "how documents begin: vocabulary (a random token) | begin (the token that begins a text) | "
        "chat (the chat template; the model says both parts) | a list of texts; null: chat where "
        "there is a template, else vocabulary",
    )
    batch_size: int = option(MISSING, "windows that are sampled side by side", range=COUNT)
    seed: int = option(MISSING, "of what is sampled", range=_SEED)


@dataclass
class DataConfig:
    kind: DataKind = option(MISSING)
    path: Any = option(MISSING, "text: files, or a saved data set | hub: owner/name")
    val_path: Any = option(
        MISSING, "held-out files; null: a fixed share, by hash of the path or of the text"
    )
    name: str | None = option(MISSING, "hub: the data set's configuration")
    revision: str | None = option(MISSING, "hub: a branch, a tag or a commit")
    split: str | None = option(MISSING, "hub, saved data set: the split to train on")
    val_split: str | None = option(
        MISSING, "split held out; null: `validation` of a saved set, or a share by hash"
    )
    val_fraction: float = option(MISSING, "share held out by hash", range=SHARE)
    text_column: str = option(
        MISSING, "where the text stands, or conversations (lists of {role, content})"
    )
    completion_column: str | None = option(
        MISSING, "where the completion stands, if text_column holds prompts"
    )
    loss_on: LossOn = option(
        MISSING, "all tokens | assistant: its answers alone (conversations), or completions"
    )
    label_column: str = option(MISSING, "sequence_classification only")
    sample_by: str = option(
        MISSING, "of a .txt file, what one document is: paragraph | line | document"
    )
    part: Part = option(
        MISSING, "stdlib: all | code, without docstrings and comments | prose, these alone"
    )
    layout: Layout = option(
        MISSING, "packed: full windows | padded: one document (or piece) per row"
    )
    isolate_documents: bool = option(
        MISSING, "packed: no attention across document borders (causal models)"
    )
    seq_len: int = option(MISSING, "tokens per window", range=_AT_LEAST_TWO)
    batch_size: int = option(MISSING, "windows per training step and process", range=COUNT)
    num_workers: int = option(MISSING, "processes that prepare batches", range=NOT_NEGATIVE)
    mlm_probability: float = option(
        MISSING, "masked_lm only: share of the tokens to be guessed", range=SHARE
    )
    streaming: Streaming = option(MISSING, "auto (files over stream_above_gb) | always | never")
    stream_above_gb: float = option(MISSING, "GB of all files together", range=NOT_NEGATIVE)
    shuffle_buffer: int = option(MISSING, "rows shuffled at a time while streaming", range=COUNT)
    self: SelfConfig | None = option(MISSING, "data=self: how the original is sampled")


@dataclass
class ObjectiveConfig:
    name: ObjectiveName = option(MISSING)
    temperature: float = option(
        MISSING, "T: both models' logits are divided by it; distill only", range=POSITIVE
    )
    label_weight: float = option(
        MISSING, "w: loss = (1-w) * T^2 * KL(teacher || model) + w * label loss", range=SHARE
    )
    attention_weight: float = option(
        MISSING,
        "adds this * relative squared error of the attention blocks' outputs",
        range=NOT_NEGATIVE,
    )
    teacher: str | None = option(
        MISSING, "null: the original of this run | another model, named as model.path is"
    )


@dataclass
class OptimConfig:
    name: OptimizerName = option(MISSING)
    parameters: Trained = option(
        MISSING, "all | attention (projections, QK-norms) | output (its outputs) | changed"
    )
    lr: float | None = option(
        MISSING,
        "null: by what surgery cost, at most 0.75 / hidden_size",
        range=POSITIVE,
    )
    weight_decay: float = option(MISSING, "on matrices only", range=NOT_NEGATIVE)
    betas: list[float] = option(
        MISSING,
        "of AdamW; the second is Muon's momentum, too",
        range=Range(0, 1, high_open=True),
        valid="two numbers, each at least 0 and below 1",
    )
    warmup_steps: int = option(MISSING, "the rate rises to lr over so many", range=NOT_NEGATIVE)
    final_lr_fraction: float = option(
        MISSING, "of lr, what is left of it at trainer.max_steps", range=SHARE
    )


@dataclass
class LoggerConfig:
    kinds: list[LoggerKind] = option(MISSING, "any of wandb, csv, tensorboard; [] for none")
    mode: LoggerMode | None = option(
        MISSING,
        "W&B: offline | online (after `wandb login`) | disabled; null: WANDB_MODE, else offline",
    )
    project: str | None = option(
        MISSING, "W&B: where the run is listed; null: WANDB_PROJECT, else attention-surgery"
    )
    name: str | None = option(MISSING, "W&B: of the run; null: WANDB_NAME, else W&B's choice")
    entity: str | None = option(
        MISSING, "W&B: user or team; null: WANDB_ENTITY, else your default one"
    )
    group: str | None = option(
        MISSING, "W&B: runs that belong together; null: WANDB_RUN_GROUP, else none"
    )
    tags: list[str] | None = option(
        MISSING, "W&B: words to find the run by; null: WANDB_TAGS, else none"
    )
    notes: str | None = option(MISSING, "W&B: about the run; null: WANDB_NOTES, else none")
    upload_export: bool = option(
        MISSING, "W&B: an artifact holds the weights; false: only what they are"
    )


@dataclass
class PlanConfig:
    tokens: int | None = option(
        MISSING, "length at which sizes are given; null: data.seq_len", range=COUNT
    )


@dataclass
class MeasureConfig:
    windows: int = option(
        MISSING, "held-out windows (data.seq_len tokens each) in every loss", range=COUNT
    )
    batch_size: int = option(MISSING, "windows at a time", range=COUNT)
    prefill_tokens: int = option(MISSING, "one prompt of this length, batch 1", range=COUNT)
    decode_tokens: int = option(
        MISSING, "generated after it, one by one, with the cache", range=COUNT
    )
    repeats: int = option(MISSING, "timings are medians of this many", range=COUNT)


@dataclass
class ValidationConfig:
    every_n_steps: int | None = option(
        MISSING,
        "optimizer steps in between; null: a tenth of trainer.max_steps, 10 or more",
        range=COUNT,
    )
    windows: int = option(MISSING, "held-out windows, others than measure.windows has", range=COUNT)
    keep: Kept = option(
        MISSING, "what is measured and exported: best, the lowest loss, untrained too | last"
    )


@dataclass
class CalibrationConfig:
    windows: int | None = option(
        MISSING,
        "training windows that are looked at; null: as many as the widths ask for",
        range=COUNT,
    )
    batch_size: int = option(MISSING, "windows at a time, and of a gradient step", range=COUNT)
    rows: int = option(MISSING, "query rows drawn per window for what heads attend to", range=COUNT)
    refine_steps: int = option(
        MISSING,
        "gradient steps per layer on the merge's coefficients; 0: closed form only",
        range=NOT_NEGATIVE,
    )
    keep_windows: int | None = option(
        MISSING, "windows that the steps go over; null: all", range=COUNT
    )
    joint_steps: int = option(
        MISSING,
        "steps that fit all layers together to what the original predicts; 0: none",
        range=NOT_NEGATIVE,
    )
    refit: bool = option(MISSING, "solve each output projection anew")
    ridge: float | None = option(
        MISSING,
        "of refit, relative to its inputs' mean second moment; null: best on held-out text",
        range=POSITIVE,
    )
    compare: bool = option(
        MISSING, "say what merge=optimal would have given, where another merge is asked for"
    )


@dataclass
class ImportanceConfig:
    estimator: str = option(
        MISSING, "of stage `score`: gate_gradient | output_norm | leave_one_out | random"
    )
    objective: ObjectiveName = option(
        MISSING, "what is lost: lm, the label loss | distill, KL to the model as it is"
    )
    windows: int = option(MISSING, "training windows that are looked at", range=COUNT)
    batch_size: int = option(MISSING, "windows at a time", range=COUNT)
    memory_windows: int = option(
        MISSING, "leave_one_out: windows that run side by side, ablations included", range=COUNT
    )


@dataclass
class RoleThresholdsConfig:
    """See `surgery.lab.analysis.roles.Thresholds`."""

    induction: float = option(
        MISSING, "attention to what followed the same token the first time", range=SHARE
    )
    duplicate_token: float = option(MISSING, "attention to that same token", range=SHARE)
    previous_token: float = option(MISSING, "attention to the token before", range=SHARE)
    positional: float = option(
        MISSING, "share of the rows whose highest weight lies at one offset", range=SHARE
    )
    syntactic: float = option(
        MISSING, "accuracy on a relation, less that of the best fixed offset", range=SHARE
    )
    first_token: float = option(MISSING, "attention to the first token", range=SHARE)
    broadcast: float = option(
        MISSING, "entropy, as a share of the highest that it could be", range=SHARE
    )


@dataclass
class MapsConfig:
    heads: Any = option(MISSING, '["2.3", ...], layer.head from 0 | best, one per role | null')
    texts: list[str] = option(MISSING, "each is drawn for each of these heads")


@dataclass
class AnalysisConfig:
    windows: int = option(MISSING, "training windows that are looked at", range=COUNT)
    batch_size: int = option(MISSING, "windows at a time", range=COUNT)
    rows: int | None = option(MISSING, "query rows drawn per window; null for all", range=COUNT)
    repeats: int = option(
        MISSING,
        "sequences of random tokens said twice: induction, duplicate tokens",
        range=COUNT,
    )
    repeat_length: int = option(MISSING, "tokens that are said twice", range=_AT_LEAST_TWO)
    probes: list[str] = option(
        MISSING, "python: relations in Python source; any other: a CoNLL-U file"
    )
    probe_texts: int = option(MISSING, "windows of source, or sentences, per probe", range=COUNT)
    cluster_distance: float = option(
        MISSING, "bits: heads whose patterns diverge less are one family", range=SHARE
    )
    maps: MapsConfig = option(default_factory=MapsConfig, help="Attention maps that are drawn.")
    thresholds: RoleThresholdsConfig = option(
        default_factory=RoleThresholdsConfig,
        help="What a score must reach for the role's name; where each comes from: "
        "docs/analysis.md.",
    )


@dataclass
class TasksConfig:
    mode: TaskMode = option(MISSING)
    data: dict[str, Any] | None = option(
        MISSING,
        "keys of `data` by task: {code: {part: code}, prose: {part: prose}}",
    )
    combine: Combine = option(
        MISSING,
        "one_mask: worst (what the task that needs a head most says) | weighted",
    )
    weights: dict[str, Any] | None = option(MISSING, "weighted: {name: share}; null: equal ones")
    hurts: float = option(
        MISSING,
        "nats per token: a mask that costs another task more is warned of",
        range=NOT_NEGATIVE,
    )


@dataclass
class ExportConfig:
    format: ExportFormat = option(
        MISSING, "auto | native: refuse what the architecture's own config cannot say"
    )
    dtype: Dtype = option(MISSING, "auto: as the model was trained")
    max_shard_size: str = option(
        MISSING, "largest file of weights", valid="a number and KB, MB or GB: 5GB"
    )
    verify: bool = option(MISSING, "reload the export and compare logits before calling it done")
    tensor_parallel: int | None = option(
        MISSING,
        "devices that each layer is split over: refuse heads that they cannot share",
        range=COUNT,
    )


@dataclass
class ReportConfig:
    prompts: list[str] | None = option(
        MISSING, "that the model answers, or continues; null: a few of ours; []: none"
    )
    new_tokens: int = option(MISSING, "at most, after each prompt", range=COUNT)


@dataclass
class RunConfig:
    stages: list[Stage] = option(
        MISSING,
        "Any subset; they run in this order. See docs/configuration.md. Two more come between "
        "measure and calibrate, each written and drawn: `score`, the importance of every head, "
        "and `analyze`, what each head does.",
    )
    seed: int = option(MISSING, "of everything that is drawn", range=_SEED)
    threads: int | None = option(
        MISSING, "CPU threads for torch; null leaves torch's choice", range=COUNT
    )
    run_dir: str = option(MISSING, "where results go; set it by hydra.run.dir")
    resume: str | None = option(
        MISSING, "a Lightning checkpoint of this very configuration, to train on from"
    )
    model: ModelConfig = option(
        default_factory=ModelConfig, help="The model that is operated on: a group."
    )
    data: DataConfig = option(
        default_factory=DataConfig, help="What it is trained and measured on: a group."
    )
    # Typed by the operations themselves, which `surgery.plan.registry` finds.
    attention: dict[str, Any] = option(
        default_factory=dict,
        help="One entry per operation, in the order in which they are performed: a group.",
    )
    objective: ObjectiveConfig = option(
        default_factory=ObjectiveConfig, help="What training minimises: a group."
    )
    optim: OptimConfig = option(
        default_factory=OptimConfig, help="Optimizer and learning rate: a group."
    )
    trainer: dict[str, Any] = option(
        default_factory=dict, help="Lightning's options, by Lightning's own names: a group."
    )
    callbacks: dict[str, Any] = option(
        default_factory=dict, help="One Lightning callback per key: a group."
    )
    logger: LoggerConfig = option(default_factory=LoggerConfig, help="Where figures go: a group.")
    plan: PlanConfig = option(
        default_factory=PlanConfig, help="Sizes before and after: stages `plan` and `measure`."
    )
    measure: MeasureConfig = option(
        default_factory=MeasureConfig, help="Losses and timings: stage `measure`."
    )
    validation: ValidationConfig = option(
        default_factory=ValidationConfig,
        help="Held-out loss while the model trains: stage `train`, docs/healing.md.",
    )
    importance: ImportanceConfig = option(
        default_factory=ImportanceConfig,
        help="How much the loss hangs on each head: stage `score`, and operations that have an "
        "estimator.",
    )
    analysis: AnalysisConfig = option(
        default_factory=AnalysisConfig,
        help="What each head does: stage `analyze`, docs/analysis.md.",
    )
    tasks: TasksConfig = option(
        default_factory=TasksConfig, help="Several tasks, one model: docs/tasks.md."
    )
    calibration: CalibrationConfig = option(
        default_factory=CalibrationConfig,
        help="What operations decide on data: which heads go or share, and coefficients.",
    )
    export: ExportConfig = option(
        default_factory=ExportConfig, help="The checkpoint: stage `export`."
    )
    report: ReportConfig = option(
        default_factory=ReportConfig,
        help="Text that the model writes, each time it is measured: stage `report`.",
    )
