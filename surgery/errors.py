"""The errors a user can cause. Each one is a sentence, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NoReturn

EXIT_USER_ERROR = 2


def get_first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def join_lines(error: BaseException) -> str:
    """Return the whole text of an error in one line, without a colon at its end."""
    return " ".join(str(error).split()).rstrip(":") or type(error).__name__


class SurgeryError(Exception):
    """Something the user asked for cannot be done; the text says what and why."""


class ConfigError(SurgeryError):
    """A config value that is not allowed.

    Args:
        key: dotted config key, as it is written on the command line.
        problem: one sentence, what is wrong.
        given: the value found (omitted from the text when ``None``).
        valid: what would be accepted: a sentence, or the list of valid values.
    """

    def __init__(
        self,
        key: str,
        problem: str,
        *,
        given: Any = None,
        valid: str | Iterable[Any] | None = None,
    ) -> None:
        self.key = key
        self.problem = problem
        self.given = given
        self.valid = (
            valid if valid is None or isinstance(valid, str) else ", ".join(map(str, valid))
        )
        lines = [f"{key}: {problem}"]
        if given is not None:
            lines.append(f"  given: {given}")
        if self.valid:
            lines.append(f"  valid: {self.valid}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled whole: worker processes hand their exceptions over that way."""
        return _rebuild_config_error, (self.key, self.problem, self.given, self.valid)


def _rebuild_config_error(key: str, problem: str, given: Any, valid: str | None) -> ConfigError:
    return ConfigError(key, problem, given=given, valid=valid)


class PlanError(SurgeryError):
    """A plan and a model (or checkpoint) that do not belong together."""


class ConversionError(SurgeryError):
    """A model that cannot move to another architecture exactly.

    Attributes:
        problem, given, valid: as of `ConfigError`, whose key only the caller knows.
    """

    def __init__(self, problem: str, *, given: Any = None, valid: Any = None) -> None:
        super().__init__(problem)
        self.problem, self.given, self.valid = problem, given, valid


class SiteError(SurgeryError):
    """An attention block that calibration cannot decide on.

    Attributes:
        path: of the block.
        why: end of a sentence.
    """

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path} cannot be calibrated: {why}")
        self.path, self.why = path, why


class TapError(SurgeryError):
    """Attention could not be observed where it was asked to be."""


def refuse(error: Exception) -> NoReturn:
    """End the process as every command of this project does: one message, exit status 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
