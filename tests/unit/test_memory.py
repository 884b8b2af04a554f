"""How this process keeps memory that tensors have freed."""

import os
import platform
import subprocess
import sys

import pytest

FREED = """
import sys, torch
from l2e_ds.system.memory import keep_freed_memory, process_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
tensor = torch.ones(16 * 2**20)  # 64 MiB
held = process_memory("VmRSS")
del tensor
print(held - process_memory("VmRSS") > 32 * 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library is left alone")
@pytest.mark.parametrize(
    ("words", "variables", "is_returned"),
    [
        ("let", {}, True),
        ("keep", {}, False),
        ("keep", {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}, True),  # the user decides
    ],
)
def test_freed_memory_is_kept_unless_the_user_decides_otherwise(words, variables, is_returned):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FREED, words]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
    assert done.stdout == f"{is_returned}\n", done.stderr
