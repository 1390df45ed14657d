"""Sample text in a run that cannot have any."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.models.source import find_embedded_dir
from tests.integration.summaries import read_summary
from tests.integration.test_healing import SHORT


def test_what_goes_wrong_ends_no_run(cli: Callable[..., Any], tmp_path: Path) -> None:
    """A chat template that takes no question."""
    shutil.copytree(find_embedded_dir(), tmp_path / "model")
    template = "{{ raise_exception('a system message is needed') }}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    run = tmp_path / "run"
    (tmp_path / "a.txt").write_text("\n\n".join(f"def f{n}(x):\n    return x" for n in range(99)))
    data = ("data=text", f"data.path={tmp_path}/a.txt", "data.val_fraction=0.5")
    override = (*data, "report.prompts=null", "stages=[measure,report]")
    outcome = cli(f"model.path={tmp_path / 'model'}", *SHORT, *override, f"hydra.run.dir={run}")
    assert outcome.code == 0, outcome.err
    problem = "TemplateError: a system message is needed"
    assert f"no sample text: {problem}" in outcome.out
    samples = read_summary(run)["samples"]
    assert samples == {"new_tokens": 48, "texts": [], "problems": {"before": problem}}
    assert f"before: nothing was written ({problem})" in (run / "report.html").read_text()
