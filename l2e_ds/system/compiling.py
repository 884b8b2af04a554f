"""Say in one line why torch.compile failed. It imports PyTorch's compiler, which takes seconds: import it late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from l2e_ds.errors import CompileError
from l2e_ds.system.files import one_line


@contextmanager
def compiling(what: str, otherwise: str = "") -> Iterator[None]:
    """Raise a CompileError of one line in place of an error of torch.compile, which has many.

    what: the beginning of the line; otherwise: its end, which says what works without a compiler.
    """
    try:
        yield
    except (TorchDynamoException, InductorError) as error:
        raise CompileError(
            f"{what}: torch.compile failed ({one_line(error)[:200]}); it needs a C++ compiler (CPU) or Triton and a C"
            f" compiler (GPU){otherwise}"
        ) from error
