"""`python -m benchmarks analysis`: what `l2e-ds analyze` costs beside the forward passes that it needs, and its memory.

It analyses all layers of a network of Pythia's shape with random weights, on random texts of twelve features. In one
process three parts alternate: the forward passes alone, the first pass of the analysis, and the second. Then whole
analyses follow, with tables and intervals, of a quarter of the texts and of all: seconds, and the peak of memory that
is not a file's (RssAnon), whose growth shows what depends on the number of texts.

Shapes: T tokens a text, N neurons of a layer, F features.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.about import Option, device_name, heading, median_and_spread, say, seconds_of, without_stderr
from l2e_ds import analysis
from l2e_ds.analysis import tables
from l2e_ds.analysis.collect import ShownNeuron, Texts, bin_edges, collect_activations, count_scores
from l2e_ds.analysis.load import LoadedModel
from l2e_ds.analysis.tables import LayerOwn
from l2e_ds.config.sections import ModelConfig
from l2e_ds.console import markdown
from l2e_ds.distributed.launch import Launch
from l2e_ds.evaluation.model_source import ModelSource
from l2e_ds.models.network import build_network
from l2e_ds.models.pythia import check_sizes, network_config
from l2e_ds.models.sites import neuron_sites
from l2e_ds.system.installed import check_extra
from l2e_ds.system.memory import process_memory
from l2e_ds.system.process import prepare_libraries

PACKAGES = ("torch", "transformers", "numpy", "scipy", "pandas")
FEATURES = 12
POLL = 0.02  # seconds
SHOWN = [ShownNeuron(0, neuron, -1.0, 10.0) for neuron in range(FEATURES)]
"""As many distributions as an analysis counts, of arbitrary neurons."""
# a quarter of the texts needs five of each feature, for fitting and testing a probe
OPTIONS = {
    "model": Option("pythia-70m", "Pythia size"),
    "texts": Option(2000, "of the larger analysis", 4 * 5 * FEATURES),
    "sequence_length": Option(512, "tokens", 1),
    "batch": Option(8, "texts at a time", 1),
    "round_texts": Option(16, "of a round", 1),
    "rounds": Option(7, "alternations", 1),
}


def measure(arguments: argparse.Namespace, launch: Launch) -> dict[str, Any]:
    """Return the seconds of parts and of whole analyses; under a launcher rank 0 measures alone. Raises ConfigError."""
    if launch.rank != 0:
        return {}
    check_extra("analysis", "analysis", analysis.PACKAGES)
    check_sizes("--model", [arguments.model])
    prepare_libraries()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = ModelConfig(name=arguments.model)
    network = build_network(config, network_config(config, arguments.sequence_length), 1234, None)
    return {"device": device_name(device), **measure_parts(network, arguments, device)}


def measure_parts(network: Any, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the seconds of each round's three parts, and of whole analyses with their peaks in bytes."""
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
            with tempfile.TemporaryDirectory(prefix="l2e-bench-") as folder, without_stderr():
                seconds = seconds_of(partial(part, Path(folder)), device)
            if number:  # the first warms up
                rounds[name].append(seconds)
    wholes = []
    for count in (max(arguments.texts // 4, 1), arguments.texts):
        say(f"whole analysis of {count} texts")
        wholes.append(_whole(model, tokens[:count], labels[:count], arguments.batch, device) | {"texts": count})
    return {"rounds": rounds, "wholes": wholes}


def _whole(model: Any, tokens: np.ndarray, labels: np.ndarray, batch: int, device: torch.device) -> dict[str, Any]:
    features = [f"feature {place}" for place in range(FEATURES)]
    texts = Texts(tokens, batch)
    seconds: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory(prefix="l2e-bench-") as folder, without_stderr(), _Peak() as peak:
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


def page(results: dict[str, Any]) -> str:
    """Return the page."""
    options, rounds = results["options"], results["rounds"]
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
            heading(f"Analysis of {options['model']}, all layers", results),
            f"Device: {results['device']}. Texts of {options['sequence_length']} tokens, {FEATURES} features.\n",
            markdown(["a text", "ms"], rows),
            "Whole analyses, with probing, tables and 200 bootstrap resamples, right after one forward pass of the same"
            " texts:\n",
            markdown(heads, whole_rows),
        ]
    )
