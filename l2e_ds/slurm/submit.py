"""`l2e-ds submit RUN.yaml [section.key=value ...] --gpus-per-node G --time HH:MM:SS [...] [-- options of sbatch]`.

Checks the run, freezes it in a folder `submit-N` of its run directory (docs/slurm.md lists its files), and submits the
script in there with sbatch.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from l2e_ds.config.reading import find_file, load_run_config
from l2e_ds.config.sections import RunConfig
from l2e_ds.console import add_run_file_arguments, at_least
from l2e_ds.slurm import sbatch
from l2e_ds.slurm.sbatch import Resources
from l2e_ds.system.process import prepare_libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file_arguments(parser)
    sbatch.add_resource_arguments(parser, required=True)
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")


def run(arguments: argparse.Namespace) -> int:
    """Submit a run and return exit code 0 when its job is queued. Raises ConfigError or DataError."""
    from l2e_ds.training.preflight import preflight  # only now: it imports torch, which --help must not wait for

    resources = sbatch.resources_of(arguments)
    at_least("--restarts", arguments.restarts, 0)
    if not arguments.dry_run:
        sbatch.check_sbatch("submit")
    for word in (arguments.run_file, *arguments.overrides, os.getcwd(), sys.executable):
        sbatch.refuse_control_characters("submit", word)
    prepare_libraries()
    config = preflight(arguments.run_file, arguments.overrides, resources.ranks).config
    # `auto` is for the node that runs it to decide, not for this one
    asked = load_run_config(arguments.run_file, arguments.overrides).training.precision
    config = config.replace("training", precision=asked)

    directory = Path(config.training.run_directory)
    sbatch.check_log_folder("training.run_directory", directory)
    if arguments.dry_run:
        folder = directory / f"submit-{len(list(directory.glob('submit-*'))) + 1}"
        print(sbatch.without_secrets(script(folder, resources, arguments.restarts), "the script"), end="")
        return 0

    with sbatch.submission(directory, "submit") as folder:
        _freeze(folder, config, arguments, resources)
        path = folder / "submit.sbatch"
        job = sbatch.queue(path, script(folder, resources, arguments.restarts))
    print(f"job     {job}: {resources.nodes} nodes x {resources.tasks_per_node} ranks, {resources.time}")
    print(f"script  {path}")
    print(f"log     {folder / f'slurm-{job}.log'}")
    return 0


def script(folder: Path, resources: Resources, restarts: int) -> str:
    """Return the batch script of the submission in this folder."""
    number = folder.name.removeprefix("submit-")
    return sbatch.script(
        f"Submission {number} of a run, made by `l2e-ds submit`; `sbatch` this file to resume it.",
        sbatch.header(resources, folder.absolute().parent.name, folder, "slurm-%j.log"),
        ["-m", "l2e_ds.slurm", "--restarts", str(restarts), str(folder / "run.yaml")],
        resources.srun,
    )


def _freeze(folder: Path, config: RunConfig, arguments: argparse.Namespace, resources: Resources) -> None:
    """Write the run file, and a record of the code, beside the script. Raises ConfigError."""
    source = find_file(config.deepspeed.config, arguments.run_file)
    assert source is not None  # preflight has read it
    json_path, run_path = folder / "deepspeed.json", folder / "run.yaml"
    json_path.write_text(sbatch.without_secrets(source.read_text(encoding="utf-8"), source.name), encoding="utf-8")
    frozen = config.replace("deepspeed", config=str(json_path))
    run_path.write_text(sbatch.without_secrets(frozen.dump(), "the run file"), encoding="utf-8")
    sbatch.record_code(folder, ["submit", arguments.run_file, *arguments.overrides], resources)
