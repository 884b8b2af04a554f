"""`l2e-ds init`: what it writes is a run file for what was asked."""

import pytest

from l2e_ds.cli import main
from l2e_ds.config.reading import load_run_config
from l2e_ds.models.pythia import PYTHIA


def written(capsys, tmp_path, *words: str):
    assert main(["init", *words]) == 0
    path = tmp_path / "run.yaml"
    path.write_text(capsys.readouterr().out)
    return load_run_config(path)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl.zst", "c.txt", "d.parquet", "e.bin", "e.idx", "f.csv", "it's: a #1.jsonl"):
        (tmp_path / name).touch()
    for name in ("folder/g.txt.gz", "deep/below/h.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()


@pytest.mark.parametrize("name", PYTHIA)
def test_every_size(capsys, tmp_path, name):
    config = written(capsys, tmp_path, "--model", name)
    assert (config.model.name, config.data.source) == (name, "stdlib")
    assert config.model.vocab_size == config.data.train_tokenizer
    assert config.deepspeed.config == (
        "ds_configs/zero3.json" if name[7:] in ("6.9b", "12b") else "ds_configs/zero1.json"
    )


@pytest.mark.parametrize(
    ("files", "source", "path"),
    [
        (["a.jsonl"], "jsonl", "a.jsonl"),
        (["a.jsonl", "b.jsonl.zst"], "jsonl", ["a.jsonl", "b.jsonl.zst"]),
        (["c.txt"], "text", "c.txt"),
        (["d.parquet"], "parquet", "d.parquet"),
        (["e.bin", "e.idx"], "indexed", "e"),
        (["folder"], "text", "folder"),
        (["it's: a #1.jsonl"], "jsonl", "it's: a #1.jsonl"),
    ],
)
def test_files_of_every_kind(capsys, tmp_path, files, source, path):
    config = written(capsys, tmp_path, "--data", *files, "--tokenizer", "EleutherAI/gpt-neox-20b")
    given = [path] if isinstance(path, str) else path
    found = [config.data.path] if isinstance(config.data.path, str) else config.data.path
    assert config.data.source == source and found == [str(tmp_path / name) for name in given]
    assert config.data.tokenizer == "EleutherAI/gpt-neox-20b" and config.model.vocab_size is None
    assert config.data.held_out == (0 if path == "c.txt" else 0.01)  # one text file is one document


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "pythia-71m"], "--model: "),
        (["--data", "gone.jsonl"], "--data: no such file or folder: gone.jsonl"),
        (["--data", "f.csv"], "--data: got f.csv, allowed: *.txt, *.txt.gz, "),
        (["--data", "a.jsonl", "c.txt"], "--data: got jsonl in a.jsonl and text in c.txt, allowed: one kind"),
        (["--data", "."], "--data: got text in . and jsonl in . and "),
        (["--data", "empty"], "--data: got empty, allowed: *.txt, "),
        (["--data", "deep"], "--data: got deep, allowed: *.txt, "),
        (["--data", "e.bin"], "--tokenizer: is required with token files"),
    ],
)
def test_bad_input(capsys, words, said):
    assert main(["init", *words]) == 2
    heard = capsys.readouterr()
    (line,) = heard.err.splitlines()
    assert said in line and heard.out == ""


def test_recipes_by_name(tmp_path):
    """Any folder will do; a file of that name comes first, a folder (a run directory, perhaps) does not."""
    (tmp_path / "pythia-1.4b").mkdir()
    assert load_run_config("pythia-1.4b").model.name == "pythia-1.4b"
    (tmp_path / "pythia-70m").write_text("model: {name: pythia-14m}\ndata: {source: stdlib, train_tokenizer: 300}\n"
                                         "training: {steps: 1}\n")  # fmt: skip
    assert load_run_config("pythia-70m").model.name == "pythia-14m"


def test_neither_file_nor_recipe(capsys):
    assert main(["train", "pythia-71m", "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pythia-71m: no such file, and no recipe of this name; recipes: llama-70m, pythia-1.4b, " in line
