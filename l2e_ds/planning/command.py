"""`l2e-ds plan`: memory, time and traffic of a run on GPUs that one does not have, from formulae alone.

Nothing is built or measured; docs/planning.md says how well each formula was checked. Pure functions of a resolved run.

Sources, by the names that the docstrings use:
    ZeRO        Rajbhandari et al. 2020, arXiv 1910.02054: model states under data parallelism, stages 1 to 3
    Korthikanti Korthikanti et al. 2022, arXiv 2205.05198: activations that a transformer layer keeps for backward
    PaLM        Chowdhery et al. 2022, arXiv 2204.02311, appendix B: FLOPs a token, model FLOPs utilisation (MFU)
    Thakur      Thakur, Rabenseifner and Gropp 2005: ring all-reduce sends 2 (R - 1) / R of the data from each rank
    DeepSpeed   its 0.19.8 source, for what it keeps beyond the papers; file names in the docstrings

Shapes: B micro-batch sequences, T tokens a sequence, M = B * T, h hidden size, N neurons of a layer, L layers, V
vocabulary rows, P parameters, R ranks (one a GPU). Sizes are bytes of one GPU unless said otherwise; GiB = 2**30, GB =
10**9.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from l2e_ds.checkpoint.manager import is_due
from l2e_ds.engine.configuration import less_memory
from l2e_ds.errors import ConfigError
from l2e_ds.planning.memory import GIB, accumulation_of, checkpoint_bytes, largest_micro_batch, memory, model_states
from l2e_ds.planning.speed import (
    GPUS_A_NODE,
    LATENCY,
    bus_bandwidth,
    gradient_bytes,
    inhibition_payload,
    times,
    traffic,
)
from l2e_ds.planning.work import Work, work_of
from l2e_ds.system.gpus import GPUS, Gpu
from l2e_ds.training.preflight import Plan, resolve_run

# Assumptions, printed with every plan. None of them was measured by this project.
DEFAULT_MFU = 0.4
USABLE_MEMORY = 0.9  # the rest: CUDA context, NCCL, fragmentation
STORAGE_GB_S = 20.0  # GB/s of a shared file system, all ranks together


# --- memory -------------------------------------------------------------------------------------------------------


# --- traffic ------------------------------------------------------------------------------------------------------


# --- time ---------------------------------------------------------------------------------------------------------


# --- the command --------------------------------------------------------------------------------------------------


def find_gpu(name: str) -> tuple[str, Gpu]:
    """By its name in any case. Raises ConfigError, naming those known."""
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return known, gpu
    raise ConfigError(f"--gpu: got {name!r}, allowed: {', '.join(GPUS)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change one value of the run file")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs, one rank each")
    parser.add_argument("--gpu", required=True, metavar="TYPE", help=", ".join(GPUS))
    parser.add_argument(
        "--mfu",
        type=float,
        default=DEFAULT_MFU,
        metavar="SHARE",
        help="of the peak, computing (default: %(default)s)",
    )
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of a ring through all GPUs (default: by type)")
    parser.add_argument(
        "--storage", type=float, default=STORAGE_GB_S, metavar="GB/S", help="all ranks together (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    from l2e_ds.system.process import quiet_libraries

    quiet_libraries()
    print(
        describe(
            *(arguments.run_file, arguments.overrides, arguments.gpus, arguments.gpu),
            *(arguments.mfu, arguments.bandwidth, arguments.storage),
        )
    )
    return 0


def describe(
    run_file: str,
    overrides: Sequence[str],
    gpus: int,
    gpu_name: str,
    mfu: float = DEFAULT_MFU,
    bandwidth: float | None = None,
    storage: float = STORAGE_GB_S,
) -> str:
    """What `l2e-ds plan` prints. Raises ConfigError."""
    name, gpu = find_gpu(gpu_name)
    if gpus < 1:
        raise ConfigError(f"--gpus: got {gpus}, allowed: an integer >= 1")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu: got {mfu:g}, allowed: above 0, at most 1")
    for option, value in (("--bandwidth", bandwidth), ("--storage", storage)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{option}: got {value:g}, allowed: GB/s above 0")
    plan = resolve_run(run_file, overrides, gpus, has_bf16=gpu.bf16)
    if plan.config.training.precision == "bf16" and not gpu.bf16:
        raise ConfigError(f"training.precision: got bf16, which a {name} does not have; allowed: fp16, fp32")
    work = work_of(plan)
    batch, usable = plan.batch, gpu.memory * GIB * USABLE_MEMORY
    largest = largest_micro_batch(work, gpus, batch.global_batch, usable)
    is_auto = plan.config.training.micro_batch == "auto"
    given = largest or 1 if is_auto else batch.micro_batch
    return "\n".join(
        [
            _head(plan, work, gpus, name),
            "",
            *_memory_table(plan, work, gpus, batch.global_batch, given, largest, gpu),
            "",
            *_run_lines(plan, work, gpu, largest, mfu, bus_bandwidth(gpu, gpus, bandwidth), storage),
            "",
            *_assumptions(gpu, work, gpus, mfu, bus_bandwidth(gpu, gpus, bandwidth), storage),
        ]
    )


def _head(plan: Plan, work: Work, gpus: int, name: str) -> str:
    model = plan.config.model.name or plan.config.model.pretrained
    checkpointing = ", activation checkpointing" if work.checkpointing else ""
    return (
        f"{model} ({work.parameters:,} parameters), {work.precision}, ZeRO-{work.stage}{checkpointing}, on {gpus:,}"
        f" {name}; {plan.batch.global_batch:,} x {work.sequence_length:,} tokens a step"
    )


def _memory_table(
    plan: Plan, work: Work, gpus: int, global_batch: int, micro_batch: int, largest: int | None, gpu: Gpu
) -> list[str]:
    sizes = [micro_batch] if largest in (None, micro_batch) else [micro_batch, largest]
    columns = [memory(work, gpus, size, accumulation_of(global_batch, gpus, size)) for size in sizes]
    heads = [f"micro-batch {size}" for size in sizes]
    lines = ["GiB a GPU     " + "".join(f"{head:>18}" for head in heads)]
    for part in vars(columns[0]):
        lines.append(f"  {part:<12}" + "".join(f"{getattr(column, part) / GIB:18.3f}" for column in columns))
    lines.append("  total       " + "".join(f"{column.total / GIB:18.3f}" for column in columns))
    fits = [column.total <= gpu.memory * GIB * USABLE_MEMORY for column in columns]
    lines.append("  fits        " + "".join(f"{'yes' if fit else 'no':>18}" for fit in fits))
    usable = gpu.memory * USABLE_MEMORY
    if largest is None:
        lines.append(f"largest micro-batch: none fits {usable:.1f} GiB; try {less_memory(plan.config, plan.ds)}")
    else:
        lines.append(f"largest micro-batch: {largest} (of those that divide {global_batch // gpus} sequences a GPU)")
    states = model_states(work, gpus)
    if states.host:
        lines.append(f"host memory a GPU: {states.host / GIB:.3f} GiB of offloaded states")
    return lines


def _run_lines(
    plan: Plan, work: Work, gpu: Gpu, largest: int | None, mfu: float, bandwidth: float, storage: float
) -> list[str]:
    batch, config = plan.batch, plan.config
    gpus, steps = batch.ranks, config.training.steps
    micro_batch = largest or batch.micro_batch
    accumulation = accumulation_of(batch.global_batch, gpus, micro_batch)
    step = times(work, gpu, gpus, batch.global_batch, accumulation, mfu, bandwidth)
    sent = traffic(work, gpus, accumulation)
    payload, _ = inhibition_payload(work, accumulation)
    size = checkpoint_bytes(work)
    writing = size / (storage * 1e9)
    every, early = config.checkpoint.every, config.checkpoint.early
    checkpoints = sum(is_due(done, steps, every, early) for done in range(steps + 1))
    seconds = steps * step.step + checkpoints * writing
    tokens = batch.tokens_per_step
    hidden = "hidden behind it" if step.hidden else "not hidden"
    return [
        f"with micro-batch {micro_batch} and {accumulation} accumulation steps:",
        f"step          {_seconds(step.step)}: computation {_seconds(step.compute)}, communication"
        f" {_seconds(step.communication)} ({hidden}), inhibition's {_seconds(step.inhibition)}",
        f"tokens/s      {tokens / step.step:,.0f} (MFU {step.mfu:.1%})",
        f"run           {steps:,} steps, {steps * tokens:,} tokens: {seconds / 86400:,.2f} days,"
        f" {seconds * gpus / 3600:,.0f} GPU-hours",
        f"traffic       a GPU sends in a step: gradients {sent.gradients:,.0f} B, weights {sent.weights:,.0f} B,"
        f" inhibition {sent.inhibition:,.0f} B ({_ratio(payload, gradient_bytes(work))} of the gradients' data)",
        f"checkpoint    {size:,.0f} B ({size / GIB:,.2f} GiB), {_seconds(writing)}; {checkpoints:,} in the run",
    ]


def _assumptions(gpu: Gpu, work: Work, gpus: int, mfu: float, bandwidth: float, storage: float) -> list[str]:
    peak = gpu.peak_fp32 if work.precision == "fp32" else gpu.peak
    return [
        "predicted, not measured (docs/planning.md), under these assumptions:",
        f"  {mfu:.0%} of {peak:g} TFLOP/s while computing (--mfu); {bandwidth / 1e9:g} GB/s through a ring of"
        f" {gpus:,} GPUs, {GPUS_A_NODE} a node (--bandwidth); {LATENCY * 1e6:g} us a hop",
        f"  checkpoints at {storage:g} GB/s in all, training waits (--storage); {USABLE_MEMORY:.0%} of"
        f" {gpu.memory:g} GiB usable; evaluations and restarts not counted",
    ]


def _seconds(value: float) -> str:
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.3%}"
