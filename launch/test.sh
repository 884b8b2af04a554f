#!/usr/bin/env bash
# Installs what the tests need (pinned) and runs them all: lint, types, unit, two and more real ranks, the quick start.
# usage: launch/test.sh [pytest arguments]     e.g. launch/test.sh tests/unit -k threshold
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/install.sh
install_l2e_ds launch/requirements-test.txt

ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
