"""What doctor finds out about installed packages, the compiler and DeepSpeed's operations."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import os
import shlex
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

from l2e_ds.doctor.finding import Finding, install_line, number, on_path, one_line, output_of, own_version
from l2e_ds.system.files import PACKAGE
from l2e_ds.system.provenance import installed_version

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PINS = PACKAGE.parent / "launch/requirements.txt"
EXTRAS = {
    "analysis": "l2e-ds analyze, neuron",
    "report": "l2e-ds report",
    "eval": "l2e-ds evaluate, section evaluation",
    "monitor": "logging.tensorboard, logging.wandb_project",
    "trainer": "InhibitionCallback for the Hugging Face Trainer",
    "bench": "l2e-ds bench throughput",
    "gpu": "the LM loss as one kernel",
}
"""Extras of the package, and what they are for."""


def wanted_versions() -> tuple[list[Requirement], dict[str, str]]:
    """Return what the package requires, "python" first, and the pinned versions by name where the repository is there.

    Raises PackageNotFoundError where the package is run without having been installed.
    """
    from packaging.requirements import Requirement

    python = importlib.metadata.metadata("l2e-ds")["Requires-Python"]
    ranges = [line for line in importlib.metadata.requires("l2e-ds") or () if "extra ==" not in line]
    pins = {}
    if PINS.is_file():
        for line in PINS.read_text(encoding="utf-8").splitlines():
            if line.strip() and not line.startswith("#"):
                pin = Requirement(line)
                if pin.marker is None or pin.marker.evaluate():
                    pins[pin.name] = next(iter(pin.specifier)).version
    return [Requirement(f"python{python}"), *map(Requirement, ranges)], pins


def check_versions() -> list[Finding]:
    """Installed versions against the package's ranges (missing) and the pinned ones (note)."""
    try:
        ranges, pins = wanted_versions()
    except importlib.metadata.PackageNotFoundError:
        text = "l2e-ds is not installed, so nothing says which are needed"
        return [Finding("note", "versions", text, "pip install -e .   (in the repository)")]
    good, bad = [f"l2e-ds {own_version()}"], []
    for wanted in ranges:
        version, pin = installed_version(wanted.name), pins.get(wanted.name)
        install = f"pip install {shlex.quote(f'{wanted.name}=={pin}' if pin else str(wanted))}"
        if wanted.name == "python":
            install = "PYTHON=python3.11 launch/install.sh"
        if version is None:
            bad.append(Finding("missing", wanted.name, "not installed", install))
        elif not wanted.specifier.contains(version, prereleases=True):
            bad.append(Finding("missing", wanted.name, f"{version}, needed: {wanted.specifier}", install))
        elif pin and not _is(version, pin):
            bad.append(Finding("note", wanted.name, f"{version}, tested with {pin}", install))
        else:
            good.append(f"{wanted.name} {version}")
    direct = {wanted.name for wanted in ranges}
    others = [
        f"{name} {version} (pinned {pin})"
        for name, pin in pins.items()
        if name not in direct and (version := installed_version(name)) and not _is(version, pin)
    ]
    lines = [", ".join(good[first : first + 5]) for first in range(0, len(good), 5)]
    findings = [*(Finding("ok", "versions", line) for line in lines), *bad]
    if others:
        text = f"{number(len(others), 'other package')} not as pinned: {', '.join(others[:4])}"
        mend = f"pip install -r {shlex.quote(os.path.relpath(PINS))}"
        findings.append(Finding("note", "versions", text + (" ..." if len(others) > 4 else ""), mend))
    return findings


def wanted_by_extra() -> dict[str, list[Requirement]]:
    """What each extra of EXTRAS requires."""
    from packaging.requirements import Requirement

    lines = [Requirement(line) for line in importlib.metadata.requires("l2e-ds") or () if "extra ==" in line]
    # with "" markers of an extra alone are false
    return {extra: [one for one in lines if one.marker and one.marker.evaluate({"extra": extra})] for extra in EXTRAS}


def check_extras() -> list[Finding]:
    """Which extras are installed, and what is for what."""
    complete, findings = [], []
    for extra, wanted in wanted_by_extra().items():
        lacking = []
        for one in wanted:
            version = installed_version(one.name)
            if version is None or not one.specifier.contains(version, prereleases=True):
                lacking.append(f"{one.name}{one.specifier}")
        if lacking:
            text = f"{extra}: without {', '.join(lacking)} ({EXTRAS[extra]})"
            findings.append(Finding("note", "extras", text, f"pip install {shlex.join(lacking)}"))
        else:
            complete.append(extra)
    return [*([Finding("ok", "extras", ", ".join(complete))] if complete else []), *findings]


def check_imports() -> list[Finding]:
    """That what is installed can be imported: a torch for other CUDA libraries, say, cannot."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of lost connections are pages of stack
    findings = []
    for module in ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "safetensors", "pydantic", "yaml"):
        try:
            imported = importlib.import_module(module)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == module:
                text, mend = "not installed", "launch/install.sh installs everything"
            else:
                text, mend = f"cannot be imported: {one_line(error)}", f"pip install --force-reinstall {module}"
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
    """DeepSpeed builds the operation of CPU offload at its first use; no other run needs a compiler."""
    use = "needed for offload to the CPU only"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    said = output_of([*compiler, "--version"])
    findings = []
    if said is not None:
        findings.append(Finding("ok", "compiler", said.splitlines()[0] if said else compiler[0]))
    else:
        text = f"{compiler[0]} does not run ({'CXX' if 'CXX' in os.environ else 'no C++ compiler on PATH'}); {use}"
        findings.append(Finding("note", "compiler", text, install_line(apt="g++", dnf="gcc-c++")))
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        mend = install_line(apt="python3-dev", dnf="python3-devel")
        findings.append(Finding("note", "headers", f"Python.h is not there; {use}", mend))
    ninja = output_of(["ninja", "--version"])
    if ninja is not None:
        findings.append(Finding("ok", "ninja", ninja.strip()))
    else:
        mend = on_path("ninja", otherwise="pip install --force-reinstall ninja")
        findings.append(Finding("note", "ninja", f"not on PATH, or broken; {use}", mend))
    return findings


def check_operations() -> list[Finding]:
    """The one DeepSpeed operation that a run may use: can it be built, is it already?"""
    import deepspeed
    from deepspeed.git_version_info import installed_ops

    with contextlib.redirect_stdout(io.StringIO()):
        compatible = deepspeed.ops.__compatible_ops__
    name, findings = "cpu_adam", []
    if installed_ops.get(name) or _is_built(name):
        findings.append(Finding("ok", "operations", f"{name} for offload: built"))
    elif compatible.get(name):
        findings.append(Finding("ok", "operations", f"{name} for offload: to be built at its first use"))
    else:
        findings.append(
            Finding("note", "operations", f"{name} for offload cannot be built here", "ds_report   (says why)")
        )
    lock = _build_folder(name) / "lock"
    if lock.is_file() and time.time() - lock.stat().st_mtime > 900:
        text = f"{name}: a build was left unfinished, and every run with offload would wait for it for ever"
        findings.append(Finding("note", "operations", text, f"rm {shlex.quote(str(lock))}"))
    return findings


def _build_folder(operation: str) -> Path:
    """Where torch.utils.cpp_extension builds (its own function would make the folder)."""
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"]) / operation
    version = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    device = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    return Path(get_default_build_root()) / f"{version}_{device}" / operation


def _is_built(operation: str) -> bool:
    return (_build_folder(operation) / f"{operation}.so").is_file()


def _is(version: str, pin: str) -> bool:
    """Whether a version is the pinned one; a build's own suffix (2.13.0+cpu) does not count."""
    return version == pin or version.split("+")[0] == pin
