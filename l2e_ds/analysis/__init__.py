"""What neurons answer to: the analysis of finished models and checkpoints (METHOD, section 8)."""

from importlib.util import find_spec

PACKAGES = ("matplotlib", "pandas", "pyarrow", "scipy")


def missing_packages() -> list[str]:
    """Of the extra `analysis`, those that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]
