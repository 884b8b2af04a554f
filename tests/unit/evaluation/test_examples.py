"""Every prompt with examples is read: none may hold the question that it asks among its examples, answered."""

from __future__ import annotations

import json

import pytest
import yaml
from lm_eval.tasks import TaskManager

from l2e_ds.cli import main
from l2e_ds.data.tokenizer import load_tokenizer
from l2e_ds.errors import ConfigError
from l2e_ds.evaluation import harness
from tests.task_files import VOCABULARY, tiny_model, write_tasks

DOCUMENTS, SHOTS = 12, 3


def documents(part: int) -> list[dict]:
    """Questions of two words that no other has, with their answer; part: of which split."""
    pairs = [(first, second) for first in range(1, VOCABULARY - 1) for second in range(first + 1, VOCABULARY)]
    return [
        {"query": f"w{a} w{b}", "choices": [f"w{b}", f"w{a}"], "gold": index % 2}
        for index, (a, b) in enumerate(pairs[part * DOCUMENTS : (part + 1) * DOCUMENTS])
    ]


def write_task(folder, splits: dict[str, list[dict]], **settings) -> None:
    """FOLDER/asked.yaml over FOLDER/SPLIT.jsonl."""
    for name, content in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in content))
    task = {
        "task": "asked",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {name: str(folder / f"{name}.jsonl") for name in splits}},
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{query}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1.0},
        **settings,
    }
    (folder / "asked.yaml").write_text(yaml.safe_dump(task))


def prompts_of(folder, shots: int = SHOTS) -> list[tuple[dict, list[str]]]:
    """Return each document in order, with the parts of its prompt, of which the last is the question."""
    write_tasks(folder / "words")
    tokenizer = load_tokenizer(str(folder / "words" / "words.json"))
    tasks = harness.load_tasks(["asked"], [folder], [shots])
    harness.evaluate(tiny_model(), tokenizer, tasks, shots, 16)
    instances = tasks.loaded["tasks"]["asked"].instances
    first = {instance.doc_id: (instance.doc, instance.args[0].split("\n\n")) for instance in instances}
    return [first[index] for index in sorted(first)]


def prompts_of_the_harness(folder, shots: int) -> list[list[str]]:
    """Return the prompts that the harness writes by itself."""
    task = TaskManager(include_path=[folder], include_defaults=False).load(["asked"])["tasks"]["asked"]
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=harness.SEED)
    task.build_all_requests()
    first = {instance.doc_id: instance.args[0].split("\n\n") for instance in task.instances}
    return [first[index] for index in sorted(first)]


TRAIN, VALIDATION, TEST = {"training_split": "train"}, {"validation_split": "validation"}, {"test_split": "test"}


@pytest.mark.parametrize(
    ("settings", "as_before"),
    [
        (TEST, False),
        (VALIDATION, True),
        (TRAIN | TEST, True),
        (TRAIN | VALIDATION, True),
        (VALIDATION | TEST, True),
        (TRAIN | VALIDATION | TEST, True),
        (TEST | {"fewshot_split": "test"}, True),
        (VALIDATION | {"fewshot_split": "validation"}, False),
        (TRAIN | VALIDATION | {"fewshot_split": "validation"}, False),
        (TRAIN | VALIDATION | TEST | {"fewshot_split": "test"}, True),
        ({"training_split": "test", "test_split": "test"}, False),
        ({"training_split": "validation", "validation_split": "validation"}, True),
        (TEST | {"fewshot_config": {"samples": documents(2)}}, False),
        (TEST | {"fewshot_config": {"sampler": "first_n"}}, False),
        (VALIDATION | {"fewshot_split": "validation", "fewshot_config": {"sampler": "first_n"}}, False),
    ],
)
def test_no_prompt_holds_its_own_question(tmp_path, settings, as_before):
    """as_before: the harness gets it right by itself, and its very prompts must come out."""
    splits = {name: documents(part) for part, name in enumerate(("train", "validation", "test"))}
    write_task(tmp_path, splits, **settings)
    prompts = prompts_of(tmp_path)
    assert len(prompts) == DOCUMENTS
    for document, parts in prompts:
        assert parts[-1] == f"Question: {document['query']}\nAnswer:"
        assert len(set(parts)) == SHOTS + 1  # examples, all different, and the question
        assert not any(is_in(document, example) for example in parts[:-1])
    theirs = prompts_of_the_harness(tmp_path, SHOTS)
    pairs = zip(prompts, theirs, strict=True)
    has_own = any(is_in(document, example) for (document, _), parts in pairs for example in parts[:-1])
    assert has_own != as_before, "not the kind of task that this is said to be"
    if as_before:
        assert [parts for _, parts in prompts] == theirs


def test_a_question_that_stands_twice_is_its_own_too(tmp_path):
    """The question is repeated with other fields, with its choices in reverse order, or in the training set."""
    plain = documents(2)
    twice = [
        {**document, "choices": document["choices"][::-1], "gold": 1 - document["gold"], "index": index}
        for index, document in enumerate(plain[:4])
    ]
    same = [{**document, "index": index} for index, document in enumerate(plain)]
    splits = {"train": documents(0)[:3] + same[:2], "test": same + twice}
    for settings in (TEST, TEST | {"fewshot_split": "test"}, TRAIN | TEST):
        write_task(tmp_path, {name: splits[name] for name in splits}, **settings)
        for document, parts in prompts_of(tmp_path):
            assert not any(is_in(document, example) for example in parts[:-1]) and len(parts) == SHOTS + 1


def is_in(document: dict, part: str) -> bool:
    return f"Question: {document['query']}\n" in part


def test_other_forms_of_questions(tmp_path):
    """Texts that are the choices (WinoGrande), free answers, running text: of each the own line is seen once."""
    content = [
        {"parts": [f"w{index + 1} w60", f"w{index + 1} w61"], "end": "w62", "gold": index % 2, "text": f"w{index + 1}"}
        for index in range(DOCUMENTS)
    ]
    texts_are_choices = {"doc_to_text": "{{gold}}", "doc_to_choice": "parts", "doc_to_target": "end"}
    free = {"doc_to_choice": None, "doc_to_target": "end", "doc_to_text": "{{text}} w60"}
    generated = free | {
        "output_type": "generate_until",
        "generation_kwargs": {"max_gen_toks": 2, "until": ["w0"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    last_word = free | {"output_type": "loglikelihood", "doc_to_target": "{{' ' + end}}"}
    for settings in (texts_are_choices, generated, last_word):
        write_task(tmp_path, {"test": content}, **TEST, **settings)
        for document, parts in prompts_of(tmp_path):
            assert [part.split()[0] for part in parts].count(document["text"]) == 1 and len(parts) == SHOTS + 1
    running = free | {"doc_to_text": "", "doc_to_target": "text", "output_type": "loglikelihood_rolling"}
    write_task(tmp_path, {"test": content}, **TEST, **running, metric_list=[{"metric": "word_perplexity"}])
    assert len(prompts_of(tmp_path)) == DOCUMENTS


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (TEST, DOCUMENTS - 1),
        (VALIDATION | {"fewshot_split": "validation"}, DOCUMENTS - 1),
        (TRAIN | VALIDATION, DOCUMENTS),
        (TRAIN | TEST, DOCUMENTS),
        (TEST | {"fewshot_config": {"samples": documents(1)}}, DOCUMENTS),
    ],
)
def test_as_many_examples_as_there_are(tmp_path, settings, most):
    splits = {name: documents(part) for part, name in enumerate(("train", "validation", "test"))}
    write_task(tmp_path, splits, **settings)
    for document, parts in prompts_of(tmp_path, most):
        assert len(set(parts)) == most + 1 and not any(is_in(document, example) for example in parts[:-1])
    with pytest.raises(ConfigError, match=f"num_fewshot: got {most + 1}, the task asked has {most} examples"):
        harness.load_tasks(["asked"], [tmp_path], [most + 1])


def test_too_few_other_questions_are_one_line(tmp_path, capsys):
    """Two of four training documents ask what a document asks."""
    plain = documents(2)
    write_task(tmp_path, {"train": documents(0)[:2] + plain[:1] * 2, "test": plain}, **TRAIN, **TEST)
    model, words = tmp_path / "model", tmp_path / "words"
    write_tasks(words)
    tiny_model().save_pretrained(model)
    load_tokenizer(str(words / "words.json")).save_pretrained(model)
    command = ["evaluate", str(model), "--tasks", "asked", "--include-path", str(tmp_path), "--num-fewshot"]
    assert main([*command, "2"]) == 0
    capsys.readouterr()
    assert main([*command, "3"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "got 3, the task asked has 2 examples that ask something else" in said
