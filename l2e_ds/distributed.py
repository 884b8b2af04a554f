"""Process groups, ranks and the few collectives that this project calls itself.

`join` works under the deepspeed launcher and torchrun (RANK ...), srun (SLURM_...), mpirun (mpi4py, through
DeepSpeed) and alone. R is the number of ranks.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from l2e_ds.errors import ConfigError, L2EError

_doing = "starting"
_progressed = time.monotonic()
_patience = timedelta(minutes=30)  # of collectives; set by `join`
_control: Any = None  # gloo group of all ranks for decisions: they wait for no GPU and mix with no gradient


@dataclass(frozen=True)
class Launch:
    """Where this process stands: its rank among `size`, its place on the node, and who said so."""

    launcher: str
    rank: int
    size: int
    local_rank: int


def find_launch(environment: dict[str, str] | None = None) -> Launch:
    """Read the launcher's variables; touches no network. Raises ConfigError where they contradict each other."""
    env = dict(os.environ) if environment is None else environment

    def read(*names: str) -> list[int]:
        try:
            return [int(env[name]) for name in names]
        except KeyError as error:
            raise ConfigError(f"launcher: {names[0]} is set but {error.args[0]} is not") from None
        except ValueError:
            given = {name: env[name] for name in names}
            raise ConfigError(f"launcher: expected numbers, got {given}") from None

    if "RANK" in env:
        rank, size, local = read("RANK", "WORLD_SIZE", "LOCAL_RANK")
        launch = Launch("torchrun or deepspeed", rank, size, local)
    elif "OMPI_COMM_WORLD_SIZE" in env:
        rank, size, local = read("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        launch = Launch("mpirun", rank, size, local)
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # inside srun; a bare batch script has no step of its own
        rank, size, local = read("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        launch = Launch("srun", rank, size, local)
    elif "PMI_SIZE" in env:  # MPICH, Intel MPI; mpi4py then finds the rest
        rank, size = read("PMI_RANK", "PMI_SIZE")
        launch = Launch("mpirun", rank, size, int(env.get("MPI_LOCALRANKID", rank)))
    elif "PMIX_RANK" in env:
        # one of several tasks that would each take themselves for the only one (DEEPSPEED.md, silent failure 10)
        raise ConfigError(
            "launcher: PMIX_RANK is set, but the number of ranks is not; set RANK, WORLD_SIZE, LOCAL_RANK"
        )
    else:
        launch = Launch("alone", 0, 1, 0)
    if not 0 <= launch.rank < launch.size:
        raise ConfigError(f"launcher: rank {launch.rank} of {launch.size} ranks ({launch.launcher})")
    if "RANK" in env:
        read("RANK", "MASTER_PORT")
        if not env.get("MASTER_ADDR"):
            raise ConfigError("launcher: RANK is set but MASTER_ADDR is not")
    return launch


def join(launch: Launch, timeout_minutes: float) -> torch.device:
    """Make the process group (nccl on GPUs, gloo on CPUs) and return this rank's device.

    Raises L2EError where the group that formed has another size than the launcher said: N tasks that each
    think they are alone would be N runs in one directory (DEEPSPEED.md, silent failure 10).
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    on_gpu = get_accelerator().device_name() == "cuda"
    variables = {"RANK": str(launch.rank), "WORLD_SIZE": str(launch.size), "LOCAL_RANK": str(launch.local_rank)}
    if launch.launcher == "srun":
        os.environ.update(variables)
        if on_gpu and torch.cuda.device_count() == 1:  # --gpus-per-task=1: each task sees only its own
            os.environ["LOCAL_RANK"] = "0"
        from l2e_ds import slurm  # here: l2e_ds.inhibition, which needs this file, stays importable on its own

        os.environ.setdefault("MASTER_ADDR", slurm.first_host())
        os.environ.setdefault("MASTER_PORT", str(slurm.rendezvous_port(os.environ)))
    elif launch.launcher == "alone":
        os.environ.update(variables, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    elif launch.launcher == "mpirun" and "MASTER_ADDR" in os.environ:
        os.environ.update(variables)  # else mpi4py finds them, and an address that may be of the wrong network
        os.environ.setdefault("MASTER_PORT", "29500")
    device = _local_device(on_gpu)
    global _control, _patience
    _patience = timedelta(minutes=timeout_minutes + 1)  # the watchdog, which can name the lost rank, comes first
    _name_gloo_interface()
    _allow_open_files()
    # Its shared-memory operation is for inference only, but compiled, loaded and set up in every CPU run; a process
    # that is killed meanwhile leaves others waiting for ever, and its buffers stay in /dev/shm (docs/deepspeed.md).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed narrates
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            auto_mpi_discovery=launch.launcher == "mpirun",
            distributed_port=int(os.environ.get("MASTER_PORT", "29500")),
            timeout=_patience,
            verbose=False,
        )
    _control = new_group()
    device = device or _local_device(on_gpu) or torch.device("cpu")
    if dist.get_world_size() != launch.size or dist.get_rank() != launch.rank:
        raise L2EError(
            f"launcher: {launch.launcher} said rank {launch.rank} of {launch.size},"
            f" the process group says {dist.get_rank()} of {dist.get_world_size()}"
        )
    return device


def _allow_open_files() -> None:
    """Gloo opens a socket for each other rank; the usual soft limit is 1024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _local_device(on_gpu: bool) -> torch.device | None:
    """This rank's device, made the current one; None where the local rank is not known yet (mpirun)."""
    if not on_gpu or "LOCAL_RANK" not in os.environ:
        return None
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"launcher: local rank {local_rank}, but this node has {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _name_gloo_interface() -> None:
    """Gloo listens where the host's own name leads, which is often 127.0.1.1 and reached by no other host; the
    interface that leads to rank 0 is right. GLOO_SOCKET_IFNAME, if set, is the user's word."""
    if "GLOO_SOCKET_IFNAME" in os.environ or "MASTER_ADDR" not in os.environ:
        return
    import psutil

    master = os.environ["MASTER_ADDR"]
    here = _address_towards(master)
    if (
        here is not None
        and ipaddress.ip_address(here).is_loopback
        and not master.startswith(("127.", "localhost", "::1"))
    ):
        here = _address_towards("192.0.2.1")  # a name of this very host; nobody has that address: the default route
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == here for entry in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def _address_towards(host: str) -> str | None:
    """This host's own address on the way to another; None where there is no way."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing; chooses the route
            return probe.getsockname()[0]
    except OSError:
        return None


def leave() -> None:
    """Take the process groups down, if there are any."""
    global _control
    _control = None
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """Of this host, for a rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def reported_once(action: Callable[[Launch], None]) -> int:
    """Do `action` on every rank; what all of them raise alike only rank 0 raises. Returns the exit code."""
    launch = find_launch()
    try:
        action(launch)
    except L2EError as error:
        if launch.rank == 0 or not error.on_every_rank:
            raise
        time.sleep(1.0)  # a launcher ends all when one has ended: rank 0 says why before
        return error.exit_code
    return 0


# --- ranks and collectives ---------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size(group: Any = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, which writes what is written once."""
    return rank() == 0


def progress(doing: str) -> None:
    """This rank's main thread moves on; `doing` in a few words, for the case that it does not come back."""
    global _doing, _progressed
    _doing, _progressed = doing, time.monotonic()


def beat() -> None:
    """This rank moves on with what it is doing; from any thread."""
    global _progressed
    _progressed = time.monotonic()


def doing() -> str:
    return _doing


def idle_seconds() -> float:
    """Seconds since the main thread last made progress."""
    return time.monotonic() - _progressed


def all_reduce_sum(tensor: Tensor, group: Any = None) -> Tensor:
    """Sum over the ranks of `group` (default: all), in place; any shape and dtype that the backend takes."""
    if size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def begin_all_reduce_sum(tensor: Tensor, group: Any = None) -> Callable[[], None]:
    """`all_reduce_sum` that goes on while this rank computes; the returned function waits, on a GPU without the host.
    Until then nobody may touch the tensor."""
    if size(group) == 1:
        return lambda: None
    work = dist.all_reduce(tensor, group=group, async_op=True)

    def wait() -> None:
        work.wait()

    return wait


def ask_all(*flags: bool) -> Callable[[], list[bool]]:
    """Begin to ask which flags any rank holds up; the returned function waits for the answer.

    Hosts talk to each other meanwhile, beside what the GPUs do: at a thousand ranks the answer takes longer than a step
    may lose.
    """
    box = torch.tensor(flags, dtype=torch.int32)
    work = dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_control, async_op=True) if size() > 1 else None

    def answer() -> list[bool]:
        if work is not None:
            work.wait()
        return [bool(flag) for flag in box]

    return answer


def any_rank(flag: bool) -> bool:
    """Whether any rank says True; waits for all."""
    return ask_all(flag)()[0]


def main_decides(value: Any) -> Any:
    """Rank 0's (picklable, small) value, on every rank."""
    box = [value]
    if size() > 1:
        dist.broadcast_object_list(box, src=0, group=_control)
    progress(_doing)
    return box[0]


def main_works(action: Callable[[], Any], tick: Callable[[], None] = lambda: None) -> Any:
    """Rank 0 does `action` while the others wait, however long it takes: they meet in a small collective every second,
    so that no timeout ends a long piece of work. Returns the result on rank 0 and None elsewhere.

    tick: called each second on every rank; may raise, on all ranks alike, which gives the work up.
    Raises what the action raised: on rank 0 itself, on the others as L2EError.
    """
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["result"] = action()
        except BaseException as error:
            outcome["error"] = error

    worker = threading.Thread(target=work, daemon=True)
    if is_main():
        worker.start()
    while not main_decides(is_main() and not worker.is_alive()):
        beat()
        tick()
        worker.join(1.0) if is_main() else time.sleep(1.0)
    error = outcome.get("error")
    if error is not None and not isinstance(error, L2EError):
        raise error  # the launcher ends the others
    agree(error)
    return outcome.get("result")


def agree(error: L2EError | None) -> None:
    """Collective: raise on every rank if any rank brings an error, so that all end together with its message."""
    errors = all_gather_objects(error)
    first: L2EError | None = error or next((e for e in errors if e is not None), None)
    if first is not None:
        first.on_every_rank = True
        raise first


def all_work(action: Callable[[], Any]) -> Any:
    """Every rank does `action` and gets its own result; what one of them raises as an L2EError, all do. Collective."""
    result, error = None, None
    try:
        result = action()
    except L2EError as raised:
        error = raised
    agree(error)
    return result


def new_group() -> Any:
    """A group of all ranks on CPUs (gloo), for collectives of one thread that others must not mix with. Collective."""
    return dist.new_group(backend="gloo", timeout=_patience) if size() > 1 else None


def from_main(array: np.ndarray | L2EError | None, shape: tuple[int, ...], group: Any) -> np.ndarray:
    """Rank 0's array (int32 of this shape) on every rank of a `new_group`; or its error, raised on every rank.

    Collective over the group. array: None elsewhere.
    """
    failed = torch.tensor([isinstance(array, L2EError)])
    if group is not None:
        dist.broadcast(failed, src=0, group=group)
    if failed:
        box: list[Any] = [array]
        if group is not None:
            dist.broadcast_object_list(box, src=0, group=group)
        box[0].on_every_rank = True
        raise box[0]
    assert not isinstance(array, L2EError)
    tensor = torch.empty(shape, dtype=torch.int32) if array is None else torch.from_numpy(array)
    if group is not None:
        dist.broadcast(tensor, src=0, group=group)
    return tensor.numpy()


def all_gather_objects(value: Any) -> list[Any]:
    """Every rank's (picklable, small) value, in the order of ranks."""
    values: list[Any] = [value]
    if size() > 1:
        values = [None] * size()
        dist.all_gather_object(values, value, group=_control)
    return values
