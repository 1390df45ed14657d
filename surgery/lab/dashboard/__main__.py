"""`python -m surgery.lab.dashboard ENTITY/PROJECT`: save the workspace; `--json` prints it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from surgery.console import say
from surgery.errors import ConfigError, SurgeryError, refuse
from surgery.login import is_logged_in

COMMAND = "python -m surgery.lab.dashboard"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. What the user can fix ends it with status 2.

    Raises:
        SystemExit: with status 2.
    """
    parser = argparse.ArgumentParser(prog=COMMAND, description="The W&B workspace of this project.")
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where the runs are")
    parser.add_argument("--name", help="of the workspace")
    parser.add_argument("--json", action="store_true", help="print it; nothing is sent")
    options = parser.parse_args(arguments)
    try:
        run(options.project, options.name, print_only=options.json)
    except SurgeryError as error:
        refuse(error)


def run(where: str, name: str | None, *, print_only: bool) -> None:
    """Build the workspace, then print or save it.

    Raises:
        ConfigError: `where` is invalid, wandb-workspaces is not installed, nobody is logged in, or
            W&B refuses.
    """
    entity, _, project = where.partition("/")
    if not entity or not project or "/" in project:
        raise ConfigError(
            "ENTITY/PROJECT", "must name a project", given=where, valid="my-team/attention-surgery"
        )
    try:
        # Takes seconds, and is an extra.
        from surgery.lab.dashboard.workspace import NAME, build_workspace
    except ImportError as error:
        if (error.name or "").split(".")[0] != "wandb_workspaces":
            raise
        raise ConfigError(
            COMMAND,
            "wandb-workspaces is not installed",
            valid='pip install "attention-surgery[dashboard]"',
        ) from None
    if not print_only and not is_logged_in():
        raise ConfigError(
            COMMAND,
            "Weights & Biases is not logged in on this machine",
            valid="`wandb login` (or WANDB_API_KEY) first, or --json to print it here",
        )
    workspace = build_workspace(entity, project, name or NAME)
    if print_only:
        print(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1))
        return
    import wandb  # takes seconds

    try:
        workspace.save()
    except (wandb.Error, OSError, ValueError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(COMMAND, f"W&B refused it: {text}", given=where) from None
    say(f"saved: {workspace.url}")


if __name__ == "__main__":
    main()
