"""What a user gets with `pip install`: one top-level package, whole, that runs from anywhere."""

from __future__ import annotations

import json
import tomllib
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest

from .conftest import ROOT, Runner

# Where each folder of the repository lands.
FOLDERS = {
    "surgery": "surgery",
    "callbacks": "surgery/callbacks",
    "conf": "surgery/conf",
    "recipes": "surgery/recipes",
}


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_one_top_level_package(contents: set[str]) -> None:
    tops = {name.split("/")[0] for name in contents}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"surgery"}
    assert len(tops) == 2


def test_every_file_of_the_source_and_no_other(contents: set[str]) -> None:
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert {name for name in contents if ".dist-info/" not in name} == expected


@pytest.mark.parametrize(
    "name",
    [
        "surgery/py.typed",
        "surgery/__main__.py",
        "surgery/callbacks/__init__.py",
        "surgery/conf/config.yaml",
        "surgery/conf/attention/gqa.yaml",
        "surgery/recipes/gqa_convert.yaml",
        "surgery/lab/report/summary.schema.json",
        "surgery/lab/report/templates/card.md.j2",
        "surgery/lab/report/html/templates/report.html.j2",
        "surgery/models/embedded/config.json",
        "surgery/models/embedded/model.safetensors",
        "surgery/models/embedded/tokenizer_config.json",
    ],
)
def test_what_the_demo_reads_is_inside(contents: set[str], name: str) -> None:
    assert name in contents


def test_metadata(wheel: Path, contents: set[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (info,) = {name.split("/")[0] for name in contents if ".dist-info/" in name}
    assert f"{info}/licenses/LICENSE" in contents
    with ZipFile(wheel) as archive:
        metadata = message_from_string(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Version"] == project["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "attention-surgery = surgery.cli:main" in entry_points
    assert "[hydra.plugins]" in entry_points
    assert not any(
        "==" in line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line
    )


def test_callbacks_import_from_anywhere(python: Runner, installed: Path) -> None:
    done = python("-c", "import surgery.callbacks as c; print(c.__file__, *c.__all__)")
    assert done.returncode == 0, done.stderr
    file, *names = done.stdout.split()
    assert Path(file) == installed / "surgery" / "callbacks" / "__init__.py"
    assert "HeadImportance" in names


def test_top_level_names_stay_free(python: Runner) -> None:
    done = python("-c", "import conf")
    assert "No module named 'conf'" in done.stderr
    done = python("-c", "import callbacks")
    assert "No module named 'callbacks'" in done.stderr


def test_plans_from_anywhere(python: Runner, tmp_path: Path) -> None:
    """The embedded model's own plan: 8 KV heads to 2 is a quarter of the cache."""
    done = python(
        "-m", "surgery", "stages=[plan]", "+recipe=gqa_convert", f"hydra.run.dir={tmp_path}/run"
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    before, after = plan["sizes_before"], plan["sizes_after"]
    assert after["kv_bytes_per_token"] * 4 == before["kv_bytes_per_token"]


def test_a_mistake_is_one_message(python: Runner) -> None:
    done = python("-m", "surgery", "+recipe=nothing_of_the_kind")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "gqa_convert" in done.stderr
    assert "Traceback" not in done.stderr
