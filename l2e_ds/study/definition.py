"""Read a study file (docs/studies.md, "A study file"), and make its runs: all combinations of levels, by seed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from l2e_ds.config.reading import checked, find_file, portable, split_override, takes_text
from l2e_ds.config.sections import LocalPath, Section
from l2e_ds.config.yaml_text import dump_yaml, parse_yaml, read_yaml
from l2e_ds.errors import ConfigError
from l2e_ds.system.files import REPOSITORY

FILE, INDEX = "study.yaml", "study.json"
LEVEL = re.compile(r"[A-Za-z0-9_.+-]+")
KEY = re.compile(r"[a-z_]+\.[a-z_]+")
LONGEST_NAME = 200  # characters; a file's name may have 255 bytes
DECIDED = {"training.run_directory": "directory", "training.seed": "seeds"}
"""Keys of a run that the study decides, and the keys of the study that decide them."""

COLUMNS = ("run", "combination", "seed", "baseline", "state", "step", "tokens")
"""Columns of the table of runs (collect.py), beside the factors and the metrics."""
LAYER_MEANS = ("top_share_score", "mean_s", "kurtosis")
"""Metrics of the hooked layers, of which the table has the means."""
RESULT_COLUMNS = (
    *("evaluated_step", "measured_layers", "measured_share", "held_out_loss", *LAYER_MEANS),
    *("observed_share", "step_seconds", "tokens_per_second", "peak_memory_gib"),
)
"""Columns of metrics (run_directory/metric_table.yaml), but for those of tasks, and of the layers and the target share
that LAYER_MEANS are of."""


class Evaluation(Section):
    """Tasks of lm-evaluation-harness on the finished run (`l2e-ds evaluate`)."""

    tasks: list[str] = Field(min_length=1)
    """Tasks and groups by the harness's names, or `paper`."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples in each prompt. Default: each task's own number."""
    include_path: list[LocalPath] = Field([])
    """Folders of task files of your own."""
    limit: int | None = Field(None, gt=0)
    """Take only the first documents of each task."""


class StudyFile(Section):
    """The keys of a study file (docs/studies.md)."""

    title: str = ""
    base: LocalPath | None = None
    directory: LocalPath = ""
    seeds: list[int] = Field([1234], min_length=1)
    set: dict[str, Any] = Field({})
    factors: dict[str, Any] = Field({})
    exclude: list[dict[str, Any]] = Field([])
    baseline: dict[str, Any] | None = None
    evaluate: list[Evaluation] = Field([])


Level = dict[str, Any]
"""What one value of a factor sets, by dotted key; under `base` the run file that replaces the study's, if any."""

Levels = dict[str, str]
"""The name of the level of each factor."""


class StudyRun(Section, extra="ignore"):
    """A run of a study, as in study.json.

    overrides: of the run file `base`, without the run directory and the cache; baseline: the name of the run that this
    one is compared with, or None; sources: where the study gives each dotted key, to begin an error's line.
    """

    name: str
    directory: str
    levels: Levels = Field({})
    seed: int | None = None
    baseline: str | None = None
    overrides: list[str] = Field([])
    base: str = ""
    sources: dict[str, str] = Field({}, exclude=True)


class Index(Section, extra="ignore"):
    """The content of study.json, for readers that do not know study files."""

    title: str
    name: str = ""
    factors: dict[str, list[str]] = Field({})
    evaluate: list[Evaluation] = Field([])
    runs: list[StudyRun]


@dataclass(frozen=True)
class Study:
    """Holds a study.

    file: with the paths of all files that it names. runs: all combinations with the first seed come first, so that a
    study that is cut off has whole replicates.
    """

    file: StudyFile
    directory: Path
    factors: dict[str, dict[str, Level]]
    runs: tuple[StudyRun, ...]

    def index(self) -> Index:
        return Index(
            title=self.file.title,
            name=self.directory.absolute().name,
            factors={factor: list(levels) for factor, levels in self.factors.items()},
            evaluate=self.file.evaluate,
            runs=list(self.runs),
        )

    def dump(self) -> str:
        """Return the file, as YAML, which gives the same runs from anywhere."""
        return dump_yaml(self.file.model_dump(exclude_defaults=True))


def read_study(path: Path, overrides: Sequence[str] = (), directory: Path | None = None) -> Study:
    """Read a study file and make its runs.

    overrides: `section.key=value` for all runs, in addition to the file's `set`. directory: replaces the file's. Raises
    ConfigError naming the file and the key, what was given and what is allowed.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a study file is a mapping with the keys {', '.join(StudyFile.model_fields)}")
    file = checked(StudyFile, raw, str(path))
    own: dict[str, Any] = {}
    for override in overrides:
        section, key, value = split_override(override)
        own |= _settings({f"{section}.{key}": value}, f"override {override!r}")
    sources = {key: f"{path}: set.{key}" for key in file.set}
    sources |= {key: f"override '{key}={text_of(value)}'" for key, value in own.items()}
    sources["training.seed"] = f"{path}: seeds"
    sources["training.run_directory"] = f"{path}: directory" if directory is None else "--directory"
    if directory is None:
        beside = path.name == FILE and (path.parent / INDEX).is_file()
        directory = path.parent if beside else Path(file.directory or f"studies/{path.stem}")
    try:
        factors = _factors(file, path)
        for name, levels in factors.items():
            for key in (key for level in levels.values() for key in level if key in own):
                raise ConfigError(f"override {key}: the factor {name} sets it; change the study file")
        file = file.model_copy(
            update={
                "title": file.title or path.stem,
                "directory": "",
                "base": None if file.base is None else _run_file_name(file.base, path, "base"),
                "set": _settings(file.set, "set") | own,
                "factors": {
                    name: given if isinstance(given, list) else factors[name] for name, given in file.factors.items()
                },
                "exclude": [_levels(given, f"exclude.{i}", factors) for i, given in enumerate(file.exclude)],
                "baseline": None if file.baseline is None else _levels(file.baseline, "baseline", factors),
                "evaluate": [_with_found_folders(part, path, f"evaluate.{i}") for i, part in enumerate(file.evaluate)],
            }
        )
        return Study(file, directory, factors, _runs(file, factors, sources, path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def text_of(value: Any) -> str:
    """Return a value as it stands in an override; also the name of a level that is given by its value."""
    try:
        if isinstance(value, str) and value.isprintable() and parse_yaml(value, "") == value:
            return value
    except ConfigError:
        pass
    return json.dumps(value)


def _factors(file: StudyFile, path: Path) -> dict[str, dict[str, Level]]:
    factors: dict[str, dict[str, Level]] = {}
    set_by: dict[str, str] = {}
    for name, given in file.factors.items():
        where = f"factors.{name}"
        if name in (*COLUMNS, *RESULT_COLUMNS):
            raise ConfigError(f"{where}: is a column of the results already; give the factor another name")
        if isinstance(given, list) and KEY.fullmatch(name):
            levels = {text_of(value): _settings({name: value}, "factors") for value in given}
            if len(levels) < len(given):
                raise ConfigError(f"{where}: {given} names a value twice")
        elif isinstance(given, dict) and LEVEL.fullmatch(name):
            bad = [level for level in given if not isinstance(level, str) or not LEVEL.fullmatch(level)]
            if bad:
                raise ConfigError(
                    f"{where}: got the level {bad[0]!r}, allowed: letters, digits and _ . + - (in quotes)"
                )
            levels = {level: _level(settings, f"{where}.{level}", path) for level, settings in given.items()}
        else:
            raise ConfigError(
                f"{where}: got {given!r}; write levels and what each sets, e.g. {{none: {{inhibition.method: none}}}},"
                " or a dotted key and a list of its values"
            )
        if not levels:
            raise ConfigError(f"{where}: got {given!r}, give at least one level")
        factors[name] = levels
        for key in sorted({key for level in levels.values() for key in level}):
            if set_by.setdefault(key, name) != name:
                raise ConfigError(f"{where}: sets {key}, as the factor {set_by[key]} does")
    return factors


def _level(given: Any, where: str, path: Path) -> Level:
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: got {given!r}, must be a mapping of dotted keys, e.g. {{inhibition.method: l2e}}")
    level = _settings({key: value for key, value in given.items() if key != "base"}, where)
    base = given.get("base")
    return level if base is None else {"base": _run_file_name(base, path, f"{where}.base")} | level


def _settings(given: dict[Any, Any], where: str) -> dict[str, Any]:
    for key, value in given.items():
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise ConfigError(f"{where}: got the key {key!r}, write section.key, e.g. training.steps")
        if key in DECIDED:
            raise ConfigError(f"{where}: {key} is decided by the study's {DECIDED[key]}; remove it")
        if takes_text(key) and not isinstance(value, str | list | None):
            raise ConfigError(f"{where}: {key}: got {value!r}; must be text (in quotes)")
    return given


def _run_file_name(base: Any, path: Path, where: str) -> str:
    """Return a name of a run file that leads to it from any folder. Raises ConfigError."""
    found = find_file(base, path) if isinstance(base, str) else None
    if found is None:
        raise ConfigError(f"{where}: no such run file: {base}")
    return portable(found)


def _with_found_folders(evaluation: Evaluation, path: Path, where: str) -> Evaluation:
    folders = []
    for name in evaluation.include_path:
        places = [Path(name), path.parent / name, REPOSITORY / name]
        found = next((place for place in places if place.is_dir()), None)
        if found is None:
            raise ConfigError(f"{where}.include_path: no such folder: {name}")
        folders.append(str(found.resolve()))
    return evaluation.model_copy(update={"include_path": folders})


def _levels(given: dict[str, Any], where: str, factors: dict[str, dict[str, Level]]) -> Levels:
    """Return the levels that a mapping of the file names, as texts. Raises ConfigError."""
    levels = {}
    for factor, value in given.items():
        if factor not in factors:
            raise ConfigError(f"{where}: there is no factor {factor!r}; allowed: {', '.join(factors)}")
        levels[factor] = value if isinstance(value, str) and value in factors[factor] else text_of(value)
        if levels[factor] not in factors[factor]:
            raise ConfigError(f"{where}.{factor}: got {value!r}; allowed: {', '.join(factors[factor])}")
    if not levels:
        raise ConfigError(f"{where}: got {given}, name at least one factor and its level")
    return levels


def _runs(
    file: StudyFile, factors: dict[str, dict[str, Level]], sources: dict[str, str], path: Path
) -> tuple[StudyRun, ...]:
    """Return the runs. sources: of the keys that all runs share; path: of the study file. Raises ConfigError."""
    if len(set(file.seeds)) < len(file.seeds):
        raise ConfigError(f"seeds: {file.seeds} names a seed twice")
    grid = [dict(zip(factors, names, strict=True)) for names in product(*factors.values())]
    kept = [levels for levels in grid if not any(excluded.items() <= levels.items() for excluded in file.exclude)]
    if not kept:
        raise ConfigError("exclude: leaves no run")
    runs = []
    for seed in file.seeds:
        for levels in kept:
            baseline = None if file.baseline is None else baseline_of(levels, kept, file.baseline, factors)
            chosen = [factors[factor][name] for factor, name in levels.items()]
            name = _name(levels, seed)
            settings, given_by = dict(file.set), dict(sources)
            for (factor, text), level in zip(levels.items(), chosen, strict=True):
                settings |= level
                where = f"{path}: factors.{factor}" + f".{text}" * (factor not in level)
                given_by |= dict.fromkeys(level, where)
            base = settings.pop("base", file.base)
            if base is None:
                raise ConfigError(f"base: is required; the run {name} has none")
            overrides = [
                f"{key}={value if isinstance(value, str) and takes_text(key) else text_of(value)}"
                for key, value in settings.items()
            ]
            runs.append(
                StudyRun(
                    name=name,
                    directory=f"runs/{name}",
                    levels=levels,
                    seed=seed,
                    baseline=None if baseline is None else _name(baseline, seed),
                    overrides=[*overrides, f"training.seed={seed}"],
                    base=base,
                    sources=given_by,
                )
            )
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"factors: two runs would be called {twice!r}; give a level another name")
    if len(longest := max(names, key=len)) > LONGEST_NAME:
        raise ConfigError(f"factors: {longest[:40]}... has {len(longest)} characters, allowed: {LONGEST_NAME}")
    return tuple(runs)


def _name(levels: Levels, seed: int) -> str:
    return "-".join([*(re.sub(r"[^A-Za-z0-9_.+-]+", "_", level) for level in levels.values()), f"seed{seed}"])


def baseline_of(
    levels: Levels, kept: Sequence[Levels], baseline: Levels, factors: dict[str, dict[str, Level]]
) -> Levels | None:
    """Return the combination, of those that are run, that this one is compared with; None for a baseline itself.

    It has the baseline's levels, and for the other factors this one's. A factor that sets nothing but inhibition may
    differ if the baseline was excluded at this combination's level. Raises ConfigError if several fit.
    """
    if baseline.items() <= levels.items():
        return None
    meaningless = {
        name
        for name, found in factors.items()
        if all(key.startswith("inhibition.") for level in found.values() for key in level)
    }
    fitting: dict[int, list[Levels]] = {}
    for other in kept:
        if not baseline.items() <= other.items():
            continue
        differing = [name for name in levels if name not in baseline and other[name] != levels[name]]
        nearer = any({**other, name: levels[name]} in kept for name in differing)
        if not nearer and meaningless.issuperset(differing):
            fitting.setdefault(len(differing), []).append(other)
    if not fitting:
        return None
    found = fitting[min(fitting)]
    if len(found) > 1:
        names = " and ".join(", ".join(other.values()) for other in found[:2])
        raise ConfigError(
            f"baseline: {', '.join(levels.values())} could be compared with {names}; exclude all but one of them"
        )
    return found[0]
