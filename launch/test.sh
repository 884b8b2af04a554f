#!/usr/bin/env bash
# Installs what the tests need (pinned), then checks the code, builds the docs and runs the tests.
#
# usage: launch/test.sh             lint, types, imports, unit tests, and each promise of the README once on real ranks
#        launch/test.sh --full      all tests but those marked `short`, as CI does
#        launch/test.sh WORDS ...   pytest WORDS, without lint and types    e.g. launch/test.sh tests/unit -k threshold
#
# REPORT: a JUnit file to write; WORKERS: tests at a time
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/install.sh
install_l2e_ds launch/requirements-test.txt

CORES=$(nproc)
export OMP_NUM_THREADS=1 # tests run beside each other, a process a rank
CHOSEN=(-m "not full")
if [[ ${1-} == --full ]]; then
    CHOSEN=(-m "not short")
    shift
elif (($#)); then
    exec python -m pytest "$@"
fi
if (($#)); then
    echo "usage: launch/test.sh [--full | pytest arguments]" >&2
    exit 2
fi

ruff check .
ruff format --check .
mypy
lint-imports
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
# one more than cores: some tests wait for schedulers and timeouts
python -m pytest "${CHOSEN[@]}" -n "${WORKERS:-$((CORES + 1))}" --dist loadfile --no-loadscope-reorder \
    --durations=20 ${REPORT:+--junitxml="$REPORT"}
