"""What `l2e-ds doctor` finds out where several ranks meet: whether hosts are alike, and how fast they all-reduce."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2e_ds.doctor.finding import Finding, Report, few, host
from l2e_ds.doctor.host import own_version
from l2e_ds.errors import RendezvousError
from l2e_ds.system.files import error_line
from l2e_ds.system.provenance import installed_version

if TYPE_CHECKING:
    from l2e_ds.distributed.launch import Launch
    from l2e_ds.doctor.all_reduce import Timing

PATIENCE = 1.0
"""Minutes without progress after which a rank gives up; the process group waits one more (process_group.join), two in
all for ranks that do not come: long enough for a slow file system, short enough to be waited for."""
PACKAGES = ("python", "torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy", "safetensors")
Facts = list[dict[str, Any]]
"""What each rank says of itself, in the order of ranks."""


def meet_to_compare(launch: Launch, report: Report, arguments: argparse.Namespace) -> int:
    """Compare the ranks, then measure; rank 0 prints. Return the same exit code on every rank. Collective."""
    from l2e_ds.distributed import collectives, heartbeat, process_group  # with torch, which may be missing
    from l2e_ds.distributed.watchdog import Watchdog
    from l2e_ds.doctor.all_reduce import measure

    with Watchdog(PATIENCE) as watchdog:
        device = process_group.join(launch, PATIENCE)
        watchdog.meet()
        facts: Facts = collectives.all_gather_objects(_facts(report.findings, device))
        report.add([*other_hosts(facts), *check_alike(facts), *check_hosts(facts)])
        if len({fact["host"] for fact in facts}) > 1:
            report.add(_check_shared_directory(arguments.directory, facts))
        heartbeat.progress("the all-reduce")
        measured = collectives.all_gather_objects(measure(device, arguments.seconds if launch.size > 1 else 0.0))
        report.add(all_reduce_findings(measured, facts, "nccl" if device.type == "cuda" else "gloo"))
        code = collectives.broadcast_object(report.conclude() if collectives.is_main() else 0)
    process_group.leave()
    return code


def _facts(findings: list[Finding], device: Any) -> dict[str, Any]:
    import torch

    on_gpu, cores = device.type == "cuda", len(os.sched_getaffinity(0))
    versions = {package: installed_version(package) or "not installed" for package in PACKAGES}
    return {
        "host": host(),
        "versions": {"l2e-ds": own_version(), **versions},
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {cores} cores",
        "gpu": str(torch.cuda.get_device_properties(device).uuid) if on_gpu else None,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "findings": findings,
    }


def _where(ranks: Sequence[int], facts: Facts) -> str:
    return f"{few(ranks, 'rank')} ({few(sorted({facts[rank]['host'] for rank in ranks}))})"


def other_hosts(facts: Facts) -> Iterator[Finding]:
    """Yield what is not ok on other hosts than rank 0's, each once with the hosts it was found on."""
    found = defaultdict(list)
    for fact in facts[1:]:
        for finding in fact["findings"]:
            if finding.state != "ok" and finding not in facts[0]["findings"]:
                found[finding].append(fact["host"])
    for finding, hosts in found.items():
        yield Finding(finding.state, finding.name, f"{few(hosts)}: {finding.text}", finding.fix)


def check_alike(facts: Facts) -> Iterator[Finding]:
    """Find ranks whose versions, of packages or of this package's own code, are not those that most ranks have."""
    are_alike = True
    for package in facts[0]["versions"]:
        versions = [fact["versions"][package] for fact in facts]
        most = Counter(versions).most_common(1)[0][0]
        for version in dict.fromkeys(version for version in versions if version != most):
            are_alike = False
            ranks = [rank for rank, own in enumerate(versions) if own == version]
            text = f"{_where(ranks, facts)}: {package} {version}, the other ranks {most}"
            fix = "use the same environment and the same copy of the code on all hosts"
            yield Finding("missing", "versions", text, fix)
    if are_alike and len(facts) > 1:
        yield Finding("ok", "versions", f"the same on all {len(facts)} ranks")


def check_hosts(facts: Facts) -> Iterator[Finding]:
    """Name each host's ranks; find ranks that share a GPU, and more threads than cores."""
    hosts = defaultdict(list)
    for rank, fact in enumerate(facts):
        hosts[fact["host"]].append(rank)
    for name, ranks in hosts.items():
        here = [facts[rank] for rank in ranks]
        devices = " and ".join(sorted({fact["device"] for fact in here}))
        yield Finding("ok", "host", f"{name}: {few(ranks, 'rank')}; {devices}; OMP_NUM_THREADS {here[0]['threads']}")
        gpus = [fact["gpu"] for fact in here if fact["gpu"]]
        if len(set(gpus)) < len(gpus):
            text = f"{name}: {len(gpus)} ranks on {len(set(gpus))} GPUs"
            yield Finding("missing", "host", text, "start at most one rank a GPU")
        threads, cores = sum(fact["threads"] for fact in here), here[0]["cores"]
        if not gpus and threads > cores and len(ranks) > 1:
            text = f"{name}: {threads} threads on {cores} cores slow each other down"
            fix = f"export OMP_NUM_THREADS={max(1, cores // len(ranks))}   (and at most {cores} ranks there)"
            yield Finding("note", "host", text, fix)


def _check_shared_directory(directory: Path, facts: Facts) -> Iterator[Finding]:
    """Find hosts that do not see what rank 0 writes. Collective."""
    from l2e_ds.distributed import collectives

    file = directory / collectives.broadcast_object(f".l2e-ds-doctor-{os.urandom(8).hex()}")
    try:
        if collectives.is_main():
            with suppress(OSError):  # not writable: found already
                file.touch()
        collectives.broadcast_object(None)  # wait for it
        deadline = time.monotonic() + 10
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.5)  # a network file system may show a new file some seconds late
        seen = collectives.all_gather_objects(file.exists())
    finally:
        if collectives.is_main():
            file.unlink(missing_ok=True)
    blind = sorted({fact["host"] for fact, sees in zip(facts, seen, strict=True) if not sees})
    if seen[0] and blind:
        text = f"{few(blind)} cannot see what rank 0 writes to {directory}"
        yield Finding("missing", "directory", text, "--directory FOLDER   (one that all hosts share)")
    elif seen[0]:
        yield Finding("ok", "directory", f"{directory} is shared by all hosts")


def all_reduce_findings(measured: list[list[Timing]], facts: Facts, backend: str) -> Iterator[Finding]:
    """Say whether sums were right, and give latency and bandwidths as rank 0 saw them.

    Bandwidths as nccl-tests defines them, in GB/s (10^9 bytes): size / time, and bus bandwidth, that times
    2 (R - 1) / R, what a ring sends over each link, which can be compared with the link's rated speed.
    """
    ranks, (latency, *large) = len(measured), measured[0]
    if wrong := [rank for rank, timings in enumerate(measured) if not all(timing.is_right for timing in timings)]:
        fix = "export NCCL_P2P_DISABLE=1   (then again; if right: PCIe access control, ACS, must be off)"
        if backend == "gloo":
            fix = "pip install --force-reinstall torch   (there; if it stays wrong, test that machine's memory)"
        yield Finding("missing", "all-reduce", f"wrong sums at {_where(wrong, facts)} ({backend})", fix)
    elif ranks == 1:
        text = f"a group of one ({backend}): the backend works, nothing to measure between ranks"
        yield Finding("ok", "all-reduce", text, "torchrun --nproc-per-node RANKS -m l2e_ds.doctor   (measures)")
    else:
        calls = sum(timing.calls for timing in measured[0])
        yield Finding("ok", "all-reduce", f"the sum of {ranks} ranks was right {calls:,} times ({backend})")
        text = f"{latency.size} B: {latency.median * 1e6:,.0f} us (longest {latency.longest * 1e6:,.0f} us)"
        yield Finding("ok", "latency", text)
        for timing in large:
            speed = timing.size / timing.median / 1e9
            text = f"{timing.median * 1e3:,.1f} ms, {speed:.2f} GB/s (bus {speed * 2 * (ranks - 1) / ranks:.2f} GB/s)"
            yield Finding("ok", "bandwidth", f"{timing.size / 2**20:>6g} MiB: {text}")


def why_no_all_reduce(error: Exception, launch: Launch, shown: Sequence[Finding]) -> Finding:
    """Return what is to be said of a rank that could not meet the others, and what most likely fixes it."""
    import torch.distributed

    from l2e_ds.distributed.watchdog import is_lost_contact

    backend, fix = "NCCL" if os.environ.get("DS_ACCELERATOR") == "cuda" else "GLOO", ""
    # NCCL connects at the first collective, after the group was made
    had_met = torch.distributed.is_initialized() and not (backend == "NCCL" and is_lost_contact(error))
    if any(finding.state == "missing" for finding in shown):
        fix = "first fix what is missing above"
    elif isinstance(error, RendezvousError):
        fix = "export MASTER_PORT=PORT   (a free one, the same for all ranks)"
    elif launch.size > 1 and not had_met and "MPI" not in str(error):  # mpi4py says itself that it lacks MPI
        address = os.environ.get("MASTER_ADDR", "rank 0's address")
        fix = f"export {backend}_SOCKET_IFNAME=INTERFACE   (the one between the hosts: ip route get {address})"
        if address.startswith("127.") or address == "localhost":
            fix = f"export MASTER_ADDR=HOST   (rank 0's; {address} is only right where all ranks are on one host)"
    where = f"rank {launch.rank} ({host()}): " if launch.size > 1 else ""
    return Finding("missing", "all-reduce", f"{where}{error_line(error)}", fix)
