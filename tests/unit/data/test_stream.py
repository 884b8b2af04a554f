"""Streams against a slow obvious reference: read everything, order it, put it in one row, cut."""

import copy
import gzip
import json
import multiprocessing
import random
import subprocess
import sys
from itertools import count

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import normalizers

from l2e_ds.config.sections import DataConfig
from l2e_ds.data import stream as stream_module
from l2e_ds.data.encode import digest
from l2e_ds.data.sources import documents
from l2e_ds.data.stream import TokenStream
from l2e_ds.data.tokenizer import end_of_text_id, train_tokenizer
from l2e_ds.errors import DataError, WorkerError

pytestmark = pytest.mark.usefixtures("without_hub")

T = 7
SEED = 5
WORDS = ["stream", "of", "documents", "é", "neuron", "\n", "one  two", "日本", "x" * 40, "<|endoftext|>", "\r\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(WORDS * 4), 280)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(stream_module, "_BATCH_CHARACTERS", 60)
    monkeypatch.setattr(stream_module, "_UNSHUFFLED", 4)


def texts(n, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(9))) for _ in range(n)]


def lines(some):
    return "".join(json.dumps({"meta": {"n": i}, "text": text}) + "\n" for i, text in enumerate(some)).encode()


def config(source, path, **more):
    more.setdefault("held_out", 0.2)
    path = path if isinstance(path, list) else str(path)
    return DataConfig(source=source, path=path, tokenizer="unused", **more)


def corpus(folder):
    """31 documents in two files, some of them blank."""
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(texts(14, 1)))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(texts(17, 2))))
    return folder


def training(data):
    """The documents that are not held out: the corpora here are large enough for the hash to hold out some."""
    every = list(documents(data))
    kept = [text for text in every if digest(text) >= data.held_out * 2**64]
    assert data.held_out == 0 or len(kept) < len(every)
    return kept


def reference(data, tokenizer, buffer, n, t=T):
    train, end = training(data), end_of_text_id(tokenizer)
    row = []
    epochs = count()
    while len(row) <= n * t:
        epoch = next(epochs)
        for number, first in enumerate(range(0, len(train), buffer or len(train))):
            block = train[first : first + (buffer or len(train))]
            if buffer:
                keys = np.random.Philox(
                    key=np.array([SEED, epoch], np.uint64), counter=np.array([0, 0, 0, number], np.uint64)
                ).random_raw(len(block))
                block = [text for _, text in sorted(zip(keys.tolist(), block, strict=True))]
            for text in block:
                row += [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
    return np.array([row[i * t : (i + 1) * t + 1] for i in range(n)])


def opened(data, tokenizer, buffer=5, workers=0, t=T, seed=SEED):
    return TokenStream(data, tokenizer, t, seed, workers, buffer)


@pytest.mark.parametrize("buffer", [0, 1, 4, 5, 1000])
def test_equals_the_reference_over_epochs_however_it_is_asked(tmp_path, tokenizer, buffer):
    folder = corpus(tmp_path / "set")
    (folder / "c.jsonl").write_bytes(b'{"text": "half a pair \\ud800"}\n\n{"text": null}\n{"text": "\\ufeff last"}')
    data = config("jsonl", folder)
    expected = reference(data, tokenizer, buffer, 200)
    epoch = sum(len(tokenizer(text)["input_ids"]) + 1 for text in training(data))
    assert 3 * epoch < 200 * T
    whole = opened(data, tokenizer, buffer).take(200)
    assert whole.dtype == np.int64
    np.testing.assert_array_equal(whole, expected)
    parts = opened(data, tokenizer, buffer)
    np.testing.assert_array_equal(np.concatenate([parts.take(n) for n in (3, 5, 0, 1, 151, 40)]), expected)


def test_any_number_of_workers_gives_the_same(tmp_path, tokenizer):
    data = config("jsonl", corpus(tmp_path / "set"))
    expected = reference(data, tokenizer, 5, 80)
    stream = opened(data, tokenizer, workers=2)
    np.testing.assert_array_equal(stream.take(30), expected[:30])
    state = stream.state()
    np.testing.assert_array_equal(stream.take(20), expected[30:50])
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(WorkerError, match="worker processes was killed"):
        stream.take(200)
    np.testing.assert_array_equal(stream.take(30), expected[50:])  # it stands where it stood: new workers
    stream.restore(state)
    np.testing.assert_array_equal(stream.take(50), expected[30:])
    stream.close()
    assert not multiprocessing.active_children()
    np.testing.assert_array_equal(opened(data, tokenizer, workers=1).take(80), expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("buffer", [1, 8])
def test_a_bad_record_ends_it_where_its_block_begins(tmp_path, tokenizer, workers, buffer):
    """The error is not raised where the record is read ahead: all text before its block is trained on, with any number
    of workers."""
    good = [text for text in texts(80, 3) if text][:40]  # whole blocks
    (tmp_path / "good.jsonl").write_bytes(lines(good))
    (tmp_path / "bad.jsonl").write_bytes(lines(good) + b"broken\n" + lines(texts(40, 4)))
    there = reference(config("jsonl", tmp_path / "good.jsonl", held_out=0), tokenizer, buffer, 1000)
    before = sum(len(tokenizer(text)["input_ids"]) + 1 for text in good)
    stream = opened(config("jsonl", tmp_path / "bad.jsonl", held_out=0), tokenizer, buffer, workers=workers)
    count = (before - 1) // T
    np.testing.assert_array_equal(stream.take(count - 1), there[: count - 1])
    np.testing.assert_array_equal(stream.take(1), there[count - 1 : count])
    for _ in range(2):
        with pytest.raises(DataError, match=r"bad.jsonl:41: not JSON"):
            stream.take(1)
    stream.close()


@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet", "hub", "hub parquet", "saved", "limited"])
def test_goes_on_from_every_position_of_every_source(tmp_path, tokenizer, kind):
    folder = tmp_path / "set"
    more = {"max_documents": 20} if kind == "limited" else {}
    if kind in ("jsonl", "limited", "hub"):
        data = config("hub" if kind == "hub" else "jsonl", corpus(folder), **more)
    elif kind == "saved":
        datasets.Dataset.from_dict({"text": texts(31, 3), "n": list(range(31))}).save_to_disk(folder)
        data = config("hub", folder)
    else:
        folder.mkdir()
        for i in range(3) if "parquet" in kind else range(31):
            if "parquet" in kind:
                table = pa.table({"n": list(range(9)), "text": texts(9, i)})
                parquet.write_table(table, folder / f"{i}.parquet", row_group_size=4)
            else:
                (folder / f"{i:02}.txt").write_bytes(texts(1, i)[0].encode())
        data = config(kind.split()[0], folder)
    n = 70
    expected = reference(data, tokenizer, 5, n)
    stream, states = opened(data, tokenizer), []
    for i in range(n):
        states.append(json.loads(json.dumps(stream.state())))
        np.testing.assert_array_equal(stream.take(1)[0], expected[i])
    assert states[-1]["block"]["epoch"] >= 1
    again = opened(data, tokenizer)
    step = 7 if data.source == "hub" else 1  # opening one takes datasets some 70 ms
    for i in (n - 2, *range(0, n - 1, step)):
        again.restore(states[i])
        assert again.state() == states[i]
        np.testing.assert_array_equal(again.take(n - i - 1), expected[i : n - 1])
        assert again.state() == states[-1]  # and so on from there: datasets once lost its place after going on twice


def test_goes_on_within_large_arrow_tables(tmp_path, tokenizer):
    """datasets hands on tables of 1,000 rows: a place within one must be found too, more than once."""
    (tmp_path / "set").mkdir()
    table = pa.table({"text": [f"{i}" for i in range(2500)]})
    parquet.write_table(table, tmp_path / "set" / "a.parquet")
    data = config("hub", tmp_path / "set", held_out=0)
    expected = reference(data, tokenizer, 130, 1500)
    stream = opened(data, tokenizer, 130)
    for i in range(0, 1500, 125):
        np.testing.assert_array_equal(stream.take(125), expected[i : i + 125])
        state = stream.state()
        stream = opened(data, tokenizer, 130)
        stream.restore(state)
    assert state["block"]["number"] > 8


def test_another_sequence_length_goes_on_at_the_same_token(tmp_path, tokenizer):
    data = config("jsonl", corpus(tmp_path / "set"))
    short = opened(data, tokenizer)
    short.take(6)
    long = opened(data, tokenizer, t=3 * T)
    long.restore(short.state())
    np.testing.assert_array_equal(long.take(4), reference(data, tokenizer, 5, 6, 3 * T)[2:])


def test_a_document_longer_than_a_block_of_pieces(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("l2e_ds.data.encode._PIECE_CHARACTERS", 30)
    (tmp_path / "a.jsonl").write_bytes(lines(["short", " ".join(WORDS * 40), "short too"]))
    data = config("jsonl", tmp_path, held_out=0)
    expected = reference(data, tokenizer, 5, 400)
    stream = opened(data, tokenizer)
    np.testing.assert_array_equal(np.concatenate([stream.take(1) for _ in range(400)]), expected)


def test_every_epoch_has_every_document_once_in_another_order(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines([f"{i:02}" for i in range(40)]))
    data = config("jsonl", tmp_path, held_out=0)
    stream = opened(data, tokenizer, 8, t=len(tokenizer("00")["input_ids"]) + 1)
    epochs = [[tokenizer.decode(row[:-2]) for row in stream.take(40)] for _ in range(3)]
    for order in epochs:
        blocks = [{int(text) // 8 for text in order[first : first + 8]} for first in range(0, 40, 8)]
        assert blocks == [{0}, {1}, {2}, {3}, {4}]
        assert len(set(order)) == 40
    orders = {
        tuple(int(text) % 8 for text in order[first : first + 8]) for order in epochs for first in range(0, 40, 8)
    }
    assert len(orders) == 15  # no two blocks alike
    other = opened(data, tokenizer, 8, t=stream.sequence_length, seed=SEED + 1)
    assert [tokenizer.decode(row[:-2]) for row in other.take(40)] != epochs[0]


def test_the_order_is_the_same_in_every_version(tmp_path, tokenizer):
    """Also of NumPy: a run goes on after an update. These figures must never change."""
    (tmp_path / "a.jsonl").write_bytes(lines([f"{i}" for i in range(10)]))
    for seed, expected in [
        (1234, "89730142560956428173"),
        (2**63 + 5, "92517803643687421905"),
        (2**63 + 6, "10795234867518093462"),
        (2**64 - 1, "89074263153872549061"),
    ]:
        stream = TokenStream(config("jsonl", tmp_path, held_out=0), tokenizer, 2, seed, 0)
        assert "".join(tokenizer.decode(row[:1]) for row in stream.take(20)) == expected


def test_held_out_documents_are_the_first_of_the_source(tmp_path, tokenizer):
    data = config("jsonl", corpus(tmp_path / "set"))
    end = end_of_text_id(tokenizer)
    chosen = [text for text in documents(data) if digest(text) < data.held_out * 2**64]
    expected = [token for text in chosen for token in [*tokenizer(text)["input_ids"], end]]
    stream = opened(data, tokenizer)
    first = stream.take(2)
    for at_most in (0, 1, len(expected) - 1, len(expected), 10_000):
        found = stream.held_out(at_most)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, expected[:at_most])
    np.testing.assert_array_equal(np.concatenate([first, stream.take(3)]), reference(data, tokenizer, 5, 5))
    assert not len(opened(config("jsonl", tmp_path / "set", held_out=0), tokenizer).held_out(100))


def test_held_out_reads_no_further_than_needed(tmp_path, tokenizer):
    some = texts(50)
    first = next(i for i, text in enumerate(some) if digest(text) < 0.2 * 2**64)
    (tmp_path / "a.jsonl").write_bytes(lines(some[: first + 1]) + b"no JSON")
    stream = opened(config("jsonl", tmp_path, held_out=0.2), tokenizer)
    needed = len(tokenizer(some[first])["input_ids"]) + 1
    assert len(stream.held_out(needed)) == needed
    with pytest.raises(DataError, match=rf"a\.jsonl:{first + 2}: not JSON"):
        stream.held_out(needed + 1)


def test_a_source_too_small_for_the_hash_holds_out_its_last_document(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(["one", "two", "three"]))
    stream = opened(config("jsonl", tmp_path, held_out=1e-9), tokenizer, t=2)
    end = end_of_text_id(tokenizer)
    assert list(stream.held_out(100)) == [*tokenizer("three")["input_ids"], end]
    assert "three" not in tokenizer.decode(stream.take(30).ravel())


def test_what_is_wrong_is_said_in_one_line(tmp_path, tokenizer):
    (tmp_path / "bad.jsonl").write_bytes(lines(["one"] * 9) + b'{"text": \n')
    (tmp_path / "blank.jsonl").write_bytes(lines([" ", ""]))
    (tmp_path / "same.jsonl").write_bytes(lines(["one", "one"]))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_bytes(lines(["one"]))

    def said(data):
        with pytest.raises(DataError) as caught:
            opened(data, tokenizer).take(100)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "bad.jsonl:10: not JSON" in said(config("jsonl", tmp_path / "bad.jsonl", held_out=0))
    assert "blank.jsonl holds no text to train on" in said(config("jsonl", tmp_path / "blank.jsonl", held_out=0))
    assert "fewer than 2 different documents" in said(config("jsonl", tmp_path / "same.jsonl"))
    assert "no such file or folder" in said(config("jsonl", tmp_path / "gone.jsonl"))
    assert "bad.jsonl:1: no key 'body'; set data.text_key to one of: meta, text" in said(
        config("jsonl", tmp_path / "bad.jsonl", held_out=0, text_key="body")
    )
    assert "no key 'body'; set data.text_key to one of: meta, text" in said(
        config("hub", tmp_path / "set", held_out=0, text_key="body")
    )


def test_a_source_that_changes_or_vanishes(tmp_path, tokenizer):
    folder = corpus(tmp_path / "set")
    data = config("jsonl", folder)
    expected = reference(data, tokenizer, 5, 60)
    stream = opened(data, tokenizer)
    stream.take(1)
    early = stream.state()
    np.testing.assert_array_equal(stream.take(29), expected[1:30])
    late = stream.state()
    assert late["block"]["number"] > 0 and late["used"] > 1
    kept = (folder / "a.jsonl").read_bytes()
    (folder / "a.jsonl").write_bytes(kept + lines(["more"]))
    with pytest.raises(DataError, match="from another stream"):
        opened(data, tokenizer).restore(late)
    (folder / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"no such file or folder: .*a\.jsonl"):
        stream.take(60)
    (folder / "a.jsonl").write_bytes(kept[:0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(["one"])))
    stream.restore(late)
    with pytest.raises(DataError, match="it has changed"):
        stream.take(1)
    (folder / "a.jsonl").write_bytes(kept)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(texts(17, 2))))
    np.testing.assert_array_equal(stream.take(30), expected[30:])  # mended: as if nothing had been
    for other in (opened(data, tokenizer, seed=1), opened(data, tokenizer, 6)):
        with pytest.raises(DataError, match="from another stream"):
            other.restore(early)
    lower = copy.deepcopy(tokenizer)  # of the same vocabulary
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(DataError, match="from another stream"):
        opened(data, lower).restore(early)


@pytest.mark.parametrize(("shorter", "taken"), [(["one two"] * 3, 6), (["one"] * 10, 1)])
def test_a_block_that_has_become_shorter(tmp_path, tokenizer, shorter, taken):
    (tmp_path / "a.jsonl").write_bytes(lines(["one two"] * 10))
    length = len(tokenizer("one two")["input_ids"])
    stream = opened(config("jsonl", tmp_path, held_out=0), tokenizer, 0 if taken == 1 else 100, t=length)
    stream.take(taken)
    state = stream.state()
    assert state["used"] >= len(shorter) or (state["used"] == 0 and state["offset"] == length)
    (tmp_path / "a.jsonl").write_bytes(lines(shorter))
    stream.restore(state)
    with pytest.raises(DataError, match="it has changed"):
        stream.take(1)


def test_workers_import_neither_torch_nor_transformers():
    """Each of them would cost seconds and hundreds of megabytes."""
    code = "import sys, l2e_ds.data.stream; print(*{'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"
