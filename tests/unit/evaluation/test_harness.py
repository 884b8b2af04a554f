"""The harness on a tiny network against a slow obvious reference: one request at a time, in float64."""

from __future__ import annotations

import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
import yaml
from transformers import GPTNeoXForCausalLM

from l2e_ds.cli import main
from l2e_ds.data.tokenizer import load_tokenizer
from l2e_ds.errors import ConfigError, DataError
from l2e_ds.evaluation import harness
from l2e_ds.run_directory import results
from l2e_ds.run_directory.json_lines import append_line
from tests.task_files import LENGTH, TASKS, tiny_model, write_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def documents(folder):
    return write_tasks(folder)


@pytest.fixture(scope="module")
def tokenizer(folder, documents):
    return load_tokenizer(str(folder / "words.json"))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tasks(folder, documents):
    return harness.load_tasks(TASKS, [folder])


class Reference:
    """Log-probabilities of a float64 copy of the model."""

    def __init__(self, model, tokenizer):
        self.model = GPTNeoXForCausalLM(model.config).double().eval()
        self.model.load_state_dict(model.state_dict())
        self.tokenizer = tokenizer

    @torch.no_grad()
    def log_p(self, tokens: list[int]) -> torch.Tensor:
        """[T, V] for the tokens after each of [T]."""
        return self.model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    def of(self, context: str, continuation: str) -> tuple[float, bool]:
        before, after = (self.tokenizer.encode(text) for text in (context, continuation))
        log_p = self.log_p((before + after)[:-1])[-len(after) :]
        greedy = log_p.argmax(-1).tolist() == after
        return float(log_p.gather(1, torch.tensor(after)[:, None]).sum()), greedy

    def goes_on(self, context: str, count: int) -> str:
        tokens = self.tokenizer.encode(context)
        for _ in range(count):
            tokens.append(int(self.log_p(tokens)[-1].argmax()))
        return self.tokenizer.decode(tokens[-count:])

    def whole_text(self, text: str) -> float:
        """Log-probability: windows of at most LENGTH predicted tokens, the first token after end-of-text."""
        tokens, total = [0, *self.tokenizer.encode(text)], 0.0
        for end in range(LENGTH, len(tokens) + LENGTH, LENGTH):
            # as many new tokens as are left, before them what fits of the text
            new = min(LENGTH, len(tokens) - 1 - (end - LENGTH))
            if new <= 0:
                break
            last = end - LENGTH + new
            begin = max(0, last - LENGTH)
            log_p = self.log_p(tokens[begin:last])[-new:]
            total += float(log_p.gather(1, torch.tensor(tokens[last - new + 1 : last + 1])[:, None]).sum())
        return total


def figures(evaluation: dict) -> dict[str, float]:
    line = results.about(None, None, "fp32", TASKS, None) | evaluation
    return {f"{r.task}/{r.metric}": r.value for r in results.results_of(line)}


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_kind_of_task_against_one_request_at_a_time(model, tokenizer, tasks, documents, batch_size):
    """The word-level tokenizer makes each word a token, so that words are lengths in characters too."""
    found = figures(harness.evaluate(model, tokenizer, tasks, None, batch_size))
    reference = Reference(model, tokenizer)

    chosen, by_length = [], []
    for document in documents["choices"]:
        scores = [reference.of(document["query"], " " + choice)[0] for choice in document["choices"]]
        chosen.append(int(np.argmax(scores)) == document["gold"])
        lengths = [len(choice) for choice in document["choices"]]
        by_length.append(int(np.argmax(np.array(scores) / lengths)) == document["gold"])
    answers = [reference.of(document["context"], " " + document["last"]) for document in documents["last_word"]]
    written = [reference.goes_on(document["context"], 3) == document["rest"] for document in documents["goes_on"]]
    texts = [document["text"] for document in documents["whole_text"]]
    words = sum(len(text.split()) for text in texts)
    expected = {
        "choices/acc": np.mean(chosen),
        "choices/acc_norm": np.mean(by_length),
        "last_word/perplexity": math.exp(-np.mean([score for score, _ in answers])),
        "last_word/acc": np.mean([greedy for _, greedy in answers]),
        "goes_on/exact_match": np.mean(written),
        "whole_text/word_perplexity": math.exp(-sum(map(reference.whole_text, texts)) / words),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    assert 0 < found["choices/acc"] < 1


def test_what_is_generated_is_the_greedy_continuation(model, tokenizer, tmp_path):
    """A task whose answers are the reference's own: all right; with the second half of the answers changed: half."""
    documents = write_tasks(tmp_path)["goes_on"][:6]
    reference = Reference(model, tokenizer)
    for index, document in enumerate(documents):
        document["rest"] = reference.goes_on(document["context"], 3) if index < 3 else "w1"
    (tmp_path / "goes_on.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    found = figures(harness.evaluate(model, tokenizer, harness.load_tasks(["goes_on"], [tmp_path]), None, 4))
    assert found["goes_on/exact_match"] == 0.5


def test_shots_are_examples_and_do_not_stay(model, tokenizer, tasks):
    """Examples change the results, and do not change those of later calls without them or with as many."""
    none, two, again, two_again = (
        harness.evaluate(model, tokenizer, tasks, shots, 8)["tasks"] for shots in (0, 2, 0, 2)
    )
    assert none == again and two == two_again and none != two
    assert [task["num_fewshot"] for task in two.values()] == [2] * len(TASKS)
    assert none["choices"]["metrics"]["acc"]["stderr"] > 0


@pytest.mark.parametrize("name", ["choices", "last_word", "goes_on"])
@pytest.mark.parametrize("shots", [0, 5])
def test_prompts_that_do_not_fit_are_counted_and_said(model, tokenizer, folder, documents, capsys, name, shots):
    tasks = harness.load_tasks([name], [folder])
    found = harness.evaluate(model, tokenizer, tasks, shots, 4)["tasks"][name]
    room = {"choices": LENGTH + 1, "last_word": LENGTH + 1, "goes_on": LENGTH - 3}[name]  # 3 are to be generated
    requests = [(instance.doc_id, instance.args) for instance in tasks.loaded["tasks"][name].instances]
    whole = [(document, arguments[0] + (arguments[1] if name != "goes_on" else "")) for document, arguments in requests]
    cut = {document for document, text in whole if len(tokenizer.encode(text)) > room}
    assert found["cut"] == len(cut) and bool(cut) == (shots == 5)
    said = (
        f"{name}, {shots}-shot: {len(cut)} of {len(documents[name])} prompts do not fit the context of {LENGTH} tokens"
    )
    assert capsys.readouterr().err.count(said) == bool(cut)
    assert {result.cut for result in results.results_of({"step": 1, "limit": None, "tasks": {name: found}})} == {
        len(cut)
    }


def test_a_tokenizer_without_an_end_of_text(model, exported, folder, documents, tmp_path, capsys):
    """Tasks begin texts with it and end answers: one line; but one that it only does not name is found."""
    content = json.loads((folder / "words.json").read_text())
    unnamed = load_tokenizer(str(folder / "words.json"))
    unnamed.eos_token = unnamed.bos_token = unnamed.unk_token = None
    named, found = (
        harness.evaluate(model, one, harness.load_tasks(TASKS, [folder]), 0, 4)["tasks"]
        for one in (load_tokenizer(str(folder / "words.json")), unnamed)
    )
    assert named == found and unnamed.eos_token is None
    content["model"]["vocab"]["w0"] = content["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "endless.json").write_text(json.dumps(content))
    command = ["evaluate", str(exported), "--tasks", "whole_text", "--include-path", str(folder)]
    assert main([*command, "--tokenizer", str(tmp_path / "endless.json")]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "endless.json has neither an eos_token nor one of <|endoftext|>" in said


def test_answers_end_with_the_tokenizers_end_of_text(tokenizer, folder, documents):
    """They end neither with the token of the model's configuration nor after the end of text."""
    model = tiny_model()
    answers = []
    for end in (0, None, [5, 6], 7):
        model.generation_config.eos_token_id = model.config.eos_token_id = end
        tasks = harness.load_tasks(["goes_on"], [folder])
        harness.evaluate(model, tokenizer, tasks, 0, 4)
        answers.append([instance.resps[0] for instance in tasks.loaded["tasks"]["goes_on"].instances])
        assert model.generation_config.eos_token_id == end
    assert all(one == answers[0] for one in answers)
    first = {answer.split()[0] for answer in answers[0]}
    wrong = int(first.pop().removeprefix("w"))
    model.generation_config.eos_token_id = wrong  # a word that answers begin with
    tasks = harness.load_tasks(["goes_on"], [folder])
    harness.evaluate(model, tokenizer, tasks, 0, 4)
    assert [instance.resps[0] for instance in tasks.loaded["tasks"]["goes_on"].instances] == answers[0]


def test_limit(model, tokenizer, tasks):
    found = harness.evaluate(model, tokenizer, tasks, 0, 8, limit=5)
    assert found["limit"] == 5
    assert {name: task["samples"] for name, task in found["tasks"].items()} == {
        "choices": 5,
        "last_word": 5,
        "goes_on": 5,
        "whole_text": 4,
    }


def test_nothing_is_left_behind(model, tokenizer, tasks):
    """Random states, mode and weights are as before; the tokenizer too, though the harness wants a padding token."""
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = [random.random(), np.random.rand(), float(torch.rand(()))]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    padding = tokenizer.pad_token
    harness.evaluate(model, tokenizer, tasks, 2, 8)
    assert [random.random(), np.random.rand(), float(torch.rand(()))] == expected
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.pad_token == padding


@pytest.mark.full
def test_groups(model, tokenizer, tmp_path):
    """A group's figure is the mean of its tasks', weighted by their documents; also of groups of groups, which have the
    shots of their tasks. What lies in a group says so."""
    write_tasks(tmp_path)
    for name, parts, metric in (
        ("inner", ["choices", "last_word"], "acc"),
        ("outer", ["inner"], "acc"),
        ("loss", ["last_word"], "perplexity"),
        ("losses", ["loss"], "perplexity"),
    ):
        metrics = [{"metric": metric, "weight_by_size": True}]
        group = {"group": name, "task": parts, "aggregate_metric_list": metrics, "metadata": {"version": 1}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(group))
    for group in ("outer", "losses"):
        found = harness.evaluate(model, tokenizer, harness.load_tasks([group], [tmp_path]), 2, 8)["tasks"]
        assert {task["num_fewshot"] for task in found.values()} == {2}
        if group == "losses":
            assert not found["losses"]["metrics"]["perplexity"]["higher_is_better"]
            continue
        accuracy = {name: task["metrics"]["acc"]["value"] for name, task in found.items()}
        mean = (11 * accuracy["choices"] + 9 * accuracy["last_word"]) / 20
        assert [accuracy["inner"], accuracy["outer"]] == pytest.approx([mean, mean])
        assert found["outer"]["samples"] == found["inner"]["samples"] == 20
        parents = [found[name]["part_of"] for name in ("outer", "inner", "choices", "last_word")]
        assert parents == [None, "outer", "inner", "inner"]


@pytest.mark.full
def test_our_groups_name_tasks_that_the_harness_has(monkeypatch):
    """An unknown name is an error that proposes the nearest one."""
    made, real = [], harness._check_known
    monkeypatch.setattr(harness, "_check_known", lambda names, known: made.append(known) or real(names, known))
    with pytest.raises(ConfigError, match="tasks: no task or group 'arc_eazy'; did you mean 'arc_easy'"):
        harness.load_tasks(["arc_eazy"], [])
    for name, count in {"paper": 9, "bigbench_lite": 24}.items():
        names = yaml.safe_load((harness.OWN_TASKS / f"{name}.yaml").read_text())["task"]
        assert len(set(names)) == count
        assert set(names) <= set(made[0])


def test_bad_tasks_are_named(folder, documents, tmp_path):
    with pytest.raises(ConfigError, match="include_path: no such folder: .*nowhere"):
        harness.load_tasks(["choices"], [tmp_path / "nowhere"])
    # one's own files are read before the harness, which would pass over a broken one and take its own task
    task, write = (folder / "choices.yaml").read_text(), tmp_path.joinpath("one.yaml").write_text
    write("task: [a, {")
    with pytest.raises(ConfigError, match=r"include_path: .*one\.yaml:2: "):
        harness.load_tasks(["choices"], [tmp_path])
    write("include: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"include_path: .*one\.yaml: .*nowhere"):
        harness.load_tasks(["choices"], [tmp_path])
    write(task)
    (tmp_path / "two.yaml").write_text(task)
    with pytest.raises(ConfigError, match=r"include_path: .*two\.yaml: the task 'choices' is also in .*one\.yaml"):
        harness.load_tasks(["choices"], [tmp_path])
    (tmp_path / "two.yaml").unlink()
    write(task.replace("choices.jsonl", "lost.jsonl"))
    with pytest.raises(DataError, match=r"task choices: cannot be loaded: FileNotFoundError: .*lost\.jsonl[^;]*$"):
        harness.load_tasks(["choices"], [tmp_path])
    (folder / "nothing.jsonl").write_text('{"query": ')
    write(task.replace("choices.jsonl", "nothing.jsonl"))
    with pytest.raises(DataError, match=r"task choices: cannot be loaded: \w+: .+"):
        harness.load_tasks(["choices"], [tmp_path])


def test_more_examples_than_there_are(folder, documents):
    """If examples are the documents themselves, one of them is always the question."""
    harness.load_tasks(["choices"], [folder], [None, 0, 10])
    with pytest.raises(ConfigError, match="num_fewshot: got 11, the task choices has 10 examples"):
        harness.load_tasks(["choices"], [folder], [0, 11])


@pytest.fixture(scope="module")
def exported(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "l2e_run.yaml").write_text(yaml.safe_dump({"step": 7, "tokens": 4096, "config": {}}))
    return path


def test_command(exported, folder, documents, model, tokenizer, tasks, capsys):
    words = ["evaluate", str(exported), "--tasks", *TASKS, "--include-path", str(folder), "--num-fewshot", "0", "2"]
    assert main([*words, "--batch-size", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| choices |") == 4
    lines = [json.loads(line) for line in (exported / results.FILE).read_text().splitlines()]
    assert [(line["step"], line["tokens"], line["ranks"], line["precision"]) for line in lines] == [
        (7, 4096, 1, "fp32")
    ] * 2
    for line, shots in zip(lines, (0, 2), strict=True):
        assert line["tasks"] == harness.evaluate(model, tokenizer, tasks, shots, 4)["tasks"]
    assert len(results.read_results(exported)) == 2 * 6


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--limit", "0"], "--limit: got 0, allowed: an integer >= 1"),
        (["--num-fewshot", "0", "-1"], "--num-fewshot: got -1, allowed: an integer >= 0"),
        (["--batch-size", "0"], "--batch-size: got 0, allowed: an integer >= 1"),
        (["--step", "5"], "--step: goes with a run directory, "),
        (["--all-checkpoints"], "--all-checkpoints: "),
        (["--output", "nowhere/figures.jsonl"], "--output: cannot write nowhere/figures.jsonl"),
        (["--output", "OTHER"], "exists and is no file of evaluations"),
        (["--num-fewshot", "11"], "--num-fewshot: got 11, the task choices has 10 examples"),
        (["--include-path", "nowhere"], "--include-path: no such folder: nowhere"),
        (["--tokenizer", "nowhere.json"], "--tokenizer: no such file or folder: nowhere.json"),
    ],
)
def test_bad_input_is_one_line(exported, folder, documents, tmp_path, capsys, words, told):
    before = sorted(exported.iterdir())
    other = tmp_path / "other.yaml"
    other.write_text("task: mine")
    words = [str(other) if word == "OTHER" else word for word in words]
    command = ["evaluate", str(exported), "--tasks", "choices", "--include-path", str(folder), *words]
    assert main(command) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and told in said.err and said.out == ""
    assert sorted(exported.iterdir()) == before and other.read_text() == "task: mine"


def test_damaged_models_are_one_line(exported, folder, documents, tmp_path, capsys):
    def told(name: str, content: str | bytes) -> str:
        model = tmp_path / name
        shutil.copytree(exported, model)
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        assert main(["evaluate", str(model), "--tasks", "choices", "--include-path", str(folder)]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        return said

    weights = (exported / "model.safetensors").read_bytes()
    assert "transformers cannot load it" in told("model.safetensors", weights[:-100])
    config = json.loads((exported / "config.json").read_text())
    assert "transformers cannot load it" in told("config.json", json.dumps({**config, "hidden_size": 32}))
    for content in ("", "step: [", "[]", "step: 7"):
        assert "does not say step and tokens" in told("l2e_run.yaml", content)
        shutil.rmtree(tmp_path / "l2e_run.yaml")


def test_a_disk_that_is_full_costs_the_file_not_the_table(exported, folder, documents, capsys, monkeypatch):
    words = ["evaluate", str(exported), "--tasks", "choices", "--include-path", str(folder), "--output", "/dev/full"]
    monkeypatch.setattr("l2e_ds.evaluation.evaluate._check_output", lambda path: None)  # it is no file
    assert main(words) == 2
    said = capsys.readouterr()
    assert "| choices |" in said.out
    assert "--output: cannot write /dev/full: No space left on device; the results are printed above" in said.err


def test_results_take_the_newest_and_no_half_line(tmp_path):
    def line(step: int, value: float | None, precision: str = "fp32") -> dict:
        metric = {"acc": {"value": value, "stderr": 0.1, "higher_is_better": True}}
        task = {"samples": 9, "cut": 0, "num_fewshot": 0, "version": 1.0, "part_of": None, "metrics": metric}
        return results.about(step, 10 * step, precision, ["choices"], 0) | {"limit": None, "tasks": {"choices": task}}

    assert results.read_results(tmp_path) == []
    for step, value in ((20, 0.5), (10, 0.25), (20, 0.75)):
        append_line(tmp_path / results.FILE, line(step, value))
    with (tmp_path / results.FILE).open("a") as file:
        file.write('{"step": 30, "tas')
    assert [(found.step, found.value) for found in results.read_results(tmp_path)] == [(10, 0.25), (20, 0.75)]
    append_line(tmp_path / results.FILE, line(40, 0.5))  # after the kill that cut the line off
    assert [found.step for found in results.read_results(tmp_path)] == [10, 20, 40]
    append_line(tmp_path / results.FILE, line(40, 0.6, "bf16"))
    both = {found.precision: found.value for found in results.read_results(tmp_path) if found.step == 40}
    assert both == {"fp32": 0.5, "bf16": 0.6}
    append_line(tmp_path / results.FILE, line(40, None))  # the newest is not finite
    assert [found.precision for found in results.read_results(tmp_path) if found.step == 40] == ["bf16"]
    wrong = json.dumps(line(20, "much"))  # type: ignore[arg-type]
    for content in ("3", "null", '{"step": 6}', wrong):
        (tmp_path / results.FILE).write_text(f"{json.dumps(line(10, 0.5))}\n{content}\n")
        with pytest.raises(DataError, match=r"evaluations\.jsonl:2: is no evaluation; remove the line"):
            results.read_results(tmp_path)
