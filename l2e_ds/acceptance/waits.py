"""Count what a training step launches, and how often it waits for the device: a part of an acceptance.

`python -m l2e_ds.acceptance.waits RUN.yaml` takes some steps of a run on one rank, and prints the counts of the last
one as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from l2e_ds.errors import L2EError

# What makes Python wait until a GPU has done all that was launched, because it asks for a value.
READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "unique")


class Operations(TorchDispatchMode):
    """Counts the operations that PyTorch is asked for while it is active, by name."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.counts: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled functions compiled: within another mode PyTorch would not run them."""
        return True

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        # values of the CPU are read without waiting; flags of the ranks are such
        on_device = any(isinstance(given, torch.Tensor) and given.device == self.device for given in arguments)
        if on_device:
            self.counts[operation.overloadpacket.__name__] += 1
        return operation(*arguments, **(options or {}))


def count_a_step(run_file: Path, overrides: list[str]) -> dict[str, int]:
    """Return what the fifth step of a run has: operations, reads, synchronisations, and on a GPU kernels."""
    # here, as DeepSpeed takes seconds, and only the process that takes the steps needs it
    from deepspeed.accelerator import get_accelerator

    from l2e_ds.distributed import process_group
    from l2e_ds.distributed.launch import find_launch
    from l2e_ds.system.process import prepare_libraries
    from l2e_ds.training.building import TrainingStack, forward_and_backward
    from l2e_ds.training.preflight import resolve_run

    prepare_libraries()
    run = resolve_run(run_file, overrides, 1)
    device = process_group.join(find_launch(), 5)
    stack = TrainingStack(run.config, run.ds, run.hf_config, device)
    accelerator: Any = get_accelerator()
    synchronise, synchronised = accelerator.synchronize, [0]

    def counted(*arguments: Any) -> Any:
        synchronised[0] += 1
        return synchronise(*arguments)

    accelerator.synchronize = counted
    shape = (run.batch.micro_batch, run.config.data.sequence_length + 1)
    tokens = torch.randint(run.hf_config.vocab_size, shape, device=device)

    def step() -> None:
        for left in reversed(range(run.batch.accumulation)):
            forward_and_backward(stack.engine, stack.head, stack.inhibitor, tokens, is_last=left == 0)
            stack.engine.step()
        if stack.inhibitor is not None:
            stack.inhibitor.step(stack.engine.was_step_applied())

    for _ in range(4):  # the self-test, which reads a value, and compilation
        step()
    synchronised[0] = 0
    with Operations(device) as operations:
        step()
    found = {
        "operations": operations.counts.total(),
        "reads": sum(operations.counts[name] for name in READS),
        "synchronisations": synchronised[0],
    }
    if device.type == "cuda":
        activities = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        on_gpu = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
        found["kernels"] = sum(not name.startswith("Mem") for name in on_gpu)
        # whoever asked for them: also what neither Python's operations nor DeepSpeed's accelerator show
        waited = sum(event.name.endswith("Synchronize") for event in profile.events())
        found["all waits"] = waited - 1  # that of this function
    stack.engine.destroy()
    process_group.leave()
    return found


def run_module(*words: str) -> str:
    """Return what `python -m` prints of a process of its own. Raises L2EError with its last error, where it fails."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing was said"]
        said = [line for line in lines if line.startswith("l2e-ds: error")] or lines
        raise L2EError(f"{' '.join(words[:2])} ended with exit code {done.returncode}: {said[-1].strip()}")
    return done.stdout


if __name__ == "__main__":
    print(json.dumps(count_a_step(Path(sys.argv[1]), sys.argv[2:])))
