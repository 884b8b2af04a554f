#!/usr/bin/env bash
# Makes (or reuses) the virtual environment and installs the package with pinned versions.
# usage: source launch/install.sh [extra requirements file]   ->  sets VENV and puts it on PATH
# L2E_DS_VENV chooses the folder (default: .venv beside the repository's files).
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${L2E_DS_VENV:-$REPOSITORY/.venv}

install_l2e_ds() {
    local python=${PYTHON:-python3} log stamp requirements=("$REPOSITORY/launch/requirements.txt" "$@")
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { echo "l2e-ds needs Python 3.10 or newer; $python is $("$python" --version 2>&1). Set PYTHON." >&2; return 2; }
    command -v "${CXX:-g++}" >/dev/null ||
        { echo "l2e-ds needs a C++ compiler (torch.compile and Triton build functions at run time): install g++." >&2; return 2; }
    [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV" || return 2
    # what is installed already is known by the checksum of everything that decides it
    stamp=$(stamp_of "${requirements[@]}")
    if [ ! -f "$VENV/.l2e-ds-$stamp" ]; then
        echo "installing into $VENV (a few minutes; log: $VENV/install.log)"
        log=$VENV/install.log
        {
            # torch and the build tools first: DeepSpeed and mpi4py look for them
            grep -hE '^(torch|setuptools|wheel|ninja)==' "$REPOSITORY/launch/requirements.txt" >"$VENV/first.txt" &&
                "$VENV/bin/pip" install --disable-pip-version-check -r "$VENV/first.txt" &&
                "$VENV/bin/pip" install --disable-pip-version-check "${requirements[@]/#/-r}" &&
                "$VENV/bin/pip" install --disable-pip-version-check --no-deps --no-build-isolation -e "$REPOSITORY"
        } >"$log" 2>&1 || { tail -n 20 "$log" >&2; echo "installation failed; see $log" >&2; return 1; }
        # with the extra file everything else is there, too
        touch "$VENV/.l2e-ds-$stamp" "$VENV/.l2e-ds-$(stamp_of "${requirements[0]}")"
    fi
    export PATH="$VENV/bin:$PATH"
}

stamp_of() {
    cat "$@" "$REPOSITORY/setup.py" "$REPOSITORY/pyproject.toml" | sha256sum | cut -c1-16
}

# usage: need_l2e_ds MODULE ...   ->  2 and a line on stderr where this shell's python lacks the package or a module
need_l2e_ds() {
    local module
    for module in l2e_ds "$@"; do
        if ! python -c "import sys; from importlib.util import find_spec; sys.exit(find_spec('$module') is None)" 2>/dev/null; then
            echo "$(command -v python || echo 'python (not on PATH)') has no $module: put an environment that has it on PATH," \
                "or make one: source $REPOSITORY/launch/install.sh && install_l2e_ds" >&2
            return 2
        fi
    done
}
