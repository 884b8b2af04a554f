"""`l2e-ds data check` and `l2e-ds data show`, through the command where that costs nothing."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml

from l2e_ds.cli import main
from l2e_ds.data import indexed, inspect
from l2e_ds.data.indexed import IndexedTokens, write_pair
from l2e_ds.data.sampler import SequenceOrder
from l2e_ds.data.tokenizer import train_tokenizer


def written(prefix, documents, dtype=np.uint16):
    write_pair(prefix, documents, dtype)
    return str(prefix)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """300 entries at most, end-of-text is id 0, and byte b is id 1 + its place in the alphabet."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(iter(["the cat sat on the mat\n" * 5]), 260).backend_tokenizer.save(str(path))
    return str(path)


def run(capsys, *words):
    code = main(["data", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# --- check ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_statistics_against_plain_python(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(inspect, "_CHUNK", chunk)
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    random = np.random.default_rng(3)
    sets = [[random.integers(0, 90, size).tolist() for size in random.integers(0, 12, 25)] for _ in range(2)]
    prefixes = [written(tmp_path / name, documents) for name, documents in zip("ab", sets, strict=True)]
    content = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").unlink()
    for i, part in enumerate((content[:20], content[20:])):
        (tmp_path / f"a-0000{i}-of-00002.bin").write_bytes(part)
    found = described(IndexedTokens(prefixes), inspect.Known(100, 7))
    lengths = sorted(len(document) for documents in sets for document in documents)
    ids = [one for documents in sets for document in documents for one in document]
    quartiles = np.quantile(lengths, [0.25, 0.5, 0.75], method="inverted_cdf").tolist()
    assert found == {
        "files": "3 .bin, uint16",
        "documents": f"50, {lengths.count(0)} of them empty",
        "tokens": f"{len(ids)}",
        "tokens a document": f"least {lengths[0]}, quartiles {', '.join(map(str, quartiles))}, mean"
        f" {np.mean(lengths):.1f}, most {lengths[-1]}",
        "vocabulary used": f"{len(set(ids))} different ids, largest {max(ids)}, of 100 in the vocabulary",
        "end-of-text": f"{ids.count(7)} (id 7)",
    }


def described(indexed, known):
    return dict(re.split(" {2,}", line.strip()) for line in inspect.examine(indexed, known))


@pytest.mark.parametrize(("documents", "end"), [([], "id not known"), ([[], []], "0 (id 1)")])
def test_statistics_of_nothing(tmp_path, documents, end):
    known = inspect.Known(10, 1) if documents else inspect.Known()
    assert described(IndexedTokens(written(tmp_path / "a", documents)), known) == {
        "files": "1 .bin, uint16",
        "documents": f"{len(documents)}, {len(documents)} of them empty",
        "tokens": "0",
        "tokens a document": "least 0, quartiles 0, 0, 0, mean 0.0, most 0",
        "vocabulary used": "none",
        "end-of-text": end,
    }


def test_large_ids_cost_no_memory(tmp_path):
    prefix = written(tmp_path / "a", [[1, 2**40, 1, 5]], np.int64)
    found = described(IndexedTokens(prefix), inspect.Known(None, 1))
    assert found["vocabulary used"] == "ids up to 1,099,511,627,776, too large to be counted"
    assert found["end-of-text"] == "2 (id 1)"


def test_check_prints_statistics(tmp_path, capsys):
    first, second = written(tmp_path / "a", [[3, 1, 0], [], [65499, 0]]), written(tmp_path / "b", [[5] * 4])
    code, out, err = run(capsys, "check", first, second, "--end-of-text", 0)
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        f"{first}: no defect found".split(),
        ["files", "1", ".bin,", "uint16"],
        ["documents", "3,", "1", "of", "them", "empty"],
        ["tokens", "5"],
        ["tokens", "a", "document", "least", "0,", "quartiles", "0,", "2,", "3,", "mean", "1.7,", "most", "3"],
        ["vocabulary", "used", "4", "different", "ids,", "largest", "65499"],
        ["end-of-text", "2", "(id", "0)"],
        f"{second}: no defect found".split(),
        ["files", "1", ".bin,", "uint16"],
        ["documents", "1,", "0", "of", "them", "empty"],
        ["tokens", "4"],
        ["tokens", "a", "document", "least", "4,", "quartiles", "4,", "4,", "4,", "mean", "4.0,", "most", "4"],
        ["vocabulary", "used", "1", "different", "ids,", "largest", "5"],
        ["end-of-text", "0", "(id", "0)"],
    ]


def patched(path, at, content):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


# name: (what is done to a good pair of 3 sequences of 3, 0 and 2 tokens, options, what the line must say)
LENGTHS, POINTERS, DOCUMENTS = 34, 34 + 3 * 4, 34 + 3 * 4 + 3 * 8
DEFECTS = {
    "truncated .bin": (
        lambda t: (t / "a.bin").write_bytes(b"12345678"),
        [],
        r"a\.bin: 8 bytes, but a\.idx describes 10",
    ),
    "half a token": (lambda t: (t / "a.bin").write_bytes(b"123456789"), [], r"a\.bin: 9 bytes, but"),
    "truncated .idx": (lambda t: (t / "a.idx").write_bytes((t / "a.idx").read_bytes()[:-8]), [], r"a\.idx: 94 bytes"),
    "empty .idx": (lambda t: (t / "a.idx").write_bytes(b""), [], r"a\.idx: not a Megatron index"),
    "another .idx": (lambda t: written(t / "b", [[1]]) and (t / "b.idx").replace(t / "a.idx"), [], "describes 2"),
    "magic": (lambda t: patched(t / "a.idx", 0, b"TNTIDX"), [], "not a Megatron index"),
    "version": (lambda t: patched(t / "a.idx", 9, b"\x02"), [], "version 2"),
    "dtype": (lambda t: patched(t / "a.idx", 17, b"\x07"), [], "dtype code 7 is floating point"),
    "another dtype": (lambda t: patched(t / "a.idx", 17, b"\x04"), [], r"sequence 1 begins at byte 6, must be 12"),
    "negative length": (lambda t: patched(t / "a.idx", LENGTHS + 4, struct.pack("<i", -2)), [], "sequence 1 has a neg"),
    "pointer": (lambda t: patched(t / "a.idx", POINTERS + 8, struct.pack("<q", 4)), [], "sequence 1 begins at byte 4"),
    "document index": (lambda t: patched(t / "a.idx", DOCUMENTS + 8, struct.pack("<q", 3)), [], "document index must"),
    "missing .idx": (lambda t: (t / "a.idx").unlink(), [], r"a\.idx: no such file"),
    "id past the vocabulary": (lambda t: None, ["--vocab-size", 9], r"a\.bin: token id 9 at position 4, but .* 0 to 8"),
    "end-of-text past it": (lambda t: None, ["--vocab-size", 10, "--end-of-text", 10], "end-of-text is id 10"),
    "no vocabulary": (lambda t: None, ["--vocab-size", 0], "--vocab-size: got 0, allowed: an integer >= 1"),
    "missing tokenizer": (lambda t: None, ["--tokenizer", "./no.json"], r"--tokenizer: no such file .*no\.json"),
    "sidecar is no JSON": (lambda t: (t / "a.json").write_text("{"), [], r"a\.json: cannot be read as JSON"),
    "sidecar is a list": (lambda t: (t / "a.json").write_text("[]"), [], r"a\.json: must be a JSON object"),
    "sidecar of another set": (
        lambda t: (t / "a.json").write_text('{"tokens": 6}'),
        [],
        r"a\.json: says 6 tokens, but .* 5",
    ),
    "sidecar's vocabulary": (lambda t: (t / "a.json").write_text('{"vocabulary": 9}'), [], "token id 9 at position 4"),
    "sidecar of text": (lambda t: (t / "a.json").write_text('{"vocabulary": "9"}'), [], "must be integers, got '9'"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_check_names_the_first_defect(tmp_path, capsys, name):
    damage, options, message = DEFECTS[name]
    prefix = written(tmp_path / "a", [[5, 6, 7], [], [8, 9]])
    damage(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "_CHUNK", 3)  # positions are counted over chunks
        code, out, err = run(capsys, "check", prefix, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err), err


def test_negative_id_is_a_defect_without_a_vocabulary(tmp_path, capsys):
    code, _, err = run(capsys, "check", written(tmp_path / "a", [[1], [2, -3]], np.int32))
    assert code == 2 and "a.bin: token id -3 at position 2, but ids are >= 0" in err


def test_sidecar_tells_vocabulary_and_end_of_text(tmp_path, capsys):
    prefix = written(tmp_path / "a.b", [[5, 0], [8, 0]])
    (tmp_path / "a.b.json").write_text(json.dumps({"vocabulary": 9, "end_of_text": 0, "documents": 2, "tokens": 4}))
    code, out, _ = run(capsys, "check", prefix)
    assert code == 0 and "2 (id 0)" in out and "3 different ids, largest 8, of 9 in the vocabulary" in out
    assert run(capsys, "check", prefix, "--vocab-size", 8)[0] == 2  # an option comes before the file


# --- show -------------------------------------------------------------------------------------------------------


def preshuffled(tmp_path):
    """40 sequences of 5 tokens, each a document: sequence i holds 100*i to 100*i + 4."""
    return written(tmp_path / "pile", [range(100 * i, 100 * i + 5) for i in range(40)])


def rows_of(out):
    return [(int(row), int(sequence)) for row, _, sequence, *_ in (line.split() for line in out.splitlines()[2:])]


def test_stored_order_is_pythias(tmp_path, capsys):
    """Step k of batch_viewer.py is documents k*1024 to (k+1)*1024 of the file, counted from step 0."""
    prefix = preshuffled(tmp_path)
    code, out, _ = run(capsys, "show", prefix, "--step", 3, "--global-batch", 8)
    assert code == 0 and rows_of(out) == [(row, 24 + row) for row in range(8)]
    assert "4 tokens" in out.splitlines()[0] and {line.split()[1] for line in out.splitlines()[2:]} == {"0"}
    assert out.splitlines()[2].endswith("2400 2401 2402 2403 2404 ...")
    again = run(capsys, "show", prefix, "--step", 8, "--global-batch", 8)[1]  # 40 sequences are 5 steps
    assert rows_of(again) == rows_of(out) and {line.split()[1] for line in again.splitlines()[2:]} == {"1"}


def test_default_batch_is_pythias(tmp_path):
    view = inspect.view_of_set(preshuffled(tmp_path))
    assert (view.sequences.global_batch, view.dataset(0).sequence_length) == (1024, 4)
    assert view.sequences.rows(0)[2][:9].tolist() == list(range(9))


def test_one_sequence_in_full(tmp_path, capsys, tokenizer_file):
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(tokenizer_file).encode
    texts = ["the cat sat", "", "\x1b[31m é mat" * 3]
    documents = [[*encode(text).ids, 0] if text else [] for text in texts]
    flat = [one for document in documents for one in document]
    length = begin = len(documents[0]) - 3  # sequence 1 begins where sequence 0 ends: 3 tokens before the next document
    code, out, _ = run(
        *(capsys, "show", written(tmp_path / "a", documents), "--step", 1, "--global-batch", 1, "--sequence", 0),
        *("--sequence-length", length, "--tokenizer", tokenizer_file),
    )
    assert code == 0
    expected = flat[begin : begin + length + 1]
    lines = out.splitlines()
    at = lines.index("ids") + 1
    assert [int(one) for line in lines[at : lines.index("", at)] for one in line.split()[1:]] == expected
    assert f"at 0: document 0 of the file, from its token {begin} on" in lines
    assert "at 3: document 2 of the file, from its token 0 on" in lines
    assert "end-of-text (id 0) at: 2" in lines
    assert "text of tokens 0 to 2" in lines and f"text of tokens 3 to {length}" in lines
    assert "\\x1b[3" in out and "\x1b" not in out  # a terminal would act on it


def test_the_sidecars_tokenizer_gives_the_text(tmp_path, capsys, tokenizer_file):
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(tokenizer_file).encode("the cat sat").ids
    prefix = written(tmp_path / "a", [ids] * 4)
    (tmp_path / "a.json").write_text(json.dumps({"tokenizer": tokenizer_file, "vocabulary": 260, "end_of_text": 0}))
    code, out, err = run(capsys, "show", prefix, "--step", 0, "--global-batch", 2)
    assert code == 0 and out.count('"the cat sat" ...') == 2 and err == ""
    (tmp_path / "a.json").write_text(json.dumps({"tokenizer": "./gone.json"}))
    code, out, err = run(capsys, "show", prefix, "--step", 0, "--global-batch", 2)
    assert code == 0 and out.count(" ".join(map(str, ids[:3]))) == 2 and "no text is shown" in err


def test_show_refuses(tmp_path, capsys):
    prefix = preshuffled(tmp_path)
    for words, message in [
        ((prefix, "--step", -1), "--step: got -1, allowed: an integer >= 0"),
        ((prefix, "--step", 0, "--global-batch", 0), "--global-batch: got 0"),
        ((prefix, "--step", 0, "--sequence-length", 0), "--sequence-length: got 0"),
        ((prefix, "--step", 0, "--global-batch", 4, "--sequence", 4), "--sequence: got 4, allowed: 0 to 3"),
        ((prefix, "--step", 0, "--sequence-length", 200), "holds 200 tokens, a sequence needs 201"),
        ((tmp_path / "run.yaml", "--step", 0, "--seed", 3), "--seed: the run file"),
        ((tmp_path / "run.yaml", "--step", 0), "run.yaml: No such file"),
        ((tmp_path / "gone", "--step", 0), "gone.bin: no such file"),
    ]:
        code, out, err = run(capsys, "show", *words)
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err, err


def run_file(tmp_path, **data):
    content = {
        "model": {"name": "pythia-14m", "vocab_size": 5000, "num_layers": 1, "hidden_size": 16, "num_heads": 2},
        "data": {"held_out": 0.1} | data,
        "training": {"steps": 9, "global_batch": 8, "seed": 5, "run_directory": str(tmp_path / "run")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "run.yaml"


@pytest.mark.parametrize("order", ["stored", "shuffled"])
def test_show_of_a_run_is_what_its_trainer_samples(tmp_path, capsys, order):
    path = run_file(tmp_path, source="indexed", path=preshuffled(tmp_path), sequence_length=4, order=order)
    code, out, _ = run(capsys, "show", path, "--step", 6)
    expected = SequenceOrder(36, 5, order).sequences(48 + np.arange(8)).tolist()  # a tenth of 40 is held out
    assert code == 0 and rows_of(out) == list(enumerate(expected))
    for line, sequence in zip(out.splitlines()[2:], expected, strict=True):
        assert f" {100 * sequence} {100 * sequence + 1} " in line
    assert not Path(tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["train_batch_size", "gradient_accumulation_steps"])
def test_a_batch_of_the_json_is_not_guessed(tmp_path, capsys, key):
    path = run_file(tmp_path, source="indexed", path=preshuffled(tmp_path), sequence_length=4)
    content = yaml.safe_load(path.read_text())
    del content["training"]["global_batch"]
    path.write_text(yaml.safe_dump(content | {"deepspeed": {"config": "ds.json"}}))
    (tmp_path / "ds.json").write_text(json.dumps({key: 2}))
    code, out, err = run(capsys, "show", path, "--step", 0)
    assert (code, out) == (2, "") and f"training.global_batch: ds.json decides it by {key}; write it into" in err
    (tmp_path / "ds.json").write_text(json.dumps({key: "auto"}))
    assert run(capsys, "show", path, "--step", 0)[1].startswith("step 0: 1,024 sequences")
    (tmp_path / "ds.json").write_text("[]")
    code, out, err = run(capsys, "show", path, "--step", 0)
    assert (code, out) == (2, "") and "ds.json: must hold a JSON object" in err


def test_a_step_beyond_the_run_is_said(tmp_path, capsys):
    """The step is not refused, as the run may be prolonged."""
    path = run_file(tmp_path, source="indexed", path=preshuffled(tmp_path), sequence_length=4)
    warning = "l2e-ds: warning: --step: the run ends with step 8 (training.steps: 9)\n"
    for step, said in ((8, ""), (9, warning), (999_999, warning)):
        code, out, err = run(capsys, "show", path, "--step", step)
        assert (code, err) == (0, said) and out.startswith(f"step {step}: ")


def test_show_of_a_run_on_text(tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    for i in range(12):
        (tmp_path / "corpus" / f"{i:02}.txt").write_text(f"the cat number {i} sat on the mat\n" * 3)
    path = run_file(tmp_path, source="text", path=str(tmp_path / "corpus"), sequence_length=16, train_tokenizer=270)
    code, out, _ = run(capsys, "show", path, "--step", 2, "--sequence", 1)
    assert code == 0 and "end-of-text (id 0) at:" in out and "text of tokens 0 to" in out
    assert "document" in out and "of the file" in out
    prepared = sorted((tmp_path / "run" / "data").iterdir())
    changed = [file.stat().st_mtime_ns for folder in prepared for file in folder.iterdir()]
    assert run(capsys, "show", path, "--step", 2, "--sequence", 1)[1] == out
    assert [file.stat().st_mtime_ns for folder in prepared for file in folder.iterdir()] == changed
