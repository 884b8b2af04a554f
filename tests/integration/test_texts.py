"""`evaluation.texts` and `evaluation.samples` of a real run, held against what the run leaves."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from l2e_ds.cli import main
from l2e_ds.data.tokenizer import load_tokenizer
from tests.integration.running import lines
from tests.processes import finish

LENGTH = 16
DOCUMENTS = ["Le chat dort sur la table, été comme hiver. " * 4, "Nobody knew where the train had gone.\n" * 3]


def test_texts_are_evaluated_whole(run_file, tmp_path, monkeypatch):
    """With the tokenizer that the run trains on its data; from paths relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    texts = [
        "{name: own, source: jsonl, path: own.jsonl}",
        "{name: half, source: jsonl, path: own.jsonl, max_documents: 1}",
    ]
    samples = ["evaluation.samples=[The river]", "evaluation.sample_tokens=4"]
    command = ["train", run_file, f"evaluation.texts=[{', '.join(texts)}]", *samples]
    codes, said = finish("-m", "l2e_ds.cli", *command)
    assert codes == [0], said[-3000:]
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "model")]) == 0
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    evaluations, start = lines(tmp_path / "run", "evaluation"), lines(tmp_path / "run", "start")[0]
    for name, documents in (("own", DOCUMENTS), ("half", DOCUMENTS[:1])):
        ids = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        count = (len(ids) - 1) // LENGTH
        rows = torch.tensor([ids[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)])
        with torch.no_grad():
            logits = model(rows[:, :-1]).logits
        loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
        size = sum(len(text.encode()) for text in documents)
        assert evaluations[-1][f"text_loss/{name}"] == pytest.approx(loss, rel=1e-5)
        bits = loss / math.log(2) * len(ids) / size
        assert evaluations[-1][f"text_bits_per_byte/{name}"] == pytest.approx(bits, rel=1e-5)
        assert start["texts"][name] == {"tokens": len(ids), "evaluated_tokens": count * LENGTH, "bytes": size}
        left = len(ids) - 1 - count * LENGTH
        assert (
            f"text {name}: {len(ids):,} tokens of {size:,} bytes, of which {count * LENGTH:,} are evaluated; {left:,}"
            in said
        )
    assert [line["step"] for line in evaluations if "text_loss/own" in line] == [0, 3, 6]
    assert "path: " + str(tmp_path / "own.jsonl") in (tmp_path / "run/config.yaml").read_text()

    written = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["tokens"], line["prompt"]) for line in written] == [
        (step, step * 8 * LENGTH, "The river") for step in (0, 3, 6)
    ]
    assert all(line["text"] for line in written)


def test_samples_longer_than_the_model_takes_are_refused(run_file, tmp_path):
    """After preparation, which trains the tokenizer; with a tokenizer that is given, before."""
    command = ["train", run_file, "evaluation.samples=[The river]", "evaluation.sample_tokens=2047"]
    codes, said = finish("-m", "l2e_ds.cli", *command)
    assert codes == [2]
    assert "l2e-ds: error: evaluation.sample_tokens: got 2047 after a prompt of" in said
    assert not (tmp_path / "run/metrics.jsonl").exists() and "Traceback" not in said
    tokenizer = next((tmp_path / "cache").glob("*/tokenizer"))
    codes, said = finish(
        "-m", "l2e_ds.cli", *command, f"data.tokenizer={tokenizer}", "data.train_tokenizer=null", "--dry-run"
    )
    assert codes == [2]
    assert "l2e-ds: error: evaluation.sample_tokens: got 2047 after a prompt of" in said
