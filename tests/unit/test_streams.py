"""Standard streams that are closed, that nobody reads any more, or that are full, change no exit code."""

import os
import subprocess
import sys

import pytest

LEAVE = """
import contextlib, os
from l2e_ds import cli, console, train
console.open_streams()
assert [os.fstat(number) is not None for number in (0, 1, 2)]
with contextlib.suppress(OSError):
    print("printed")
console.say("said")
child = os.system("echo from a child; echo from a child >&2")
assert child == 0, child
{leave}({code})
"""
COMMANDS = [["l2e_ds.cli"], ["l2e_ds.cli", "train"], ["l2e_ds.train"], ["l2e_ds.supervise"]]


def run(how: str, *command: str) -> int:
    """Its exit code, with its streams like this."""
    words = [sys.executable, *command]
    if how == "closed":
        return subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words], timeout=600).returncode
    if how == "full":
        with open("/dev/full", "w") as full:
            return subprocess.run(words, stdout=full, stderr=full, timeout=600).returncode
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run(words, stdout=write, stderr=write, timeout=600).returncode
    finally:
        os.close(write)


@pytest.mark.parametrize("how", ["closed", "full", "unread"])
@pytest.mark.parametrize("leave", ["train.leave_process", "cli.leave_process"])
@pytest.mark.parametrize("code", [0, 3, 75])
def test_a_command_ends_with_its_own_code(how, leave, code):
    script = LEAVE.format(leave=leave, code=code)
    if how != "closed":  # a child's own complaint is not what this is about
        script = script.replace("assert child == 0, child\n", "")
    assert run(how, "-c", script) == code


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_opens_what_is_closed(command, tmp_path):
    """Mistakes end with 2, and not with a traceback that nobody sees."""
    missing = str(tmp_path / "missing.yaml")
    words = ["summary", missing] if command == ["l2e_ds.cli"] else [missing]
    launcher = ["--", "true"] if command == ["l2e_ds.supervise"] else []
    assert run("closed", "-m", *command, *words, *launcher) == 2
