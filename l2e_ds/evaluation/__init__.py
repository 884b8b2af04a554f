"""Of finished runs and models: export, figures on tasks, first and last figures."""

from l2e_ds.errors import ConfigError
from l2e_ds.installed import is_installed


def check_installed(where: str) -> None:
    """Raises ConfigError without lm-evaluation-harness; `where` begins its line."""
    if not is_installed("lm_eval"):
        raise ConfigError(f"{where}: lm-evaluation-harness is not installed: pip install 'l2e-ds[eval]'")
