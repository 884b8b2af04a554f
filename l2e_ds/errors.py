"""The exceptions a user may meet. Each ends the command with one line and its `exit_code`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


class L2EError(Exception):
    """Base class of the errors whose message is written for the user: where, what was given, what is allowed.

    problem: what was given and what is allowed, in one or more parts; a run file's key in the middle of it is a part of
    its own. where: the place at fault, or several from the outer one to the inner one: a file, file:line, a dotted key
    or an option. What has an option in place of a key uses `renaming`.
    """

    exit_code = 2
    on_every_rank = False
    """Whether all ranks raise this error alike, so that only rank 0 need report it."""

    def __init__(self, *problem: str, where: str | Sequence[str] = ()) -> None:
        super().__init__(*problem)
        self.where = (where,) if isinstance(where, str) else tuple(where)

    @property
    def problem(self) -> str:
        """The message without `where`."""
        return "".join(self.args)

    def rename(self, names: Mapping[str, str]) -> None:
        """Replace each of these keys by another name, in `where` and in the problem; an empty name leaves it out."""
        self.where = tuple(names.get(place, place) for place in self.where)
        self.args = tuple(names.get(part, part) for part in self.args)

    def __str__(self) -> str:
        return ": ".join([*filter(None, self.where), self.problem])


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Give these keys other names, as `L2EError.rename` does, in errors that are raised inside."""
    try:
        yield
    except L2EError as error:
        error.rename(names)
        raise


class ConfigError(L2EError):
    """A run file, an override or a DeepSpeed JSON says something impossible. Names the dotted key."""

    on_every_rank = True


class DataError(L2EError):
    """A corpus, tokenizer or token file is missing, empty or broken. Names the file."""


class WorkerError(L2EError):
    """A helper process was killed (perhaps because memory ran out), failed or did not answer. No input is wrong: the
    same command resumes."""

    exit_code = 1


class RendezvousError(L2EError):
    """Rank 0 cannot listen where the others look for it. Started again, the same command may get another port."""

    exit_code = 1


class CheckpointError(L2EError):
    """A checkpoint is missing, incomplete or belongs to another run. Ranks agree before they raise it."""

    on_every_rank = True


class AnalysisError(L2EError):
    """A model's activations are not finite, so that nothing can be said of them. Ranks agree before they raise it."""

    on_every_rank = True


class SaveError(L2EError):
    """A checkpoint could not be written (a full disk). Ranks agree before they raise it. step: the checkpoint's."""

    exit_code = 3
    on_every_rank = True
    step = 0


class SelfTestError(L2EError):
    """A hook was not called as often as it should be, its gradient did not arrive (docs/deepspeed.md, row 3), or the
    network does not pass on what its output projection returns."""

    on_every_rank = True


class CompileError(L2EError):
    """torch.compile or Triton cannot compile here: a compiler is missing, or fails."""


class TrainingError(L2EError):
    """The run cannot continue, e.g. after too many non-finite steps in a row."""

    exit_code = 3
    on_every_rank = True


class OutOfMemory(L2EError):
    """This rank's device has too little memory for the run. Its exit code is 1 where earlier steps have fitted."""

    exit_code = 3


class Interrupted(L2EError):
    """The run was asked to stop (signal, time limit, stop file) and can be resumed. EX_TEMPFAIL of sysexits.h."""

    exit_code = 75
    on_every_rank = True
