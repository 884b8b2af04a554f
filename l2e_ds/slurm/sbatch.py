"""Write and queue batch scripts, with a frozen record of each submission, for `submit` and `study --slurm`."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from l2e_ds.config.sections import slurm_seconds
from l2e_ds.console import at_least
from l2e_ds.distributed.launch import without_launcher
from l2e_ds.errors import ConfigError
from l2e_ds.system.provenance import commit_and_changes, difference, versions

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,@=+:-]*")
SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$")
SHORTEST_SECRET = 8  # characters; shorter values would be found in any text
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy", "safetensors", "mpi4py")


@dataclass(frozen=True)
class Resources:
    """Holds what the job asks SLURM for. time: as SLURM writes it; signal_seconds: the part of it to stop and save
    in; extra: more options of sbatch; srun: more options of the srun that starts the ranks."""

    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    time: str
    signal_seconds: int
    job_name: str | None
    partition: str | None
    account: str | None
    qos: str | None
    extra: tuple[str, ...]
    srun: tuple[str, ...]

    @property
    def ranks(self) -> int:
        """Return the number of ranks of the job."""
        return self.nodes * self.tasks_per_node


def add_resource_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add the options that `resources_of` reads, and --restarts."""
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, required=required, metavar="G", help="one rank a GPU; 0: on CPUs")
    parser.add_argument("--tasks-per-node", type=int, metavar="T", help="ranks a node, with --gpus-per-node 0")
    parser.add_argument("--time", required=required, metavar="HH:MM:SS", help="limit after which the job is requeued")
    parser.add_argument("--partition", metavar="P")
    parser.add_argument("--account", metavar="A")
    parser.add_argument("--qos", metavar="Q")
    parser.add_argument("--job-name", metavar="NAME", help="default: the run directory's name")
    parser.add_argument(
        "--signal-seconds", type=int, default=300, metavar="S", help="stop and save so long before the limit (300)"
    )
    parser.add_argument(
        "--srun-option", action="append", metavar="OPTION", help="for the srun that starts the ranks; may be repeated"
    )
    parser.add_argument("--restarts", type=int, default=3, metavar="N", help="after a crash, within one job (3)")
    parser.epilog = (
        "Options of sbatch follow `--`, e.g. `-- --cpus-per-task=12 --mem=0 --exclusive`. An option of srun is joined"
        " by `=`, e.g. `--srun-option=--container-image=FILE`."
    )


def header(resources: Resources, name: str, folder: Path, log: str) -> list[str]:
    """Return the `#SBATCH` lines.

    name: of the job, if no --job-name was given; log: the name of a file in `folder`, a pattern of sbatch's.
    """
    options = {
        "job-name": resources.job_name or plain(name),
        "nodes": resources.nodes,
        "ntasks-per-node": resources.tasks_per_node,
        "gpus-per-node": resources.gpus_per_node or None,
        "time": resources.time,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "output": str(folder.absolute()).replace("%", "%%") + f"/{log}",
        "open-mode": "append",
        "signal": f"B:USR1@{resources.signal_seconds}",
    }
    lines = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
    lines.append("#SBATCH --requeue")
    if resources.extra:
        lines.append(f"#SBATCH {shlex.join(resources.extra)}")
    return lines


def script(comment: str, options: Sequence[str], command: Sequence[str], srun: Sequence[str]) -> str:
    """Return a batch script that runs these arguments of Python, with the launcher of ranks after `--`.

    options: the `#SBATCH` lines; srun: more options of the launcher. Values are quoted as a shell does, which is also
    how sbatch reads those lines.
    """
    python = shlex.quote(sys.executable)
    launcher = shlex.join(["srun", "--kill-on-bad-exit=0", "--wait=30", *srun])
    lines = [
        "#!/bin/bash",
        f"# {comment}",
        *options,
        "",
        f"cd {shlex.quote(os.getcwd())} || exit 2",
        f"exec {python} {shlex.join(command)} \\",
        f"    -- {launcher} {python} -m l2e_ds.train",
    ]
    return "\n".join(lines) + "\n"


def check_sbatch(where: str) -> None:
    """Check that jobs can be submitted from here. Raises ConfigError."""
    if shutil.which("sbatch") is None:
        raise ConfigError(f"{where}: sbatch is not on PATH; submit where SLURM is installed, or use --dry-run")


def check_log_folder(where: str, directory: Path) -> None:
    """Check that a batch script can name a folder and write logs below it. Raises ConfigError."""
    refuse_control_characters(where, str(directory))
    if "\\" in str(directory.absolute()):  # turns off the replacement of %A and %j in the logs' names
        raise ConfigError(f"{where}: got {str(directory)!r}; SLURM cannot write a log below a backslash")


def plain(name: str) -> str:
    """Return a name of letters, digits and _ . - only."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.-") or "l2e-ds"


def resources_of(arguments: argparse.Namespace) -> Resources:
    """Check the options and return them. Raises ConfigError naming the option, what was given and what is allowed."""
    at_least("--nodes", arguments.nodes, 1)
    gpus, tasks = at_least("--gpus-per-node", arguments.gpus_per_node, 0), arguments.tasks_per_node
    if gpus and tasks is not None:
        raise ConfigError("--tasks-per-node: is for --gpus-per-node 0; with GPUs there is one rank a GPU")
    if not gpus and (tasks is None or tasks < 1):
        raise ConfigError(f"--tasks-per-node: got {tasks}, --gpus-per-node 0 needs the number of ranks a node, >= 1")
    for option in ("job_name", "partition", "account", "qos"):
        value = getattr(arguments, option)
        if value is not None and not NAME.fullmatch(value):
            name = option.replace("_", "-")
            raise ConfigError(f"--{name}: got {value!r}, allowed: letters, digits and _ . , @ = + : -")
    limit = slurm_seconds(arguments.time)
    if limit is None:
        raise ConfigError(
            f"--time: got {arguments.time!r}, allowed: e.g. 12:00:00 (hours, minutes, seconds) or 2-12:00:00"
        )
    if limit == 0:
        raise ConfigError(f"--time: got {arguments.time!r}, allowed: a limit before which the run can stop and save")
    if not 0 < arguments.signal_seconds < min(limit, 65536):
        raise ConfigError(
            f"--signal-seconds: got {arguments.signal_seconds}, allowed: 1 to less than the {limit} s of --time"
        )
    extra, srun = tuple(arguments.for_sbatch), tuple(arguments.srun_option or ())
    for word in extra:
        refuse_control_characters("--", word)
    if extra and not extra[0].startswith("-"):
        raise ConfigError(f"--: got {extra[0]!r}, allowed: options of sbatch, which begin with -")
    for word in srun:
        if not word.startswith("-"):  # srun would take it for the program
            raise ConfigError(f"--srun-option: got {word!r}, allowed: an option of srun such as --mpi=pmix")
        refuse_control_characters("--srun-option", word)
    given: dict[str, Any] = {field.name: getattr(arguments, field.name, None) for field in fields(Resources)}
    given |= {"tasks_per_node": gpus or tasks, "extra": extra, "srun": srun}
    return Resources(**given)


def refuse_control_characters(where: str, text: str) -> None:
    """Raise ConfigError for a text that cannot stand in a batch script."""
    if not text.isprintable():
        raise ConfigError(f"{where}: got {text!r}, which cannot stand in a batch script; allowed: printable characters")


@contextlib.contextmanager
def submission(directory: Path, name: str) -> Iterator[Path]:
    """Make and yield the first of the folders NAME-1, NAME-2 ... that does not exist, for what is submitted.

    After an error, when nothing was queued, it is removed again, with the parent folders that were made for it. Raises
    ConfigError.
    """
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    for number in itertools.count(1):
        folder = directory / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from None
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()
        raise


def record_code(folder: Path, words: Sequence[str], resources: Resources) -> None:
    """Write code.json, and code.diff if files were changed. words: of the command line. Raises ConfigError."""
    commit, status = commit_and_changes()
    code = {
        "command": ["l2e-ds", *words],
        "ranks": resources.ranks,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": {"commit": commit, "changed": status},
        "versions": versions("l2e_ds", "python", *PACKAGES),
    }
    text = without_secrets(json.dumps(code, indent=2), "the command line")
    (folder / "code.json").write_text(text + "\n", encoding="utf-8")
    changes = difference() if status else ""  # untracked files have none
    if changes:
        for _, value in _secrets(os.environ):
            changes = changes.replace(value, "[left out: value of an environment variable]")
        (folder / "code.diff").write_text(changes, encoding="utf-8")


def _secrets(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    return [
        (name, value)
        for name, value in environment.items()
        if SECRET_VARIABLE.search(name.upper()) and len(value) >= SHORTEST_SECRET
    ]


def without_secrets(text: str, where: str) -> str:
    """Return a text, after checking that no value of a variable such as HF_TOKEN or WANDB_API_KEY is in it.

    Raises ConfigError.
    """
    for name, value in _secrets(os.environ):
        if value in text:
            raise ConfigError(f"{where} contains the value of {name}; leave it to the environment alone")
    return text


def queue(path: Path, text: str) -> str:
    """Write a batch script, queue it and return the job's id. Raises ConfigError if sbatch refuses it."""
    path.write_text(without_secrets(text, path.name), encoding="utf-8")
    # once more on the command line: variables such as SBATCH_TIMELIMIT, which profiles set, outrank `#SBATCH` lines
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    command = ["sbatch", "--parsable", *(word for line in lines for word in shlex.split(line)), str(path)]
    done = subprocess.run(command, env=without_launcher(os.environ), capture_output=True, text=True)
    if done.returncode != 0:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
        raise ConfigError("sbatch: " + re.sub("^sbatch: (error|fatal): ", "", reason))
    return done.stdout.strip().split(";")[0]
