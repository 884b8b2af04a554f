"""Runs on every rank: `training.micro_batch: auto`. OUTPUT/run.yaml is a run file; PORT... are free ports.

Each case in a process of its own, as each would be a start of its own:
    auto    a run with `auto` to step 2, and the same command again to step 4
    given   the same run with the number that was found, to step 4
    killed  `find` among 1 and 2, where rank 1's child is killed when it takes micro-batches of 2
    limited `find` among 1 to 8, below a limit between the peaks of 2 and 4
"""

import gc
import importlib
import json
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

from l2e_ds.config.reading import checked
from l2e_ds.config.sections import RunConfig
from l2e_ds.distributed import heartbeat, process_group
from l2e_ds.distributed.launch import find_launch
from l2e_ds.engine.configuration import resolve
from l2e_ds.models.pythia import network_config
from l2e_ds.system.files import write_whole
from l2e_ds.system.process import prepare_libraries
from l2e_ds.training import micro_batch
from l2e_ds.training.preflight import preflight
from l2e_ds.training.run import train

USED = ("l2e_ds.training.trainer", "transformers.models.gpt_neox.modeling_gpt_neox", "deepspeed.ops.adam")

PROBED = {
    "model": {"name": "pythia-14m", "vocab_size": 8192, "num_layers": 4, "hidden_size": 32, "num_heads": 2},
    "data": {"source": "indexed", "path": "none", "sequence_length": 128},
    "training": {"steps": 1, "micro_batch": "auto", "precision": "fp32"},
    "deepspeed": {"config": "ds_configs/zero2.json"},
}


def run_to(steps: int, number: object, output: Path, name: str) -> None:
    launch = find_launch()
    overrides = [f"training.run_directory={output / name}", f"training.steps={steps}", f"training.micro_batch={number}"]
    train(preflight(output / "run.yaml", overrides, launch.size, this_machine=True), launch)


def find(output: Path, name: str, global_batch: int, limit: float) -> None:
    launch = find_launch()
    device = process_group.join(launch, 5)
    own = {"run_directory": str(output / name), "global_batch": global_batch}
    raw = {**PROBED, "training": {**PROBED["training"], **own}}
    config, ds, _ = resolve(checked(RunConfig, raw, "case"), launch.size)
    if name == "killed" and launch.rank == 1:
        threading.Thread(target=kill_at_2, daemon=True).start()
    _, record = micro_batch.find(config, ds, network_config(config.model, 128), device, limit)
    write_whole(output / f"{name}-rank{launch.rank}.json", record)
    process_group.leave()


def kill_at_2() -> None:
    while heartbeat.doing() != "measuring micro-batch 2":
        time.sleep(0.01)
    for child in multiprocessing.active_children():
        child.kill()


def found_by(path: Path) -> dict:
    return json.loads(path.read_text())


def limit_from(output: Path) -> float:
    """The peak of 1, and twice the logits' share of a sequence, which is all but a tenth of it."""
    found = output / "killed-rank0.json"
    while not found.exists():  # rank 0 may be a moment behind
        time.sleep(0.01)
    return found_by(found)["measured"]["1"]["peak_bytes"] + 2 * 12 * 128 * 8192


def case(name: str, output: Path, port: str) -> None:
    os.environ["MASTER_PORT"] = port
    log = os.open(output / f"{name}-rank{os.environ['RANK']}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    if name == "auto":
        run_to(2, "auto", output, "auto")
    elif name == "again":
        run_to(4, "auto", output, "auto")
    elif name == "given":
        run_to(4, found_by(output / "auto/micro_batch.json")["micro_batch"], output, "given")
    elif name == "killed":
        find(output, name, 4, 1e12)
    else:
        find(output, name, 16, limit_from(output))
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    prepare_libraries()
    output, ports = Path(sys.argv[1]), sys.argv[2:]
    for used in USED:
        importlib.import_module(used)
    gc.freeze()
    for name, port in zip(("auto", "again", "given", "killed", "limited"), ports, strict=True):
        child = multiprocessing.get_context("fork").Process(target=case, args=(name, output, port))
        child.start()
        child.join()
        if child.exitcode:
            said = (output / f"{name}-rank{os.environ['RANK']}.txt").read_text()
            sys.exit(f"{name}: exit code {child.exitcode}: {said[-3000:]}")


if __name__ == "__main__":
    main()
