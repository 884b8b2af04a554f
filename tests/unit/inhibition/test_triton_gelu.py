"""The GPU's kernels without a GPU: what they compute, in Triton's interpreter; and that they compile for GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from l2e_ds.errors import CompileError
from l2e_ds.inhibition import triton_gelu
from l2e_ds.inhibition.fused import FACTORS
from l2e_ds.inhibition.losses import Regulariser

CASES = Path(__file__).parent / "triton_cases.py"


@pytest.mark.full
def test_in_the_interpreter():
    """Everything in `triton_cases.py`, none skipped."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.match(r"\d{2,} passed(, \d+ warnings?)? in ", done.stdout.splitlines()[-1]), done.stdout


KERNELS = {
    "forward": (
        triton_gelu._forward_kernel,
        {"ROWS": triton_gelu.ROWS, "STRETCH": triton_gelu.STRETCH, "FACTORS": FACTORS, "STAGES": triton_gelu.STAGES},
    ),
    "backward": (
        triton_gelu._backward_kernel,
        {"ROWS": triton_gelu.BACKWARD_ROWS, "STRETCH": triton_gelu.BACKWARD_STRETCH},
    ),
}


@pytest.mark.parametrize(
    ("regulariser", "dtype", "capability"),
    [
        (Regulariser(), "bf16", 90),
        *(  # each varied alone
            pytest.param(*varied, marks=pytest.mark.full)
            for varied in (
                (Regulariser("published"), "bf16", 90),
                (Regulariser(power=0), "bf16", 90),
                (Regulariser(power=2), "bf16", 90),
                (Regulariser(), "fp32", 90),
                (Regulariser(), "fp16", 90),
                (Regulariser(), "bf16", 80),
            )
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_for_gpus(kernel, regulariser, dtype, capability, tmp_path, monkeypatch):
    """To machine code, for A100 and H100; registers suffice, and leave room for three programs a multiprocessor (two,
    with a few bytes beside them, where the force needs a division and the loss a logarithm)."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    function, constants = KERNELS[kernel]
    constants = {"COLUMNS": triton_gelu.COLUMNS, "POWER": regulariser.force_power, **constants}
    if kernel == "forward":
        constants["PROJECTED"] = regulariser.is_projected
    else:
        constants["FACTOR"] = regulariser.factor
    signature = {name: "constexpr" if name in constants else "*fp32" for name in function.arg_names}
    signature |= {name: f"*{dtype}" for name in signature if name in ("x_ptr", "z_ptr", "incoming_ptr", "outgoing_ptr")}
    signature |= {"M": "i32", "N": "i32"}
    aligned = {(number,): [["tt.divisibility", 16]] for number, name in enumerate(signature) if name not in constants}
    source = ASTSource(function, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=triton_gelu.OPTIONS)
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said).groups())
    programs, spilled = (2, 16) if regulariser == Regulariser(power=0) else (3, 0)
    assert max(stack, local) <= spilled
    assert registers * 32 * triton_gelu.WARPS * programs <= 65536
    assert re.search(r"[.]v4[.]b32", compiled.asm["ptx"]), "reads 16 bytes at a time"


@pytest.mark.parametrize(
    "error",
    [
        TritonError("\n  at 3:4: no such function\nand more"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["gcc"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_compiler_that_fails_or_is_missing(error):
    """The error is one line that says what is needed, and what works without it."""
    said = r"^inhibition.fused: Triton failed \([^\n]+\); .+inhibition.fused: false, or Settings\(fused=False\)$"
    with pytest.raises(CompileError, match=said), triton_gelu._explained():
        raise error


def test_faults_of_the_device_are_not_the_compilers():
    """A supervisor begins again after those."""
    with pytest.raises(RuntimeError, match="illegal memory access"), triton_gelu._explained():
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
