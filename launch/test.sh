#!/usr/bin/env bash
# Installs what the tests need (pinned) and runs them all: lint, types, unit, two and more real ranks, the quick start.
# usage: launch/test.sh [pytest arguments]     e.g. launch/test.sh tests/unit -k threshold
# REPORTS: a folder for JUnit files
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/install.sh
install_l2e_ds launch/requirements-test.txt

ruff check .
ruff format --check .
mypy
(($# == 0)) || exec python -m pytest "$@"

# unit tests are one process each: as many at a time as there are cores; the others start ranks of their own
REPORTS=${REPORTS:-$(mktemp -d)}
code=0
OMP_NUM_THREADS=1 python -m pytest tests/unit -n auto --dist loadfile --junitxml="$REPORTS/unit.xml" || code=$?
python -m pytest --ignore=tests/unit --junitxml="$REPORTS/rest.xml" || code=$?
exit "$code"
