"""`python -m benchmarks overhead`: what inhibition adds to the time of a step.

Each variant is measured twice, alternating with no inhibition. The operation: forward and backward of one hooked
layer's activation, and what follows once a step; its milliseconds, divided by a step's, are precise where the times of
whole steps scatter. The whole step: one trainer whose hooks are changed from step to step. Runs alone, and under any
launcher (`deepspeed --module benchmarks overhead ...`, torchrun, srun, mpirun); rank 0 prints and writes.

Shapes: B sequences of a micro-batch, T tokens a sequence, M = B * T, N neurons of a layer.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import throughput
from benchmarks.about import Option, device_name, heading, median_and_spread, say, seconds_of
from benchmarks.contenders import make_dataset
from l2e_ds.acceptance.operations import Layer, hooked, one_pass
from l2e_ds.checkpoint.weights import DTYPES
from l2e_ds.config.reading import checked
from l2e_ds.config.sections import RunConfig
from l2e_ds.console import markdown
from l2e_ds.data import PreparedData
from l2e_ds.distributed import collectives, process_group
from l2e_ds.distributed.launch import Launch
from l2e_ds.engine.configuration import check_device
from l2e_ds.inhibition import Inhibitor, Settings
from l2e_ds.models.families import neurons_of
from l2e_ds.system.process import prepare_libraries
from l2e_ds.training.preflight import ResolvedRun, resolve_config

VARIANTS: dict[str, Settings] = {
    "L2E": Settings(),  # as runs do: in one pass where that is faster
    "L2E, plain operations": Settings(fused=False),
    "L2E, reduce: forward": Settings(reduce="forward"),
    "MEmeL": Settings(retrieval="top-k", mechanism="reverse-deactivation"),
}
PACKAGES = ("torch", "deepspeed", "transformers")
NONE = "none"
WIDE = 10_240  # neurons of a layer of Pythia 2.8B
WARMUP = 3  # rounds of every variant that are not counted: history, the self-test, compilation
PER_STEP = 5  # rounds of the operation for one whole step

# On a GPU smaller shapes would measure how fast Python launches kernels, not how fast they are.
ON_GPU = torch.cuda.is_available()
SIZES = ["pythia-70m", "pythia-410m", "pythia-1b"] if ON_GPU else ["pythia-14m", "pythia-31m", "pythia-70m"]
OPTIONS = {
    "models": Option(SIZES, "Pythia sizes"),
    "sequence_length": Option(2048 if ON_GPU else 512, "tokens a sequence", 2),
    "micro_batch": Option(16 if ON_GPU else 4, "sequences a rank takes at once; a step has one", 1),
    "rounds": Option(12, f"alternations of whole steps; of the operation {PER_STEP} times as many", 1),
    "deepspeed": Option("ds_configs/zero1.json", "DeepSpeed JSON"),
    "precision": Option("auto", "auto, fp32, bf16, fp16"),
    "wide_tokens": Option(32_768 if ON_GPU else 1024, f"tokens of the layer of {WIDE:,} neurons; 0: without it", 0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of a run file's section model")


def measure(arguments: argparse.Namespace, launch: Launch) -> dict[str, Any]:
    """Return the times of every model, and of the wide layer. Raises ConfigError."""
    prepare_libraries()
    arguments.accumulation, arguments.steps, arguments.method = 1, 1, "none"
    contents = {name: throughput.run_file(arguments, name, launch.size) for name in arguments.models}
    throughput.check(arguments, contents, launch.size)
    configs = {name: checked(RunConfig, content, "bench") for name, content in contents.items()}
    runs = {name: resolve_config(config, launch.size) for name, config in configs.items()}
    for run in runs.values():
        check_device(run.config)
    device = process_group.join(launch, 10)
    torch.set_num_threads(throughput.threads_of_rank())
    precision = next(iter(runs.values())).config.training.precision
    results: dict[str, Any] = {
        "ranks": launch.size,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "models": {},
    }
    dtype = DTYPES[precision]
    operation_rounds = PER_STEP * arguments.rounds
    for name, run in runs.items():
        results["models"][name] = measure_model(name, run, arguments.rounds, dtype, device)
    if arguments.wide_tokens:
        results["wide"] = measure_operation(arguments.wide_tokens, WIDE, dtype, device, operation_rounds)
        results["wide"] |= {"top_k": time_top_k(arguments.wide_tokens, WIDE, device, operation_rounds)}
    process_group.leave()
    return results


# --- the operation -----------------------------------------------------------------------------------------------


def time_steps(layers: int, tokens: int, neurons: int, device: torch.device, rounds: int) -> list[float]:
    """Return milliseconds of `Inhibitor.step` on this rank, with so many hooked layers of [M, N] float32."""
    modules = [Layer() for _ in range(layers)]
    inhibitor, times = hooked(modules, neurons, VARIANTS["L2E"], device), []
    x, incoming = (torch.randn(1, tokens, neurons, device=device) for _ in range(2))
    scale = torch.ones((), device=device, requires_grad=True)
    x.requires_grad_()
    for index in range(WARMUP + rounds):
        one_pass(modules, inhibitor, x, incoming, scale)
        took = 1e3 * seconds_of(inhibitor.step, device)
        if index >= WARMUP:
            times.append(took)
    return times


def measure_operation(
    tokens: int, neurons: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Return milliseconds of forward and backward of GELU on [M, N] (`passes`) and of `Inhibitor.step` (`steps`).

    Both are lists by variant, with an entry for each round; the variants alternate round by round.
    """
    torch.compiler.reset()  # after eight shapes torch.compile would run uncompiled
    x = torch.randn(1, tokens, neurons, dtype=dtype, device=device, requires_grad=True)
    incoming = torch.randn(tokens, neurons, device=device).to(dtype).view_as(x)
    modules = {name: Layer() for name in (NONE, *VARIANTS)}
    inhibitors = {name: hooked([modules[name]], neurons, settings, device) for name, settings in VARIANTS.items()}
    scale = torch.ones((), device=device, requires_grad=True)
    passes: dict[str, list[float]] = {name: [] for name in modules}
    steps: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for index in range(WARMUP + rounds):
        for name, module in modules.items():
            used, x.grad = inhibitors.get(name), None
            took = 1e3 * seconds_of(partial(one_pass, [module], used, x, incoming, scale), device)
            after = 0.0 if used is None else 1e3 * seconds_of(used.step, device)
            if index >= WARMUP:
                passes[name].append(took)
                if used is not None:
                    steps[name].append(after)
    return {"tokens": tokens, "neurons": neurons, "passes": passes, "steps": steps}


@torch.no_grad()
def time_top_k(tokens: int, neurons: int, device: torch.device, rounds: int) -> list[float]:
    """Return milliseconds of `torch.topk` alone, of 2 % of float32 scores [M, N], which MEmeL needs."""
    scores = torch.rand(tokens, neurons, device=device)
    k = math.ceil(VARIANTS["MEmeL"].target_share * neurons)
    return [1e3 * seconds_of(lambda: scores.topk(k, dim=1), device) for _ in range(rounds)]


# --- the whole step ----------------------------------------------------------------------------------------------


def measure_model(name: str, run: ResolvedRun, rounds: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Measure one model; every rank takes its steps, each has its own times. Collective.

    Returns `operation`, from `measure_operation` at the model's shape, `step_seconds` by variant, and `layers`, the
    number of hooked layers.
    """
    from l2e_ds.training.trainer import RunData, Trainer

    config, batch, hf_config = run.config, run.batch, run.hf_config
    steps = (WARMUP + rounds) * (1 + len(VARIANTS))
    tokens = batch.micro_batch * config.data.sequence_length
    operation = measure_operation(tokens, neurons_of(hf_config), dtype, device, PER_STEP * rounds)
    dataset = make_dataset(steps * batch.global_batch, config.data.sequence_length, hf_config.vocab_size)
    data = RunData([PreparedData(dataset)])
    seconds: dict[str, list[float]] = {variant: [] for variant in (NONE, *VARIANTS)}
    with tempfile.TemporaryDirectory(prefix="l2e-bench-") as folder:
        run = replace(run, config=config.replace("training", run_directory=folder, steps=steps))
        with Trainer(run, data, device) as trainer:
            inhibitors = {
                variant: Inhibitor([replace(site) for site in trainer.sites], settings, device)
                for variant, settings in VARIANTS.items()
            }
            for index in range(WARMUP + rounds):
                for variant in seconds:
                    trainer.inhibitor = inhibitors.get(variant)
                    with trainer.inhibitor or nullcontext():
                        took = seconds_of(trainer.train_step, device)
                    if index >= WARMUP:
                        seconds[variant].append(took)
            trainer.inhibitor = None
            if collectives.is_main():
                say(f"{name}: a step takes {statistics.median(seconds[NONE]):.3g} s")
    return {"layers": len(trainer.sites), "operation": operation, "step_seconds": seconds}


# --- the page ----------------------------------------------------------------------------------------------------


def added(operation: dict[str, Any], variant: str) -> list[float]:
    """Return the milliseconds that a variant adds to forward and backward of a layer, round by round."""
    return [
        with_it - without
        for with_it, without in zip(operation["passes"][variant], operation["passes"][NONE], strict=True)
    ]


def cost_of_step(found: dict[str, Any], variant: str) -> float:
    """Return the percentage of a step that the layers' passes and what follows once a step take, from the medians."""
    operation = found["operation"]
    once = statistics.median(operation["steps"][variant])
    more = found["layers"] * (statistics.median(added(operation, variant)) + once)
    return more / (10 * statistics.median(found["step_seconds"][NONE]))


def median_interval(values: list[float]) -> tuple[float, float]:
    """Return a 95 % interval of the median, between two order statistics, that needs no assumption about the
    distribution.

    Their ranks are those of the binomial distribution's tails (Conover 1999, section 3.2); with fewer than six values
    it is the whole range.
    """
    ordered, count, tail = sorted(values), len(values), 0.0
    rank = 0
    while rank < count // 2 and (tail := tail + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[count - rank]


def page(results: dict[str, Any]) -> str:
    """Return the page: a table for each model, and one for the wide layer."""
    options, deepspeed = results["options"], Path(results["options"]["deepspeed"]).name
    devices = "CPUs" if results["device"] == "cpu" else results["device"]
    parts = [
        heading("Overhead of inhibition", results),
        f"{results['ranks']} rank(s) on {devices}, {results['threads']} threads each; {deepspeed},"
        f" {results['precision']}; a step of a rank: {options['micro_batch']} sequences of"
        f" {options['sequence_length']:,} tokens in one micro-batch, the least that a step can have, so that what"
        " inhibition does once a step weighs most. `mid-2`, a share of 2 %.\n\n"
        '"A layer": what forward and backward of a hooked layer\'s activation take more than GELU alone. "Of the step":'
        " that of all hooked layers, and `Inhibitor.step`, over the median step without inhibition."
        ' "Whole step": its time over that without inhibition in the same round; 95 % interval of the median.\n',
    ]
    for name, found in results["models"].items():
        operation, seconds = found["operation"], found["step_seconds"]
        rows = []
        for variant in VARIANTS:
            ratios = [one / none for one, none in zip(seconds[variant], seconds[NONE], strict=True)]
            low, high = median_interval(ratios)
            rows.append(
                [
                    variant,
                    median_and_spread(added(operation, variant)),
                    median_and_spread(operation["steps"][variant]),
                    f"{cost_of_step(found, variant):.2f}",
                    f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})",
                ]
            )
        heads = ["method", "a layer, ms", "once a step and layer, ms", "of the step, %", "whole step"]
        parts.append(
            f"## {name}\n\n[{operation['tokens']:,}, {operation['neurons']:,}] activations a layer, {found['layers']}"
            f" layers; GELU alone {median_and_spread(operation['passes'][NONE])} ms, a step without inhibition"
            f" {median_and_spread(seconds[NONE], 3)} s.\n\n{markdown(heads, rows)}"
        )
    if "wide" in results:
        parts.append(_wide_table(results["wide"]))
    return "\n".join(parts)


def _wide_table(operation: dict[str, Any]) -> str:
    """Return the table of a layer of a 2.8B model, with MEmeL's overhead over each variant's."""
    memel = added(operation, "MEmeL")
    rows = []
    for variant in VARIANTS:
        own = added(operation, variant)
        ratio = statistics.median(memel) / statistics.median(own)
        rows.append([variant, median_and_spread(own), f"{ratio:.1f}"])
    return (
        f"## A layer of Pythia 2.8B\n\n[{operation['tokens']:,}, {operation['neurons']:,}] activations; GELU alone"
        f" {median_and_spread(operation['passes'][NONE])} ms, the top-k of MEmeL alone"
        f" {median_and_spread(operation['top_k'])} ms.\n\n"
        + markdown(["method", "added, ms", "MEmeL's over it (medians)"], rows)
    )
