"""Which packages are installed, without importing them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from l2e_ds.errors import ConfigError


def is_installed(package: str) -> bool:
    """Return whether a package is installed. A folder of its name in the working directory (`wandb/`) does not
    count."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def check_extra(where: str, extra: str, packages: Sequence[str]) -> None:
    """Check that packages of an extra are installed. where: what needs them. Raises ConfigError, naming those that are
    missing."""
    missing = [name for name in packages if not is_installed(name)]
    if missing:
        raise ConfigError(f"needs {', '.join(missing)}: pip install 'l2e-ds[{extra}]'", where=where)
