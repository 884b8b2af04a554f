"""`l2e-ds accept`: whether this machine, its driver and its packages compute the right numbers, and how fast.

    l2e-ds accept                             on a GPU about ten minutes; on a CPU the same parts, small
    l2e-ds accept --only loss resume          some parts
    l2e-ds accept --minutes 3                 as many parts as fit, the most telling first

Each part is a line of pass, FAIL or, where it only measures, a dash; what is known so far is in the JSON file. The exit
code is 0 where nothing failed, and 1 where something did.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from l2e_ds.errors import ConfigError
from l2e_ds.system.files import error_line, write_whole

# In order of value: --minutes leaves out the last ones.
PARTS = {
    "ceilings": "copying speed, and one large product of matrices in bf16",
    "activation": "the hooked GELU, forward and backward, against float64",
    "loss": "the LM loss and its gradients against float64",
    "settings": "ZeRO stages, recomputation and accumulation give the same numbers",
    "resume": "a resumed run is the uninterrupted one, bit for bit",
    "steps": "tokens a second, MFU and memory of whole steps, with and without inhibition",
    "timings": "GELU and inhibition as a share of the copying speed",
    "waits": "how many kernels a step launches, and how often it waits for the device",
    "auto": "training.micro_batch: auto, with an evaluation",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=15.0, help="begin no part after so many (default: 15)")
    about = "; ".join(f"{name} ({what})" for name, what in PARTS.items())
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"of these: {about}")
    parser.add_argument("--output", type=Path, default=Path("accept.json"), help="default: accept.json")


def run(arguments: argparse.Namespace) -> int:
    """Do the parts one after another, and return the exit code. Raises ConfigError."""
    chosen = list(PARTS) if arguments.only is None else arguments.only
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise ConfigError(f"--only: got {unknown[0]!r}, allowed: {', '.join(PARTS)}")
    if not arguments.minutes > 0:
        raise ConfigError(f"--minutes: got {arguments.minutes:g}, allowed: above 0")
    folder = arguments.output.absolute().parent
    if arguments.output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--output: got {arguments.output}, allowed: a file in a folder that can be written to")
    from l2e_ds.system.process import prepare_libraries  # with torch: a mistake above need not wait for it

    prepare_libraries()
    import torch

    from l2e_ds.acceptance import operations, runs
    from l2e_ds.acceptance.outcome import Outcome, Scale
    from l2e_ds.system.provenance import cpu_name, machine, versions

    scale = Scale()
    device = torch.cuda.get_device_name(scale.device) if scale.on_gpu else cpu_name()
    installed = versions("l2e_ds", "python", "torch", "deepspeed", "transformers", "triton")
    about = {"date": time.strftime("%Y-%m-%d"), "device": device, "machine": machine(), "versions": installed}
    print(f"{device}, {', '.join(f'{name} {number}' for name, number in installed.items())}", flush=True)
    if not scale.on_gpu:
        print("no GPU is visible: the parts run small, and their speeds say nothing", flush=True)
    outcomes: list[Outcome] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="l2e-ds-accept-") as folder:
        for part in (part for part in PARTS if part in chosen):
            torch.compiler.reset()  # after eight shapes torch.compile would give up and run uncompiled
            started = time.monotonic()
            try:
                if started - begin > 60 * arguments.minutes:
                    outcome = Outcome(None, reason="not run: --minutes is over")
                elif part in runs.PARTS:
                    outcome = runs.PARTS[part](scale, Path(folder))
                else:
                    outcome = operations.PARTS[part](scale)
            except Exception as error:  # whatever a machine does wrong, the other parts are to be done
                outcome = Outcome(False, reason=error_line(error))
            outcome.part, outcome.seconds = part, time.monotonic() - started
            if scale.on_gpu:
                torch.cuda.empty_cache()  # for the runs of the next parts, which are other processes
            outcomes.append(outcome)
            print(outcome.line(), flush=True)
            content = about | {"parts": [asdict(outcome) for outcome in outcomes]}
            write_whole(arguments.output, json.dumps(content, indent=1) + "\n")
    failed = [outcome.part for outcome in outcomes if outcome.passed is False]
    said = f"failed: {', '.join(failed)}" if failed else "nothing failed"
    print(f"{said}; {arguments.output}", flush=True)
    return 1 if failed else 0
