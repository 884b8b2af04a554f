"""What doctor finds out where several ranks meet: whether hosts are alike, and how fast they all-reduce."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2e_ds.doctor.finding import Finding, conclude, few, host, number, one_line, own_version, size_in_words
from l2e_ds.doctor.machine import can_lock
from l2e_ds.system.provenance import installed_version

if TYPE_CHECKING:
    from l2e_ds.distributed.launch import Launch
    from l2e_ds.doctor.all_reduce import Measurement

PATIENCE = 1.0
"""Minutes without progress after which a rank gives up; the process group waits one more (distributed.join), two in all
for ranks that do not come: long enough for a slow file system, short enough to be waited for."""


def meet_to_compare(launch: Launch, local: list[Finding], arguments: argparse.Namespace) -> int:
    """Collective: compare the ranks, then measure; rank 0 prints. Returns the same exit code on every rank."""
    from l2e_ds.distributed import process_group
    from l2e_ds.distributed.watchdog import Watchdog

    with Watchdog(PATIENCE) as watchdog:
        device = process_group.join(launch, PATIENCE)
        watchdog.meet()
        code = _compare_and_measure(launch, device, local, arguments)
    process_group.leave()
    return code


def _compare_and_measure(launch: Launch, device: Any, local: list[Finding], arguments: argparse.Namespace) -> int:
    from l2e_ds.distributed import collectives

    facts = collectives.all_gather_objects(_facts(local, device))
    clocks = collectives.all_gather_objects(time.time())  # the gather before it is a barrier
    findings = other_hosts(facts) + check_alike(facts) + check_hosts(facts)
    if len({fact["host"] for fact in facts}) > 1:
        findings += _check_clocks(clocks, facts) + _check_shared_directory(arguments.directory, facts)
    if collectives.is_main():
        for finding in findings:
            print(finding, flush=True)
    measured = _all_reduce(device, arguments.seconds, facts, launch)
    code = 0
    if collectives.is_main():
        code = conclude([*local, *findings, *measured], measured)
    return collectives.main_decides(code)


def _facts(local: list[Finding], device: Any) -> dict[str, Any]:
    """What the ranks compare."""
    import torch

    versions = {"python": ".".join(platform.python_version_tuple()[:2]), "l2e-ds": own_version()}
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
    return [Finding(f.state, f.name, f"{few(hosts)}: {f.text}", f.mend) for f, hosts in found.items()]


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
                hosts = few(sorted({facts[rank]["host"] for rank in ranks}))
                text = f"{few(ranks, 'rank')} ({hosts}): {package} {version}, the other ranks {most}"
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
        text = f"{name}: {few(ranks, 'rank')}; {' and '.join(devices)}; {number(here[0]['threads'], 'thread')} a rank"
        findings.append(Finding("ok", "host", text))
        gpus = [fact["gpu"] for fact in here if fact["gpu"]]
        if len(set(gpus)) < len(gpus):
            text = f"{name}: {len(gpus)} ranks on {len(set(gpus))} GPUs"
            findings.append(Finding("missing", "host", text, "start at most one rank a GPU"))
        busy = [rank for rank in ranks if facts[rank]["busy"] > 0.1]
        if busy:
            text = f"{name}: over 10% of the GPU's memory is in use already ({few(busy, 'rank')})"
            findings.append(Finding("note", "host", text, "nvidia-smi   (there: who uses it)"))
        if not gpus and threads > here[0]["cores"] and len(ranks) > 1:
            text = f"{name}: {threads} threads on {here[0]['cores']} cores slow each other down"
            mend = f"export OMP_NUM_THREADS={max(1, here[0]['cores'] // len(ranks))}"
            if all(fact["threads"] == 1 for fact in here):
                mend = f"start {number(here[0]['cores'], 'rank')} there"
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
    from l2e_ds.distributed import collectives

    with contextlib.ExitStack() as stack:
        file = None
        if collectives.is_main():
            with contextlib.suppress(OSError):  # not writable: found already
                file = stack.enter_context(tempfile.NamedTemporaryFile(dir=directory, prefix=".l2e-ds-doctor-"))
                file.write(os.urandom(16).hex().encode())
                file.flush()
                os.fsync(file.fileno())
        held = file is not None and can_lock(file)
        name, held = collectives.main_decides((Path(file.name).name if file else None, held))
        if name is None:
            return []
        seen, locked = False, True
        for _ in range(20):  # a network file system may show a new file some seconds late
            with contextlib.suppress(OSError), (directory / name).open("rb+") as mine:
                seen = True
                locked = facts[collectives.rank()]["host"] == facts[0]["host"] or not can_lock(mine)
                break
            time.sleep(0.5)
        answers = collectives.all_gather_objects((seen, locked))
    blind = sorted({fact["host"] for fact, (seen, _) in zip(facts, answers, strict=True) if not seen})
    if blind:
        text = f"{few(blind)} cannot see what rank 0 writes to {directory}"
        return [Finding("missing", "directory", text, "--directory FOLDER   (one that all hosts share)")]
    if held and not all(locked for _, locked in answers):
        text = f"{directory}: file locks do not reach other hosts"
        return [Finding("note", "directory", text, "mount it with locks (Lustre: -o flock; NFS: without local_lock)")]
    return [Finding("ok", "directory", f"{directory} is shared by all hosts{', with its locks' if held else ''}")]


def _all_reduce(device: Any, seconds: float, facts: list[dict[str, Any]], launch: Launch) -> list[Finding]:
    from l2e_ds.distributed import collectives, heartbeat
    from l2e_ds.doctor.all_reduce import measure

    backend = "nccl" if device.type == "cuda" else "gloo"
    if launch.size == 1:
        right = not measure(device, 0.0).wrong
        text = f"a group of one ({backend}): the backend works, nothing to measure between ranks"
        if right:
            return [Finding("ok", "all-reduce", text, "torchrun --nproc-per-node RANKS -m l2e_ds.doctor   (measures)")]
        return [Finding("missing", "all-reduce", f"wrong sums in {text}", "pip install --force-reinstall torch")]
    heartbeat.progress("the all-reduce")
    began = time.perf_counter()
    found: list[Measurement] = collectives.all_gather_objects(measure(device, seconds))
    return all_reduce_findings(found, facts, backend, time.perf_counter() - began)


def all_reduce_findings(
    measured: list[Measurement], facts: list[dict[str, Any]], backend: str, seconds: float
) -> list[Finding]:
    """Right or wrong, latency and bandwidths as rank 0 saw them, and the rank that computes slowest."""
    import statistics

    wrong = [rank for rank, one in enumerate(measured) if one.wrong]
    if wrong:
        sizes = sorted({size for one in measured for size in one.wrong})
        hosts = few(sorted({facts[rank]["host"] for rank in wrong}))
        text = f"wrong sums at {few(wrong, 'rank')} ({hosts}), sizes {', '.join(map(size_in_words, sizes))} ({backend})"
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
    text = f"{size_in_words(small.size):>7}: {small.median * 1e6:,.0f} us (longest {small.longest * 1e6:,.0f} us)"
    findings.append(Finding("ok", "latency", text))
    for timing in large:
        algorithm, bus = timing.bandwidths(ranks)
        text = (
            f"{size_in_words(timing.size):>7}: {timing.median * 1e3:,.1f} ms, {algorithm:.2f} GB/s (bus {bus:.2f} GB/s)"
        )
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


def why_no_all_reduce(error: Exception, launch: Launch, shown: list[Finding]) -> Finding:
    where = f"rank {launch.rank} ({host()}): " if launch.size > 1 else ""
    text = f"{where}{one_line(error)}"
    if any(finding.state == "missing" for finding in shown):
        return Finding("missing", "all-reduce", text, "first mend what is missing above")
    if launch.size == 1:
        return Finding("missing", "all-reduce", text, "pip install --force-reinstall torch deepspeed")
    import torch.distributed

    from l2e_ds.distributed.watchdog import is_lost_contact

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
