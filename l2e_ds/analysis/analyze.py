"""`l2e-ds analyze MODEL [MODEL ...] --features FILE --output DIR`: the analyses of the paper (METHOD, section 8).

    DIR/
      analysis.json              what was analysed, how, on what; the report on the texts
      summary.md                 the figures that matter, a table a question
      figures/*.png, *.svg
      models/LABEL/*.parquet     tables that pandas opens (docs/analysis.md names the columns)
      changes.parquet            with --all-checkpoints: from each checkpoint to the next

Also under a launcher, on any number of ranks: they share the texts. DIR appears when everything is done.
"""

from __future__ import annotations

import argparse
import glob
import json
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import l2e_ds
from l2e_ds import distributed
from l2e_ds.analysis import options, tables
from l2e_ds.analysis.collect import (
    BINS,
    Distribution,
    LayerActivations,
    Shown,
    Texts,
    bin_edges,
    collect_activations,
    count_scores,
    count_scores_of_samples,
    distributions_of_samples,
)
from l2e_ds.analysis.load import (
    LoadedModel,
    ModelSource,
    all_checkpoints,
    check_model,
    find_model,
    load_model,
    load_tokenizer_of,
)
from l2e_ds.analysis.tables import Tables
from l2e_ds.console import markdown, say
from l2e_ds.errors import ConfigError, L2EError

if TYPE_CHECKING:
    import pandas as pd

    from l2e_ds.analysis.features import FeatureSet

TABLES = (
    *("neurons", "neuron_features", "probes", "significance", "scale", "layers", "fkr"),
    "distributions",
)
SAMPLES = ("token", "mean", "max")
REPORTED_SHARES = (0.01, 0.02, 0.05)
TIMEOUT_MINUTES = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help=options.MODEL)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty")
    options.add_feature_arguments(parser)
    options.add_model_arguments(parser)
    group = parser.add_argument_group("analysis")
    group.add_argument("--layers", type=int, nargs="+", metavar="L", help="counted from 0 (default: all)")
    group.add_argument(
        "--samples",
        choices=SAMPLES,
        default="token",
        help="what counts as one sample: every token, or a text by its neurons' mean or largest activation"
        " (default: %(default)s)",
    )
    group.add_argument("--resamples", type=int, default=200, metavar="B", help="bootstrap (default: %(default)s)")
    group.add_argument(
        "--suggest-share", action="store_true", help="print the share k with the lowest FKR, with its interval"
    )
    group.add_argument("--all-checkpoints", action="store_true", help="of the only MODEL, a run: how it changed")
    group.add_argument("--zero3", action="store_true", help="shard the weights over the ranks (ZeRO-3)")
    group.add_argument("--scratch", type=Path, metavar="DIR", help="for tables of texts (default: beside --output)")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0. Raises ConfigError, CheckpointError, DataError, AnalysisError."""
    return distributed.reported_once(lambda launch: _run(arguments, launch))


def _run(arguments: argparse.Namespace, launch: distributed.Launch) -> None:
    from l2e_ds.train import quiet_libraries

    for number in (signal.SIGTERM, signal.SIGHUP):  # nothing of the scratch folder stays
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda received, _: sys.exit(128 + received))
    quiet_libraries()
    device = distributed.join(launch, TIMEOUT_MINUTES)
    try:
        sources = _on_all(lambda: _sources(arguments))
        session = _Session(arguments, device)
        for source in sources:  # all of them, before anything is written and any takes its hours
            session.texts_of(source)
        with _folders(arguments) as (scratch, output):
            results = _analyse_all(arguments, sources, session, scratch, output)
    finally:
        distributed.leave()
    if launch.rank == 0:
        print(summary(arguments, results))
        print(f"figures and tables: {arguments.output}", flush=True)


def _analyse_all(
    arguments: argparse.Namespace,
    sources: Sequence[ModelSource],
    session: _Session,
    scratch: Path,
    output: Path | None,
) -> list[Result]:
    """One model after another; their tables are written at once, the rest at the end. Collective."""
    results: list[Result] = []
    changes: list[pd.DataFrame] = []
    for source in sources:
        result = session.analyse(source, scratch / source.label)
        if output is None:
            continue
        _write_tables(output / "models" / source.label, result)
        if arguments.all_checkpoints and results:
            changes.append(_change(results[-1], result))
            results[-1] = results[-1].without_neurons()
        results.append(result.without_features())
    if output is not None:
        _write(output, arguments, results, changes)
    return results


# --- what was asked for ------------------------------------------------------------------------------------------


def _sources(arguments: argparse.Namespace) -> list[ModelSource]:
    """The models, where everything about the options is right. Raises ConfigError, CheckpointError."""
    options.check(arguments)
    if arguments.resamples < 20:
        raise ConfigError(f"--resamples: got {arguments.resamples}, allowed: an integer >= 20")
    if arguments.all_checkpoints and len(arguments.models) != 1:
        raise ConfigError(f"--all-checkpoints: goes with one run, got {len(arguments.models)} models")
    path = arguments.output
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"--output: {path} exists and is not an empty folder")
    if arguments.all_checkpoints:
        return all_checkpoints(arguments.models[0])
    sources = [find_model(given) for given in arguments.models]
    labels = [source.label for source in sources]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"MODEL: two models are called {twice}; give them folders of different names")
    return sources


@contextmanager
def _folders(arguments: argparse.Namespace) -> Iterator[tuple[Path, Path | None]]:
    """This rank's scratch folder, and on rank 0 the folder that becomes --output when all went well."""
    error: L2EError | None = None
    folders: list[Path] = []
    try:
        parent = arguments.output.absolute().parent
        left = sorted(map(str, parent.glob(f".{glob.escape(arguments.output.name)}.????????")))
        if left and distributed.is_main():
            say(f"l2e-ds: left by a command that was killed, or of one that still runs: {', '.join(left)}")
        for place in (arguments.scratch or parent, parent)[: 2 if distributed.is_main() else 1]:
            place.mkdir(parents=True, exist_ok=True)
            folders.append(Path(tempfile.mkdtemp(prefix=f".{arguments.output.name}.", dir=place)))
    except OSError as raised:
        error = ConfigError(f"--output, --scratch: cannot write: {raised}")
    try:
        distributed.agree(error)
        yield folders[0], folders[1] if distributed.is_main() else None
        if distributed.is_main():
            folders[1].chmod(0o755)
            if arguments.output.exists():
                arguments.output.rmdir()
            folders[1].rename(arguments.output)
    except BaseException:
        if len(folders) == 2 and (folders[1] / "models").is_dir():  # it may have taken hours
            kept = folders[1].with_name(f"{folders[1].name[1:]}.unfinished")
            folders[1].rename(kept)
            say(f"l2e-ds: tables of the models that were finished: {kept}")
        raise
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


# --- one model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What rank 0 keeps of a model: what is small, once the tables are on disk."""

    source: ModelSource
    tables: Tables
    parameters: int
    tokens: int | None
    report: dict[str, Any]

    def without_features(self) -> Result:
        """Of the table of neurons and features only the neurons whose distribution is shown."""
        shown = self.tables["distributions"][["layer", "neuron"]].drop_duplicates()
        kept = self.tables["neuron_features"].merge(shown, on=["layer", "neuron"])
        return replace(self, tables=self.tables | {"neuron_features": kept})

    def without_neurons(self) -> Result:
        return replace(self, tables={name: table for name, table in self.tables.items() if name != "neurons"})


class _Session:
    """What stays the same from model to model."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments, self.device = arguments, device
        self._texts: dict[str, FeatureSet] = {}

    def texts_of(self, source: ModelSource) -> FeatureSet:
        """In the model's tokens; models of one tokenizer see the very same. Collective. Raises ConfigError, DataError,
        also for what the model cannot take."""
        return _on_all(lambda: self._texts_of(source))

    def _texts_of(self, source: ModelSource) -> FeatureSet:
        from l2e_ds.analysis.features import format_report
        from l2e_ds.data.tokenizer import tokenizer_digest

        network = check_model(source, self.arguments.layers)
        tokenizer = load_tokenizer_of(source, self.arguments.tokenizer)
        digest = tokenizer_digest(tokenizer)
        if digest not in self._texts:
            self._texts[digest] = options.load_features(self.arguments, tokenizer)
            if distributed.is_main():
                print(format_report(self._texts[digest].report), flush=True)
        options.check_fits(network, self._texts[digest], source.given)
        return self._texts[digest]

    def analyse(self, source: ModelSource, folder: Path) -> Result:
        """Both passes and all tables. Collective; the tables are rank 0's, empty elsewhere. folder: of tables of texts,
        gone at the end."""
        arguments = self.arguments
        texts = self.texts_of(source)
        if len(set(distributed.all_gather_objects(texts.report["digest"]))) > 1:
            raise L2EError(f"--features: {arguments.features} is not the same on all ranks")
        model = _on_all(lambda: load_model(source, arguments.layers, arguments.precision, self.device, arguments.zero3))
        folder.mkdir()
        _check_disk(model, texts, folder)
        rows = Texts(texts.tokens, arguments.batch, in_step=arguments.zero3)
        layers = collect_activations(model, rows, folder)
        if arguments.samples != "token":
            layers = [layer.as_one_sample(arguments.samples) for layer in layers]

        first = _on_main(lambda: self._first_tables(layers, texts, model))
        own, shown = distributed.main_decides((first.own, _shown(first, layers)) if first is not None else None)
        counts, distributions = self._count(model, rows, texts, layers, own, shown, folder)
        model.close()
        found = _on_main(lambda: _all_tables(first, model, texts, counts, distributions)) or {}
        shutil.rmtree(folder, ignore_errors=True)
        return Result(source, found, model.parameters, model.tokens, texts.report)

    def _first_tables(
        self, layers: Sequence[LayerActivations], texts: FeatureSet, model: LoadedModel
    ) -> tables.FirstTables:
        wanted = self.arguments
        probed = [layer.top if wanted.samples == "max" else layer.mean for layer in layers]
        return tables.first_tables(
            [tables.LayerTexts(layer.mean, layer.variance, value) for layer, value in zip(layers, probed, strict=True)],
            texts.labels,
            texts.features,
            tokens=layers[0].tokens,
            parameters=model.parameters,
            seed=wanted.seed,
            resamples=wanted.resamples,
        )

    def _count(
        self,
        model: LoadedModel,
        rows: Texts,
        texts: FeatureSet,
        layers: Sequence[LayerActivations],
        own: Sequence[tables.LayerOwn],
        shown: Sequence[Shown],
        folder: Path,
    ) -> tuple[list[tables.LayerCounts], list[Distribution]]:
        if self.arguments.samples == "token":
            return count_scores(model, rows, texts.labels, own, len(texts.features), shown, folder)
        if not distributed.is_main():
            return [], []
        counts = [
            count_scores_of_samples(layer, texts.labels, of_layer, folder / f"scores-{layer.layer:03d}.npy")
            for layer, of_layer in zip(layers, own, strict=True)
        ]
        return counts, distributions_of_samples(layers, texts.labels, len(texts.features), shown)


def _check_disk(model: LoadedModel, texts: FeatureSet, folder: Path) -> None:
    """That the tables of texts will find room. Collective; raises ConfigError."""
    count = len(texts.labels)
    needed = count * sum(12 * site.neurons + 8 * BINS for site in model.sites)
    needed *= min(2, distributed.size())  # the other ranks' parts may lie on the same disk
    free = shutil.disk_usage(folder).free
    error = None
    if needed > free:
        error = ConfigError(
            f"--scratch: the tables of {count} texts and {len(model.sites)} layers take {needed / 2**20:,.0f} MiB,"
            f" there are {free / 2**20:,.0f} MiB free in {folder.parent.parent}; fewer --layers or texts take less"
        )
    distributed.agree(error)


def _on_all(action: Callable[[], Any]) -> Any:
    """Every rank's work; what one of them raises as an L2EError, all do."""
    result, error = None, None
    try:
        result = action()
    except L2EError as raised:
        error = raised
    distributed.agree(error)
    return result


def _on_main(action: Callable[[], Any]) -> Any:
    """Rank 0's work, however long it takes; None elsewhere. An error of it ends all."""
    return distributed.main_works(action, lambda: None)


def _shown(first: tables.FirstTables, layers: Sequence[LayerActivations]) -> list[Shown]:
    """The best probed neuron of each feature, once each, and between which values its activations lie."""
    probes = first.tables["probes"]
    best = probes[probes["place"] == 1][["layer", "neuron"]].drop_duplicates()
    shown = []
    for index, neuron in best.itertuples(index=False):  # the tables still count the layers that were looked at
        layer = layers[index]
        shown.append(Shown(layer.layer, int(neuron), float(layer.lowest[neuron]), float(layer.top[:, neuron].max())))
    return shown


def _all_tables(
    first: tables.FirstTables,
    model: LoadedModel,
    texts: FeatureSet,
    counts: Sequence[tables.LayerCounts],
    distributions: Sequence[Distribution],
) -> Tables:
    """With the layers' own numbers, where not all were looked at."""
    found = tables.build_tables(first, counts, bin_edges())
    numbers = {-1: -1} | {place: site.layer for place, site in enumerate(model.sites)}
    for table in found.values():
        if "layer" in table:
            table["layer"] = table["layer"].map(numbers)
    found["layers"]["depth"] = found["layers"]["layer"] / max(1, model.layers - 1)
    found["distributions"] = _distributions(found["probes"], distributions, texts.features)
    return found


def _distributions(probes: pd.DataFrame, found: Sequence[Distribution], features: Sequence[str]) -> pd.DataFrame:
    """A row a bin, feature and probed feature."""
    import pandas as pd

    by_neuron = {(part.layer, part.neuron): part.trimmed() for part in found}
    parts = []
    for row in probes[probes["place"] == 1].itertuples():
        part = by_neuron[row.layer, row.neuron]
        bins = len(part.edges) - 1
        parts.append(
            pd.DataFrame(
                {
                    "probe_feature": row.feature,
                    "layer": row.layer,
                    "neuron": row.neuron,
                    "feature": np.repeat(np.array(features, dtype=object), bins),
                    "left": np.tile(part.edges[:-1], len(features)),
                    "right": np.tile(part.edges[1:], len(features)),
                    "count": part.counts.ravel(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


# --- what is written ---------------------------------------------------------------------------------------------


def _write_tables(folder: Path, result: Result) -> None:
    folder.mkdir(parents=True)
    for name in TABLES:
        result.tables[name].to_parquet(folder / f"{name}.parquet", index=False)


def _change(before: Result, after: Result) -> pd.DataFrame:
    change = tables.layer_change(before.tables, after.tables)
    return change.assign(from_step=before.source.step, to_step=after.source.step)


def _write(
    output: Path, arguments: argparse.Namespace, results: Sequence[Result], changes: Sequence[pd.DataFrame]
) -> None:
    import pandas as pd

    from l2e_ds.analysis.figures import write_figures

    report = results[0].report
    about = {
        "name": options.name_of_set(report["source"]),
        "features": len(report["features"]),
        "texts": report["total"]["kept"],
        "tokens": report["total"]["tokens"],
        "sample": _sample(arguments),
    }
    if changes:
        pd.concat(changes, ignore_index=True).to_parquet(output / "changes.parquet", index=False)
    shown = results[-1:] if arguments.all_checkpoints else results
    over_time = [(result.source.step or 0, result.tables) for result in results] if arguments.all_checkpoints else ()
    write_figures({each.source.label: each.tables for each in shown}, about, output / "figures", over_time)
    (output / "analysis.json").write_text(json.dumps(_about(arguments, results), indent=1) + "\n", encoding="utf-8")
    (output / "summary.md").write_text(summary(arguments, results), encoding="utf-8")


def _about(arguments: argparse.Namespace, results: Sequence[Result]) -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "numpy", "scipy", "pandas")
    wanted = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    for name in ("action", "verb", "local_rank", "for_sbatch", "models"):
        wanted.pop(name, None)
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
        "options": wanted,
        "texts": list({result.report["digest"]: result.report for result in results}.values()),
        "ranks": distributed.size(),
        "versions": {
            "l2e_ds": l2e_ds.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
    }


def summary(arguments: argparse.Namespace, results: Sequence[Result]) -> str:
    """The figures that matter, as Markdown."""
    parts = [
        "## Models\n",
        markdown(
            [
                "model",
                "step",
                "parameters",
                "neurons",
                "K-S",
                "own MS",
                "FKR at 1, 2, 5 %",
                "dead",
                "kurtosis",
            ],
            [_model_row(result) for result in results],
        ),
        "Own MS: mean monosemanticity score (MS) on the texts of the neurons' own features. K-S: between the MS of own"
        f" and of all features. FKR: false killing rate. 95 % intervals in brackets, by {arguments.resamples} bootstrap"
        f" resamples of the texts. A sample is a {_sample(arguments)}.\n",
    ]
    last = results[-1]
    parts += [
        f"## Layers of {last.source.label}\n",
        markdown(
            ["layer", "neurons", "dead", "kurtosis", "mean S", "own MS", "FKR at 2 %"],
            [_layer_row(row, last.tables["fkr"]) for _, row in last.tables["layers"].iterrows()],
        ),
        f"## Best probed neuron of each feature, {last.source.label}\n",
        markdown(
            ["feature", "layer", "neuron", "F1 (test)", "MS inside", "MS outside", "ten best against random", "p"],
            _probe_rows(last.tables),
        ),
    ]
    if arguments.suggest_share:
        parts += [
            "## Share k with the lowest False Killing Rate\n",
            markdown(["model", "layer", "k", "FKR there"], [row for result in results for row in _share_rows(result)]),
        ]
    return "\n".join(parts)


def _sample(arguments: argparse.Namespace) -> str:
    return "token" if arguments.samples == "token" else f"text by its {arguments.samples}"


def _model_row(result: Result) -> list[str]:
    scale, layers = result.tables["scale"].iloc[0], result.tables["layers"]
    neurons = int(layers["neurons"].sum())
    dead = float((layers["dead_share"] * layers["neurons"]).sum() / neurons)
    return [
        result.source.label,
        "" if result.source.step is None else f"{result.source.step:,}",
        f"{result.parameters:,}",
        f"{neurons:,}",
        _with_interval(scale, "ks"),
        _with_interval(scale, "own_score"),
        ", ".join(f"{_fkr_at(result.tables['fkr'], -1, share)['fkr']:.1%}" for share in REPORTED_SHARES),
        f"{dead:.2%}",
        f"{layers['kurtosis'].median():.1f}",
    ]


def _layer_row(row: pd.Series, fkr: pd.DataFrame) -> list[str]:
    at = _fkr_at(fkr, int(row["layer"]), 0.02)
    return [
        str(int(row["layer"])),
        f"{int(row['neurons']):,}",
        f"{row['dead_share']:.2%}",
        f"{row['kurtosis']:.1f}",
        f"{row['mean_s']:.3g}",
        _with_interval(row, "own_score"),
        f"{at['fkr']:.1%} [{at['fkr_low']:.1%}, {at['fkr_high']:.1%}]",
    ]


def _probe_rows(found: Tables) -> list[list[str]]:
    rows = []
    best = found["probes"][found["probes"]["place"] == 1].merge(found["significance"], on="feature")
    for _, row in best.iterrows():
        rows.append(
            [
                str(row["feature"]),
                str(row["layer"]),
                str(row["neuron"]),
                f"{row['f1_test']:.2f}",
                _with_interval(row, "score_inside"),
                _with_interval(row, "score_outside"),
                _with_interval(row, "ratio"),
                f"{row['p_adjusted']:.2g}",
            ]
        )
    return rows


def _share_rows(result: Result) -> list[list[str]]:
    rows = [("all", result.tables["scale"].iloc[0])]
    rows += [(str(int(row["layer"])), row) for _, row in result.tables["layers"].iterrows()]
    return [
        [
            result.source.label,
            layer,
            f"{row['suggested_share']:.2%} [{row['suggested_share_low']:.2%}, {row['suggested_share_high']:.2%}]",
            f"{row['suggested_fkr']:.1%}",
        ]
        for layer, row in rows
    ]


def _fkr_at(fkr: pd.DataFrame, layer: int, share: float) -> pd.Series:
    return fkr[(fkr["layer"] == layer) & (fkr["share"] == share)].iloc[0]


def _with_interval(row: pd.Series, name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
