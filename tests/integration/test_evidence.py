"""The scripts of launch/studies/evidence, at a size of seconds."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from l2e_ds.evaluation.model_source import find_model, load_causal_model
from l2e_ds.study.checking import resolve_runs
from l2e_ds.study.definition import read_study
from tests.integration.conftest import SENTENCES
from tests.integration.running import lines
from tests.processes import REPOSITORY, finish

EVIDENCE = REPOSITORY / "launch/studies/evidence"
STUDIES = {"main": 50, "long": 12, "strength": 32, "transfer": 42, "start": 18, "choices": 24, "all-layers": 12}
SOURCES = [part["name"] for part in yaml.safe_load((EVIDENCE / "base.yaml").read_text())["data"]["sets"]]


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    """Twenty documents of each source, as `prepare.py` takes them, and what it makes of them."""
    monkeypatch.chdir(tmp_path)
    documents = [
        {"text": " ".join(SENTENCES[(k * n) % 5] for k in range(20)) + f" {n} {source}", "meta": {"source": source}}
        for n in range(20)
        for source in SOURCES
    ]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.jsonl").write_text("\n".join(map(json.dumps, documents)))
    codes, said = finish(EVIDENCE / "prepare.py", tmp_path / "corpus")
    assert codes == [0], said
    return tmp_path / "studies/evidence/text"


@pytest.mark.full
def test_every_study_could_start(text):
    assert {path.stem for path in EVIDENCE.glob("*.yaml")} == {"base", *STUDIES}
    for name, count in STUDIES.items():
        study = read_study(EVIDENCE / f"{name}.yaml", [])
        runs = resolve_runs(study, 1, this_machine=False)
        assert len(runs) == count
        for run in study.runs:
            assert (run.baseline is None) == (runs[run.name].config.inhibition.method == "none"), run.name


@pytest.mark.full
def test_a_control_and_what_is_measured(text, tmp_path):
    small = ["model.hidden_size=32", "model.num_heads=2", "model.num_layers=4", "data.sequence_length=16"]
    small += ["training.steps=2", "training.evaluation_sequences=64", "optimizer.schedule_steps=10"]
    small += ["training.precision=fp32"]  # in which `measure.py` computes
    run_file = EVIDENCE / "base.yaml"
    runs = [tmp_path / "a/runs/none-seed1", tmp_path / "a/runs/without-mlp"]
    for run, words in zip(runs, [["-m", "l2e_ds.train"], [EVIDENCE / "controls.py", "without-mlp"]], strict=True):
        codes, said = finish(*words, run_file, *small, "inhibition.method=none", f"training.run_directory={run}")
        assert codes == [0], said
    plain, without = ([line["held_out_loss"] for line in lines(run, "evaluation")] for run in runs)
    assert plain[0] != without[0] and len(plain) == len(without) == 2
    codes, said = finish(EVIDENCE / "curves.py", tmp_path / "curves.csv", *runs)
    assert codes == [0], said
    with (tmp_path / "curves.csv").open() as file:
        found = [(line["run"], int(line["step"]), float(line["held_out_loss"])) for line in csv.DictReader(file)]
    assert found == [
        (run.name, step, round(loss, 6))
        for run, losses in zip(runs, (plain, without), strict=True)
        for step, loss in zip((0, 2), losses, strict=True)
    ]
    saved = load_causal_model(find_model(str(runs[1])), "fp32", None)[0]
    assert [bool(block.mlp.dense_4h_to_h.weight.any()) for block in saved.gpt_neox.layers] == [True, False, False, True]
    for _ in range(2):  # the second time there is nothing to do
        codes, said = finish(EVIDENCE / "measure.py", tmp_path / "measured.csv", runs[0])
        assert codes == [0], said
    with (tmp_path / "measured.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert line["run"] == "a/none-seed1"
    assert float(line["loss"]) == pytest.approx(plain[-1], rel=1e-5)  # a mean of float32 losses of 11 x 64 x 16 tokens
    assert abs(float(line["worth"])) > abs(float(line["worth_random"])) > 0
    assert 0 < float(line["active_share"]) < 1 and float(line["dead_share"]) == 0
    codes, said = finish(EVIDENCE / "layers.py", tmp_path / "layers.csv", runs[0])
    assert codes == [0], said
    with (tmp_path / "layers.csv").open() as file:
        (line,) = csv.DictReader(file)
    last = lines(runs[0], "evaluation")[-1]
    for layer, key in enumerate(("comparison_layer0", "layer1", "layer2", "comparison_layer3")):
        for name in ("top_share_score", "mean_s"):
            # the same text and weights, in float32, in batches of another size
            assert float(line[f"layer{layer}/{name}"]) == pytest.approx(last[f"{key}/{name}"], rel=1e-4)


@pytest.mark.full
def test_table_and_figure_of_the_results(tmp_path):
    """Made anew from the committed files; docs/results.md has those tables."""
    codes, said = finish(EVIDENCE / "tables.py", EVIDENCE)
    page = (REPOSITORY / "docs/results.md").read_text()
    tables = said.strip().split("\n\n")
    assert codes == [0] and len(tables) == 19 and all(table in page for table in tables)
    codes, said = finish(EVIDENCE / "figure.py", EVIDENCE / "results.csv", tmp_path / "figure.svg")
    assert codes == [0], said
    assert "projected-0.05 (n = " in (tmp_path / "figure.svg").read_text()


def test_planted_specificity(monkeypatch):
    """The first half of 40 neurons belong to one feature each, the others to none; half as peaked changes no share."""
    monkeypatch.syspath_prepend(EVIDENCE)  # as when it is run
    random = np.random.default_rng(0)
    labels, length, neurons = random.permutation(np.arange(4).repeat(40)), 32, 40
    of_tokens = labels.repeat(length)[:, None]
    noise = random.standard_normal((len(of_tokens), neurons))
    is_own = (of_tokens == np.arange(neurons) % 4) & (np.arange(neurons) < neurons // 2)
    specific, unspecific = (np.where(is_own[:, part], 4.0, 0.0) + noise[:, part] for part in (slice(20), slice(20, 40)))
    measure = script("features").measure
    tied, free = (measure(z.astype(np.float32), labels, length) for z in (specific, unspecific))
    assert tied["own_share"] > 0.99 and tied["fkr"] < free["fkr"]
    # a quarter by chance: of 20 neurons, each with 2 % of 160 * 32 tokens, of which half are counted
    assert abs(free["own_share"] - 0.25) < 5 * (0.25 * 0.75 / (20 * 51)) ** 0.5
    # between the features lie 4^2 * 1/4 * 3/4 = 3 of a variance of 4; with 160 texts in 4 features, chance gives 3/5120
    assert tied["eta2"] == pytest.approx(0.75, abs=0.02) and tied["eta2_chance"] < 0.1 and free["eta2"] < 0.01
    # every neuron's highest of four features lies above its three others, and above those of all other neurons
    assert tied["own_ms"] > free["own_ms"] and tied["ks"] == pytest.approx(0.75)
    flat = measure(np.cbrt(specific).astype(np.float32), labels, length)
    assert flat["own_share"] == tied["own_share"] and flat["ms"] < tied["ms"]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EVIDENCE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("layers", "numbers"), [("mid-2", [1, 2]), ([3], [3])])
def test_controls_change_the_inhibited_layers(layers, numbers):
    controls = script("controls")
    hf_config = GPTNeoXConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64
    )
    tokens = torch.arange(24).view(2, 12)

    def gradients(control: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(hf_config)
        if control != "none":
            controls.changed(control, layers, model)
        penalty = []
        for layer in numbers:
            act = model.gpt_neox.layers[layer].mlp.act
            act.register_forward_hook(lambda module, inputs, z: penalty.append(0.5 * z.square().mean()))
        loss = model(input_ids=tokens, labels=tokens).loss
        (loss + sum(penalty) if control == "none" else loss).backward()
        return [parameter.grad for parameter in model.parameters()]

    for found, expected in zip(gradients("l2=0.5"), gradients("none"), strict=True):
        torch.testing.assert_close(found, expected)
    nothing = gradients("without-mlp")
    names = [name for name, _ in AutoModelForCausalLM.from_config(hf_config).named_parameters()]
    still = {name.split(".")[2] for name, g in zip(names, nothing, strict=True) if "mlp" in name and not g.any()}
    assert still == set(map(str, numbers))
    with pytest.raises(SystemExit, match="allowed: without-mlp, small-start, l2=COEFFICIENT"):
        gradients("else")
    assert sys.modules.get("controls") is None
