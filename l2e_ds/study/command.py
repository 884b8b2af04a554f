"""`l2e-ds study STUDY.yaml [section.key=value ...]`: run what is left of a grid of runs (docs/studies.md)."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path

from l2e_ds.config.reading import find_file
from l2e_ds.console import at_least, markdown
from l2e_ds.errors import ConfigError, DataError
from l2e_ds.run_directory.lock import RunLock
from l2e_ds.slurm.sbatch import add_resource_arguments, resources_of
from l2e_ds.study import array
from l2e_ds.study.checking import refuse_changes, resolve_runs, write_study
from l2e_ds.study.collect import RESULTS, collect, summary, write_results
from l2e_ds.study.definition import FILE, INDEX, Study, read_study
from l2e_ds.study.processes import places
from l2e_ds.study.runner import Runner, say
from l2e_ds.study.state import State, run_directory, state_of
from l2e_ds.system.installed import check_extra
from l2e_ds.system.process import prepare_libraries
from l2e_ds.training.preflight import ResolvedRun

SLURM_ONLY = (
    *("nodes", "gpus_per_node", "tasks_per_node", "time", "signal_seconds"),
    *("partition", "account", "qos", "job_name", "srun_option"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="also study.yaml of a study's folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change one value of all runs")
    parser.add_argument("--directory", metavar="DIR", help="the study's folder, instead of the file's")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="check run files and data, print the runs and how far they are"
    )
    what.add_argument("--collect", action="store_true", help="only collect the results so far")
    here = parser.add_argument_group("on this machine")
    here.add_argument("--devices", type=int, metavar="N", help="N runs at a time, each on one device")
    here.add_argument(
        "--ranks", type=int, metavar="R", help="one run at a time, on R ranks (default: all GPUs; without any 1)"
    )
    cluster = parser.add_argument_group("on a cluster")
    cluster.add_argument("--slurm", action="store_true", help="as an array job, one task a run; with the options below")
    add_resource_arguments(parser, required=False)
    # so that without --slurm one sees which of them were given
    defaults = {option: parser.get_default(option) for option in SLURM_ONLY}
    parser.set_defaults(**dict.fromkeys(SLURM_ONLY), slurm_defaults=defaults)


def run(arguments: argparse.Namespace) -> int:
    """Run a study and return the exit code.

    0: all runs are done (or queued); 1: one failed; 2: the user can fix it; 75: it was stopped and can be resumed.
    Raises ConfigError or DataError before anything starts.
    """
    _check_options(arguments)
    if arguments.collect:
        own = arguments.study.name == FILE and (arguments.study.parent / INDEX).is_file()
        beside = arguments.study.parent if own else None
        return _collect(arguments.directory or beside or read_study(arguments.study).directory)
    prepare_libraries()
    study = read_study(arguments.study, arguments.overrides, arguments.directory)
    if study.file.evaluate:
        check_extra("evaluate", "eval", ["lm_eval"])
    resources = resources_of(arguments) if arguments.slurm else None
    where = [] if resources else places(arguments.devices, arguments.ranks, os.environ)
    ranks = resources.ranks if resources else where[0].ranks
    resolved = resolve_runs(study, ranks, this_machine=not (arguments.slurm or arguments.dry_run))
    refuse_changes(study, resolved)
    names = [name for name, state in _states(study, resolved).items() if not state.is_done]
    if arguments.dry_run:
        print(describe(study, resolved))
        if resources is not None:
            print(array.script(study.directory / "slurm-N", len(names), resources, arguments.restarts), end="")
        return 0

    if names:
        _load_tasks(study)
    folder = [] if arguments.directory is None else ["--directory", str(arguments.directory)]
    words = ["study", str(arguments.study), *arguments.overrides, *folder, "--slurm"]
    if resources is not None:
        array.check(study.directory, words)
    array.refuse_queued(study.directory)
    with RunLock(study.directory, study.runs[0].sources["training.run_directory"], what="study") as lock:
        write_study(study, resolved)
        if resources is not None and names:
            array.submit(study.directory, names, resources, arguments.restarts, words)
            return 0
        runner = Runner(study.directory, names, study.file.evaluate, where, arguments.restarts, lock.renew)
        code = runner.run()
    _collect(study.directory)
    for name, (_, why) in runner.failed.items():
        say(f"{name}: failed: {why}")
    for name in runner.stopped:
        say(f"{name}: was stopped; the same command resumes it")
    return code


def _load_tasks(study: Study) -> None:
    """Load the tasks and their data, so that compute nodes find them in the cache. Raises ConfigError, DataError."""
    if not study.file.evaluate:
        return
    from l2e_ds.evaluation.harness import load_tasks  # only now: it imports lm-eval, an extra

    for tasks, include_path in sorted({(tuple(part.tasks), tuple(part.include_path)) for part in study.file.evaluate}):
        try:
            load_tasks(tasks, include_path)
        except (ConfigError, DataError) as error:
            raise type(error)(f"evaluate: {error}") from None


def describe(study: Study, resolved: dict[str, ResolvedRun]) -> str:
    """Return what `--dry-run` prints: a table of the runs, and what is left to do."""
    common = set.intersection(*(set(run.overrides) for run in study.runs))
    states = _states(study, resolved)
    rows, steps_left, tokens_left = [], 0, 0
    for run in study.runs:
        batch, state = resolved[run.name].batch, states[run.name]
        left = 0 if state.trained else state.steps - state.step
        steps_left, tokens_left = steps_left + left, tokens_left + left * batch.tokens_per_step
        own = " ".join(word for word in run.overrides if word not in common and not word.startswith("training.seed="))
        rows.append([run.name, own, str(state), f"{left:,}", f"{left * batch.tokens_per_step:,}", str(batch)])
    batches = {row[-1] for row in rows}
    heads = ["run", "differs", "state", "steps to go", "tokens to go", "batch"]
    if len(batches) == 1:
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    counts = Counter(str(state) if state.is_done or not state.begun else "begun" for state in states.values())
    bases = ", ".join(dict.fromkeys(run.base for run in study.runs))
    said = [f"study       {study.file.title}", f"folder      {study.directory}", f"base        {bases}"]
    said += [f"all runs    {' '.join(sorted(common))}"] if common else []
    said += [f"batch       {batch}" for batch in batches if len(batches) == 1]
    for part in study.file.evaluate:
        shots = "each task's own number of examples" if part.num_fewshot is None else f"{part.num_fewshot}-shot"
        said.append(f"evaluation  {' '.join(part.tasks)}, {shots}")
    said += [f"runs        {len(rows)}: {', '.join(f'{count} {state}' for state, count in counts.items())}"]
    said += [f"to go       {steps_left:,} steps, {tokens_left:,} tokens"]
    return "\n".join([markdown(heads, rows), *said])


def _states(study: Study, resolved: dict[str, ResolvedRun]) -> dict[str, State]:
    steps = {name: run.config.training.steps for name, run in resolved.items()}
    return {name: state_of(run_directory(study.directory, name), steps[name], study.file.evaluate) for name in steps}


def _check_options(arguments: argparse.Namespace) -> None:
    at_least("--restarts", arguments.restarts, 0)
    if arguments.study.is_dir():
        arguments.study = arguments.study / FILE
    elif (found := find_file(str(arguments.study))) is not None and not arguments.study.is_file():
        arguments.study = found  # a study of the repository, from another folder
    if arguments.directory is not None:
        if not arguments.directory:
            raise ConfigError("--directory: got '', allowed: a folder; . is the current one")
        arguments.directory = Path(arguments.directory)
    given = [option for option in SLURM_ONLY if getattr(arguments, option) is not None]
    if arguments.slurm:
        for option in set(SLURM_ONLY) - set(given):
            setattr(arguments, option, arguments.slurm_defaults[option])
        for option in ("devices", "ranks"):
            if getattr(arguments, option) is not None:
                raise ConfigError(f"--{option}: is for runs on this machine; leave it or --slurm out")
        for option in ("gpus_per_node", "time"):
            if getattr(arguments, option) is None:
                raise ConfigError(f"--slurm: needs --{option.replace('_', '-')}")
    elif given or arguments.for_sbatch:
        option = f"--{given[0].replace('_', '-')}" if given else "--"
        raise ConfigError(f"{option}: is for --slurm; give that too, or leave it out")


def _collect(directory: Path) -> int:
    table = collect(directory)
    write_results(directory, table)
    print(summary(table))
    print(f"results  {directory / RESULTS}", flush=True)
    return 0
