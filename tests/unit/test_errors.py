"""An error carries its place and its keys, which a command may call by other names."""

import pickle

import pytest

from l2e_ds.errors import ConfigError, DataError
from l2e_ds.train import reason_of


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ((), "no text"),
        ("", "no text"),
        ("a:3", "a:3: no text"),
        (("data.path", "'x' row 5"), "data.path: 'x' row 5: no text"),
    ],
)
def test_the_place_begins_the_line(where, line):
    error = DataError("no text", where=where)
    assert (str(error), error.problem) == (line, "no text")


def test_keys_get_other_names_and_other_text_does_not():
    """A file whose name contains a key keeps it; a place without a name is left out."""
    error = ConfigError(
        "no key 'data.path' in data.path.txt; set ", "data.text_key", " or data.path", where="data.path"
    )
    error.rename({"data.path": "", "data.text_key": "--text-key"})
    assert str(error) == "no key 'data.path' in data.path.txt; set --text-key or data.path"


def test_an_error_of_another_process_is_the_same():
    error = DataError("see ", "data.text_key", where=("data.path", "row 1"))
    error.on_every_rank = True
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.args, again.where, again.on_every_rank) == (str(error), error.args, error.where, True)
    again.rename({"data.text_key": "data.sets.1.text_key", "data.path": "data.sets.1.path"})
    assert str(again) == "data.sets.1.path: row 1: see data.sets.1.text_key"


def test_nccl_says_the_cause_at_its_end():
    message = """NCCL error in: ProcessGroupNCCL.cpp:2251, unhandled cuda error (run with NCCL_DEBUG=INFO for details)
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Cuda failure 'out of memory'
"""
    assert reason_of(RuntimeError(message)).endswith("; Cuda failure 'out of memory'")
    assert reason_of(RuntimeError("Connection closed by peer\nsecond line")) == "Connection closed by peer"
    assert reason_of(RuntimeError("")) == "RuntimeError"
