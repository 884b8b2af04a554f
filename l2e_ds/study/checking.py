"""Check a study's runs before anything starts, and write them to its folder."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from l2e_ds.checkpoint.changes import Changes
from l2e_ds.config.reading import find_file, load_run_config
from l2e_ds.config.sections import RunConfig, flat
from l2e_ds.errors import ConfigError, DataError
from l2e_ds.run_directory.names import newest_step, published_checkpoints
from l2e_ds.study.definition import FILE, INDEX, Study, StudyRun
from l2e_ds.study.state import config_file, run_directory
from l2e_ds.system.files import write_whole
from l2e_ds.training.preflight import ResolvedRun, preflight, resolve_run


def resolve_runs(study: Study, ranks: int, this_machine: bool) -> dict[str, ResolvedRun]:
    """Check every run as `l2e-ds train` does before it starts, and return the resolved runs by name.

    Raises ConfigError or DataError naming the run, and where the key that is wrong was given.
    """
    resolved: dict[str, ResolvedRun] = {}
    looked_at: set[str] = set()
    seen: dict[str, str] = {}
    for run in study.runs:
        own = [f"training.run_directory={run_directory(study.directory, run.name)}"]
        try:
            base = find_file(run.base)
            assert base is not None  # `read_study` has found it
            words = (base, [*run.overrides, *own], ranks)
            asked = load_run_config(*words[:2])
            # data and machine are checked once for all runs that differ only in how they train
            needs = json.dumps([asked.model_dump(mode="json", exclude={"inhibition", "optimizer", "training"})])
            needs += f"{asked.training.precision} {asked.training.resume}"
            needs += f" {bool(published_checkpoints(Path(asked.training.run_directory)))}"
            checked = resolve_run(*words) if needs in looked_at else preflight(*words, this_machine)
            looked_at.add(needs)
        except (ConfigError, DataError) as error:
            raise type(error)(_with_source(str(error), run)) from None
        # as it is started: the device that runs it resolves the precision, and all runs share one cache
        config = checked.config.replace("training", precision=asked.training.precision)
        if config.data.cache is None:
            config = config.replace("data", cache=str(study.directory / "data"))
        resolved[run.name] = replace(checked, config=config)
        content = json.dumps(flat(config.replace("training", run_directory="")))
        same = seen.setdefault(content, run.name)
        if same != run.name:
            raise ConfigError(f"factors: {same} and {run.name} would be the same run; leave one of them out")
    return resolved


def _with_source(line: str, run: StudyRun) -> str:
    """Return an error's line, beginning with the place where the study gives the first of its keys in the line."""
    said = line.removeprefix(f"{find_file(run.base)}: ")
    for override in run.overrides:
        said = said.removeprefix(f"override {override!r}: ")
    own = next((key for key in re.findall(r"[a-z_]+\.[a-z_]+", said) if key in run.sources), None)
    if unknown := re.match(r"([a-z_]+): unknown key", said):  # a section
        own = next((key for key in run.sources if key.startswith(f"{unknown[1]}.")), None)
    return f"{run.name}: {line}" if own is None else f"{run.sources[own]}: {run.name}: {said}"


def changes(directory: Path, new: RunConfig) -> list[str]:
    """Return the changes that would make a run that has begun another one, as `key: old -> new`: those with which it
    does not resume, a number of steps that it has passed, and another beginning. Raises ConfigError."""
    path = directory / "config.yaml"
    if not path.is_file():
        return []
    old, step = load_run_config(path), newest_step(directory)
    if new.training.precision == "auto":
        old = old.replace("training", precision="auto")
    found = Changes(old, new, step).refused()
    if new.training.steps < step:
        found.append(f"training.steps: {old.training.steps} -> {new.training.steps}, but step {step} is done")
    resumes = old.training.resume, new.training.resume
    if resumes[0] != resumes[1] and not {*resumes} <= {"auto", "never"}:
        found.append(f"training.resume: {resumes[0]} -> {resumes[1]}")
    return found


def refuse_changes(study: Study, resolved: dict[str, ResolvedRun]) -> None:
    """Raise ConfigError if a run that has begun would become another one."""
    for run in study.runs:
        found = changes(run_directory(study.directory, run.name), resolved[run.name].config)
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ConfigError(
                f"{study.directory}: the run {run.name} has begun, and its configuration has changed since: {found[0]}"
                f"{more}; give the same overrides again (they are in {study.directory / FILE}), or another --directory"
            )


def write_study(study: Study, resolved: dict[str, ResolvedRun]) -> None:
    """Write the study file, study.json and the runs' configurations. Raises ConfigError if the folder cannot be
    written."""
    try:
        for run in study.runs:
            write_whole(config_file(study.directory, run.name), resolved[run.name].config.dump())
        write_whole(study.directory / FILE, study.dump())
        write_whole(study.directory / INDEX, json.dumps(study.index().model_dump(), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"directory: cannot write {error.filename or study.directory}: {error.strerror}") from None
