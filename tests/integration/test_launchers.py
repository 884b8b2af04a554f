"""`l2e-ds train` under every launcher that runs here, on the same global batches: the same run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from l2e_ds.distributed.launch import free_port
from tests.integration.running import lines
from tests.processes import environment, finish
from tests.tolerances import rounding, selection

ROUNDING = rounding(steps=6, layers=4, tokens=8 * 16)
SELECTION = selection(tokens=8 * 16, neurons=128)


def execute(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)


def port() -> str:
    return str(free_port())


LAUNCHERS = {
    "deepspeed": lambda: [
        *("deepspeed", "--num_accelerators", "2", "--master_port", port(), "--module", "l2e_ds.train")
    ],
    "torchrun": lambda: ["torchrun", "--nproc-per-node", "2", "--master-port", port(), "-m", "l2e_ds.train"],
    "mpirun": lambda: [
        *("mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none", "-x", "MASTER_PORT=" + port()),
        *(sys.executable, "-m", "l2e_ds.train"),
    ],
}

ALONE = {"alone": ["-m", "l2e_ds.train"], "cli": ["-m", "l2e_ds.cli", "train"]}


@pytest.mark.full
def test_every_launcher_makes_the_same_run(run_file, tmp_path):
    runs = {}
    for name in (*ALONE, *LAUNCHERS):
        run = tmp_path / name
        ranks = 1 if name in ALONE else 2
        # each step in two micro-batches of four sequences: the projected loss depends on that cut (docs/method.md 5.2)
        words = [str(run_file), f"training.run_directory={run}", f"training.micro_batch={4 // ranks}"]
        if name in ALONE:
            codes, said = finish(*ALONE[name], *words)
            assert codes == [0], f"{name}: {said[-8000:]}"
        else:
            done = execute(*LAUNCHERS[name](), *words)
            assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}\n{done.stderr[:6000]}\n{done.stderr[-3000:]}"
        runs[name] = lines(run, "train")
        assert len(runs[name]) == 6
        start = lines(run, "start")[0]
        assert start["ranks"] == ranks
    for name, found in runs.items():
        for line, expected in zip(found, runs["alone"], strict=True):
            assert line["lm_loss"] == pytest.approx(expected["lm_loss"], rel=ROUNDING), name
            for key in ("observed_share", "layer1/tau", "gradient_norm"):
                assert line[key] == pytest.approx(expected[key], rel=SELECTION), (name, key)
    assert runs["alone"][-1]["lm_loss"] < runs["alone"][0]["lm_loss"]

    # the run directory has what the README says; its frozen configuration gives the same run again
    run = tmp_path / "deepspeed"
    assert {path.name for path in run.iterdir()} == {
        *("checkpoints", "config.yaml", "deepspeed.json", "metrics.jsonl", "model", "tokenizer")
    }
    again = yaml.safe_load((run / "config.yaml").read_text())
    assert again["training"]["run_directory"] == str(run)
    _a_refused_resume_leaves_the_run_as_it_was(run)
    _resume_from_the_frozen_configuration(run)
    _export_and_generate(run, tmp_path / "export")
    _a_user_s_mistake_ends_all_ranks(run_file)


def _a_refused_resume_leaves_the_run_as_it_was(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    codes, text = finish("-m", "l2e_ds.train", run / "config.yaml", "model.hidden_size=64", ranks=2)
    assert codes == [2, 2]
    said = [line for line in text.splitlines() if "l2e-ds: error" in line]
    assert len(said) == 1
    assert "was trained with other values: model.hidden_size: 32 -> 64; give those again" in said[0]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def _resume_from_the_frozen_configuration(run: Path) -> None:
    codes, said = finish("-m", "l2e_ds.train", run / "config.yaml", "training.steps=8", ranks=2)
    assert codes == [0, 0], said[-4000:]
    assert "resumed from" in said
    assert "changed since that checkpoint: training.steps: 6 -> 8" in said
    assert [line["step"] for line in lines(run, "train")] == list(range(1, 9))


def _export_and_generate(run: Path, output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from l2e_ds.cli import main

    assert main(["export", str(run), "--output", str(output), "--step", "6"]) == 0
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    text = "The old pilot counted"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] == ids.shape[1] + 3
    assert tokenizer.eos_token_id == model.config.eos_token_id
    _start_from_pretrained(run, output)
    assert main(["export", str(run), "--output", str(output)]) == 2  # not empty
    assert main(["export", str(run), "--output", str(output) + "2", "--step", "7"]) == 2
    shutil.rmtree(output)


def _start_from_pretrained(run: Path, weights: Path) -> None:
    """Check that a run on the exported weights and tokenizer starts at the held-out loss that the first one ended
    with."""
    overrides = [f"model.{key}=null" for key in ("name", "vocab_size", "num_layers", "hidden_size", "num_heads")]
    overrides += [f"model.pretrained={weights}", "data.train_tokenizer=null", f"data.tokenizer={weights}"]
    overrides += [f"training.run_directory={run}-pretrained", "training.steps=2", "training.global_batch=4"]
    codes, said = finish("-m", "l2e_ds.train", run / "config.yaml", *overrides)
    assert codes == [0], said[-4000:]
    ended = next(line for line in lines(run, "evaluation") if line["step"] == 6)
    began = lines(Path(f"{run}-pretrained"), "evaluation")[0]
    assert began["held_out_loss"] == pytest.approx(ended["held_out_loss"], rel=ROUNDING)


def _a_user_s_mistake_ends_all_ranks(run_file: Path) -> None:
    codes, text = finish("-m", "l2e_ds.train", run_file, "inhibition.layers=[9]", ranks=2)
    assert codes == [2, 2]
    said = [line for line in text.splitlines() if "l2e-ds: error" in line]
    assert said == ["l2e-ds: error: inhibition.layers: got 9, allowed: 0 to 3 (4 layers)"]
