import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import chain, islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from l2e_ds import cli
from l2e_ds.config.sections import DataConfig
from l2e_ds.data import encode, prepare_sets, sources, token_files
from l2e_ds.data.encode import Encoder, digest, may_cut
from l2e_ds.data.indexed import IndexedTokens
from l2e_ds.data.sources import _json_lines
from l2e_ds.data.tokenize import Seen
from l2e_ds.data.tokenizer import load_tokenizer, train_tokenizer
from tests.unit.data.reading import documents_in

WORDS = [
    "the",
    "Neuron",
    "layer_2",
    "token's",
    "été",
    "e\u0301",
    "a",
    "x[0]=3.14;",
    "中文，and",
    "\r\n\r\n",
    "\t",
    " ",
    "--",
]


def text(i):
    generator = random.Random(i)
    return "".join(generator.choice(WORDS) + generator.choice(" \n.,'") for _ in range(generator.randrange(80)))


TEXTS = [text(i % 230) for i in range(300)]  # 70 duplicates, some empty, some blank


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(iter(TEXTS), 400).backend_tokenizer.save(str(path))
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    """Two files, one of them compressed."""
    lines = [json.dumps({"text": text, "meta": i}) + "\n" for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("".join(lines[:150]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[150:]).encode()))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]


def run(*words):
    return cli.main(["tokenize", *map(str, words)])


def read(prefix):
    return documents_in(IndexedTokens(prefix))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx", ".json")}


def expected(tokenizer, share=0.0, deduplicate=False, texts=TEXTS, end=(0,)):
    """Slow and obvious: (training documents, held-out documents)."""
    backend = load_tokenizer(tokenizer).backend_tokenizer
    kept = [text for text in texts if text.strip()]
    kept = list(dict.fromkeys(kept)) if deduplicate else kept
    ids = {text: backend.encode(text, add_special_tokens=False).ids + list(end) for text in kept}
    held_out = [digest(text) < share * 2**64 for text in kept]
    sides = [[ids[text] for text, out in zip(kept, held_out, strict=True) if out is side] for side in (False, True)]
    return sides


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_documents_in_order_whatever_the_number_of_workers(tmp_path, corpus, tokenizer, workers, monkeypatch, capsys):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 3000)
    (tmp_path / "out").mkdir()
    prefix = tmp_path / "out" / "set"
    options = ["--append-eod", "--held-out", 0.2, "--deduplicate", "--workers", workers]
    assert run(*corpus, "--output", prefix, "--tokenizer", tokenizer, *options) == 0
    train, held_out = expected(tokenizer, 0.2, deduplicate=True)
    assert len(held_out) > 10
    assert read(prefix) == train
    assert read(f"{prefix}_held_out") == held_out
    names = [f"set{part}{suffix}" for part in ("", "_held_out") for suffix in (".bin", ".idx", ".json")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    record = json.loads(prefix.with_suffix(".json").read_text())
    assert (record["documents"], record["tokens"]) == (len(train), sum(map(len, train)))
    assert (record["end_of_text"], record["append_eod"], record["vocabulary"], record["dtype"]) == (
        0,
        True,
        400,
        "uint16",
    )
    with_text = [text for text in TEXTS if text.strip()]
    assert record["left_out"] == {
        "duplicates": len(with_text) - len(set(with_text)),
        "bad": 0,
        "empty": len(TEXTS) - len(with_text),
    }
    said = capsys.readouterr().out
    assert f"{len(train):,} documents" in said and f"{len(held_out):,} documents" in said


def test_limits(tmp_path, corpus, tokenizer):
    train, _ = expected(tokenizer, end=())
    run(*corpus, "--output", tmp_path / "a", "--tokenizer", tokenizer, "--max-documents", 7, "--workers", 0)
    assert read(tmp_path / "a") == train[:7]
    run(*corpus, "--output", tmp_path / "b", "--tokenizer", tokenizer, "--max-tokens", 1000, "--workers", 0)
    ends = np.cumsum([len(ids) for ids in train])
    assert read(tmp_path / "b") == train[: int(np.searchsorted(ends, 1000)) + 1]


@pytest.mark.parametrize("form", ["text", "parquet", "hub"])
def test_other_formats_and_going_on_with_them(tmp_path, tokenizer, form, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(sources, "_CHUNK_ROWS", 9)
    monkeypatch.setattr(sources, "_CHUNK_FILES", 9)
    monkeypatch.setattr(sources, "_BATCH_ROWS", 5)
    folder = tmp_path / "in"
    folder.mkdir()
    if form == "text":
        for i, one in enumerate(TEXTS):
            (folder / f"{i:03}.txt").write_bytes(one.encode())
    else:
        parquet.write_table(pa.table({"body": TEXTS}), folder / "train-0.parquet", row_group_size=40)
    options = ["--format", form, *(() if form == "text" else ("--text-key", "body"))]
    words = interrupted(tmp_path, [str(folder)], tokenizer, monkeypatch, *options)
    encoded = []
    monkeypatch.setattr(Encoder, "__call__", lambda *_, call=Encoder.__call__: encoded.append(1) or call(*_))
    assert run(*words) == 0
    assert read(tmp_path / "out" / "set") == expected(tokenizer, end=())[0]
    assert encoded


# --- after a kill -------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from l2e_ds import cli
from l2e_ds.data import sources, token_files
if __name__ == "__main__":
    sources.CHUNK_BYTES, token_files._COMMIT_EVERY = 2000, 0
    advance = token_files.TokenFiles.advance
    def slow(*arguments):
        advance(*arguments)
        time.sleep(0.05)
    token_files.TokenFiles.advance = slow
    sys.exit(cli.main(["tokenize", *sys.argv[1:]]))
"""


@pytest.mark.full
def test_killed_at_random_moments_it_gives_the_same_bytes(tmp_path, corpus, tokenizer):
    words = [*corpus, "--tokenizer", tokenizer, "--append-eod", "--held-out", "0.1", "--deduplicate"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run(*words, "--output", tmp_path / "one" / "set", "--workers", 0)
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, tmp_path / "slow.py", *words, "--output", tmp_path / "two" / "set", "--workers"]
    journal = tmp_path / "two" / "set.partial" / "journal.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    for workers, commits in (("2", 2), ("0", 6)):
        process = subprocess.Popen([*command, workers], env=environment, stderr=subprocess.PIPE, text=True)
        changes, before, until = 0, journal.read_bytes() if journal.exists() else b"", time.monotonic() + 600
        while changes < commits and process.poll() is None and time.monotonic() < until:
            now = journal.read_bytes() if journal.exists() else b""
            changes, before = changes + (now != before), now
            time.sleep(0.002)
        time.sleep(random.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, said
        assert [path.name for path in (tmp_path / "two").iterdir()] == ["set.partial"]
        assert ("resuming from" in said) == (commits > 2)
    position = json.loads(journal.read_text())["position"]
    assert position["file"] == 1 or position["offset"] > 2000
    done = subprocess.run([*command, "2"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_killed_while_files_get_their_names(tmp_path, corpus, tokenizer, monkeypatch):
    (tmp_path / "out").mkdir()
    words = [*corpus, "--tokenizer", tokenizer, "--output", tmp_path / "out" / "set", "--held-out", 0.1, "--workers", 0]
    replace, left = Path.replace, 4

    def dying(self, target):
        nonlocal left
        if Path(target).name.startswith("set"):
            left -= 1
            if not left:
                raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        assert run(*words) == 75
    assert len(files(tmp_path / "out")) == 3
    assert run(*words, "--append-eod") == 2  # other work
    assert run(*words) == 0
    assert read(tmp_path / "out" / "set") == expected(tokenizer, 0.1, end=())[0]
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_killed_before_the_folder_is_removed(tmp_path, corpus, tokenizer, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    words = [*corpus, "--tokenizer", tokenizer, "--output", tmp_path / "out" / "set", "--held-out", 0.1, "--workers", 0]

    def dying(own):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_files.Exclusive, "remove", dying)
        assert run(*words) == 75
    partial, before = tmp_path / "out" / "set.partial", files(tmp_path / "out")
    assert len(before) == 6 and (partial / "journal.json").exists()
    capsys.readouterr()
    assert run(*words, "--append-eod") == 2  # other work
    assert run(*words) == 0
    assert "all was done before" in capsys.readouterr().err
    assert files(tmp_path / "out") == before and not partial.exists()
    assert run(*words) == 2
    assert "set.bin exists already" in capsys.readouterr().err
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"asked": []}', "\udcff"])
def test_a_damaged_journal(tmp_path, corpus, tokenizer, monkeypatch, capsys, damage):
    words = interrupted(tmp_path, corpus, tokenizer, monkeypatch)
    folder = tmp_path / "out" / "set.partial"
    (folder / "journal.json").write_bytes(damage.encode(errors="surrogateescape"))
    for name in ("train.bin", "train.json"):  # the last: as if all were complete
        (folder / name).touch()
        capsys.readouterr()
        assert run(*words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1] == f"l2e-ds: error: {folder}/journal.json: damaged; remove {folder} to start over"


def interrupted(tmp_path, corpus, tokenizer, monkeypatch, *options):
    """The words of a command that has been interrupted in the middle."""
    words = [*corpus, "--tokenizer", tokenizer, "--output", tmp_path / "out" / "set", "--workers", 0, *options]
    advance, left = token_files.TokenFiles.advance, 5

    def dying(*arguments):
        nonlocal left
        advance(*arguments)
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_files.TokenFiles, "advance", dying)
        patch.setattr(sources, "CHUNK_BYTES", 2000)
        assert run(*words) == 75
    return words


def test_other_work_is_refused(tmp_path, corpus, tokenizer, monkeypatch, capsys):
    words = interrupted(tmp_path, corpus, tokenizer, monkeypatch)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def refused(*more):
        assert run(*words, *more) == 2
        assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
        return capsys.readouterr().err

    capsys.readouterr()
    assert "set.partial holds the beginning of other work: --append-eod was false, now it is true" in refused(
        "--append-eod"
    )
    assert "--max-tokens was null, now it is 5" in refused("--max-tokens", 5)
    with open(corpus[0], "a") as file:
        file.write('{"text": "one more"}\n')
    assert "other work: INPUT changed" in refused()


@pytest.mark.parametrize(
    ("option", "value", "least"), [("max-tokens", 0, 1), ("max-documents", -1, 1), ("workers", -1, 0)]
)
def test_numbers_out_of_range(tmp_path, corpus, tokenizer, capsys, option, value, least):
    assert run(*corpus, "--tokenizer", tokenizer, "--output", tmp_path / "set", f"--{option}", value) == 2
    assert capsys.readouterr().err == f"l2e-ds: error: --{option}: got {value}, allowed: an integer >= {least}\n"


def test_two_processes_and_files_that_exist(tmp_path, corpus, tokenizer, capsys):
    words = [*corpus, "--tokenizer", tokenizer, "--output", tmp_path / "set", "--workers", 0]
    with token_files.Exclusive(tmp_path / "set.partial"):
        assert run(*words) == 2
    assert "another process is writing there" in capsys.readouterr().err
    (tmp_path / "set.idx").write_text("precious")
    assert run(*words) == 2
    assert "set.idx exists already" in capsys.readouterr().err
    assert (tmp_path / "set.idx").read_text() == "precious"
    assert not list(tmp_path.glob("set.bin")) and not list(tmp_path.glob("set.partial"))


def test_a_full_disk(tmp_path, corpus, tokenizer, monkeypatch, capsys):
    disk = tmp_path / "out"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system (needs root): {done.stderr.strip()}")
    try:
        monkeypatch.setattr(sources, "CHUNK_BYTES", 2000)
        monkeypatch.setattr(token_files, "_COMMIT_EVERY", 0)
        words = [*corpus, "--tokenizer", tokenizer, "--output", disk / "set", "--workers", 0]
        assert run(*words) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert "No space left on device; " in line and "set.partial keeps what is done" in line
        assert [path.name for path in disk.iterdir()] == ["set.partial"]
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        assert run(*words) == 0
        assert "resuming from" in capsys.readouterr().err
        assert read(disk / "set") == expected(tokenizer, end=())[0]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_bad_records(tmp_path, tokenizer, capsys):
    lines = [b'{"text": "one"}', b'{"text": ', b'{"body": "x", "n": 1}', b'{"text": 5}', b'{"text": "caf\xe9"}']
    lines += [b'{"text": "a surrogate \xed\xa0\x80"}', b'\xef\xbb\xbf{"text": "after a mark"} {"text": "joined"}']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*lines, b'{"text": "two"}']))
    words = [path, "--tokenizer", tokenizer, "--output", tmp_path / "set", "--workers", 0]
    assert run(*words) == 2
    assert f"{path}:2: not JSON" in capsys.readouterr().err
    assert run(*words, "--skip-bad") == 0
    said = capsys.readouterr().out
    assert "6 bad" in said and f"first bad  {path}:2: not JSON" in said
    assert read(tmp_path / "set") == expected(tokenizer, texts=["one", "two"], end=())[0]
    path.write_bytes(lines[2])
    assert run(path, "--tokenizer", tokenizer, "--output", tmp_path / "other", "--workers", 0) == 2
    assert f"{path}:1: no key 'text'; set --text-key to one of: body, n" in capsys.readouterr().err
    assert not list(tmp_path.glob("other*"))
    path.write_bytes(lines[2] + b"\n" + lines[0])
    assert run(path, "--tokenizer", tokenizer, "--output", tmp_path / "key", "--workers", 0, "--skip-bad") == 0
    assert f"first bad  {path}:1: no key 'text'; set --text-key to one of: body, n" in capsys.readouterr().out
    assert "--text-key" in json.loads((tmp_path / "key.json").read_text())["first_bad"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_files_joined_with_their_byte_order_marks(tmp_path, tokenizer, pack, end, monkeypatch):
    """`cat a b` makes such files, also of gz files."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 30)
    texts = [["one", "two }\ufeff{ two"], ["three"], ["four }\ufeff", "five"]]
    parts = ["\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in part) + end for part in texts]
    (tmp_path / f"a.jsonl{'.gz' * (pack is gzip.compress)}").write_bytes(
        b"".join(pack(part.encode("utf-8-sig")) for part in parts)
    )
    assert run(tmp_path, "--tokenizer", tokenizer, "--output", tmp_path / "set", "--workers", 0, "--skip-bad") == 0
    assert read(tmp_path / "set") == expected(tokenizer, texts=[*chain(*texts)], end=())[0]
    assert json.loads((tmp_path / "set.json").read_text())["left_out"]["bad"] == 0


def test_files_that_are_passed_over_are_said(tmp_path, tokenizer, capsys):
    (tmp_path / "in/sub").mkdir(parents=True)
    for name in ("a.txt", "b.md", "sub/c.txt"):
        (tmp_path / "in" / name).write_text("one two")
    line = f"{tmp_path / 'in'}: 1 read; files passed over: 1 of other kinds (.md), 1 in subfolders"
    assert run(tmp_path / "in", "--tokenizer", tokenizer, "--output", tmp_path / "set", "--workers", 0) == 0
    said = capsys.readouterr()
    assert line in said.err and line in said.out
    assert json.loads((tmp_path / "set.json").read_text())["passed_over"] == line
    words = ["tokenizer", "train", str(tmp_path / "in"), "--output", str(tmp_path / "t.json"), "--vocab-size", "300"]
    assert cli.main(words) == 0
    assert line in capsys.readouterr().err
    data = DataConfig(source="text", path=str(tmp_path / "in"), tokenizer=tokenizer, sequence_length=2, held_out=0.0)
    prepare_sets(data, tmp_path / "cache", 400, 1)
    assert line in capsys.readouterr().err


def test_an_error_that_a_limit_comes_before_does_not_matter(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\nbroken\n')
    for workers in (0, 1):
        words = ["--tokenizer", tokenizer, "--output", tmp_path / f"set{workers}", "--workers", workers]
        assert run(path, *words, "--max-documents", 2) == 0
        assert len(read(tmp_path / f"set{workers}")) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.jsonl"], "error: no such file or folder: gone.jsonl"),
        (["a.jsonl", "b.txt"], "the names do not say one format; give --format"),
        (["a.jsonl", "--revision", "x"], "--revision is for --format hub"),
        (["a.jsonl", "--held-out", "1"], "--held-out: got 1.0"),
        (["a.jsonl", "--tokenizer", "./gone"], "--tokenizer: no such file or folder: ./gone"),
    ],
)
def test_bad_options(tmp_path, tokenizer, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    assert run("--tokenizer", tokenizer, "--output", "set", *words) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_tokenizer_train(tmp_path, corpus, capsys):
    words = ["tokenizer", "train", *corpus, "--output", str(tmp_path / "t.json"), "--vocab-size", "300"]
    assert cli.main(words) == 0
    made = Tokenizer.from_file(str(tmp_path / "t.json"))
    reference = train_tokenizer((text for text in TEXTS if text.strip()), 300).backend_tokenizer
    assert made.to_str() == reference.to_str()
    assert cli.main(words) == 2
    assert "t.json exists already" in capsys.readouterr().err


# --- parts --------------------------------------------------------------------------------------------------------


def test_seen_is_a_set():
    generator, known, seen = np.random.default_rng(0), set(), Seen(np.empty(0, np.uint64))
    for size in [0, 1, 500, 3, 400, 1000, 7, 2000] * 3:
        digests = generator.integers(0, 5000, size, dtype=np.uint64)
        expected_new = []
        for one in digests.tolist():
            expected_new.append(one not in known)
            known.add(one)
        assert seen.add(digests).tolist() == expected_new
    assert sum(map(len, seen._sorted)) == len(known)


def chunk_of(texts):
    return partial(_json_lines, "x", 1, "\n".join(json.dumps({"text": one}) for one in texts).encode())


def test_looking_words_up_changes_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(encode, "_MEMO_ENTRIES", 200)
    special = [f"{text(1)}<|endoftext|>{text(2)}", "x" * 3000, "word" + " \u0301y", "a" + "\u0301" * 3]
    encoder = Encoder(Path(tokenizer).read_text(), "text", None, np.dtype("<u2"), False)
    assert encoder._may_cut
    for _ in range(2):
        texts = [one for one in [*TEXTS, *special] if one.strip()]
        encoded = encoder(chunk_of(texts))
        wanted = expected(tokenizer, texts=texts, end=())[0]
        assert encoded.lengths.tolist() == [len(ids) for ids in wanted]
        assert encoded.tokens.tolist() == [id for ids in wanted for id in ids]
        assert 100 < len(encoder._memo) <= 200


# letters that NFC takes apart, before what the pattern joins with a mark
APART = ["\u0930\u093e\u095b!", "\u095c; x", "\ufb1d-\ufb4e!", "plain words, then \u09dc."]


@pytest.mark.parametrize("pattern", ["gpt-2", *encode._PATTERNS])
def test_letters_that_are_taken_apart(pattern, monkeypatch):
    """The tokenizer has merges over the place where such a text must not be cut."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern != "gpt-2":
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = [*APART, *TEXTS[:20], "it's 1234567 years", "a\r\n\r\nb  \n c"]
    texts = [one for one in texts if one.strip()]
    backend.train_from_iterator(texts * 9, trainer)
    assert may_cut(backend)
    encoder = Encoder(backend.to_str(), "text", None, np.dtype("<u2"), False)
    for one in texts:
        assert encoder(chunk_of([one])).tokens.tolist() == backend.encode(one, add_special_tokens=False).ids, one
    assert encoder._memo
    word, mark = encode._WORDS(APART[0])
    ends = [end for _, (_, end) in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(APART[0]))]
    assert mark == "!" and len(backend.normalizer.normalize_str(word)) not in ends  # what would go wrong


def changed(tokenizer, change):
    backend = Tokenizer.from_file(tokenizer)
    change(backend)
    return backend


def test_tokenizers_whose_words_are_not_independent(tokenizer):
    assert may_cut(Tokenizer.from_file(tokenizer))

    def prepend(backend):
        backend.normalizer = normalizers.Prepend("x")

    def no_words(backend):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def metaspace(backend):
        backend.pre_tokenizer = pre_tokenizers.Metaspace()

    def over_blanks(backend):
        backend.add_tokens([AddedToken("two words")])

    def lower(backend):
        backend.normalizer = normalizers.Lowercase()

    def taken_apart(backend):
        backend.normalizer = normalizers.NFD()

    def with_hyphens(backend):
        own = pre_tokenizers.Split(Regex(r"\p{L}+(?:-\p{L}+)*| ?[^\s\p{L}]+|\s+"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [own, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    def in_another_form(backend):
        backend.add_tokens([AddedToken("a|b", normalized=True)])

    for change in (prepend, no_words, metaspace, over_blanks, lower, taken_apart, with_hyphens, in_another_form):
        assert not may_cut(changed(tokenizer, change)), change
    whole = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    assert not may_cut(whole)
    encoder = Encoder(changed(tokenizer, prepend).to_str(), "text", None, np.dtype("<u2"), False)
    texts = list(islice((one for one in TEXTS if one.strip()), 5))
    wanted = [changed(tokenizer, prepend).encode(one, add_special_tokens=False).ids for one in texts]
    assert encoder(chunk_of(texts)).tokens.tolist() == [id for ids in wanted for id in ids]


def test_folders_of_others_are_left_alone(tmp_path, tokenizer, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    words = [tmp_path / "a.jsonl", "--tokenizer", tokenizer, "--workers", 0, "--output"]
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.txt").write_text("precious")
    assert run(*words, tmp_path / "mine") == 2
    assert "mine.partial: is not ours" in capsys.readouterr().err
    assert (tmp_path / "mine.partial" / "thesis.txt").read_text() == "precious"
    (tmp_path / "folder").mkdir()
    for name in (f"{tmp_path}/folder/", f"{tmp_path}/folder/.bin"):
        with pytest.raises(SystemExit) as left:
            run(*words, name)
        assert left.value.code == 2 and "must end in a name" in capsys.readouterr().err
    assert not list((tmp_path / "folder").iterdir())
    assert run(*words, tmp_path / "folder") == 0  # folder.bin beside it
    assert (tmp_path / "folder.bin").exists()
