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
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from l2e_ds import distributed
from l2e_ds.analysis import options
from l2e_ds.analysis.collect import (
    BINS,
    Distribution,
    LayerActivations,
    LayerHistogram,
    Reference,
    Texts,
    collect_activations,
    count_scores,
    count_scores_of_samples,
)
from l2e_ds.analysis.load import LoadedModel, ModelSource, all_checkpoints, find_model, load_model, load_tokenizer_of
from l2e_ds.errors import ConfigError, L2EError

if TYPE_CHECKING:
    import pandas as pd

    from l2e_ds.analysis.features import FeatureSet
    from l2e_ds.analysis.tables import FirstTables

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

    _check(arguments)
    quiet_libraries()
    sources = _sources(arguments)
    device = distributed.join(launch, TIMEOUT_MINUTES)
    with _folders(arguments) as (scratch, output):
        session = _Session(arguments, device, scratch)
        results: list[_Result] = []
        changes: list[pd.DataFrame] = []
        for source in sources:
            result = session.analyse(source)
            if distributed.is_main():
                if arguments.all_checkpoints and results:
                    changes.append(_change(results[-1], result))
                results.append(result)
        if output is not None:
            _write(output, arguments, session, results, changes)
    if distributed.is_main():
        print((arguments.output / "summary.md").read_text(encoding="utf-8"))
        if arguments.suggest_share:
            print(_suggestions(results))
        print(f"figures and tables: {arguments.output}", flush=True)
    distributed.leave()


# --- what was asked for ------------------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace) -> None:
    options.check(arguments)
    if arguments.resamples < 20:
        raise ConfigError(f"--resamples: got {arguments.resamples}, allowed: an integer >= 20")
    if arguments.all_checkpoints and len(arguments.models) != 1:
        raise ConfigError(f"--all-checkpoints: goes with one run, got {len(arguments.models)} models")
    if arguments.zero3 and arguments.samples != "token" and distributed.find_launch().size == 1:
        raise ConfigError("--zero3: one rank has nobody to share the weights with")
    path = arguments.output
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"--output: {path} exists and is not an empty folder")


def _sources(arguments: argparse.Namespace) -> list[ModelSource]:
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
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


# --- one model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Result:
    """What rank 0 keeps of a model."""

    source: ModelSource
    tables: dict[str, pd.DataFrame]
    parameters: int
    tokens: int | None
    report: dict[str, Any]


class _Session:
    """What stays the same from model to model."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device, scratch: Path) -> None:
        self.arguments, self.device, self.scratch = arguments, device, scratch
        self._texts: dict[str, FeatureSet] = {}

    def texts_of(self, source: ModelSource) -> FeatureSet:
        """In the model's tokens; models of one tokenizer see the very same."""
        from l2e_ds.analysis.features import format_report
        from l2e_ds.data.tokenizer import tokenizer_digest

        tokenizer = load_tokenizer_of(source, self.arguments.tokenizer)
        digest = tokenizer_digest(tokenizer)
        if digest not in self._texts:
            self._texts[digest] = options.load_features(self.arguments, tokenizer)
            if distributed.is_main():
                print(format_report(self._texts[digest].report), flush=True)
        return self._texts[digest]

    def analyse(self, source: ModelSource) -> _Result:
        """Both passes and all tables. Collective; the tables are rank 0's, empty elsewhere."""
        arguments = self.arguments
        texts = self.texts_of(source)
        model = load_model(source, arguments.layers, arguments.precision, self.device, arguments.zero3)
        options.check_fits(model, texts)
        self._check_disk(model, texts)
        folder = self.scratch / source.label
        folder.mkdir()
        rows = Texts(texts.tokens, arguments.batch, keep_step=arguments.zero3)
        layers = collect_activations(model, rows, folder)
        if arguments.samples != "token":
            layers = [layer.as_one_sample(arguments.samples) for layer in layers]

        first = _on_main(lambda: _first_tables(layers, texts, model, arguments))
        references, shown = distributed.main_decides(
            (_references(first), _shown(first, layers)) if first is not None else None
        )
        if arguments.samples == "token":
            histograms, distributions = count_scores(
                model, rows, texts.labels, references, len(texts.features), shown, folder
            )
        else:
            histograms = [
                count_scores_of_samples(layer, texts.labels, reference, folder / f"scores-{layer.layer:03d}.npy")
                for layer, reference in zip(layers, references, strict=False)
            ]
            distributions = _distributions_of_samples(layers, texts, shown)
        tables = _on_main(lambda: _all_tables(first, model, texts, histograms, distributions)) or {}
        shutil.rmtree(folder, ignore_errors=True)
        return _Result(source, tables, model.parameters, model.tokens, texts.report)

    def _check_disk(self, model: LoadedModel, texts: FeatureSet) -> None:
        """That the tables of texts will find room. Raises ConfigError on every rank."""
        count = len(texts.labels)
        needed = count * sum(12 * site.neurons + 8 * BINS for site in model.sites)
        free = shutil.disk_usage(self.scratch).free
        error = None
        if needed > free:
            error = ConfigError(
                f"--scratch: the tables of {count} texts and {len(model.sites)} layers take {needed / 1e9:.1f} GB,"
                f" {self.scratch.parent} has {free / 1e9:.1f} GB free; fewer --layers or texts take less"
            )
        distributed.agree(error)


def _on_main(action: Callable[[], Any]) -> Any:
    """Rank 0's work, however long it takes; None elsewhere. An error of it ends all."""
    return distributed.main_works(action, lambda: None)


def _first_tables(
    layers: Sequence[LayerActivations], texts: FeatureSet, model: LoadedModel, arguments: argparse.Namespace
) -> FirstTables:
    raise NotImplementedError


def _references(first: FirstTables) -> list[Reference]:
    raise NotImplementedError


def _shown(first: FirstTables, layers: Sequence[LayerActivations]) -> list[tuple[int, int, float, float]]:
    raise NotImplementedError


def _distributions_of_samples(
    layers: Sequence[LayerActivations], texts: FeatureSet, shown: Sequence[tuple[int, int, float, float]]
) -> list[Distribution]:
    raise NotImplementedError


def _all_tables(
    first: FirstTables,
    model: LoadedModel,
    texts: FeatureSet,
    histograms: Sequence[LayerHistogram],
    distributions: Sequence[Distribution],
) -> dict[str, pd.DataFrame]:
    raise NotImplementedError
