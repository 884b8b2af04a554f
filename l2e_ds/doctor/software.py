"""What doctor finds out about installed packages and the compiler."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shlex
import sysconfig
import time
from pathlib import Path

from l2e_ds.doctor.finding import Finding, check_program, described, own_version
from l2e_ds.system.files import PACKAGE
from l2e_ds.system.provenance import installed_version

PINS = PACKAGE.parent / "launch/requirements.txt"
MODULES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "safetensors", "pydantic", "yaml")
OFFLOAD = "offload to the CPU"  # whose operation, cpu_adam, DeepSpeed builds at its first use; no other run compiles it


def check_versions() -> list[Finding]:
    """Compare installed versions with the package's ranges (missing) and, in the repository, the pinned ones (note)."""
    from packaging.requirements import Requirement

    try:
        ranges = [line for line in importlib.metadata.requires("l2e-ds") or () if "extra ==" not in line]
    except importlib.metadata.PackageNotFoundError:
        text = "l2e-ds is not installed, so nothing says which are needed"
        return [Finding("note", "versions", text, "pip install -e .   (in the repository)")]
    ranges.insert(0, f"python{importlib.metadata.metadata('l2e-ds')['Requires-Python']}")
    lines = PINS.read_text(encoding="utf-8").splitlines() if PINS.is_file() else []
    all_pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    pins = {pin.name: next(iter(pin.specifier)).version for pin in all_pins if not pin.marker or pin.marker.evaluate()}
    good, bad = [f"l2e-ds {own_version()}"], []
    for wanted in map(Requirement, ranges):
        version, pin = installed_version(wanted.name), pins.get(wanted.name)
        install = f"pip install {shlex.quote(f'{wanted.name}=={pin}' if pin else str(wanted))}"
        if wanted.name == "python":
            install = "PYTHON=python3.11 launch/install.sh"
        if version is None:
            bad.append(Finding("missing", wanted.name, "not installed", install))
        elif not wanted.specifier.contains(version, prereleases=True):
            bad.append(Finding("missing", wanted.name, f"{version}, needed: {wanted.specifier}", install))
        elif pin not in (None, version, version.split("+")[0]):  # 2.13.0+cpu is 2.13.0
            bad.append(Finding("note", wanted.name, f"{version}, tested with {pin}", install))
        else:
            good.append(f"{wanted.name} {version}")
    return [*(Finding("ok", "versions", ", ".join(good[i : i + 5])) for i in range(0, len(good), 5)), *bad]


def check_imports() -> list[Finding]:
    """Find what cannot be imported, though it may be installed: a torch for other CUDA libraries, say."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of lost connections are pages of stack
    findings = []
    for module in MODULES:
        try:
            imported = importlib.import_module(module)
        except Exception as error:
            text, mend = f"cannot be imported: {described(error)}", f"pip install --force-reinstall {module}"
            if isinstance(error, ModuleNotFoundError) and error.name == module:
                text, mend = "not installed", "launch/install.sh installs everything"
            findings.append(Finding("missing", module, text, mend))
            if module == "torch":
                break  # most of the others need it
            continue
        if module == "torch":
            os.environ.setdefault("DS_ACCELERATOR", "cuda" if imported.cuda.is_available() else "cpu")
    if not findings:
        from l2e_ds.system.process import quiet_libraries

        quiet_libraries()
    return findings


def check_compiler() -> list[Finding]:
    """Find what building the operation of CPU offload lacks, and a build that was left unfinished."""
    from torch.utils.cpp_extension import get_default_build_root

    compiler = [*shlex.split(os.environ.get("CXX", "c++")), "--version"]
    findings = [
        check_program("compiler", compiler, OFFLOAD, "apt-get install g++   (or: dnf install gcc-c++)"),
        check_program("ninja", ["ninja", "--version"], OFFLOAD, "pip install --force-reinstall ninja"),
    ]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        mend = "apt-get install python3-dev   (or: dnf install python3-devel)"
        findings.append(Finding("note", "compiler", f"Python.h is not there; needed for {OFFLOAD} only", mend))
    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).rglob("cpu_adam/lock"):
        if time.time() - lock.stat().st_mtime < 900:
            continue  # somebody builds now
        text = "a build of cpu_adam was left unfinished, and every run with offload would wait for it for ever"
        findings.append(Finding("note", "compiler", text, f"rm {shlex.quote(str(lock))}"))
    return findings
