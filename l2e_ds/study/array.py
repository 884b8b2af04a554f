"""`l2e-ds study ... --slurm`: submit the runs that are not done as an array job, one task a run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from l2e_ds.errors import ConfigError
from l2e_ds.slurm import sbatch
from l2e_ds.slurm.sbatch import Resources
from l2e_ds.study.state import config_file

FOLDER = "slurm"


def submit(directory: Path, names: Sequence[str], resources: Resources, restarts: int, words: Sequence[str]) -> None:
    """Queue the runs of these names, after `check`. words: of the command line. Raises ConfigError if sbatch
    refuses."""
    with sbatch.submission(directory, FOLDER) as folder:
        sbatch.record_code(folder, words, resources)
        lines = [shlex.quote(str(config_file(directory, name))) for name in names]
        (folder / "list").write_text("\n".join(lines) + "\n", encoding="utf-8")
        path = folder / "study.sbatch"
        job = sbatch.queue(path, script(folder, len(names), resources, restarts))
    (folder / "job").write_text(job + "\n")
    print(f"job     {job}: {len(names)} tasks of {resources.nodes} nodes x {resources.tasks_per_node} ranks")
    print(f"script  {path}")
    print(f"logs    {folder}/slurm-{job}_TASK.log")


def script(folder: Path, tasks: int, resources: Resources, restarts: int) -> str:
    """Return the batch script of an array job."""
    options = sbatch.header(resources, folder.absolute().parent.name, folder, "slurm-%A_%a.log")
    return sbatch.script(
        "Runs of a study, made by `l2e-ds study --slurm`; `sbatch` this file to resume them.",
        [f"#SBATCH --array=0-{tasks - 1}", *options],
        ["-m", "l2e_ds.study.array_task", "--restarts", str(restarts), str(folder / "list")],
        resources.srun,
    )


def check(directory: Path, words: Sequence[str]) -> None:
    """Check that a study can be submitted from here. Raises ConfigError."""
    sbatch.check_sbatch("--slurm")
    for word in (*words, os.getcwd(), sys.executable):
        sbatch.refuse_control_characters("--slurm", word)
    sbatch.check_log_folder("directory", directory)


def refuse_queued(directory: Path) -> None:
    """Raise ConfigError if tasks of an earlier submission are still queued or running."""
    for path in sorted(directory.glob(f"{FOLDER}-*/job")):
        job = path.read_text().strip()
        listing = ["squeue", "--noheader", f"--jobs={job}", "--format=%i"]
        try:
            done = subprocess.run(listing, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.SubprocessError):  # also where there is no SLURM
            continue
        if done.returncode == 0 and done.stdout.strip():  # a job that SLURM has forgotten is an error to squeue
            raise ConfigError(
                f"{directory}: tasks of the array job {job} are still queued or running ({path.parent.name}); wait for"
                f" them, or scancel {job}"
            )
