"""What a run writes: files with the mode that the umask gives, the special tokens of its tokenizer, a profile."""

import json
import stat

import pytest

from tests.processes import finish
from tests.unit.evaluation.test_exported import END, tokenizer_json


@pytest.mark.parametrize("umask", [pytest.param(0o002, marks=pytest.mark.full), 0o027])
def test_of_a_run(run_file, tmp_path, umask):
    tokenizer = json.loads(tokenizer_json(tmp_path / "tokenizer", END).read_text())
    end = tokenizer["added_tokens"][0]["id"]
    assert end > 0
    own = [f"data.tokenizer={tmp_path}/tokenizer/tokenizer.json", "data.train_tokenizer=null", "training.steps=2"]
    own.append("logging.profile=[2,2]")
    start = "runpy.run_module('l2e_ds.cli', run_name='__main__', alter_sys=True)"
    program = f"import os, runpy; os.umask({umask}); {start}"
    for command in (["train", run_file, *own], ["export", tmp_path / "run", "--output", tmp_path / "model"]):
        codes, said = finish("-c", program, *command)
        assert codes == [0], said[-3000:]
        if command[0] == "train":
            assert f"profile of steps 2 to 2: {tmp_path}/run/profile/step00000002-rank0.json.gz\n" in said
    for place in ("run", "cache", "model"):
        for path in [tmp_path / place, *(tmp_path / place).rglob("*")]:
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, f"{path}: {mode:o}"
    written = {path.suffix for path in (tmp_path / "run/checkpoints").rglob("*") if path.is_file()}
    assert {".safetensors", ".pt", ".json"} <= written
    for folder in ("run/model", "model"):
        hf_config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (hf_config["eos_token_id"], hf_config["bos_token_id"]) == (end, end)
