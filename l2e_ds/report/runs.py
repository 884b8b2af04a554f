"""Run directories and studies, read into plain values; runs that go on are read as far as they are.

A *variant* is what is compared: the runs that differ in nothing but their seed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from l2e_ds.config.sections import DECIDES_NO_FIGURE, METHODS, flat
from l2e_ds.errors import DataError
from l2e_ds.report import published
from l2e_ds.run_directory.configuration import check_folder, read_config
from l2e_ds.run_directory.metrics import (
    FILE,
    after_first_intervals,
    comparison_key,
    finite,
    layers_of,
    of_kind,
    read_lines,
)
from l2e_ds.run_directory.results import TaskResult, read_results
from l2e_ds.study.definition import INDEX
from l2e_ds.study.state import read_study

_SHAPE = ("vocab_size", "num_layers", "hidden_size", "num_heads")


@dataclass(frozen=True)
class Run:
    """What a run directory holds. config: dotted key -> value; the lines are those of metrics.jsonl, by kind (findings:
    guard); steady: those of training by which its speed is told.

    study, levels, baseline: of a study: its title, factor -> level, and the folder of the run to compare this one with.
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
        """That it is to have when it is done."""
        return self.config["training.steps"]

    @property
    def step(self) -> int:
        """The newest that it tells of."""
        return max((line["step"] for line in (*self.training[-1:], *self.evaluations[-1:])), default=0)

    @property
    def tokens(self) -> int:
        return max((line["tokens"] for line in (*self.training[-1:], *self.evaluations[-1:])), default=0)

    @property
    def tokens_per_step(self) -> int:
        return self.config["training.global_batch"] * self.config["data.sequence_length"]

    @property
    def model(self) -> str:
        """pythia-70m, or what a pretrained one is called; with what was changed of it."""
        name = self.config["model.name"] or Path(str(self.config.get("model.pretrained"))).name
        changes = [f"{key} {value}" for key in _SHAPE if (value := self.config.get(f"model.{key}")) is not None]
        return f"{name} ({', '.join(changes)})" if changes else name

    @property
    def size(self) -> str:
        """The same without the family's name, as the paper's tables have it: 70m."""
        return self.model.removeprefix("pythia-")

    @property
    def has_threshold(self) -> bool:
        """Whether activations are selected by tau."""
        return (self.config.get("inhibition.retrieval") or METHODS[self.method][0]) == "threshold"

    @property
    def layers(self) -> list[int]:
        """Those that its lines have figures of."""
        return layers_of((*self.training[-1:], *self.evaluations[-1:]))

    @property
    def sets(self) -> list[str]:
        """Names of the sets of a mixture whose held-out loss its newest evaluation has."""
        return [key.partition("/")[2] for key in (self.evaluations or [{}])[-1] if key.startswith("held_out_loss/")]

    @property
    def comparison_layers(self) -> list[int]:
        """Those without inhibition that its newest evaluation has figures of beside others."""
        return layers_of(self.evaluations[-1:], comparison_key)

    @property
    def is_published_method(self) -> bool:
        """Whether the paper has figures of it: plain pretraining, or a method of its own with eq. 5, on the two middle
        layers, with the share that did best at this size."""
        parts = [self.config.get(f"inhibition.{key}") for key in ("retrieval", "mechanism")]
        if self.method == "none":
            return True
        return (
            self.method in ("l2e", "memel")
            and parts == [None, None]
            and self.config["inhibition.loss"] == "published"
            and self.config["inhibition.layers"] == "mid-2"
            and self.config["inhibition.target_share"] == published.BEST_SHARE.get(self.size)
        )


@dataclass(frozen=True)
class Variant:
    """treatment: its name without the model's size."""

    name: str
    treatment: str
    runs: list[Run]

    @property
    def seeds(self) -> list[Run]:
        """The first run of each seed: a second one is no further sample."""
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


@dataclass(frozen=True)
class Collection:
    """Everything that one page tells of. waiting: names of a study's runs that have written nothing yet."""

    runs: list[Run]
    variants: list[Variant]
    titles: list[str]
    waiting: list[str]

    def baseline_of(self, run: Run) -> Run | None:
        """Return the run that has the same seed and all else but inhibits nothing, or the one that its study says."""
        if run.baseline is not None:
            return next((other for other in self.runs if other.directory == run.baseline), None)
        if run.method == "none":
            return None
        wanted = comparable(run, inhibition=False)
        return next(
            (other for other in self.runs if other.method == "none" and comparable(other, inhibition=False) == wanted),
            None,
        )

    def baseline_variant(self, variant: Variant) -> Variant | None:
        found = [base for run in variant.runs if (base := self.baseline_of(run)) is not None]
        return next((other for other in self.variants if found and found[0] in other.runs), None)


def read(paths: Sequence[Path]) -> Collection:
    """Raises DataError: no run directory or study, nothing written yet, a broken file."""
    runs: list[Run] = []
    titles: list[str] = []
    waiting: list[str] = []
    for path in {os.path.realpath(path): path for path in paths}.values():
        check_folder(path)
        if os.path.isfile(path / INDEX):
            title, found, missing = _read_study(path, titles)
            titles.append(title)
            waiting += missing
            runs += found
        else:
            run = _read_run(path)
            if run is None:
                raise DataError(f"{path / FILE}: has no metrics yet")
            runs.append(run)
    runs = _named_apart(_once(runs))
    return Collection(runs, _variants(runs), titles, waiting)


def _read_run(directory: Path) -> Run | None:
    """None where it has begun, but has no metrics yet."""
    try:
        lines = read_lines(directory)
        written = datetime.fromtimestamp((directory / FILE).stat().st_mtime, timezone.utc)
        results = read_results(directory)
    except OSError as error:
        raise DataError(f"{directory}: is no run directory or study, or has no metrics yet: {error.filename}") from None
    config = flat(read_config(directory))
    starts, training, evaluations, findings = (
        of_kind(lines, kind) for kind in ("start", "train", "evaluation", "guard")
    )
    if not training and not evaluations:
        return None
    steady = after_first_intervals(lines)
    name = directory.resolve().name
    run = Run(name, directory, config, starts, training, evaluations, findings, steady, results, written)
    # a run that goes on from an older checkpoint has not yet come to what it was evaluated at before
    reached = (one for one in results if one.step is None or one.step <= run.step)
    kept = [replace(one, stderr=finite(one.stderr)) for one in reached if finite(one.value) is not None]
    return replace(run, results=kept)


def _read_study(directory: Path, others: Sequence[str]) -> tuple[str, list[Run], list[str]]:
    """Return the title, unlike the others', the runs that have begun and the names of those that have not."""
    index = read_study(directory)
    places = {entry.name: directory / entry.directory for entry in index.runs}
    title = f"{index.title} ({directory})" if index.title in others else index.title
    runs = []
    for entry in index.runs:
        place = places[entry.name]
        run = _read_run(place) if os.path.isfile(place / FILE) else None
        if run is not None:
            base = places.get(entry.baseline) if entry.baseline is not None else None
            runs.append(replace(run, name=entry.name, study=title, levels=entry.levels, baseline=base))
    begun = {run.name for run in runs}
    if not runs:
        raise DataError(f"{directory}: none of its {len(places)} runs has metrics yet")
    return title, runs, [name for name in places if name not in begun]


def _once(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, each once: one that is given by itself and in a study, too, is the study's."""
    found: dict[Path, Run] = {}
    for run in runs:
        place = run.directory.resolve()
        if place not in found or (run.study and not found[place].study):
            found[place] = run
    return list(found.values())


def _named_apart(runs: Sequence[Run]) -> list[Run]:
    """With as much of the path as it takes before names that two runs share."""
    names = [run.name for run in runs]
    parts = [run.directory.resolve().parts for run in runs]
    for depth in range(2, max(map(len, parts)) + 1):
        twice = {name for name in names if names.count(name) > 1}
        names = ["/".join(own[-depth:]) if name in twice else name for name, own in zip(names, parts, strict=True)]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


# --- what is compared with what ----------------------------------------------------------------------------------


def comparable(run: Run, inhibition: bool = True, seed: bool = True) -> dict[str, Any]:
    """Return the part of its configuration that decides its figures, on whatever machine."""
    return {
        key: value
        for key, value in run.config.items()
        if not key.startswith(DECIDES_NO_FIGURE)
        and (inhibition or not key.startswith("inhibition."))
        and (seed or key != "training.seed")
    }


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values are not all the same, in the order of the files."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({json.dumps(config.get(key), default=str) for config in configs}) > 1]


def _variants(runs: Sequence[Run]) -> list[Variant]:
    """Return those of one size together, plain pretraining first, otherwise as they come."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = [run.study, run.levels] if run.levels is not None else comparable(run, seed=False)
        groups.setdefault(json.dumps(key, default=str), []).append(run)
    alone = [group[0] for group in groups.values() if group[0].levels is None]
    names = _names(alone, all(len(group) == 1 for group in groups.values()))
    several_studies = len({run.study for run in runs}) > 1
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
        variants.append(Variant(name, treatment, group))
    sizes = list(dict.fromkeys(variant.size for variant in variants))
    return sorted(variants, key=lambda variant: (sizes.index(variant.size), variant.method != "none"))


def _names(firsts: Sequence[Run], single: bool) -> dict[str, tuple[str, str]]:
    """Of the variants outside studies, by their first run: the run's own name, or what makes the variant differ."""
    if single:
        return {run.name: (run.name, run.name) for run in firsts}
    inhibited = [run for run in firsts if run.method != "none"]  # the settings of inhibition mean nothing to the others
    keys = differing([comparable(run, inhibition=False, seed=False) for run in firsts])
    keys += [key for key in differing([comparable(run) for run in inhibited]) if key.startswith("inhibition.")]
    keys = [key for key in keys if not key.startswith("model.")]
    sizes = len({run.size for run in firsts}) > 1
    names = {}
    for run in firsts:
        own = [key for key in keys if key != "inhibition.method"]
        if run.method == "none":
            own = [key for key in own if not key.startswith("inhibition.")]
        own = [key for key in own if run.config.get(key) is not None]  # a deactivation has no strength
        others = [f"{key.rpartition('.')[2]} {run.config.get(key)}" for key in own]
        treatment = ", ".join([run.method, *others])
        names[run.name] = (f"{run.size} {treatment}" if sizes else treatment, treatment)
    return names
