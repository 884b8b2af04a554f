"""The exceptions a user may meet. Each ends the command with one line and its `exit_code`."""


class L2EError(Exception):
    """Base of the errors whose message is written for the user: where, what was given, what is allowed."""

    exit_code = 2
    on_every_rank = False
    """Whether all ranks raise it alike, so that rank 0 alone need report it."""


class ConfigError(L2EError):
    """A run file, an override or a DeepSpeed JSON says something impossible. Names the dotted key."""

    on_every_rank = True


class DataError(L2EError):
    """A corpus, tokenizer or token file is missing, empty or broken. Names the file."""


class WorkerError(L2EError):
    """A worker process was killed, perhaps for want of memory. No input is wrong: the same command goes on."""

    exit_code = 1


class CheckpointError(L2EError):
    """A checkpoint is missing, incomplete or belongs to another run. Ranks agree before they raise it."""

    on_every_rank = True


class AnalysisError(L2EError):
    """A model's activations are not finite, so that nothing can be said of them. Ranks agree before they raise it."""

    on_every_rank = True


class SaveError(L2EError):
    """A checkpoint could not be written (a full disk). Ranks agree before they raise it."""

    exit_code = 3
    on_every_rank = True


class SelfTestError(L2EError):
    """A hook was not called as often as it should be, its gradient did not arrive (docs/deepspeed.md, row 3), or the
    network does not pass on what its output projection returns."""

    on_every_rank = True


class CompileError(L2EError):
    """torch.compile or Triton cannot compile here, for want of a compiler or for a fault of theirs."""


class TrainingError(L2EError):
    """The run cannot go on, e.g. too many non-finite steps in a row."""

    exit_code = 3
    on_every_rank = True


class Interrupted(L2EError):
    """The run was asked to stop (signal, time limit, stop file) and can be gone on with. EX_TEMPFAIL of sysexits.h."""

    exit_code = 75
    on_every_rank = True
