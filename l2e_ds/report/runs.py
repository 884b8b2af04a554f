"""Read run directories and studies into plain values. A run that is not finished is read as far as it is.

A *variant* is what is compared: the runs that differ in nothing but their seed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from l2e_ds.config.sections import DECIDES_NO_RESULT, METHODS, flat
from l2e_ds.errors import ConfigError, DataError
from l2e_ds.report import published
from l2e_ds.run_directory import metrics
from l2e_ds.run_directory.configuration import check_folder, read_config
from l2e_ds.run_directory.results import TaskResult, read_results
from l2e_ds.study.definition import INDEX
from l2e_ds.study.state import read_index

_SHARE = "inhibition.target_share:"  # how a change of it begins
_SHAPE = ("vocab_size", "num_layers", "hidden_size", "num_heads")
_IN_NAME = {f"model.{key}" for key in ("name", "config", "pretrained", *_SHAPE)}  # which `Run.model` says


@dataclass(frozen=True)
class Run:
    """The content of a run directory.

    config: dotted key -> value. starts, training, evaluations, findings: the lines of metrics.jsonl of the kinds start,
    train, evaluation, guard. steady: the lines of training from which the speed is computed. results: of evaluation
    tasks. written: when metrics.jsonl was last written. For a run of a study: study, its title; levels, factor ->
    level; baseline, the directory of the run to compare this one with.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    starts: list[dict]
    training: list[dict]
    evaluations: list[dict]
    findings: list[dict]
    steady: list[dict]
    results: list[TaskResult]
    written: datetime
    study: str = ""
    levels: Mapping[str, str] | None = None
    baseline: Path | None = None

    @property
    def method(self) -> str:
        return self.config["inhibition.method"]

    @property
    def seed(self) -> int:
        return self.config["training.seed"]

    @property
    def steps(self) -> int:
        """The number of steps after which the run ends."""
        return self.config["training.steps"]

    def lines(self, kind: str) -> list[dict]:
        """Return the lines of a kind, train or evaluation."""
        return self.training if kind == "train" else self.evaluations

    @property
    def newest(self) -> list[dict]:
        """The newest line of training and of evaluations, of those that it has."""
        return [*self.training[-1:], *self.evaluations[-1:]]

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.newest), default=0)

    @property
    def tokens(self) -> int:
        return max((line["tokens"] for line in self.newest), default=0)

    @property
    def skipped_steps(self) -> int:
        """The number of batches that were consumed without changing a weight."""
        line = self.training[-1] if self.training else {}
        return line.get("step", 0) - line.get("applied_steps", line.get("step", 0))

    @property
    def tokens_per_step(self) -> int:
        return self.config["training.global_batch"] * self.config["data.sequence_length"]

    @property
    def model(self) -> str:
        """The model's name, such as pythia-70m or that of its file or folder, with what was changed of its shape."""
        given = (self.config.get(f"model.{key}") for key in ("config", "pretrained"))
        path = Path(next((one for one in given if one), ""))
        if path.suffix == ".json":  # a model.config: of a folder, or a file
            path = path.parent if path.name == "config.json" else path.with_suffix("")
        name = self.config["model.name"] or path.name
        changes = [f"{key} {value}" for key in _SHAPE if (value := self.config.get(f"model.{key}")) is not None]
        return f"{name} ({', '.join(changes)})" if changes else name

    @property
    def size(self) -> str:
        """The model's name without the family, as in the paper's tables: 70m."""
        return self.model.removeprefix("pythia-")

    @property
    def has_threshold(self) -> bool:
        """Whether activations are selected by tau."""
        return (self.config.get("inhibition.retrieval") or METHODS[self.method][0]) == "threshold"

    @property
    def layers(self) -> list[int]:
        """The layers of which its newest lines have metrics."""
        return metrics.layers_of(self.newest)

    @property
    def sets(self) -> list[str]:
        """The sets of a mixture of which its newest evaluation has the held-out loss."""
        return [key.partition("/")[2] for key in (self.evaluations or [{}])[-1] if key.startswith("held_out_loss/")]

    @property
    def texts(self) -> list[str]:
        """The texts of `evaluation.texts` of which its newest evaluation has the loss."""
        return metrics.texts_of((self.evaluations or [{}])[-1])

    @property
    def comparison_layers(self) -> list[int]:
        """The layers without inhibition that its newest evaluation has for comparison."""
        return metrics.layers_of(self.evaluations[-1:], metrics.comparison_key)

    @property
    def is_published_method(self) -> bool:
        """Whether it is trained from scratch, plain or as the paper does: eq. 5 on the two middle layers with the best
        share of its size."""
        if self.config.get("model.pretrained") is not None:
            return False
        if self.method == "none":
            return True
        return (
            self.method in ("l2e", "memel")
            and self.config.get("inhibition.retrieval") is None
            and self.config.get("inhibition.mechanism") is None
            and self.config["inhibition.loss"] == "published"
            and self.config["inhibition.layers"] == "mid-2"
            and self.config["inhibition.target_share"] == published.BEST_SHARE.get(self.size)
        )


@dataclass(frozen=True)
class Variant:
    """The runs that differ in nothing but their seed.

    treatment: the name without the model's size. shown_size: the size, or None if all variants have the same or the
    name tells it.
    """

    name: str
    treatment: str
    shown_size: str | None
    runs: list[Run]

    @property
    def seeds(self) -> list[Run]:
        """The first run of each seed, as a second one is no further sample."""
        first: dict[int, Run] = {}
        for run in self.runs:
            first.setdefault(run.seed, run)
        return list(first.values())

    @property
    def size(self) -> str:
        return self.runs[0].size

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def is_published_method(self) -> bool:
        return all(run.is_published_method for run in self.runs)


@dataclass(frozen=True)
class Collection:
    """All that one report shows. waiting: names of the runs of studies that have written nothing yet."""

    runs: list[Run]
    variants: list[Variant]
    titles: list[str]
    waiting: list[str]

    def baseline_of(self, run: Run) -> Run | None:
        """Return the run that its study names, or else that of the same settings without inhibition, or None."""
        if run.baseline is not None:
            return next((other for other in self.runs if other.directory == run.baseline), None)
        if run.method == "none":
            return None
        wanted = comparable(run, inhibition=False)
        plain = (other for other in self.runs if other.method == "none")
        return next((other for other in plain if comparable(other, inhibition=False) == wanted), None)

    def baseline_variant(self, variant: Variant) -> Variant | None:
        """Return the variant of the first baseline of a variant's runs, or None."""
        bases = [base for run in variant.runs if (base := self.baseline_of(run)) is not None]
        return next((other for other in self.variants if bases and bases[0] in other.runs), None)


def read(paths: Sequence[Path]) -> Collection:
    """Read run directories and studies.

    Raises DataError for a path that is neither, for one that has no metrics yet, and for a broken file.
    """
    runs: list[Run] = []
    titles: list[str] = []
    waiting: list[str] = []
    for path in {os.path.realpath(path): path for path in paths}.values():
        if os.path.isfile(path / INDEX):
            title, begun, not_begun = _read_study(path, titles)
            titles.append(title)
            runs += begun
            waiting += not_begun
        else:
            run = read_run(path)
            if run is None:
                raise DataError(f"{path / metrics.FILE}: has no metrics yet")
            runs.append(run)
    runs = _without_repeated(runs)
    names = Counter(run.name for run in runs)
    runs = [replace(run, name=str(run.directory)) if names[run.name] > 1 else run for run in runs]
    return Collection(runs, _variants(runs), titles, waiting)


def _with_one_share(lines: Sequence[dict], evaluations: list[dict]) -> list[dict]:
    """Return the evaluations, without MS of the top share where it is of another share than at the end of the run.

    lines: all of the run's, in order. A start says what a resume has changed (`training.allow_changes`).
    """
    changed = [
        index
        for index, line in enumerate(lines)
        if line["kind"] == "start" and any(text.startswith(_SHARE) for text in line.get("changes") or ())
    ]
    earlier = len(metrics.of_kind(lines[: changed[-1]], "evaluation")) if changed else 0
    stripped = (
        {key: value for key, value in line.items() if not key.endswith("/top_share_score")}
        for line in evaluations[:earlier]
    )
    return [*stripped, *evaluations[earlier:]]


def read_run(directory: Path) -> Run | None:
    """Return the run in a directory, or None if it has no metrics yet. Raises DataError."""
    check_folder(directory)
    try:
        lines = metrics.read_lines(directory)
        written = datetime.fromtimestamp((directory / metrics.FILE).stat().st_mtime, timezone.utc)
        results = read_results(directory)
    except PermissionError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    except OSError as error:
        raise DataError(f"{directory}: is no run directory, or has no metrics yet: {error.filename}") from None
    starts, training, evaluations, findings = (
        metrics.of_kind(lines, kind) for kind in ("start", "train", "evaluation", "guard")
    )
    if not training and not evaluations:
        return None
    evaluations = _with_one_share(lines, evaluations)
    config = flat(read_config(directory))  # which a run writes after it has opened its metrics
    steady = metrics.after_first_intervals(lines)
    name = directory.resolve().name
    run = Run(name, directory, config, starts, training, evaluations, findings, steady, results, written)
    # A run that was resumed from an older checkpoint may have results of steps that it has not reached again.
    reached = (result for result in results if result.step is None or result.step <= run.step)
    kept = [
        replace(result, stderr=metrics.finite(result.stderr))
        for result in reached
        if metrics.finite(result.value) is not None
    ]
    return replace(run, results=kept)


def _read_study(directory: Path, others: Sequence[str]) -> tuple[str, list[Run], list[str]]:
    """Return a study's title, made unlike the others, the runs that have begun and the names of those that have not."""
    try:
        index = read_index(directory)
    except ConfigError as error:
        raise DataError(str(error)) from None
    places = {entry.name: directory / entry.directory for entry in index.runs}
    title = f"{index.title} ({directory})" if index.title in others else index.title
    runs = []
    for entry in index.runs:
        place = places[entry.name]
        run = read_run(place) if os.path.isfile(place / metrics.FILE) else None
        if run is not None:
            base = places.get(entry.baseline) if entry.baseline is not None else None
            runs.append(replace(run, name=entry.name, study=title, levels=entry.levels, baseline=base))
    begun = {run.name for run in runs}
    if not runs:
        raise DataError(f"{directory}: none of its {len(places)} runs has metrics yet")
    return title, runs, [name for name in places if name not in begun]


def _without_repeated(runs: Sequence[Run]) -> list[Run]:
    """Return each run once. A run that is given both by itself and in a study is the study's."""
    found: dict[Path, Run] = {}
    for run in runs:
        first = found.setdefault(run.directory.resolve(), run)
        if run.study and not first.study:
            found[run.directory.resolve()] = run
    return list(found.values())


def comparable(run: Run, inhibition: bool = True, seed: bool = True) -> dict[str, Any]:
    """Return the part of a run's configuration that decides its results, on any machine."""
    return {
        key: value
        for key, value in run.config.items()
        if not key.startswith(DECIDES_NO_RESULT)
        and (inhibition or not key.startswith("inhibition."))
        and (seed or key != "training.seed")
    }


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values are not all the same, in the order of the configurations."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({json.dumps(config.get(key), default=str) for config in configs}) > 1]


def _variants(runs: Sequence[Run]) -> list[Variant]:
    """Group runs into variants. Those of one size are together, plain pretraining first, others in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = [run.study, run.levels] if run.levels is not None else comparable(run, seed=False)
        groups.setdefault(json.dumps(key, default=str), []).append(run)
    alone = [group[0] for group in groups.values() if group[0].levels is None]
    names = _names(alone, all(len(group) == 1 for group in groups.values()))
    several_studies = len({run.study for run in runs}) > 1
    several_sizes = len({run.size for run in runs}) > 1
    variants = []
    for group in groups.values():
        first = group[0]
        if first.levels is None:
            name, treatment = names[first.name]
        else:
            name = " ".join(first.levels.values()) or first.study
            treatment = " ".join(level for factor, level in first.levels.items() if factor != "size") or name
            if several_studies:
                name, treatment = (f"{first.study}: {part}" for part in (name, treatment))
        shown_size = first.size if several_sizes and first.size not in name else None
        variants.append(Variant(name, treatment, shown_size, group))
    sizes = list(dict.fromkeys(variant.size for variant in variants))
    return sorted(variants, key=lambda variant: (sizes.index(variant.size), variant.method != "none"))


def _names(firsts: Sequence[Run], single: bool) -> dict[str, tuple[str, str]]:
    """Return (name, treatment) of the variants outside studies, by the name of each one's first run.

    These are the run's name if every variant has one run (single), else the settings by which it differs.
    """
    if single:
        return {run.name: (run.name, run.name) for run in firsts}
    inhibited = [run for run in firsts if run.method != "none"]  # others do not use the settings of inhibition
    keys = differing([comparable(run, inhibition=False, seed=False) for run in firsts])
    of_inhibition = [key for key in differing([comparable(run) for run in inhibited]) if key.startswith("inhibition.")]
    sizes = len({run.size for run in firsts}) > 1
    names = {}
    for run in firsts:
        settings = {key: run.config.get(key) for key in [*keys, *(of_inhibition if run in inhibited else ())]}
        others = [
            f"{key.rpartition('.')[2]} {value}"
            for key, value in settings.items()
            if value is not None and key not in _IN_NAME and key != "inhibition.method"
        ]
        treatment = ", ".join([run.method, *others])
        names[run.name] = (f"{run.size} {treatment}" if sizes else treatment, treatment)
    counts = Counter(name for name, _ in names.values())
    return {
        run: (f"{name} ({run})", f"{treatment} ({run})") if counts[name] > 1 else (name, treatment)
        for run, (name, treatment) in names.items()
    }
