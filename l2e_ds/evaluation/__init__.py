"""Of finished runs and models: export, figures on tasks, first and last figures."""

from importlib.util import find_spec

from l2e_ds.errors import ConfigError


def check_installed(where: str) -> None:
    """Raises ConfigError without lm-evaluation-harness; `where` begins its line."""
    if find_spec("lm_eval") is None:
        raise ConfigError(f"{where}: lm-evaluation-harness is not installed: pip install 'l2e-ds[eval]'")
