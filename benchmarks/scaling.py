"""`python -m benchmarks scaling`: how the cost of inhibition grows with neurons, tokens, layers and ranks.

The operation is that of `python -m benchmarks overhead`, at many shapes. Between ranks it compares the one all-reduce a
step of the packed sums with one of as many bytes as the gradients have. Alone it starts its own ranks on this machine's
CPUs (gloo); under a launcher it uses that launcher's.

Shapes: M tokens of a micro-batch, N neurons of a layer, L hooked layers, R ranks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
from functools import partial
from typing import Any

import torch

from benchmarks import overhead
from benchmarks.about import Option, device_name, heading, median_and_spread, seconds_of
from l2e_ds.config.sections import ModelConfig
from l2e_ds.console import markdown
from l2e_ds.distributed import collectives, process_group
from l2e_ds.distributed.launch import Launch, free_port
from l2e_ds.errors import L2EError
from l2e_ds.inhibition.hook import NeuronHook
from l2e_ds.models.counts import parameter_counts
from l2e_ds.models.families import neurons_of
from l2e_ds.models.pythia import check_sizes, network_config
from l2e_ds.models.sites import chosen_layers
from l2e_ds.system.process import prepare_libraries

PACKAGES = ("torch",)
# on a GPU fewer tokens would measure how fast Python launches kernels
TOKENS = [4096, 8192, 16_384, 32_768] if torch.cuda.is_available() else [256, 512, 1024, 2048, 4096]
FIXED_TOKENS, FIXED_NEURONS = 16_384 if torch.cuda.is_available() else 1024, 2048
OPTIONS = {
    "neurons": Option([512, 1024, 2048, 4096, 10_240], f"neurons of a layer, with {FIXED_TOKENS:,} tokens", 1),
    "tokens": Option(TOKENS, f"tokens of a micro-batch, with {FIXED_NEURONS:,} neurons", 1),
    "layers": Option([1, 2, 6, 12, 24], f"hooked layers, of {FIXED_NEURONS:,} neurons", 1),
    "ranks": Option([1, 2, 3, 4], "ranks to start on this machine; not under a launcher, which has its own", 1),
    "models": Option(["pythia-14m", "pythia-70m", "pythia-410m", "pythia-2.8b", "pythia-12b"], "Pythia sizes"),
    "rounds": Option(30, "alternations", 1),
}
LARGEST = 512 * 2**20
"""Bytes of gradients up to which an all-reduce of them is timed."""
SHOWN = ("L2E", "L2E, plain operations", "MEmeL")


def measure(arguments: argparse.Namespace, launch: Launch) -> dict[str, Any]:
    """Return the milliseconds at every shape, and of the all-reduces. Raises ConfigError; L2EError if a rank fails."""
    check_sizes("--models", arguments.models)
    prepare_libraries()
    sizes = {name: sizes_of(name) for name in arguments.models}
    timed = [size for size in sizes.values() if size["gradients"] <= LARGEST]
    device = torch.device("cpu")
    if launch.size > 1:
        device = process_group.join(launch, 10)
        traffic = {launch.size: time_all_reduces(timed, arguments.rounds, device)}
    else:
        if torch.cuda.is_available():
            device = torch.device("cuda", 0)
        traffic = {ranks: on_own_ranks(ranks, timed, arguments.rounds) for ranks in arguments.ranks}
    rounds = arguments.rounds
    shapes = {
        "neurons": [(FIXED_TOKENS, neurons) for neurons in arguments.neurons],
        "tokens": [(tokens, FIXED_NEURONS) for tokens in arguments.tokens],
    }
    results = {  # measured on every rank, since a step reduces over them
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        **{
            name: [overhead.measure_operation(*shape, torch.float32, device, rounds) for shape in some]
            for name, some in shapes.items()
        },
        "layers": {
            layers: overhead.time_steps(layers, FIXED_TOKENS, FIXED_NEURONS, device, rounds)
            for layers in arguments.layers
        },
        "sizes": sizes,
        "all_reduce": traffic,
        "between": "the launcher's ranks" if launch.size > 1 else "processes of this machine's CPUs (gloo)",
    }
    if launch.size > 1:
        process_group.leave()
    return results


# --- ranks -------------------------------------------------------------------------------------------------------


def sizes_of(model: str) -> dict[str, int]:
    """Return the bytes of the packed sums of `mid-2` (float64) and of the float32 gradients, and the neurons of a
    layer."""
    hf_config = network_config(ModelConfig(name=model), 2048)
    neurons = neurons_of(hf_config)
    layers = len(chosen_layers("mid-2", hf_config.num_hidden_layers))
    return {
        "neurons": neurons,
        "packed": layers * NeuronHook.buffer_size(neurons) * 8,
        "gradients": 4 * parameter_counts(hf_config)[0],
    }


def time_all_reduces(sizes: list[dict[str, int]], rounds: int, device: torch.device) -> list[dict[str, list[float]]]:
    """Return milliseconds of both all-reduces of each size, alternating: the slowest rank's, on every rank.
    Collective."""
    found = []
    for size in sizes:
        tensors = {
            "packed": torch.zeros(size["packed"] // 8, dtype=torch.float64, device=device),
            "gradients": torch.zeros(size["gradients"] // 4, device=device),
        }
        times: dict[str, list[float]] = {name: [] for name in tensors}
        for index in range(2 + rounds):
            for name, tensor in tensors.items():
                collectives.raise_on_all(None)  # all begin together
                took = 1e3 * seconds_of(partial(collectives.all_reduce_sum, tensor), device)
                if index >= 2:
                    times[name].append(max(collectives.all_gather_objects(took)))
        found.append(times)
    return found


def on_own_ranks(ranks: int, sizes: list[dict[str, int]], rounds: int) -> list[dict[str, list[float]]]:
    """Return `time_all_reduces` of R processes on this machine (gloo, one thread each). Raises L2EError."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    port = free_port()
    children = [
        context.Process(target=_rank, args=(rank, ranks, port, sizes, rounds, answers), daemon=True)
        for rank in range(ranks)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    if any(child.exitcode for child in children):
        raise L2EError(f"bench scaling: a rank of {ranks} ended with exit code {[c.exitcode for c in children]}")
    return answers.get()


def _rank(rank: int, ranks: int, port: int, sizes: list[dict[str, int]], rounds: int, answers: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    device = process_group.join(Launch("bench scaling", rank, ranks, rank), 10)
    found = time_all_reduces(sizes, rounds, device)
    if rank == 0:
        answers.put(found)
    process_group.leave()


# --- the page ----------------------------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    """Return the page: a table for each question."""
    devices = "CPUs" if results["device"] == "cpu" else results["device"]
    parts = [
        heading("How inhibition scales", results),
        f"{devices}, {results['threads']} threads, float32; added to forward and backward of one layer's GELU, in"
        " milliseconds and in nanoseconds per activation.\n",
    ]
    for name in ("neurons", "tokens"):
        rows = []
        for operation in results[name]:
            activations = operation["tokens"] * operation["neurons"]
            row = [f"[{operation['tokens']:,}, {operation['neurons']:,}]"]
            for variant in SHOWN:
                own = overhead.added(operation, variant)
                row += [median_and_spread(own), f"{1e6 * statistics.median(own) / activations:.2f}"]
            rows.append(row)
        heads = [name, *(head for variant in SHOWN for head in (f"{variant}, ms", "ns an activation"))]
        parts.append(f"## {name.capitalize()}\n\n{markdown(heads, rows)}")
    rows = [[str(layers), median_and_spread(times, 3)] for layers, times in results["layers"].items()]
    parts.append(
        "## Layers\n\nOnce a step, moments and thresholds are updated.\n\n"
        + markdown(["hooked layers", "Inhibitor.step, ms"], rows)
    )
    rows = [
        [model, f"{size['packed']:,}", f"{size['gradients']:,}", f"{100 * size['packed'] / size['gradients']:.3f}"]
        for model, size in results["sizes"].items()
    ]
    heads = ["model", "packed sums, bytes", "gradients in float32, bytes", "of them, %"]
    parts.append(
        "## Bytes between ranks\n\nOne all-reduce a step each, whatever the tokens; two hooked layers (`mid-2`).\n\n"
        + markdown(heads, rows)
    )
    rows = []
    timed = [model for model, size in results["sizes"].items() if size["gradients"] <= LARGEST]
    for ranks, found in results["all_reduce"].items():
        for model, times in zip(timed, found, strict=True):
            ratio = 100 * statistics.median(times["packed"]) / statistics.median(times["gradients"])
            both = [median_and_spread(times[name]) for name in ("packed", "gradients")]
            rows.append([str(ranks), model, *both, f"{ratio:.1f}" if int(ranks) > 1 else "nothing is sent"])
    parts.append(
        f"## Time between ranks\n\nBetween {results['between']}. Nothing else runs meanwhile; in training the packed"
        " sums travel behind backward."
        f" Gradients of more than {LARGEST // 2**20} MiB are not timed.\n\n"
        + markdown(["ranks", "model", "packed sums, ms", "gradients, ms", "of them, %"], rows)
    )
    return "\n".join(parts)
