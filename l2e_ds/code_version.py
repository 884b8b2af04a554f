"""By which code something was made."""

from __future__ import annotations

import subprocess

from l2e_ds.config import REPOSITORY

DIFF = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv")


def commit_and_changes() -> tuple[str | None, list[str]]:
    """Commit and `git status` lines of the checkout that this package is run from; (None, []) of a copy."""
    try:
        _git("ls-files", "--error-unmatch", "l2e_ds/__init__.py")  # else some other checkout around an installed copy
        return _git("rev-parse", "HEAD").strip(), _git("status", "--porcelain").splitlines()
    except (OSError, subprocess.SubprocessError):
        return None, []


def difference() -> str:
    """`git diff HEAD` of that checkout. Raises OSError or SubprocessError where there is none."""
    return _git(*DIFF)


def _git(*words: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, errors="replace").stdout
