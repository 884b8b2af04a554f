"""Load the Jinja templates that lie beside the code which computes their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def template(path: Path, **filters: Callable[..., str]) -> Template:
    """Return the template of a file, with filters of the caller's.

    Rendering it without a value that it needs is an error. In a template named *.html, values are escaped unless they
    are `markupsafe.Markup`.
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
