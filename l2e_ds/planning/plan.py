"""What `l2e-ds plan` prints, from formulae alone; docs/planning.md says how well each was checked.

Sources, by the names that the docstrings of this package use:

    ZeRO        Rajbhandari et al. 2020, arXiv 1910.02054: model states under data parallelism, stages 1 to 3
    Korthikanti Korthikanti et al. 2022, arXiv 2205.05198: activations that a transformer layer keeps for backward
    PaLM        Chowdhery et al. 2022, arXiv 2204.02311, appendix B: FLOPs a token
    Thakur      Thakur, Rabenseifner and Gropp 2005: ring all-reduce sends 2 (R - 1) / R of the data from each rank
    DeepSpeed   its 0.19.8 source, for what it keeps beyond the papers; file names in the docstrings

Shapes: B micro-batch sequences, T tokens a sequence, M = B * T, h hidden size, N neurons of a layer, L layers, V
vocabulary rows, P parameters, R ranks (one a GPU). Sizes are bytes of one GPU unless said otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from l2e_ds.console import at_least
from l2e_ds.engine.configuration import memory_remedies
from l2e_ds.errors import ConfigError
from l2e_ds.planning.memory import GIB, accumulation_of, largest_micro_batch, memory, model_states
from l2e_ds.planning.work import Work, inhibition_payload, mfu_range, step_flops, traffic
from l2e_ds.system.gpus import GPUS, Gpu
from l2e_ds.training.preflight import ResolvedRun, checkpoints_of, resolve_run

USABLE_MEMORY = 0.9
"""Share of a GPU's memory that a run can use, not measured by this project; the rest goes to the CUDA context, NCCL and
fragmentation."""


def find_gpu(name: str) -> tuple[str, Gpu]:
    """Return the name and the data of a GPU, by any name that people or nvidia-smi write for it. Raises ConfigError."""
    plain = re.sub("[^a-z0-9]", "", name.lower())
    plain = re.sub("^(nvidia)?(tesla|geforce)?", "", plain)
    for known, gpu in GPUS.items():
        if re.fullmatch(gpu.written, plain):
            return known, gpu
    raise ConfigError(f"--gpu: got {name!r}, allowed: {', '.join(GPUS)}")


def describe(run_file: str, overrides: Sequence[str], gpus: int, gpu_name: str, mfu: float | None) -> str:
    """Return what `l2e-ds plan` prints. mfu: the share of the peak, or None: `mfu_range`. Raises ConfigError."""
    name, gpu = find_gpu(gpu_name)
    at_least("--gpus", gpus, 1)
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"--mfu: got {mfu:g}, allowed: above 0, at most 1")
    run = resolve_run(run_file, overrides, gpus, has_bf16=gpu.bf16)
    if run.config.training.precision == "bf16" and not gpu.bf16:
        raise ConfigError(f"training.precision: got bf16, which a {name} does not have; allowed: fp16, fp32")
    work = Work(run)
    model = run.config.model.origin
    checkpointing = ", activation checkpointing" if work.checkpointing else ""
    largest = largest_micro_batch(work, gpus, run.batch.global_batch, gpu.memory * GIB * USABLE_MEMORY)
    peak = gpu.peak_in(work.precision)
    low, high = mfu_range(work.parameters, gpu.peak) if mfu is None else (mfu, mfu)
    source = "published of other programs, not measured by this project; --mfu" if mfu is None else "--mfu"
    speeds = [share * peak * 1e12 * gpus for share in (low, high)]
    return "\n".join(
        [
            f"{model} ({work.parameters:,} parameters), {work.precision}, ZeRO-{work.stage}{checkpointing}, on {gpus:,}"
            f" {name}; {run.batch.global_batch:,} x {work.sequence_length:,} tokens a step",
            "",
            *_memory_table(run, work, largest, gpu),
            "",
            *_run_lines(run, work, largest or run.batch.micro_batch, speeds),
            "",
            "predicted, not measured (docs/planning.md), under these assumptions:",
            f"  {_span(f'{low:.0%}', f'{high:.0%}')} of {peak:g} TFLOP/s in a step ({source})",
            f"  {USABLE_MEMORY:.0%} of {gpu.memory:g} GiB usable; checkpoints, evaluations and restarts take no time",
        ]
    )


def _memory_table(run: ResolvedRun, work: Work, largest: int | None, gpu: Gpu) -> list[str]:
    """Return the table of memory by part, with the run's micro-batch and with the largest that fits, if one does."""
    gpus, global_batch = run.batch.ranks, run.batch.global_batch
    given = largest or 1 if run.config.training.micro_batch == "auto" else run.batch.micro_batch
    sizes = [given] if largest in (None, given) else [given, largest]
    columns = [memory(work, gpus, size, accumulation_of(global_batch, gpus, size)) for size in sizes]
    usable = gpu.memory * USABLE_MEMORY
    rows = {part: [f"{getattr(column, part) / GIB:.3f}" for column in columns] for part in vars(columns[0])}
    rows["total"] = [f"{column.total / GIB:.3f}" for column in columns]
    rows["fits"] = ["yes" if column.total <= usable * GIB else "no" for column in columns]
    lines = ["GiB a GPU     " + "".join(f"{f'micro-batch {size}':>18}" for size in sizes)]
    lines += [f"  {name:<12}" + "".join(f"{cell:>18}" for cell in cells) for name, cells in rows.items()]
    if largest is None:
        lines.append(f"largest micro-batch: none fits {usable:.1f} GiB; try {memory_remedies(run.config, run.ds)}")
    else:
        lines.append(f"largest micro-batch: {largest} (of those that divide {global_batch // gpus} sequences a GPU)")
    if host := model_states(work, gpus).host:
        lines.append(f"host memory a GPU: {host / GIB:.3f} GiB of offloaded states")
    return lines


def _span(first: str, last: str) -> str:
    """Return a range as text, or its one value."""
    return first if first == last else f"{first} to {last}"


def _seconds(duration: float) -> str:
    return f"{duration:,.2f} s" if duration >= 1 else f"{duration * 1e3:.3g} ms"


def _run_lines(run: ResolvedRun, work: Work, micro_batch: int, speeds: Sequence[float]) -> list[str]:
    """Return the lines below the table of memory. speeds: the lowest and highest operations a second of all GPUs."""
    batch, config = run.batch, run.config
    gpus, steps, tokens = batch.ranks, config.training.steps, batch.tokens_per_step
    accumulation = accumulation_of(batch.global_batch, gpus, micro_batch)
    slow, fast = (step_flops(work, batch.global_batch) / speed for speed in speeds)  # seconds a step
    hours = [steps * step / 3600 for step in (fast, slow)]
    gradients = work.parameters * work.communication
    sent, payload = traffic(work, gpus, accumulation), inhibition_payload(work, accumulation)
    reduced = f"inhibition {sent.inhibition:,.0f} B ({payload / gradients:.3%} of the gradients' data)"
    every_step = f"gradients {sent.gradients:,.0f} B, weights {sent.weights:,.0f} B, {reduced}"
    return [
        f"with micro-batch {micro_batch} and {accumulation} accumulation steps:",
        f"step          {_span(_seconds(fast), _seconds(slow))},"
        f" {_span(*(f'{tokens / step:,.0f}' for step in (slow, fast)))} tokens/s",
        f"run           {steps:,} steps, {steps * tokens:,} tokens: {_span(*(f'{h / 24:,.2f}' for h in hours))} days,"
        f" {_span(*(f'{h * gpus:,.0f}' for h in hours))} GPU-hours",
        f"traffic       {'none, with one GPU' if gpus == 1 else f'a GPU sends in a step: {every_step}'}",
        *(f"{label:<14}{text}" for label, text in checkpoints_of(run)),
    ]
