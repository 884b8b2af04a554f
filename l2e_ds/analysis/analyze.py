"""`l2e-ds analyze MODEL [MODEL ...] --features FILE --output DIR`: the analyses of the paper (docs/analysis.md).

Under a launcher, any number of ranks share the texts. DIR appears when everything is done.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from l2e_ds.analysis import PACKAGES, collect, options, tables
from l2e_ds.analysis.bootstrap import RESAMPLES
from l2e_ds.analysis.features import FeatureSet, format_report
from l2e_ds.analysis.load import LoadedModel, check_model, load_model
from l2e_ds.analysis.summary import Result, sample_of, summary
from l2e_ds.analysis.tables import Tables
from l2e_ds.console import at_least, say
from l2e_ds.data.tokenizer import tokenizer_digest
from l2e_ds.distributed import collectives, process_group
from l2e_ds.distributed.launch import Launch, run_on_launched_ranks
from l2e_ds.errors import ConfigError
from l2e_ds.evaluation.model_source import MODEL, ModelSource, all_checkpoints, find_model, load_tokenizer_of
from l2e_ds.system.files import is_free, whole_folder
from l2e_ds.system.installed import check_extra
from l2e_ds.system.process import prepare_libraries
from l2e_ds.system.provenance import versions

SAMPLES = ("token", "mean", "max")
TIMEOUT_MINUTES = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    options.add_feature_arguments(parser)
    options.add_model_arguments(parser)
    add = parser.add_argument_group("analysis").add_argument
    add("--layers", type=int, nargs="+", metavar="L", help="layers to analyse, counted from 0 (default: all)")
    add(
        "--samples",
        choices=SAMPLES,
        default="token",
        help="what counts as one sample: every token, or a text by its neurons' mean or largest activation"
        " (default: %(default)s)",
    )
    add("--resamples", type=int, default=RESAMPLES, metavar="B", help="bootstrap resamples (default: %(default)s)")
    add("--suggest-share", action="store_true", help="print the share k with the lowest FKR, with its interval")
    add("--all-checkpoints", action="store_true", help="MODEL is one run: show how it changed")
    add("--zero3", action="store_true", help="shard the weights over the ranks (ZeRO-3)")
    add("--scratch", type=Path, metavar="DIR", help="folder for tables of texts (default: that of --output)")


def run(arguments: argparse.Namespace) -> int:
    """Return the exit code. Raises ConfigError, CheckpointError, DataError, AnalysisError."""
    return run_on_launched_ranks(lambda launch: _run(arguments, launch))


def _run(arguments: argparse.Namespace, launch: Launch) -> None:
    check_extra("analyze", "analysis", PACKAGES)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda received, _: sys.exit(128 + received))  # removes the scratch folder
    prepare_libraries()
    device = process_group.join(launch, TIMEOUT_MINUTES)
    try:
        sources = collectives.run_on_all(lambda: _sources(arguments))
        # All are checked before anything is written, as each may then take hours.
        texts = collectives.run_on_all(lambda: _texts_of_each(arguments, sources))
        digests = [model_texts.report["digest"] for model_texts in texts]
        differs = digests != collectives.broadcast_object(digests)
        collectives.raise_on_all(
            ConfigError(f"--features: {arguments.features} differs between ranks") if differs else None
        )
        with _folders(arguments) as (scratch, output):
            results = _analyse_all(arguments, sources, texts, device, scratch, output)
    finally:
        process_group.leave()
    if launch.rank == 0:
        print(summary(arguments, results))
        print(f"figures and tables: {arguments.output}", flush=True)


def _analyse_all(
    arguments: argparse.Namespace,
    sources: Sequence[ModelSource],
    texts: Sequence[FeatureSet],
    device: torch.device,
    scratch: Path,
    output: Path | None,
) -> list[Result]:
    """Analyse one model after another. The tables of each are written at once, the rest at the end. Collective."""
    results: list[Result] = []
    changes: list[pd.DataFrame] = []
    for source, model_texts in zip(sources, texts, strict=True):
        result = _analyse(arguments, source, model_texts, device, scratch / source.label)
        if output is None:
            continue
        folder = output / "models" / source.label
        folder.mkdir(parents=True)
        for name, table in result.tables.items():
            if name != "resamples":  # which only `layer_change` needs
                table.to_parquet(folder / f"{name}.parquet", index=False)
        if arguments.all_checkpoints and results:
            before = results[-1]
            change = tables.layer_change(before.tables, result.tables)
            changes.append(change.assign(from_step=before.source.step, to_step=source.step))
            results[-1] = before.without_neurons()
        results.append(result.without_features())
    if output is not None:
        _write(output, arguments, results, changes)
    return results


def _sources(arguments: argparse.Namespace) -> list[ModelSource]:
    """Check the options and return the models. Raises ConfigError, CheckpointError."""
    at_least("--batch", arguments.batch, 1)
    at_least("--resamples", arguments.resamples, 20)
    if arguments.all_checkpoints and len(arguments.models) != 1:
        raise ConfigError(f"--all-checkpoints: goes with one run, got {len(arguments.models)} models")
    if not is_free(arguments.output):
        raise ConfigError(f"--output: {arguments.output} exists and is not an empty folder")
    if arguments.all_checkpoints:
        return all_checkpoints(arguments.models[0])
    sources = [find_model(given) for given in arguments.models]
    labels = [source.label for source in sources]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"MODEL: two models are called {twice}; give them folders of different names")
    return sources


def _texts_of_each(arguments: argparse.Namespace, sources: Sequence[ModelSource]) -> list[FeatureSet]:
    """Return the texts in each model's tokens, those of one tokenizer as one object. Raises ConfigError, DataError."""
    by_tokenizer: dict[str, FeatureSet] = {}
    texts = []
    for source in sources:
        hf_config = check_model(source, arguments.layers, "--layers")
        tokenizer = load_tokenizer_of(source, arguments.tokenizer)
        digest = tokenizer_digest(tokenizer)
        if digest not in by_tokenizer:
            by_tokenizer[digest] = options.load_features(arguments, tokenizer)
            if collectives.is_main():
                print(format_report(by_tokenizer[digest].report), flush=True)
        options.check_fits(hf_config, by_tokenizer[digest], source.given)
        texts.append(by_tokenizer[digest])
    return texts


@contextmanager
def _folders(arguments: argparse.Namespace) -> Iterator[tuple[Path, Path | None]]:
    """Yield this rank's scratch folder, and on rank 0 the folder that becomes --output if all goes well. Collective."""
    target = arguments.output
    with ExitStack() as stack:

        def make() -> tuple[Path, Path | None]:
            try:
                place = arguments.scratch or target.absolute().parent
                place.mkdir(parents=True, exist_ok=True)
                scratch = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=place, ignore_cleanup_errors=True)
                )
                output = stack.enter_context(whole_folder(target)) if collectives.is_main() else None
            except OSError as error:
                raise ConfigError(f"--output, --scratch: cannot write: {error}") from None
            return Path(scratch), output

        scratch, output = collectives.run_on_all(make)
        try:
            yield scratch, output
        except BaseException:
            if output is not None and (output / "models").is_dir():  # these may have taken hours
                kept = output.rename(output.with_name(f"{output.name[1:]}.unfinished"))
                say(f"l2e-ds: tables of the models that were finished: {kept}")
            raise


def _analyse(
    arguments: argparse.Namespace, source: ModelSource, texts: FeatureSet, device: torch.device, folder: Path
) -> Result:
    """Run a model over the texts twice and return all tables on rank 0, none elsewhere. Collective.

    folder: a new folder for the tables of texts, which is removed at the end.
    """
    model = collectives.run_on_all(
        lambda: load_model(source, arguments.layers, arguments.precision, device, arguments.zero3)
    )
    folder.mkdir()
    _check_disk(model, texts, folder)
    rows = collect.Texts(texts.tokens, arguments.batch, in_step=arguments.zero3)
    layers = collect.collect_activations(model, rows, folder)
    samples = None
    if arguments.samples != "token":
        layers = samples = [layer.as_one_sample(arguments.samples) for layer in layers]

    first = collectives.run_on_main(
        lambda: tables.first_tables(
            [(layer.mean, layer.variance) for layer in layers],
            texts.labels,
            texts.features,
            tokens=layers[0].tokens,
            parameters=model.parameters,
            seed=arguments.seed,
            resamples=arguments.resamples,
        )
    )
    own, shown = collectives.broadcast_object((first.own, _shown(first, layers)) if first is not None else None)
    counts, activations = collect.count_scores(
        model, rows, texts.labels, own, len(texts.features), shown, folder, samples
    )
    model.close()
    model_tables = collectives.run_on_main(lambda: _all_tables(first, model, texts, counts, shown, activations)) or {}
    shutil.rmtree(folder, ignore_errors=True)
    return Result(source, model_tables, model.parameters, model.tokens, texts.report)


def _check_disk(model: LoadedModel, texts: FeatureSet, folder: Path) -> None:
    """Raise ConfigError if the tables of texts do not fit on the disk. Collective."""
    count = len(texts.labels)
    needed = count * sum(12 * site.neurons + 8 * collect.BINS for site in model.sites)
    needed *= min(2, collectives.size())  # the other ranks' parts may be on the same disk
    free = shutil.disk_usage(folder).free
    error = None
    if needed > free:
        error = ConfigError(
            f"--scratch: the tables of {count} texts and {len(model.sites)} layers take {needed / 2**20:,.0f} MiB,"
            f" there are {free / 2**20:,.0f} MiB free in {folder.parent.parent}; fewer --layers or texts take less"
        )
    collectives.raise_on_all(error)


def _shown(first: tables.FirstTables, layers: Sequence[collect.LayerActivations]) -> list[collect.ShownNeuron]:
    """Return the best probed neuron of each feature, once each, with its lowest and highest activation."""
    probes = first.tables["probes"]
    best = probes[probes["place"] == 1][["layer", "neuron"]].drop_duplicates()
    shown = []
    for index, neuron in best.itertuples(index=False):  # in these tables `layer` counts the analysed layers only
        layer = layers[index]
        lowest, highest = float(layer.lowest[neuron]), float(layer.top[:, neuron].max())
        shown.append(collect.ShownNeuron(layer.layer, int(neuron), lowest, highest))
    return shown


def _all_tables(
    first: tables.FirstTables,
    model: LoadedModel,
    texts: FeatureSet,
    counts: Sequence[tables.LayerCounts],
    shown: Sequence[collect.ShownNeuron],
    activations: np.ndarray,
) -> Tables:
    """Return all tables of a model. Their column `layer` is the model's number of the layer, not that of the site."""
    model_tables = tables.build_tables(first, counts, collect.bin_edges())
    numbers = {-1: -1} | {index: site.layer for index, site in enumerate(model.sites)}
    for table in model_tables.values():
        if "layer" in table:
            table["layer"] = table["layer"].map(numbers)
    model_tables["layers"]["depth"] = model_tables["layers"]["layer"] / max(1, model.layers - 1)
    model_tables["distributions"] = _distributions(model_tables["probes"], shown, activations, texts.features)
    return model_tables


def _distributions(
    probes: pd.DataFrame, shown: Sequence[collect.ShownNeuron], activations: np.ndarray, features: Sequence[str]
) -> pd.DataFrame:
    """Return a row for each probed feature, feature and bin."""
    by_neuron = {
        (neuron.layer, neuron.neuron): collect.trim_distribution(neuron, counts)
        for neuron, counts in zip(shown, activations, strict=True)
    }
    parts = []
    for row in probes[probes["place"] == 1].itertuples():
        edges, counts = by_neuron[row.layer, row.neuron]
        columns = {
            "probe_feature": row.feature,
            "layer": row.layer,
            "neuron": row.neuron,
            "feature": np.repeat(np.array(features, dtype=object), len(edges) - 1),
            "left": np.tile(edges[:-1], len(features)),
            "right": np.tile(edges[1:], len(features)),
            "count": counts.ravel(),
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _write(
    output: Path, arguments: argparse.Namespace, results: Sequence[Result], changes: Sequence[pd.DataFrame]
) -> None:
    from l2e_ds.analysis.figures import write_figures  # with matplotlib, an extra

    report = results[0].report
    about = {
        "name": options.name_of_set(report["source"]),
        "features": len(report["features"]),
        "texts": [result.report["total"]["kept"] for result in results],  # they differ where tokenizers do
        "tokens": [result.report["total"]["tokens"] for result in results],
        "sample": sample_of(arguments),
    }
    if changes:
        pd.concat(changes, ignore_index=True).to_parquet(output / "changes.parquet", index=False)
    shown = results[-1:] if arguments.all_checkpoints else results
    over_time = [(result.source.step or 0, result.tables) for result in results] if arguments.all_checkpoints else ()
    write_figures({each.source.label: each.tables for each in shown}, about, output / "figures", over_time)
    (output / "analysis.json").write_text(json.dumps(_about(arguments, results), indent=1) + "\n", encoding="utf-8")
    (output / "summary.md").write_text(summary(arguments, results), encoding="utf-8")


def _about(arguments: argparse.Namespace, results: Sequence[Result]) -> dict[str, Any]:
    """Return the content of analysis.json."""
    no_options = ("action", "verb", "for_sbatch", "models")
    given = {name: value for name, value in vars(arguments).items() if name not in no_options}
    return {
        "models": [
            {
                "model": result.source.given,
                "label": result.source.label,
                "step": result.source.step,
                "tokens": result.tokens,
                "parameters": result.parameters,
                "texts": result.report["digest"],
            }
            for result in results
        ],
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in given.items()},
        "texts": list({result.report["digest"]: result.report for result in results}.values()),
        "ranks": collectives.size(),
        "versions": versions("l2e_ds", "python", "torch", "transformers", "numpy", "scipy", "pandas"),
    }
