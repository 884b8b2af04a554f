"""Runs on every rank. `good`: the command of OUTPUT/command.json. `bad`: each case of OUTPUT/cases.json, {name: [model,
task, examples]}, by the harness; what is raised goes to OUTPUT/NAME-rankR.txt. A process joins one group of ranks
only."""

import json
import sys
from pathlib import Path

from l2e_ds.cli import main
from l2e_ds.data.tokenizer import load_tokenizer
from l2e_ds.distributed import collectives, launch, process_group
from l2e_ds.errors import L2EError
from l2e_ds.system.process import leave_process, prepare_libraries


def run_bad(output: Path) -> None:
    prepare_libraries()
    process_group.join(launch.find_launch(), 2)
    from transformers import AutoModelForCausalLM

    from l2e_ds.evaluation.harness import evaluate, load_tasks

    tokenizer = load_tokenizer(str(output / "tasks/words.json"))
    for name, (model, task, shots) in json.loads((output / "cases.json").read_text()).items():
        tasks = load_tasks([task], [output / "tasks"]) if collectives.is_main() else None
        told = "nothing"
        try:
            evaluate(AutoModelForCausalLM.from_pretrained(output / model), tokenizer, tasks, shots, 3)
        except L2EError as error:
            told = f"{error.on_every_rank} {error}"
        (output / f"{name}-rank{collectives.rank()}.txt").write_text(told)
    process_group.leave()


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    if sys.argv[1] == "bad":
        run_bad(folder)
        leave_process(0)
    leave_process(main(json.loads((folder / "command.json").read_text())))
