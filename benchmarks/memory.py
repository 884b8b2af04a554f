"""`python -m benchmarks memory`: what inhibition adds to the memory of a step, by the number of tokens.

For a network of Pythia's shape, without DeepSpeed, it measures what autograd keeps for backward, and the peak of all
allocations of a forward and backward pass, with and without inhibition. On GPUs the peak is the allocator's; on CPUs
torch.profiler's, which records every allocation.

Shapes: B sequences of a micro-batch, T tokens a sequence, N neurons of a layer.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.about import Option, device_name, heading, without_stderr
from benchmarks.overhead import NONE, VARIANTS
from l2e_ds.config.sections import ModelConfig
from l2e_ds.console import markdown
from l2e_ds.distributed.launch import Launch
from l2e_ds.errors import ConfigError
from l2e_ds.inhibition import Inhibitor
from l2e_ds.models.network import build_network
from l2e_ds.models.pythia import check_sizes, network_config
from l2e_ds.models.sites import neuron_sites
from l2e_ds.system.process import prepare_libraries
from l2e_ds.training.loss import LossHead

PACKAGES = ("torch", "transformers")
OPTIONS = {
    "model": Option("pythia-14m", "Pythia size"),
    "vocabulary": Option(1024, "rows; few, to hide nothing", 2),
    "sequence_length": Option(512, "tokens", 2),
    "micro_batches": Option([4, 8, 16], "sequences", 1),
}
PASSES = 3
"""Passes, of which the last is measured: the first has no history, and the self-test ends after the second."""


def measure(arguments: argparse.Namespace, launch: Launch) -> dict[str, Any]:
    """Return the bytes of every variant at every size. Raises ConfigError.

    Under a launcher rank 0 measures alone: other ranks' memory is the same.
    """
    if launch.rank != 0:
        return {}
    check_sizes("--model", [arguments.model])
    if len(set(arguments.micro_batches)) < 2:
        given = " ".join(map(str, arguments.micro_batches))
        raise ConfigError(f"--micro-batches: got {given}, allowed: at least two different integers")
    prepare_libraries()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = ModelConfig(name=arguments.model, vocab_size=arguments.vocabulary)
    found = {
        variant: [
            measure_pass(model, variant, size, arguments.sequence_length, device) for size in arguments.micro_batches
        ]
        for variant in (NONE, *VARIANTS)
    }
    return {
        "device": device_name(device),
        "model": arguments.model,
        "vocabulary": arguments.vocabulary,
        "tokens": [size * arguments.sequence_length for size in arguments.micro_batches],
        "found": found,
    }


def measure_pass(model: Any, variant: str, sequences: int, length: int, device: torch.device) -> dict[str, int]:
    """Return bytes: `state` of the inhibitor, `kept` for backward, `peak` of a pass above what was held before it."""
    network = build_network(model, network_config(model, length), 1234, None).to(device)
    head = LossHead(network)
    inhibitor = Inhibitor(neuron_sites(network), VARIANTS[variant], device) if variant != NONE else None
    if inhibitor is not None:
        inhibitor.attach()
    tokens = torch.randint(model.vocab_size, (sequences, length + 1), device=device)

    def forward() -> Tensor:
        loss, _ = head.loss(network, tokens[:, :-1], tokens[:, 1:])
        return loss if inhibitor is None else inhibitor.attach_loss(loss)

    for _ in range(PASSES - 1):
        forward().backward()
        if inhibitor is not None:
            inhibitor.step()
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    bytes_kept = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    kept.clear()
    loss.backward()
    del loss
    if inhibitor is not None:
        inhibitor.step()
    return {"state": _state_bytes(inhibitor), "kept": bytes_kept, "peak": _peak(forward, device)}


def _state_bytes(inhibitor: Inhibitor | None) -> int:
    """Return the bytes of the packed sums, of what a checkpoint holds, and of the float32 constants of a step."""
    if inhibitor is None:
        return 0
    held = [inhibitor._packed, *inhibitor.state_dict().values()]
    for hook in inhibitor.hooks:
        held += [tensor for tensor in vars(hook.step_statistics).values() if isinstance(tensor, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _peak(forward: Any, device: torch.device) -> int:
    """Return the peak in bytes of one forward and backward pass, above what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward().backward()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward().backward()
    live, peak = 0, 0
    events = profiler.profiler.kineto_results.events()
    for _, allocated in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += allocated
        peak = max(peak, live)
    return peak


def per_token(results: dict[str, Any], variant: str, what: str) -> float:
    """Return bytes that a variant adds for each token: the slope between the smallest and the largest micro-batch."""
    tokens, found = results["tokens"], results["found"]
    low, high = tokens.index(min(tokens)), tokens.index(max(tokens))
    added = [found[variant][index][what] - found[NONE][index][what] for index in (low, high)]
    return (added[1] - added[0]) / (tokens[high] - tokens[low])


def page(results: dict[str, Any]) -> str:
    """Return the page: added bytes by variant and number of tokens."""
    devices = "CPUs" if results["device"] == "cpu" else results["device"]
    parts = [
        heading("Memory of inhibition", results),
        f"{devices}; {results['model']} with {results['vocabulary']:,}"
        " vocabulary rows, float32, `mid-2`. Bytes that a method adds to those of the same pass without inhibition.\n",
    ]
    for what, title in (
        ("kept", "Kept for backward by autograd"),
        ("peak", "Peak of forward and backward"),
    ):
        heads = ["method", *(f"{tokens:,} tokens" for tokens in results["tokens"]), "a token"]
        none = results["found"][NONE]
        rows = [[f"{NONE} (all of it)", *(f"{one[what]:,}" for one in none), ""]]
        for variant in VARIANTS:
            pairs = zip(results["found"][variant], none, strict=True)
            added = [f"{one[what] - other[what]:,}" for one, other in pairs]
            rows.append([variant, *added, f"{per_token(results, variant, what):,.1f}"])
        parts.append(f"## {title}\n\n{markdown(heads, rows)}")
    state = results["found"]["L2E"][0]["state"]
    parts.append(f"Whatever the tokens, L2E holds {state:,} bytes of moments, thresholds, constants and sums.\n")
    return "\n".join(parts)
