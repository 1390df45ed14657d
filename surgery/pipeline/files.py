"""Names of the files in a run's directory, except those of plans and summaries."""

CONFIG = "config.yaml"

IMPORTANCE = "importance"  # of the run; `importance-TASK` of a task: .json and .parquet
IMPORTANCE_PICTURE = "importance.png"

ANALYSIS = "analysis"
HEADS = "heads"  # .json and .parquet
REDUNDANCY = "redundancy"  # .json and .parquet
GROUPS = "groups.json"
ROLES_PICTURE = "roles.png"
SIMILARITY_PICTURE = "similarity.png"
PROBES_PICTURE = "probes.png"

TASKS = "tasks.json"
TASKS_PICTURE = "tasks.png"
TASK_RUNS = "tasks"  # a run directory per task
PROJECTIONS = "projections"

BEST_WEIGHTS = "best.safetensors"
FINAL_CHECKPOINT = "checkpoints/final.ckpt"
EXPORT = "export"
EXPORT_DRAFT = "export.partial"
RECORD = "surgery.json"  # in the export: what was done to the model
CARD = "README.md"  # in the export

RESULT_PICTURE = "result.png"


def name_scores(task: str) -> str:
    """Name the score table of a task, without its suffix."""
    return f"{IMPORTANCE}-{task}"
