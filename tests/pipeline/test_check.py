"""How long the windows of a run may be."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import surgery.hydra  # noqa: F401
from surgery.config.validate import check_config
from surgery.errors import ConfigError
from surgery.models.source import ModelSource
from surgery.pipeline.check import check_fit
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations

# The embedded model has 2048 positions.
LONGER = ["attention.rope.factor=2"]


@pytest.mark.parametrize(
    ("overrides", "longest"),
    [
        (["attention=[]"], 2048),
        (["attention=[rope_linear]", *LONGER], 4096),
        (["attention=[rope_dynamic]", *LONGER], 4096),  # its config keeps saying 2048
    ],
)
def test_windows_may_be_as_long_as_the_result_is_for(overrides: list[str], longest: int) -> None:
    def check(seq_len: int) -> None:
        GlobalHydra.instance().clear()
        with initialize_config_module("surgery.conf", version_base="1.3"):
            words = [*overrides, f"data.seq_len={seq_len}", "run_dir=unused"]
            cfg: Any = compose("config", overrides=words)
        OmegaConf.resolve(cfg)
        run = check_config(cfg)
        source = ModelSource(run.model)
        operations = parse_operations(run.attention)
        plan = make_plan(source.build_meta_model(), operations)
        check_fit(run, source.load_config(), plan)

    check(longest)
    with pytest.raises(ConfigError, match=f"2 to {longest}"):
        check(longest + 1)
