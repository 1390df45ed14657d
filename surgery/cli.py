"""The command line: Hydra composes, the pipeline runs, mistakes become one clear message."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

EXIT_USER_ERROR = 2


def main() -> None:
    """Entry of `train.py` and of the console script `attention-surgery`."""
    # Hydra then lets exceptions through instead of printing them and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    import surgery.hydra  # noqa: F401
    from surgery.errors import SurgeryError

    @hydra.main(version_base="1.3", config_path="pkg://surgery.conf", config_name="config")
    def run(cfg: DictConfig) -> Any:
        from surgery.pipeline.run import execute

        try:
            return execute(cfg)
        except (SurgeryError, OmegaConfBaseException) as error:
            _refuse(error)

    try:
        run()
    except (HydraException, OmegaConfBaseException, OSError) as error:
        _refuse(error)


def _refuse(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
