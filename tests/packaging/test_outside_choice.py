"""An operation that another package brings is a choice of `attention`, with a YAML or without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Runner

FILES = {
    "their.py": '''
from dataclasses import dataclass
from enum import Enum

from surgery.config.options import POSITIVE, option
from surgery.plan.draft import Draft
from surgery.plan.operation import Operation


class Side(Enum):
    left = "left"
    right = "right"


@dataclass
class Softcap(Operation):
    """A bound on attention logits."""

    name = "their_softcap"

    bound: float = option(help="of the logits", range=POSITIVE)
    side: Side = option(Side.left)
    layers: list[int] | None = option(None, "layer numbers from 0; null for all")

    def plan(self, draft: Draft) -> None:
        draft.set_config("their_bound", self.bound)
''',
    "their-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: their\nVersion: 1.0\n",
    "their-1.0.dist-info/entry_points.txt": "[surgery.operations]\ntheir_softcap = their\n",
    "conf/config.yaml": "defaults:\n  - attention: []\n  - _self_\n",
    "app.py": """
import json
import sys

import hydra
import surgery.hydra
from omegaconf import OmegaConf

light = not {"torch", "transformers"} & set(sys.modules)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    print(json.dumps({"light": light, "config": OmegaConf.to_container(cfg)}))


main()
""",
}
# Prints the status and the message of a run for each argument, an override.
SEVERAL = """
import json
import sys
from contextlib import redirect_stderr
from io import StringIO

from surgery.cli import main

answers = []
for override in sys.argv[1:]:
    printed, code = StringIO(), 0
    sys.argv = ["surgery", "stages=[plan]", "attention=[their_softcap]", override]
    try:
        with redirect_stderr(printed):
            main()
    except SystemExit as stop:
        code = stop.code
    answers.append((code, printed.getvalue()))
print(json.dumps(answers))
"""
YAML = "their_softcap:\n  bound: 30.0\n  side: right\n  layers: [0]\n"


@pytest.fixture
def app(tmp_path: Path) -> Path:
    _write(tmp_path, FILES)
    return tmp_path


def _write(root: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_without_a_yaml_its_options_have_their_defaults(app: Path, python: Runner) -> None:
    done = python("app.py", "attention=[their_softcap]", path=app)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "light": True,  # the import alone asks no package for its operations
        "config": {
            "attention": {"their_softcap": {"bound": "???", "side": "left", "layers": None}}
        },
    }
    assert done.stderr == ""


def test_beside_ours_and_with_options(app: Path, python: Runner) -> None:
    done = python(
        "app.py",
        "attention=[their_softcap,mqa]",
        "attention.their_softcap.bound=20",
        "attention.their_softcap.side=right",
        path=app,
    )
    assert done.returncode == 0, done.stderr
    attention = json.loads(done.stdout)["config"]["attention"]
    assert list(attention) == ["their_softcap", "gqa"]
    assert attention["their_softcap"] == {"bound": 20, "side": "right", "layers": None}


def test_a_yaml_of_the_app_holds(app: Path, python: Runner) -> None:
    _write(app, {"conf/attention/their_softcap.yaml": YAML})
    done = python("app.py", "attention=[their_softcap]", path=app)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["attention"] == {
        "their_softcap": {"bound": 30.0, "side": "right", "layers": [0]}
    }
    assert done.stderr == ""  # no warning of Hydra that two configs have one name


def test_a_yaml_of_the_package_holds(app: Path, python: Runner) -> None:
    """Which puts its folder on Hydra's search path, as Hydra's plugins do."""
    plugin = """
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin


class TheirPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path):
        search_path.append("their", "pkg://their_conf")


Plugins.instance().register(TheirPath)
"""
    files = {
        "their_conf/__init__.py": "",
        "their_conf/attention/their_softcap.yaml": YAML,
        "app.py": f"{plugin}\n{FILES['app.py']}",
    }
    _write(app, files)
    done = python("app.py", "attention=[their_softcap]", path=app)
    assert done.returncode == 0, done.stderr
    attention = json.loads(done.stdout)["config"]["attention"]
    assert attention == {"their_softcap": {"bound": 30.0, "side": "right", "layers": [0]}}
    assert done.stderr == ""


def test_our_own_command_line_plans_with_it(app: Path, python: Runner) -> None:
    done = python(
        "-m",
        "surgery",
        "stages=[plan]",
        "attention=[their_softcap]",
        "attention.their_softcap.bound=20",
        path=app,
    )
    assert done.returncode == 0, done.stderr
    assert "their_bound=20" in done.stdout


def test_mistakes_are_answered_as_with_ours(app: Path, python: Runner) -> None:
    """In one process: each new one would import everything again."""
    messages = {
        "attention.their_softcap.bound=0": "attention.their_softcap.bound: must be above 0",
        "attention.their_softcap.limit=1": "attention.their_softcap.limit: unknown key",
        "attention=[their_softcap,their]": "attention: there is no such choice",
        "attention.their_softcap.layers=[0]": "attention.their_softcap.bound: a value is req",
    }
    _write(app, {"several.py": SEVERAL})
    done = python("several.py", *messages, path=app)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert len(answers) == len(messages)
    for (code, printed), says in zip(answers, messages.values(), strict=True):
        assert code == 2
        assert printed.startswith(f"error: {says}")
        assert "their_softcap" in printed
        assert "Traceback" not in printed


def test_its_yaml_can_be_printed(app: Path, python: Runner) -> None:
    done = python("-m", "surgery.config", "attention.their_softcap", path=app)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "# A bound on attention logits.\n"
        "their_softcap:\n"
        "  bound: ???             # of the logits\n"
        "  side: left             # left | right\n"
        "  layers: null           # layer numbers from 0; null for all\n"
    )


def test_a_package_that_is_broken_is_named(app: Path, python: Runner) -> None:
    _write(app, {"their.py": "import nothing_of_the_kind\n"})
    done = python("-m", "surgery", "stages=[plan]", path=app)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the operation their_softcap (their of their)")
    assert "nothing_of_the_kind" in done.stderr
    assert "Traceback" not in done.stderr
