"""`l2e-ds analyze` and `l2e-ds neuron`: the real commands on a model with planted neurons, on one rank and on two."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from l2e_ds.cli import main
from l2e_ds.data.tokenizer import train_tokenizer
from tests.processes import finish

FEATURES = ("animals", "metals", "numbers", "rivers")
WORDS = {
    "animals": "horse tiger otter zebra lemur camel",
    "metals": "iron copper silver nickel cobalt tungsten",
    "numbers": "seven eleven forty sixty twelve ninety",
    "rivers": "danube volga mekong amazon loire tagus",
}
COMMON = "the of and with near from over that this under"
LENGTH, TEXTS, HIDDEN, NEURONS = 16, 30, 32, 48
MONOSEMANTIC, POLYSEMANTIC = 7, 21  # neurons of layer 1; the first answers to metals, the second to all but rivers
TABLES = ("neurons", "neuron_features", "probes", "significance", "scale", "layers", "fkr", "distributions")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """features.jsonl, `planted` (a Pythia with two planted neurons) and `other` (a Llama), each with a tokenizer."""
    folder = tmp_path_factory.mktemp("analyze")
    random = np.random.default_rng(5)
    records = []
    for feature in FEATURES:
        for _ in range(TEXTS):
            own, common = random.choice(WORDS[feature].split(), 16), random.choice(COMMON.split(), 24)
            words = random.permutation(np.concatenate([own, common]))
            records.append({"text": " ".join(words), "feature": feature})
    (folder / "features.jsonl").write_text("\n".join(map(json.dumps, records)))
    tokenizer = train_tokenizer((record["text"] for record in records), 400)
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4}
    planted = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, intermediate_size=NEURONS))
    plant(planted, tokenizer)
    other = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=NEURONS))
    for name, model in (("planted", planted), ("other", other)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@torch.no_grad()
def plant(model: GPTNeoXForCausalLM, tokenizer) -> None:
    """The embeddings of a feature's words share a direction of their own, which only two neurons of layer 1 read."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02 if "embed_in" in name or "attention" in name else 0.1)
        if "dense_h_to_4h.weight" in name:
            parameter[:, : len(FEATURES)] = 0
    embedding, mlp = model.gpt_neox.embed_in.weight, model.gpt_neox.layers[1].mlp
    for place, feature in enumerate(FEATURES):
        for word in WORDS[feature].split():
            for token in tokenizer.encode(f" {word}"):
                embedding[token, place] += 0.3
    for neuron, features in ((MONOSEMANTIC, [1]), (POLYSEMANTIC, [0, 1, 2])):
        mlp.dense_h_to_4h.weight[neuron] = 0
        mlp.dense_h_to_4h.weight[neuron, features] = 2.0
        mlp.dense_h_to_4h.bias[neuron] = -2.0


def said_by(*words: object, ranks: int = 1) -> str:
    """What a command says that succeeds."""
    codes, said = finish("-m", "l2e_ds.cli", *words, ranks=ranks)
    assert codes == [0] * ranks, said[-5000:]
    return said


def analyze(made: Path, output: Path, *options: object, ranks: int = 1, models: tuple[str, ...] = ("planted",)) -> str:
    words = ["analyze", *(made / model for model in models), "--features", made / "features.jsonl"]
    words += ["--output", output, "--sequence-length", LENGTH, "--resamples", 20, *options]
    said = said_by(*words, ranks=ranks)
    umask = os.umask(0)
    os.umask(umask)
    assert output.stat().st_mode & 0o777 == 0o777 & ~umask
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []
    return said


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("alone") / "analysis"
    return output, analyze(made, output, "--suggest-share", models=("planted", "other"))


def table(output: Path, name: str, model: str = "planted") -> pd.DataFrame:
    return pd.read_parquet(output / "models" / model / f"{name}.parquet")


def test_planted_neurons(alone):
    """The neuron that answers to metals is found first and killed rightly; the one that answers to three is not."""
    output, _ = alone
    probes = table(output, "probes")
    first = probes[(probes["feature"] == "metals") & (probes["place"] == 1)].iloc[0]
    assert (first["layer"], first["neuron"], first["direction"]) == (1, MONOSEMANTIC, 1)
    assert first["f1_test"] > 0.95
    assert first["score_inside_low"] > 2 * first["score_outside_high"]
    found = table(output, "neuron_features").set_index(["layer", "neuron", "feature"])
    for feature in FEATURES[:3]:  # it tells rivers, by its silence
        assert found.loc[(1, POLYSEMANTIC, feature), "f1_test"] < 0.75
    neurons = table(output, "neurons").set_index(["layer", "neuron"])
    assert neurons.loc[1, MONOSEMANTIC]["own_feature"] == "metals"
    assert neurons.loc[1, MONOSEMANTIC]["own_score"] > 1.5 * neurons.loc[1, POLYSEMANTIC]["own_score"]
    significance = table(output, "significance").set_index("feature")
    assert significance.loc["metals", "ratio"] > 1


def test_what_is_written(alone):
    output, said = alone
    names = {path.stem for path in (output / "models/planted").iterdir()}
    assert names == set(TABLES)
    assert {path.suffix for path in (output / "figures").iterdir()} == {".png", ".svg"}
    assert len(list((output / "figures").iterdir())) >= 12
    about = json.loads((output / "analysis.json").read_text())
    assert [model["label"] for model in about["models"]] == ["planted", "other"]
    assert about["options"]["sequence_length"] == LENGTH and about["ranks"] == 1
    report = about["texts"][0]
    assert [row["kept"] for row in report["features"]] == [TEXTS] * 4
    for words in ("| planted |", "| other |", "metals", "lowest False Killing Rate"):
        assert words in said
    assert len(table(output, "neurons")) == 3 * NEURONS
    assert len(table(output, "neuron_features", "other")) == 3 * NEURONS * len(FEATURES)


def test_scores_against_numpy(alone, made):
    """Every score, kurtosis and the false killing rate from single tokens, of the folder's model and tokenizer."""
    output, _ = alone
    model = GPTNeoXForCausalLM.from_pretrained(made / "planted").eval()
    tokenizer = AutoTokenizer.from_pretrained(made / "planted")
    records = [json.loads(line) for line in (made / "features.jsonl").read_text().splitlines()]
    tokens = torch.tensor([tokenizer(record["text"])["input_ids"][:LENGTH] for record in records])
    labels = np.array([record["feature"] for record in records])
    seen: list[np.ndarray] = []
    handle = model.gpt_neox.layers[1].mlp.dense_4h_to_h.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].double().numpy())
    )
    with torch.no_grad():
        model(tokens)
    handle.remove()
    z = seen[0]
    phi = (z - z.mean((0, 1))) ** 2 / z.reshape(-1, NEURONS).var(0, ddof=1)
    neurons = table(output, "neurons").query("layer == 1")
    np.testing.assert_allclose(neurons["kurtosis"], (phi**2).mean((0, 1)), rtol=1e-3)
    found = table(output, "neuron_features").query("layer == 1")
    inside = np.stack([phi[labels == feature].mean((0, 1)) for feature in FEATURES], 1)
    outside = np.stack([phi[labels != feature].mean((0, 1)) for feature in FEATURES], 1)
    np.testing.assert_allclose(found["score_inside"], inside.ravel(), rtol=1e-4)
    np.testing.assert_allclose(found["score_outside"], outside.ravel(), rtol=1e-4)
    own = np.array(FEATURES)[inside.argmax(1)]
    assert (neurons["own_feature"] == own).all()
    wrong = labels[:, None, None] != own
    for row in table(output, "fkr").query("layer == 1").itertuples():
        count = round(row.share_counted * phi.size)
        chosen = np.argsort(phi.ravel())[::-1][:count]
        assert abs(row.fkr - np.broadcast_to(wrong, phi.shape).ravel()[chosen].mean()) <= row.fkr_error + 1e-6
        assert abs(row.tau / np.sort(phi.ravel())[::-1][count - 1] - 1) < 1 / 64


@pytest.mark.full
def test_two_ranks_give_the_same_tables(alone, made, tmp_path):
    """To the bit; kurtosis, summed over ranks, to its last digits."""
    analyze(made, tmp_path / "analysis", ranks=2, models=("planted",))
    for name in TABLES:
        one, two = table(alone[0], name), table(tmp_path / "analysis", name)
        if "kurtosis" in one:
            np.testing.assert_allclose(one.pop("kurtosis"), two.pop("kurtosis"), rtol=1e-12)
        pd.testing.assert_frame_equal(one, two, check_exact=True)


@pytest.mark.full
def test_sharded_weights_give_the_same(alone, made, tmp_path):
    """--zero3 on two ranks, up to rounding; one of the ranks has a batch less."""
    analyze(made, tmp_path / "analysis", "--zero3", "--batch", 7, ranks=2, models=("other",))
    one, two = table(alone[0], "neurons", "other"), table(tmp_path / "analysis", "neurons", "other")
    np.testing.assert_allclose(one["own_score"], two["own_score"], rtol=1e-3)
    assert (one["own_feature"] == two["own_feature"]).mean() > 0.98
    assert (
        table(alone[0], "scale", "other")["parameters"] == table(tmp_path / "analysis", "scale", "other")["parameters"]
    ).all()


@pytest.mark.full
def test_an_activation_that_is_not_finite_ends_all_ranks(made, tmp_path):
    """At once, also where ranks gather each other's weights; the model before it is not lost."""
    given = not_finite(made)
    words = ["analyze", made / "planted", *given, "--features", made / "features.jsonl", "--output", tmp_path / "out"]
    words += ["--sequence-length", LENGTH, "--resamples", 20, "--zero3"]
    codes, said = finish("-m", "l2e_ds.cli", *words, ranks=2)
    assert 0 not in codes
    assert said.count("broken: layer 2, neuron 3: its activations in text 0 are not finite") == 1
    (kept,) = tmp_path.iterdir()
    assert kept.name.endswith(".unfinished") and str(kept) in said
    assert len(pd.read_parquet(kept / "models/planted/neurons.parquet")) == 3 * NEURONS


@pytest.mark.full
@pytest.mark.parametrize("samples", ["mean", "max"])
def test_a_text_as_one_sample(made, tmp_path, samples):
    analyze(made, tmp_path / "analysis", "--samples", samples, "--layers", 1, "--precision", "bf16")
    probes = table(tmp_path / "analysis", "probes").query("feature == 'metals' and place == 1")
    assert probes[["layer", "neuron"]].to_numpy().tolist() == [[1, MONOSEMANTIC]]
    fkr = table(tmp_path / "analysis", "fkr")
    assert set(fkr["layer"]) == {-1, 1}
    assert (table(tmp_path / "analysis", "layers")["depth"] == 0.5).all()


@pytest.mark.full
def test_checkpoints_of_a_run(made, run_file, launch, tmp_path):
    """Figures over training, changes between checkpoints; the newest checkpoint is what the run directory means."""
    overrides = ["training.steps=4", "checkpoint.every=2"]
    one = launch(sys.executable, "-m", "l2e_ds.train", run_file, *overrides)
    assert one.end() == 0, one.said()[-3000:]
    run = tmp_path / "run"
    output = tmp_path / "over-time"
    options = ["--features", made / "features.jsonl", "--sequence-length", LENGTH, "--resamples", 20]
    said_by("analyze", run, "--all-checkpoints", "--layers", 1, 3, "--output", output, *options)
    assert (output / "figures/over_time.png").stat().st_size > 10_000
    changes = pd.read_parquet(output / "changes.parquet")
    assert changes[["from_step", "to_step"]].drop_duplicates().to_numpy().tolist() == [[2, 4]]
    labels = [model["label"] for model in json.loads((output / "analysis.json").read_text())["models"]]
    assert labels == ["run-step00000002", "run-step00000004"]
    assert changes["layer"].tolist() == [1, 3]
    before, after = (table(output, "layers", label) for label in labels)
    np.testing.assert_allclose(changes["mean_s"], after["mean_s"] - before["mean_s"])
    before, after = (table(output, "neurons", label).groupby("layer")["own_feature"].agg(list) for label in labels)
    changed = [np.mean([a != b for a, b in zip(before[layer], after[layer], strict=True)]) for layer in (1, 3)]
    np.testing.assert_allclose(changes["own_changed"], changed)
    said = said_by("neuron", run, "--layer", 3, "--index", 5, "--output", tmp_path / "neuron.html", *options[:4])
    assert "<svg" in (tmp_path / "neuron.html").read_text()
    own = table(output, "neurons", labels[1]).query("layer == 3 and neuron == 5")
    assert own["own_feature"].iloc[0] in said


def one_feature(folder: Path) -> list[str]:
    records = [{"text": "iron " * 40, "feature": "metals"}] * 40
    (folder / "one.jsonl").write_text("\n".join(map(json.dumps, records)))
    return ["--features", str(folder / "one.jsonl")]


def few_texts(folder: Path) -> list[str]:
    records = [{"text": "iron " * 40, "feature": "metals"}] * 40 + [{"text": "otter " * 40, "feature": "animals"}] * 3
    (folder / "few.jsonl").write_text("\n".join(map(json.dumps, records)))
    return ["--features", str(folder / "few.jsonl")]


def without_tokenizer(folder: Path) -> list[str]:
    GPTNeoXForCausalLM.from_pretrained(folder / "planted").save_pretrained(folder / "bare")
    return [str(folder / "bare")]


def unknown_family(folder: Path) -> list[str]:
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(vocab_size=400, d_model=16, n_heads=2, n_layers=2)
    MptForCausalLM(config).save_pretrained(folder / "mpt")
    return [str(folder / "mpt"), "--tokenizer", str(folder / "planted/tokenizer.json")]


def not_finite(folder: Path) -> list[str]:
    model = GPTNeoXForCausalLM.from_pretrained(folder / "planted")
    with torch.no_grad():
        model.gpt_neox.layers[2].mlp.dense_h_to_4h.bias[3] = float("nan")
    model.save_pretrained(folder / "broken")
    return [str(folder / "broken"), "--tokenizer", str(folder / "planted")]


BAD = {
    "one feature": (one_feature, ["metals"]),
    "few texts": (few_texts, ["animals", "3", "20"]),
    "no tokenizer": (without_tokenizer, ["bare", "tokenizer", "--tokenizer"]),
    "unknown family": (unknown_family, ["mpt", "l2e_ds/models/families.py"]),
    "not finite": (not_finite, ["broken", "layer 2, neuron 3", "not finite"]),
    "no such model": (lambda folder: [str(folder / "nowhere")], ["nowhere: no such folder"]),
    "no such layer": (lambda folder: ["--layers", "1", "3"], ["--layers: got 3", "0 to 2"]),
    "too long": (lambda folder: ["--sequence-length", "4096"], ["animals", "4096"]),
    "no such features": (lambda folder: ["--features", str(folder / "nothing.jsonl")], ["nothing.jsonl"]),
    "revision of a folder": (lambda folder: [f"{folder / 'planted'}@step1"], ["planted@step1", "hub name"]),
    "texts as features": (lambda folder: ["--feature-column", "text"], ["and 108 more", "20"]),
    "batch": (lambda folder: ["--batch", "0"], ["--batch", "0", ">= 1"]),
    "resamples": (lambda folder: ["--resamples", "3"], ["--resamples", "3"]),
    "checkpoints of a folder": (lambda folder: ["--all-checkpoints"], ["--all-checkpoints", "not a run directory"]),
}


@pytest.fixture
def as_before():
    """The process group is joined in this process: nothing of it may reach other tests."""
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, made, tmp_path, capsys, monkeypatch, as_before):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make, expected = BAD[name]
    given = make(made)
    model = [given.pop(0)] if given and not given[0].startswith("--") else [str(made / "planted")]
    features = [] if "--features" in given else ["--features", str(made / "features.jsonl")]
    length = [] if "--sequence-length" in given else ["--sequence-length", str(LENGTH)]
    output = tmp_path / "out"
    assert main(["analyze", *model, *features, *length, "--output", str(output), *given]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("l2e-ds: error")]
    assert len(said) == 1
    assert all(word in said[0] for word in expected), said[0]
    assert list(tmp_path.iterdir()) == []
