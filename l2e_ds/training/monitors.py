"""Write metrics to CSV, TensorBoard and Weights & Biases, too, as the section `logging` says.

The names are `KIND/KEY`, and x is the step. If a run resumes from an earlier checkpoint, files are cut back with
metrics.jsonl; what was sent to Weights & Biases stays, so that it has repeated steps twice.
"""

from __future__ import annotations

import csv
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from l2e_ds.config.sections import RunConfig
from l2e_ds.system.files import one_line, write_whole

WANDB_ID = "wandb-id"
Write = Callable[[int, Mapping[str, float]], None]
IsKept = Callable[[str, int], bool]  # of a kind of line and its step


class Monitors:
    """Writes to all monitors of a run, on rank 0. One that fails or cannot be reached loses metrics, never the run."""

    def __init__(self, config: RunConfig, is_kept: IsKept, last_kept: int, say: Callable[[str], None]) -> None:
        """Open the monitors, and remove from CSV files what is not kept, and from TensorBoard's, which know no kinds,
        what is after the step last_kept."""
        self._say = say
        self._writes: dict[str, Write] = {}
        self._opened = {name: ExitStack() for name, open_it in _OPENED_BY.items() if getattr(config.logging, name)}
        for name, stack in self._opened.items():
            with self._allowing_failure(name):
                self._writes[name] = stack.enter_context(_OPENED_BY[name](config, is_kept, last_kept, say))

    def write(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """Write those values that are numbers."""
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        for name, write in list(self._writes.items()):
            with self._allowing_failure(name):
                write(step, numbers)

    def close(self) -> None:
        """Close the monitors."""
        for name, stack in self._opened.items():
            with self._allowing_failure(name):
                stack.close()

    @contextmanager
    def _allowing_failure(self, name: str) -> Iterator[None]:
        """Warn of an exception and no longer write to this monitor, instead of raising it."""
        try:
            yield
        except Exception as error:
            self._writes.pop(name, None)
            self._say(f"l2e-ds: warning: logging.{name}: {one_line(error)}; the run continues without it")


@contextmanager
def _csv(config: RunConfig, is_kept: IsKept, _last_kept: int, _say: Callable[[str], None]) -> Iterator[Write]:
    """Write a file for each metric: a heading, then rows of step and value."""
    folder = Path(config.training.run_directory) / "csv"
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.csv"):
        _keep_rows(path, partial(is_kept, path.name.partition("_")[0]))

    def write(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            with (folder / f"{name.replace('/', '_')}.csv").open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    writer.writerow(["step", name.rpartition("/")[2]])
                writer.writerow([step, value])

    yield write


def _keep_rows(path: Path, is_kept: Callable[[int], bool]) -> None:
    """Keep the heading and the rows of some steps, but no row cut off by a kill and no second heading."""
    heading, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
    kept = [
        row
        for row in rows
        if row.endswith("\n") and (found := row.partition(",")[0]).isdecimal() and is_kept(int(found))
    ]
    write_whole(path, "".join([heading, *kept]) if heading.endswith("\n") else "")


@contextmanager
def _tensorboard(config: RunConfig, _is_kept: IsKept, last_kept: int, _say: Callable[[str], None]) -> Iterator[Write]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(Path(config.training.run_directory) / "tensorboard", purge_step=last_kept + 1) as writer:

        def write(step: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        yield write


@contextmanager
def _wandb(config: RunConfig, _is_kept: IsKept, _last_kept: int, say: Callable[[str], None]) -> Iterator[Write]:
    """Write to one run of Weights & Biases per run directory, which holds its files, however often that is started."""
    import wandb

    directory = Path(config.training.run_directory)
    kept = directory / WANDB_ID
    if not kept.exists():
        write_whole(kept, f"{secrets.token_hex(8)}\n")
    # By default it asks for a key on a terminal, copies all output, and waits for a network at the end without limit.
    settings = wandb.Settings(silent=True, console="off", login_timeout=60, finish_timeout=60)
    run = wandb.init(
        project=config.logging.wandb_project,
        id=kept.read_text(encoding="ascii").strip(),
        resume="allow",
        name=directory.absolute().name,
        config=config.model_dump(mode="json"),
        allow_val_change=True,
        dir=directory,
        settings=settings,
    )
    # Its own count of steps must not fall, but the line of a checkpoint comes after those of later steps.
    run.define_metric("*", step_metric="step")
    if not run.offline:
        say(f"Weights & Biases: {run.url}")

    def write(step: int, numbers: Mapping[str, float]) -> None:
        run.log({"step": step, **numbers})

    yield write
    run.finish()


_OPENED_BY = {"csv": _csv, "tensorboard": _tensorboard, "wandb_project": _wandb}
