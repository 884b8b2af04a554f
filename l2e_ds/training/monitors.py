"""The metrics beside metrics.jsonl, as the section `logging` asks: CSV, TensorBoard, Weights & Biases.

Under the same names, `KIND/KEY`, and at x = step. Files are cut back with metrics.jsonl where a run goes on from an
earlier checkpoint; what was sent to Weights & Biases stays, so that repeated steps are there twice.
"""

from __future__ import annotations

import csv
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from l2e_ds.config.sections import RunConfig
from l2e_ds.system.files import write_whole

WANDB_ID = "wandb-id"
Write = Callable[[int, Mapping[str, float]], None]


class Monitors:
    """On rank 0. One that fails, or is not reached, costs its figures and never the run."""

    def __init__(self, config: RunConfig, first_step: int, say: Callable[[str], None]) -> None:
        """first_step: what was written of later steps is forgotten. say: shows the user a line."""
        self._say = say
        self._writes: dict[str, Write] = {}
        self._opened = {name: ExitStack() for name, open_it in _OPENED_BY.items() if getattr(config.logging, name)}
        for name, stack in self._opened.items():
            with self._allowing_failure(name):
                self._writes[name] = stack.enter_context(_OPENED_BY[name](config, first_step, say))

    def write(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """Those of the values that are numbers."""
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        for name, write in list(self._writes.items()):
            with self._allowing_failure(name):
                write(step, numbers)

    def close(self) -> None:
        for name, stack in self._opened.items():
            with self._allowing_failure(name):
                stack.close()

    @contextmanager
    def _allowing_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._writes.pop(name, None)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self._say(f"l2e-ds: warning: logging.{name}: {reason}; the run goes on without it")


@contextmanager
def _csv(config: RunConfig, first_step: int, _say: Callable[[str], None]) -> Iterator[Write]:
    """A file for each metric: a heading, then step and value."""
    folder = Path(config.training.run_directory) / "csv"
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.csv"):
        _drop_rows_after(path, first_step)

    def write(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            with (folder / f"{name.replace('/', '_')}.csv").open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    writer.writerow(["step", name.rpartition("/")[2]])
                writer.writerow([step, value])

    yield write


def _drop_rows_after(path: Path, step: int) -> None:
    """Keep the heading, and the rows up to a step; not a row cut off by a kill, nor a second heading."""
    heading, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
    kept = [
        row
        for row in rows
        if row.endswith("\n") and (found := row.partition(",")[0]).isdecimal() and int(found) <= step
    ]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join([heading, *kept]) if heading.endswith("\n") else "", encoding="utf-8")
    temporary.replace(path)


@contextmanager
def _tensorboard(config: RunConfig, first_step: int, _say: Callable[[str], None]) -> Iterator[Write]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(Path(config.training.run_directory) / "tensorboard", purge_step=first_step + 1) as writer:

        def write(step: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        yield write


@contextmanager
def _wandb(config: RunConfig, _first_step: int, say: Callable[[str], None]) -> Iterator[Write]:
    """One run of Weights & Biases for one run directory, which holds its files, whatever number of starts it takes."""
    import wandb

    directory = Path(config.training.run_directory)
    kept = directory / WANDB_ID
    if not kept.exists():
        write_whole(kept, f"{secrets.token_hex(8)}\n")
    # by itself it would ask on a terminal for a key, copy all output, and wait at the end without limit for a network
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
    # its own count of steps must not fall, but a checkpoint's line comes when later steps are written already
    run.define_metric("*", step_metric="step")
    if not run.offline:
        say(f"Weights & Biases: {run.url}")

    def write(step: int, numbers: Mapping[str, float]) -> None:
        run.log({"step": step, **numbers})

    yield write
    run.finish()


_OPENED_BY = {"csv": _csv, "tensorboard": _tensorboard, "wandb_project": _wandb}
