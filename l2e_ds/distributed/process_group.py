"""Join the process group that a launcher asks for, and take it down again.

`join` works under the deepspeed launcher and torchrun (RANK ...), srun (SLURM_...), mpirun (mpi4py, through DeepSpeed)
and alone.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import os
import resource
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from l2e_ds.distributed import collectives
from l2e_ds.distributed.launch import Launch, free_port
from l2e_ds.distributed.slurm_step import rendezvous_port, set_first_host
from l2e_ds.errors import ConfigError, L2EError, RendezvousError


def join(launch: Launch, timeout_minutes: float) -> torch.device:
    """Make the process group (nccl on GPUs, gloo on CPUs) and return this rank's device.

    Raises RendezvousError where rank 0's port is in use, ConfigError where two ranks have one GPU, and L2EError where
    the group that formed has another size than the launcher said: N tasks that each think they are alone would be N
    runs in one directory (docs/deepspeed.md, row 10).
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    on_gpu = get_accelerator().device_name() == "cuda"
    variables = {"RANK": str(launch.rank), "WORLD_SIZE": str(launch.size), "LOCAL_RANK": str(launch.local_rank)}
    if launch.launcher == "srun":
        os.environ.update(variables)
        set_first_host()
        os.environ.setdefault("MASTER_PORT", str(rendezvous_port(os.environ)))
    elif launch.launcher == "alone":
        os.environ.update(variables, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    elif launch.launcher == "mpirun" and "MASTER_ADDR" in os.environ:
        os.environ.update(variables)
        os.environ.setdefault("MASTER_PORT", "29500")
    elif launch.launcher == "mpirun":  # mpi4py finds the address of rank 0, which may belong to the wrong network
        deepspeed.comm.comm.mpi_discovery(verbose=False)
    device = _local_gpu() if on_gpu else torch.device("cpu")
    patience = timedelta(minutes=timeout_minutes + 1)  # longer than the watchdog, which can name the lost rank
    _name_gloo_interface()
    _allow_open_files()
    # Its shared-memory operation is for inference only, but compiled, loaded and set up in every CPU run; a process
    # that is killed meanwhile leaves others waiting for ever, and its buffers stay in /dev/shm (docs/deepspeed.md).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints progress
            deepspeed.init_distributed(
                dist_backend="nccl" if on_gpu else "gloo",
                auto_mpi_discovery=False,
                distributed_port=int(os.environ.get("MASTER_PORT", "29500")),
                timeout=patience,
                verbose=False,
            )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise RendezvousError(
                f"launcher: another program on {socket.gethostname()} uses port {os.environ['MASTER_PORT']}, on which"
                " rank 0 must listen; set MASTER_PORT to a free one"
            ) from error
        if "Duplicate GPU" in str(error):
            raise ConfigError(
                f"launcher: two ranks of {socket.gethostname()} have the same GPU; start as many ranks on a host as it"
                " has GPUs, each seeing all of them or one of its own"
            ) from error
        raise
    # DeepSpeed's own copy of the world group would give up when torch does by default, after 10 minutes of NCCL
    deepspeed.utils.groups._WORLD_GROUP = dist.new_group(timeout=patience)
    collectives.open_control_group(patience)
    if dist.get_world_size() != launch.size or dist.get_rank() != launch.rank:
        raise L2EError(
            f"launcher: {launch.launcher} said rank {launch.rank} of {launch.size},"
            f" the process group says {dist.get_rank()} of {dist.get_world_size()}"
        )
    return device


def _allow_open_files() -> None:
    """Raise the limit of open files: gloo opens a socket for each other rank, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _local_gpu() -> torch.device:
    """Make this rank's GPU the current one and return it. Raises ConfigError where the node has too few."""
    count = torch.cuda.device_count()
    if count == 1:  # a launcher or a script shows each rank its own, which is number 0 to it
        os.environ["LOCAL_RANK"] = "0"
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank >= count:
        error = ConfigError(
            f"launcher: local rank {local_rank}, but node {socket.gethostname()} has {count} GPUs; start at most"
            f" {count} ranks on it"
        )
        error.on_every_rank = False
        raise error
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _name_gloo_interface() -> None:
    """Tell gloo to listen on the interface that leads to rank 0, unless the user has set GLOO_SOCKET_IFNAME.

    By itself it listens where the host's own name leads, which is often 127.0.1.1 and reached by no other host.
    """
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
        # MASTER_ADDR names this host: take the default route, to an address that nobody has
        here = _address_towards("192.0.2.1")
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == here for entry in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def _address_towards(host: str) -> str | None:
    """Return this host's own address on the way to another, or None if there is no way."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing; chooses the route
            return probe.getsockname()[0]
    except OSError:
        return None


def leave() -> None:
    """Destroy the process groups, if there are any."""
    collectives.forget_control_group()
    if dist.is_initialized():
        dist.destroy_process_group()
