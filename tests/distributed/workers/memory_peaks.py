"""Runs on every rank: for the case NAME of OUTPUT/cases.json the real Trainer, whose allocations on the CPU the
profiler notes one by one. Writes OUTPUT/NAME-rankR.json: peak bytes of two steps, bytes of a checkpoint, and what
`l2e_ds.planning.memory` predicts.

usage: memory_peaks.py OUTPUT NAME, in a process for each case: DeepSpeed keeps some of an engine alive as long as its
process lives.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch.profiler import ProfilerActivity, profile

from l2e_ds.config.reading import checked
from l2e_ds.config.sections import RunConfig
from l2e_ds.data import PreparedData, TokenDataset
from l2e_ds.distributed import collectives, process_group
from l2e_ds.distributed.launch import find_launch
from l2e_ds.planning import memory
from l2e_ds.planning.work import Work
from l2e_ds.system.process import leave_process, prepare_libraries
from l2e_ds.training.loss import CHUNK
from l2e_ds.training.preflight import checkpoint_size, resolve_config
from l2e_ds.training.trainer import RunData, Trainer

LENGTH = 64


def measure(case: dict, directory: Path, device: object, ranks: int) -> dict:
    case["training"] = {"steps": 4, "evaluate_every": 0, "run_directory": str(directory), **case["training"]}
    case["checkpoint"], case["logging"] = {"every": 0}, {"progress": False}
    case["data"] = {"source": "indexed", "path": "none", "sequence_length": LENGTH}
    run = resolve_config(checked(RunConfig, case, "case"), ranks)
    vocabulary = run.hf_config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, LENGTH * 200 + 1)
    data = RunData([PreparedData(TokenDataset(tokens, 0, len(tokens), LENGTH, vocabulary, "x"))])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = Trainer(run, data, device)
        for _ in range(2):
            trainer.train_step()
    trainer.save()
    trainer.close()
    size = 0
    if collectives.is_main():
        size = sum(path.stat().st_size for path in (directory / "checkpoints").rglob("*_states.pt"))
    events = profiler.profiler.kineto_results.events()
    live, peak = 0, 0
    for _, allocated in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += allocated
        peak = max(peak, live)
    work = Work(run)
    work.chunk = CHUNK["cpu"]
    predicted = memory.memory(work, ranks, run.batch.micro_batch, run.batch.accumulation)
    return {
        "peak": peak,
        "predicted": predicted.total,
        "parts": asdict(predicted),
        "checkpoint": size,
        "predicted_checkpoint": checkpoint_size(run),
    }


def main() -> None:
    prepare_libraries()
    output, name = Path(sys.argv[1]), sys.argv[2]
    launch = find_launch()
    device = process_group.join(launch, 5)
    case = json.loads((output / "cases.json").read_text())[name]
    found = measure(case, output / name, device, launch.size)
    (output / f"{name}-rank{launch.rank}.json").write_text(json.dumps(found))
    process_group.leave()


if __name__ == "__main__":
    main()
    leave_process(0)
