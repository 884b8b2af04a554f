"""Which packages are installed, without importing them."""

from __future__ import annotations

from importlib.util import find_spec


def is_installed(package: str) -> bool:
    """A folder of that name in the working directory, such as `wandb/`, is no package: it has no file to import."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
