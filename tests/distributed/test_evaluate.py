"""`l2e-ds evaluate` on one and on three ranks: the same figures; and what fails on one of two ends both."""

import json

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from l2e_ds.data.tokenizer import load_tokenizer
from l2e_ds.evaluation.harness import evaluate, load_tasks
from tests.processes import REPOSITORY
from tests.task_files import TASKS, VOCABULARY, tiny_model, write_tasks

WORKER = REPOSITORY / "tests/distributed/workers/evaluate.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, of which the small one lacks half of the tokens, and tasks."""
    root = tmp_path_factory.mktemp("evaluate")
    write_tasks(root / "tasks")
    wide = (root / "tasks/choices.yaml").read_text().replace("task: choices", "task: wide")
    (root / "tasks/wide.yaml").write_text(f"{wide}description: '{20 * 'w9 '}'\n")  # prompts that do not fit the context
    tokenizer = load_tokenizer(str(root / "tasks/words.json"))
    for name, rows in (("model", VOCABULARY), ("small", VOCABULARY // 2)):
        tiny_model(rows).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def test_three_ranks_give_the_figures_of_one(folder, run_ranks):
    common = ["--include-path", str(folder / "tasks"), "--batch-size", "3", "--output", str(folder / "three.jsonl")]
    command = ["evaluate", str(folder / "model"), "--tasks", *TASKS, "wide", "--num-fewshot", "0", "2", *common]
    (folder / "command.json").write_text(json.dumps(command))
    run_ranks(3, WORKER, "good", folder, timeout=600)
    lines = [json.loads(line) for line in (folder / "three.jsonl").read_text().splitlines()]
    assert [line["ranks"] for line in lines] == [3, 3]
    model = GPTNeoXForCausalLM.from_pretrained(folder / "model")
    tokenizer = load_tokenizer(str(folder / "tasks/words.json"))
    tasks = load_tasks([*TASKS, "wide"], [folder / "tasks"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks had: more would add up in another order
    try:
        alone = [evaluate(model, tokenizer, tasks, shots, 3)["tasks"] for shots in (0, 2)]
    finally:
        torch.set_num_threads(threads)
    assert [line["tasks"] for line in lines] == alone
    assert alone[-1]["wide"]["cut"] == alone[-1]["wide"]["samples"] and not alone[-1]["choices"]["cut"]


def test_a_failure_on_any_rank_ends_all(folder, run_ranks):
    """Of all ranks alike, of some ranks' batches only, and of rank 0 while it reckons."""
    broken = (folder / "tasks/goes_on.yaml").read_text().replace("goes_on", "broken")
    (folder / "tasks/broken.yaml").write_text(
        broken.replace("doc_to_target: rest", "doc_to_target: '{{rest | length}}'")
    )
    last = json.dumps({"context": "w1 w2", "rest": None})
    (folder / "tasks/broken.jsonl").write_text((folder / "tasks/goes_on.jsonl").read_text() + last + "\n")
    (folder / "tasks/repeated.yaml").write_text(
        (folder / "tasks/goes_on.yaml").read_text().replace("goes_on", "repeated")
    )
    (folder / "tasks/repeated.jsonl").write_text(2 * (json.dumps({"context": "w1 w2", "rest": "w3"}) + "\n"))
    cases = {
        "too-long": ["model", "too_long", 0],
        "small": ["small", "choices", 0],
        "broken": ["model", "broken", 0],
        "repeated": ["model", "repeated", 1],
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    run_ranks(2, WORKER, "bad", folder, timeout=600)
    said = {name: [(folder / f"{name}-rank{rank}.txt").read_text() for rank in (0, 1)] for name in cases}
    assert all(first == second for first, second in said.values())
    assert said["too-long"][0].startswith("True tasks: rank 0: AssertionError: Invalid configuration: requested max")
    assert said["small"][0].startswith("True tasks: rank 0: IndexError: index out of range")
    assert said["broken"][0].startswith("True tasks: broken: ")
    assert said["repeated"][0].startswith("True num_fewshot: got 1, the task repeated has 0 examples")
