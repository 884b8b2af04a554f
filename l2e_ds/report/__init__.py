"""`l2e-ds report`: one page of runs and studies, for a browser without a network. Reads run directories only."""

from importlib.util import find_spec

PACKAGES = ("jinja2", "matplotlib")


def missing_packages() -> list[str]:
    """Of the extra `report`, those that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]
