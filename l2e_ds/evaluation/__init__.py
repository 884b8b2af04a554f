"""Evaluate finished runs and models on the tasks of lm-evaluation-harness."""

from l2e_ds.errors import ConfigError
from l2e_ds.system.installed import is_installed


def check_installed(where: str) -> None:
    """Raise ConfigError, whose message begins with `where`, if lm-evaluation-harness is not installed."""
    if not is_installed("lm_eval"):
        raise ConfigError(f"{where}: lm-evaluation-harness is not installed: pip install 'l2e-ds[eval]'")
