"""What doctor finds out where several ranks meet: whether hosts are alike, and how fast they all-reduce."""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2e_ds.doctor.finding import Finding, conclude, described, few, host, own_version
from l2e_ds.system.provenance import installed_version

if TYPE_CHECKING:
    from l2e_ds.distributed.launch import Launch
    from l2e_ds.doctor.all_reduce import Measurement

PATIENCE = 1.0
"""Minutes without progress after which a rank gives up; the process group waits one more (process_group.join), two in
all for ranks that do not come: long enough for a slow file system, short enough to be waited for."""
PACKAGES = ("python", "torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy", "safetensors")
Facts = list[dict[str, Any]]
"""What each rank says of itself, in the order of ranks."""


def meet_to_compare(launch: Launch, local: list[Finding], arguments: argparse.Namespace) -> int:
    """Compare the ranks, then measure; rank 0 prints. Return the same exit code on every rank. Collective."""
    from l2e_ds.distributed import collectives, heartbeat, process_group  # with torch, which may be missing
    from l2e_ds.distributed.watchdog import Watchdog
    from l2e_ds.doctor.all_reduce import measure

    code, found = 0, list(local)

    def show(findings: list[Finding]) -> None:
        found.extend(findings)
        for finding in findings:
            if collectives.is_main():
                print(finding, flush=True)

    with Watchdog(PATIENCE) as watchdog:
        device = process_group.join(launch, PATIENCE)
        watchdog.meet()
        facts: Facts = collectives.all_gather_objects(_facts(local, device))
        show([*other_hosts(facts), *check_alike(facts), *check_hosts(facts)])
        if len({fact["host"] for fact in facts}) > 1:
            show(_check_shared_directory(arguments.directory, facts))
        heartbeat.progress("the all-reduce")
        measured = collectives.all_gather_objects(measure(device, arguments.seconds if launch.size > 1 else 0.0))
        show(all_reduce_findings(measured, facts, "nccl" if device.type == "cuda" else "gloo"))
        if collectives.is_main():
            code = conclude(found)
        code = collectives.main_decides(code)
    process_group.leave()
    return code


def _facts(local: list[Finding], device: Any) -> dict[str, Any]:
    import torch

    on_gpu, cores = device.type == "cuda", len(os.sched_getaffinity(0))
    free, total = torch.cuda.mem_get_info(device) if on_gpu else (1, 1)
    versions = {package: installed_version(package) or "not installed" for package in PACKAGES}
    return {
        "host": host(),
        "versions": {"l2e-ds": own_version(), **versions},
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {cores} cores",
        "gpu": str(torch.cuda.get_device_properties(device).uuid) if on_gpu else None,
        "busy": 1 - free / total,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "findings": local,
    }


def _where(ranks: Sequence[int], facts: Facts) -> str:
    return f"{few(ranks, 'rank')} ({few(sorted({facts[rank]['host'] for rank in ranks}))})"


def other_hosts(facts: Facts) -> list[Finding]:
    """Return what is not ok on other hosts than rank 0's, each once with the hosts it was found on."""
    found = defaultdict(list)
    for fact in facts[1:]:
        for finding in fact["findings"]:
            if finding.state != "ok" and finding not in facts[0]["findings"]:
                found[finding].append(fact["host"])
    return [Finding(f.state, f.name, f"{few(hosts)}: {f.text}", f.mend) for f, hosts in found.items()]


def check_alike(facts: Facts) -> list[Finding]:
    """Find versions (and this package's own code) that some ranks have otherwise than most."""
    findings = []
    for package in facts[0]["versions"]:
        versions = [fact["versions"][package] for fact in facts]
        most = Counter(versions).most_common(1)[0][0]
        for version in dict.fromkeys(version for version in versions if version != most):
            ranks = [rank for rank, own in enumerate(versions) if own == version]
            mend = f"pip install {package}=={most}   (there)"
            if package in ("python", "l2e-ds"):
                mend = "use the same environment and the same copy of the code on all hosts"
            text = f"{_where(ranks, facts)}: {package} {version}, the other ranks {most}"
            findings.append(Finding("missing", "versions", text, mend))
    if findings or len(facts) == 1:
        return findings
    return [Finding("ok", "versions", f"the same on all {len(facts)} ranks")]


def check_hosts(facts: Facts) -> list[Finding]:
    """Name each host's ranks; find ranks that share a GPU, GPUs in use by others, more threads than cores."""
    hosts, findings = defaultdict(list), []
    for rank, fact in enumerate(facts):
        hosts[fact["host"]].append(rank)
    for name, ranks in hosts.items():
        here = [facts[rank] for rank in ranks]
        devices = " and ".join(sorted({fact["device"] for fact in here}))
        threads, cores = sum(fact["threads"] for fact in here), here[0]["cores"]
        own = f"OMP_NUM_THREADS {here[0]['threads']}"
        findings.append(Finding("ok", "host", f"{name}: {few(ranks, 'rank')}; {devices}; {own}"))
        gpus = [fact["gpu"] for fact in here if fact["gpu"]]
        if len(set(gpus)) < len(gpus):
            text = f"{name}: {len(gpus)} ranks on {len(set(gpus))} GPUs"
            findings.append(Finding("missing", "host", text, "start at most one rank a GPU"))
        if busy := [rank for rank in ranks if facts[rank]["busy"] > 0.1]:
            text = f"{name}: over 10% of the GPU's memory is in use already ({few(busy, 'rank')})"
            findings.append(Finding("note", "host", text, "nvidia-smi   (there: who uses it)"))
        if not gpus and threads > cores and len(ranks) > 1:
            text = f"{name}: {threads} threads on {cores} cores slow each other down"
            mend = f"export OMP_NUM_THREADS={max(1, cores // len(ranks))}   (and at most {cores} ranks there)"
            findings.append(Finding("note", "host", text, mend))
    return findings


def _check_shared_directory(directory: Path, facts: Facts) -> list[Finding]:
    """Find hosts that do not see what rank 0 writes. Collective."""
    from l2e_ds.distributed import collectives

    file = directory / collectives.main_decides(f".l2e-ds-doctor-{os.urandom(8).hex()}")
    try:
        if collectives.is_main():
            with suppress(OSError):  # not writable: found already
                file.touch()
        written, deadline = collectives.main_decides(collectives.is_main() and file.exists()), time.monotonic() + 10
        while not file.exists() and written and time.monotonic() < deadline:
            time.sleep(0.5)  # a network file system may show a new file some seconds late
        seen = collectives.all_gather_objects(file.exists())
    finally:
        if collectives.is_main():
            file.unlink(missing_ok=True)
    blind = sorted({fact["host"] for fact, sees in zip(facts, seen, strict=True) if not sees})
    if blind and written:
        text = f"{few(blind)} cannot see what rank 0 writes to {directory}"
        return [Finding("missing", "directory", text, "--directory FOLDER   (one that all hosts share)")]
    return [Finding("ok", "directory", f"{directory} is shared by all hosts")] if written else []


def all_reduce_findings(measured: list[Measurement], facts: Facts, backend: str) -> list[Finding]:
    """Say whether sums were right, latency and bandwidths as rank 0 saw them, and which rank computes slowest.

    Bandwidths as nccl-tests defines them, in GB/s (10^9 bytes): size / time, and bus bandwidth, that times
    2 (R - 1) / R, what a ring sends over each link, which can be compared with the link's rated speed.
    """
    ranks, first, speeds = len(measured), measured[0], [one.speed for one in measured]
    if wrong := [rank for rank, one in enumerate(measured) if one.wrong]:
        sizes = ", ".join(map(_in_words, sorted({size for one in measured for size in one.wrong})))
        mend = "export NCCL_P2P_DISABLE=1   (then again; if right: PCIe access control, ACS, must be off)"
        if backend == "gloo":
            mend = "pip install --force-reinstall torch   (there; if it stays wrong, test that machine's memory)"
        text = f"wrong sums at {_where(wrong, facts)}, sizes {sizes} ({backend})"
        return [Finding("missing", "all-reduce", text, mend)]
    if ranks == 1:
        text = f"a group of one ({backend}): the backend works, nothing to measure between ranks"
        return [Finding("ok", "all-reduce", text, "torchrun --nproc-per-node RANKS -m l2e_ds.doctor   (measures)")]
    calls, small = sum(timing.calls for timing in first.timings), first.timings[0]
    latency = f"{small.median * 1e6:,.0f} us (longest {small.longest * 1e6:,.0f} us)"
    findings = [
        Finding("ok", "all-reduce", f"the sum of {ranks} ranks was right {calls:,} times ({backend})"),
        Finding("ok", "latency", f"{_in_words(small.size):>7}: {latency}"),
    ]
    for timing in first.timings[1:]:
        speed = timing.size / timing.median / 1e9
        text = f"{timing.median * 1e3:,.1f} ms, {speed:.2f} GB/s (bus {speed * 2 * (ranks - 1) / ranks:.2f} GB/s)"
        findings.append(Finding("ok", "bandwidth", f"{_in_words(timing.size):>7}: {text}"))
    slowest, typical = speeds.index(min(speeds)), statistics.median_high(speeds)
    text = f"{_where([slowest], facts)}: {speeds[slowest]:,.0f} GFLOP/s, median {typical:,.0f}"
    if speeds[slowest] >= 0.7 * typical:
        return [*findings, Finding("ok", "slowest rank", text)]
    mend = "nvidia-smi   (there: clocks, temperature)" if backend == "nccl" else "top   (there: what else runs)"
    return [*findings, Finding("note", "slowest rank", f"{text}: all others wait for it", mend)]


def _in_words(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB" if size >= 2**10 else f"{size} B"


def why_no_all_reduce(error: Exception, launch: Launch, shown: Sequence[Finding]) -> Finding:
    """Return what is to be said of a rank that could not meet the others, and what most likely mends it."""
    on_gpu = os.environ.get("DS_ACCELERATOR") == "cuda"
    address = os.environ.get("MASTER_ADDR", "rank 0's address")
    if any(finding.state == "missing" for finding in shown):
        mend = "first mend what is missing above"
    elif launch.size == 1:
        mend = "pip install --force-reinstall torch deepspeed"
    elif _had_met(error, on_gpu):
        mend = ""  # not the network's matter
    elif address.startswith("127.") or address == "localhost":
        mend = f"export MASTER_ADDR=HOST   (rank 0's; {address} is only right where all ranks are on one host)"
    else:
        why = f"the interface between the hosts; and is {address} reachable from all?"
        with suppress(OSError):
            own = socket.gethostbyname(socket.gethostname())
            if own.startswith("127."):  # what gloo then tells the other hosts to connect to
                why = f"this host's name is {own} to itself, which no other host can reach"
        up = [state.parent.name for state in Path("/sys/class/net").glob("*/operstate") if "up" in state.read_text()]
        real = (name for name in sorted(up) if not name.startswith(("docker", "veth", "br-", "virbr")))
        mend = f"export {'NCCL' if on_gpu else 'GLOO'}_SOCKET_IFNAME={next(real, 'eth0')}   ({why})"
    where = f"rank {launch.rank} ({host()}): " if launch.size > 1 else ""
    return Finding("missing", "all-reduce", f"{where}{described(error)}", mend)


def _had_met(error: Exception, on_gpu: bool) -> bool:
    import torch.distributed

    from l2e_ds.distributed.watchdog import is_lost_contact

    return torch.distributed.is_initialized() and not (on_gpu and is_lost_contact(error))  # NCCL connects later
