"""Templates of this package's pages and cards: a name that is not there is an error."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def make_environment(package: str, *, escape: bool) -> Environment:
    """The folder `templates` of a package.

    Args:
        escape: whether text is escaped for HTML.
    """
    return Environment(
        loader=PackageLoader(package),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
