"""What `l2e-ds doctor` finds out about one host. Only the standard library is imported at the top."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import shlex
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import l2e_ds
from l2e_ds.doctor.finding import Finding
from l2e_ds.system.files import PACKAGE, error_line
from l2e_ds.system.provenance import cpu_name, installed_version

MODULES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "safetensors", "pydantic", "yaml")
GB = 1e9
SHARED_MEMORY = 512 * 2**20
"""Bytes of /dev/shm below which NCCL and data workers may fail (DeepSpeed's own ds_report warns there, too)."""


def check_host(directory: Path, imports: list[Finding]) -> Iterator[Finding]:
    """Yield what there is to say of this host. imports: what `check_imports` found.

    A check that raises is a finding itself: the others follow all the same.
    """
    checks = {"versions": check_versions(), "imports": iter(imports)}
    if not imports:  # these two ask torch and DeepSpeed
        checks |= {"accelerator": check_accelerator(), "compiler": check_compiler()}
    checks |= {"directory": check_directory(directory), "hub": check_hub(), "shared memory": check_shared_memory()}
    for name, findings in checks.items():
        try:
            yield from findings
        except Exception as error:
            yield Finding("note", name, f"could not be checked: {error_line(error)}")


def own_version() -> str:
    """Return version and a checksum of the code: two hosts may have copies of different days."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(PACKAGE.rglob("*.py"))))
    return f"{l2e_ds.__version__} (code {digest.hexdigest()[:8]})"


def check_versions() -> Iterator[Finding]:
    """Compare the versions of this host with those that the package needs."""
    from packaging.requirements import Requirement

    good = [f"l2e-ds {own_version()}", f"python {installed_version('python')}"]
    for line in importlib.metadata.requires("l2e-ds") or ():
        wanted = Requirement(line)
        version = installed_version(wanted.name)
        if wanted.marker and "extra" in str(wanted.marker):
            continue
        if version is not None and wanted.specifier.contains(version, prereleases=True):
            good.append(f"{wanted.name} {version}")
        else:
            text = f"{version or 'not installed'}, needed: {wanted.specifier}"
            yield Finding("missing", wanted.name, text, f"pip install {shlex.quote(str(wanted))}")
    for first in range(0, len(good), 5):
        yield Finding("ok", "versions", ", ".join(good[first : first + 5]))


def check_imports() -> Iterator[Finding]:
    """Find what cannot be imported, though it may be installed: a torch for other CUDA libraries, say."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of lost connections are pages of stack
    for module in MODULES:
        try:
            imported = importlib.import_module(module)
            if module == "torch":
                os.environ.setdefault("DS_ACCELERATOR", "cuda" if imported.cuda.is_available() else "cpu")
        except Exception as error:
            text, fix = f"cannot be imported: {error_line(error)}", f"pip install --force-reinstall {module}"
            if isinstance(error, ModuleNotFoundError) and error.name == module:
                text, fix = "not installed", "launch/install.sh installs everything"
            yield Finding("missing", module, text, fix)
            if module == "torch":
                return  # most of the others need it


def check_compiler() -> Iterator[Finding]:
    """Find what Triton needs on every GPU run, and torch.compile on CPUs for large layers."""
    from deepspeed.accelerator import get_accelerator

    on_gpu = get_accelerator().device_name() == "cuda"
    state = "missing" if on_gpu else "note"
    who = "Triton needs it" if on_gpu else "torch.compile needs it where a layer is large"
    usual = ["gcc", "clang"] if on_gpu else ["g++"]
    named = os.environ.get("CC" if on_gpu else "CXX")
    if not any(shutil.which(name) for name in ([named] if named else usual)):
        yield Finding(
            state, "compiler", f"no C compiler is found; {who}", "apt-get install g++   (or: dnf install gcc-c++)"
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        fix = "apt-get install python3-dev   (or: dnf install python3-devel)"
        yield Finding(state, "compiler", f"Python.h is not there; {who}", fix)


def check_accelerator() -> Iterator[Finding]:
    """Name the GPUs or the CPU, and find GPUs that the run would not use."""
    import psutil
    import torch
    from deepspeed.accelerator import get_accelerator
    from torch.utils import collect_env

    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    if get_accelerator().device_name() == "cuda":
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        kinds = sorted({f"{device.name} ({device.total_memory / GB:.0f} GB)" for device in devices})
        precision = "bf16, fp16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16, no bf16"
        text = f"{len(devices)} x {' and '.join(kinds)}, driver {driver}, CUDA {torch.version.cuda}, {precision}"
        yield Finding("ok", "accelerator", text)
        return
    cores, free = len(os.sched_getaffinity(0)), psutil.virtual_memory().available / GB
    text = f"none: runs on the CPU ({cpu_name()}, {cores} of {os.cpu_count()} cores, {free:.0f} GB free)"
    yield Finding("ok", "accelerator", text)
    if driver is not None:
        text = f"torch {torch.__version__} uses no GPU, though there is an NVIDIA driver ({driver})"
        fix = "unset DS_ACCELERATOR CUDA_VISIBLE_DEVICES   (or install a torch for CUDA that the driver knows)"
        yield Finding("note", "accelerator", text, fix)


def check_directory(directory: Path) -> Iterator[Finding]:
    """Find out whether a folder is there and can be written to, and how much space it has."""
    if not directory.is_dir():
        fix = f"mkdir -p {shlex.quote(str(directory))}"
        yield Finding("missing", "directory", f"{directory} is no folder", fix)
        return
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(os.urandom(2**20))
    except OSError as error:
        fix = "--directory FOLDER   (one with space that you may write to)"
        yield Finding("missing", "directory", f"cannot write to {directory}: {error.strerror or error}", fix)
        return
    text = f"{shutil.disk_usage(directory).free / GB:.1f} GB free; a checkpoint takes 12 to 16 bytes a parameter"
    yield Finding("ok", "directory", f"{directory}: {text}")


def check_hub() -> Iterator[Finding]:
    """Ask the hub, and say where its cache lies; of a token only whether there is one."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session

    endpoint = constants.ENDPOINT.split("://")[-1].split("@")[-1]  # a mirror's address may carry a password
    cache = constants.HF_HUB_CACHE.replace(str(Path.home()), "~")
    rest = f"cache {cache}, {'a' if get_token() else 'no'} token"
    if constants.HF_HUB_OFFLINE:
        yield Finding("ok", "hub", f"offline (HF_HUB_OFFLINE): only what the cache has; {rest}")
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=3)
        yield Finding("ok", "hub", f"{endpoint} answers; {rest}")
    except Exception as error:
        text = f"{endpoint} does not answer ({type(error).__name__}): only local folders and the cache; {rest}"
        yield Finding("note", "hub", text, "export HF_HUB_OFFLINE=1   (so that nothing waits for it)")


def check_shared_memory() -> Iterator[Finding]:
    """Look at /dev/shm, through which the ranks of a host and data workers exchange."""
    usage = shutil.disk_usage("/dev/shm")
    text = f"/dev/shm {usage.free / GB:.1f} of {usage.total / GB:.1f} GB free"
    if usage.free >= SHARED_MEMORY:
        yield Finding("ok", "shared memory", text)
    else:
        text += ": NCCL and data workers may fail with 'bus error' or 'no space'"
        fix = "mount -o remount,size=8G /dev/shm   (docker run --shm-size=8g; and: ls -l /dev/shm)"
        yield Finding("note", "shared memory", text, fix)
