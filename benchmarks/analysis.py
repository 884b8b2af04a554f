"""`python -m benchmarks analysis`: what `l2e-ds analyze` costs beside the forward passes that it needs, and its memory.

It analyses all layers of a network of Pythia's shape with random weights, on random texts of twelve features. In one
process three parts alternate: the forward passes alone, the first pass of the analysis, and the second. Then whole
analyses follow, with tables and intervals, of a quarter of the texts and of all: seconds, and the peak of memory that
is not a file's (RssAnon), whose growth shows what depends on the number of texts.

Shapes: T tokens a text, N neurons of a layer, F features.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.about import (
    add_output,
    circumstances,
    device_name,
    heading,
    median_and_spread,
    new_folder,
    publish,
    say,
    seconds_of,
)
from l2e_ds.analysis import PACKAGES
from l2e_ds.analysis.collect import Shown
from l2e_ds.console import at_least, markdown
from l2e_ds.distributed import launch
from l2e_ds.system.installed import check_extra
from l2e_ds.system.memory import process_memory

FEATURES = 12
POLL = 0.02  # seconds
SHOWN = [Shown(0, neuron, -1.0, 10.0) for neuron in range(FEATURES)]
"""As many distributions as an analysis counts, of arbitrary neurons."""
NUMBERS = ("texts", "sequence_length", "batch", "round_texts", "rounds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pythia-70m", metavar="NAME", help="Pythia size (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=2000, metavar="N", help="default: %(default)s")
    parser.add_argument("--sequence-length", type=int, default=512, metavar="T", help="tokens (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="texts at a time (default: %(default)s)")
    parser.add_argument("--round-texts", type=int, default=16, metavar="N", help="of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="alternations (default: %(default)s)")
    add_output(parser, "analysis")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write the page; return exit code 0. Raises ConfigError.

    Under a launcher rank 0 measures alone.
    """
    from l2e_ds.config.sections import ModelConfig
    from l2e_ds.models.network import build_network
    from l2e_ds.models.pythia import check_sizes, network_config
    from l2e_ds.system.process import quiet_libraries

    if launch.find_launch().rank != 0:
        return 0
    check_extra("analysis", PACKAGES)
    check_sizes("--model", [arguments.model])
    for name in NUMBERS:
        at_least(f"--{name.replace('_', '-')}", getattr(arguments, name), 1)
    least = 4 * 5 * FEATURES  # so that a quarter of them has five of each feature, for fitting and testing a probe
    at_least("--texts", arguments.texts, least)
    quiet_libraries()
    about = circumstances("torch", "transformers", "numpy", "scipy", "pandas")
    if arguments.output is not None:
        new_folder("--output", arguments.output)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = ModelConfig(name=arguments.model)
    network = build_network(config, network_config(config, arguments.sequence_length), 1234, None)
    results = about | {
        "device": device_name(device),
        "options": {name: getattr(arguments, name) for name in ("model", *NUMBERS)},
        **measure(network, arguments, device),
    }
    publish(arguments.output, "analysis", results, page(results))
    return 0


def measure(network: Any, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the seconds of each round's three parts, and of whole analyses with their peaks in bytes."""
    from l2e_ds.analysis.collect import Texts, collect_activations, count_scores
    from l2e_ds.analysis.load import LoadedModel
    from l2e_ds.analysis.tables import LayerOwn
    from l2e_ds.evaluation.model_source import ModelSource
    from l2e_ds.models.sites import neuron_sites

    sites = neuron_sites(network, "all")
    body = network.base_model.to(device).eval().requires_grad_(False)
    model = LoadedModel(ModelSource("bench", "bench", name="bench"), body, sites, len(sites), 0, None, device)
    random = np.random.default_rng(1)
    tokens = random.integers(0, 50000, (arguments.texts, arguments.sequence_length)).astype(np.int32)
    labels = np.arange(arguments.texts) % FEATURES
    few = Texts(tokens[: arguments.round_texts], arguments.batch)
    own = [LayerOwn(np.zeros(s.neurons), np.full(s.neurons, 0.05), np.arange(s.neurons) % FEATURES) for s in sites]

    parts: dict[str, Callable[[Path], object]] = {
        "forward": lambda folder: run_plain(model, few),
        "first": lambda folder: collect_activations(model, few, folder),
        "second": lambda folder: count_scores(model, few, labels, own, FEATURES, SHOWN, folder),
    }
    rounds: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(arguments.rounds + 1):
        for name, part in parts.items():
            with tempfile.TemporaryDirectory(prefix="l2e-bench-") as folder, _quiet():
                seconds = seconds_of(partial(part, Path(folder)), device)
            if number:  # the first warms up
                rounds[name].append(seconds)
    wholes = []
    for count in (max(arguments.texts // 4, 1), arguments.texts):
        say(f"whole analysis of {count} texts")
        wholes.append(_whole(model, tokens[:count], labels[:count], arguments.batch, device) | {"texts": count})
    return {"rounds": rounds, "wholes": wholes}


def _whole(model: Any, tokens: np.ndarray, labels: np.ndarray, batch: int, device: torch.device) -> dict[str, Any]:
    from l2e_ds.analysis import tables
    from l2e_ds.analysis.collect import Texts, bin_edges, collect_activations, count_scores

    features = [f"feature {place}" for place in range(FEATURES)]
    texts = Texts(tokens, batch)
    seconds: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory(prefix="l2e-bench-") as folder, _quiet(), _Peak() as peak:
        forward = seconds_of(lambda: run_plain(model, texts), device)
        begin = time.perf_counter()
        layers = collect_activations(model, texts, Path(folder))
        seconds["first"] = time.perf_counter() - begin
        first = tables.first_tables(
            [(layer.mean, layer.variance) for layer in layers],
            labels,
            features,
            tokens=tokens.shape[1],
            parameters=1,
            seed=1,
        )
        seconds["tables"] = time.perf_counter() - begin - seconds["first"]
        counts, _ = count_scores(model, texts, labels, first.own, FEATURES, SHOWN, Path(folder))
        seconds["second"] = time.perf_counter() - begin - sum(seconds.values())
        tables.build_tables(first, counts, bin_edges())
        seconds["tables"] += time.perf_counter() - begin - sum(seconds.values())
    on_gpu = {"gpu_peak": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    return {"forward": forward, "seconds": seconds, "peak": peak.most - peak.before} | on_gpu


def run_plain(model: Any, texts: Any) -> None:
    """Run the texts through the network, and nothing else."""
    for rows in texts.own:
        model.run(torch.from_numpy(texts.tokens[rows].astype(np.int64)))


class _Peak:
    """Measures the most memory, in bytes, that this process holds beside files while it is open."""

    def __enter__(self) -> _Peak:
        self.before = self.most = process_memory("RssAnon")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(POLL):
            self.most = max(self.most, process_memory("RssAnon"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard standard error, and so progress bars."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def page(results: dict[str, Any]) -> str:
    """Return the page."""
    options, rounds = results["options"], results["rounds"]
    command = "python -m benchmarks analysis " + " ".join(f"--{n.replace('_', '-')} {v}" for n, v in options.items())
    extra = [
        (first + second) / (2 * forward)
        for forward, first, second in zip(rounds["forward"], rounds["first"], rounds["second"], strict=True)
    ]
    per_text = {name: [1000 * value / options["round_texts"] for value in values] for name, values in rounds.items()}
    rows = [
        ["forward pass alone", median_and_spread(per_text["forward"])],
        ["first pass", median_and_spread(per_text["first"])],
        ["second pass", median_and_spread(per_text["second"])],
        ["both against two forward passes", median_and_spread(extra)],
    ]
    small, large = results["wholes"]
    whole_rows = [
        [
            f"{whole['texts']:,}",
            f"{whole['forward']:.1f}",
            *(f"{whole['seconds'][name]:.1f}" for name in ("first", "second", "tables")),
            f"{sum(whole['seconds'].values()) / (2 * whole['forward']):.2f}",
            f"{whole['peak'] / 2**20:,.0f}",
            *([f"{whole['gpu_peak'] / 2**20:,.0f}"] if "gpu_peak" in whole else []),
        ]
        for whole in (small, large)
    ]
    heads = ["texts", "forward, s", "first, s", "second, s", "tables, s", "against two forward", "peak, MiB"]
    heads += ["peak of the GPU, MiB"] if "gpu_peak" in large else []
    return "\n".join(
        [
            heading(f"Analysis of {options['model']}, all layers", command, results),
            f"Device: {results['device']}. Texts of {options['sequence_length']} tokens, {FEATURES} features.\n",
            markdown(["a text", "ms"], rows),
            "Whole analyses, with probing, tables and 200 bootstrap resamples, right after one forward pass of the same"
            " texts:\n",
            markdown(heads, whole_rows),
        ]
    )
