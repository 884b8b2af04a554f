"""Text made from a template of Jinja that lies beside the code which computes its values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def template(path: Path, **filters: Callable[..., str]) -> Template:
    """Return the template of a file, with filters of the caller's.

    A value that it lacks is an error when it is rendered.

    In a template named *.html, values are escaped unless they are `markupsafe.Markup`.
    """
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=path.suffix == ".html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(path.name)
