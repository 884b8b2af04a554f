"""The method can be lifted out: it needs torch, and of this project three small files."""

import subprocess
import sys

LIST = """
import sys
import l2e_ds.inhibition
print(*sorted(name for name in sys.modules if name.startswith("l2e_ds.") and "inhibition" not in name))
heavy = ("deepspeed", "transformers", "pydantic", "psutil", "triton", "torch._dynamo")
print(*(name for name in heavy if name in sys.modules))
"""


def test_inhibition_imports_errors_and_distributed_only():
    done = subprocess.run([sys.executable, "-c", LIST], capture_output=True, text=True, check=True)
    assert (
        done.stdout
        == "l2e_ds.distributed l2e_ds.distributed.collectives l2e_ds.distributed.heartbeat l2e_ds.errors\n\n"
    )
