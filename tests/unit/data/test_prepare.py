import json
import math
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from l2e_ds.cli import main
from l2e_ds.config.sections import DataConfig
from l2e_ds.data import check_data, encode, prepare, prepare_data, sources
from l2e_ds.data.indexed import IndexedTokens, write_pair
from l2e_ds.data.token_files import Exclusive, TokenFiles
from l2e_ds.data.tokenizer import train_tokenizer
from l2e_ds.errors import DataError
from tests.unit.data.reading import documents_in

WORDS = ["the", "of", "and", "neuron", "layer", "token", "model", "a", "to", "in", "is", "score", "share", "step"]


def text(i, words=40):
    generator = np.random.default_rng(i)
    return " ".join(generator.choice(WORDS, words)) + f" number {i}\n"


def corpus(tmp_path, texts):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config(path, **more):
    more = {"held_out": 0.1, "sequence_length": 8} | more
    if "tokenizer" not in more:
        more.setdefault("train_tokenizer", 300)
    return DataConfig(source=more.pop("source", "jsonl"), path=str(path), **more)


def texts_of(prepared, part):
    """The stored documents as text."""
    ids = documents_in(IndexedTokens(prepared.directory / part))
    assert all(document[-1] == 0 for document in ids)
    return [prepared.tokenizer.decode(document[:-1]) for document in ids]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_bytes_of_a_text(tmp_path, cache):
    """Of the documents that are evaluated, in UTF-8; counted anew where the file is missing."""
    texts = [text(i) + "été 中文\n" for i in range(20)]
    path, plain = corpus(tmp_path, [*texts, "  "]), {"held_out": 0.0, "sequence_length": 16}
    whole = prepare.prepare_text(config(path, **plain), cache, 300, "own")
    assert whole.num_bytes == sum(len(one.encode()) for one in texts) > sum(map(len, texts))
    assert whole.evaluated_tokens == (whole.dataset.num_tokens - 1) // 16 * 16
    assert whole.bits_per_byte(math.log(2)) == whole.dataset.num_tokens / whole.num_bytes
    three = prepare.prepare_text(config(path, max_documents=3, **plain), cache, 300, "own")
    assert three.num_bytes == sum(len(one.encode()) for one in texts[:3])
    some = prepare.prepare_text(config(path, max_tokens=200, **plain), cache, 300, "own")
    assert 200 <= some.dataset.num_tokens < whole.dataset.num_tokens
    assert some.num_bytes == sum(len(one.encode()) for one in texts[: some.dataset.documents.num_documents])
    for counted in cache.glob("*/bytes"):
        counted.unlink()
    assert prepare.prepare_text(config(path, **plain), cache, 300, "own").num_bytes == whole.num_bytes
    with pytest.raises(DataError, match=r"holds \d+ tokens, a sequence needs 9001; give more text or lower data"):
        prepare.prepare_text(config(path, **plain | {"sequence_length": 9000}), cache, 300, "own")


def test_every_document_is_stored_once_on_one_side(tmp_path, cache):
    texts = [text(i) for i in range(200)] + [text(i) for i in range(50)]
    prepared = prepare_data(config(corpus(tmp_path, texts)), cache, 300)
    train, held_out = texts_of(prepared, "train"), texts_of(prepared, "held_out")
    assert sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)
    assert 5 <= len(set(held_out)) <= 40  # 10 % of 200
    assert [t for t in texts if t in set(train)] == train
    meta = json.loads((prepared.directory / "meta.json").read_text())
    assert meta["documents"] == {"train": len(train), "held_out": len(held_out)}
    assert meta["tokens"] == {"train": prepared.train_tokens, "held_out": prepared.held_out_tokens}
    assert len(prepared.train) == (prepared.train_tokens - 1) // 8
    assert sorted(path.name for path in cache.iterdir()) == [prepared.directory.name]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    data = config(corpus(tmp_path, [text(i) for i in range(50)]))
    one, two = (prepare_data(data, tmp_path / name, 300).directory for name in ("a", "b"))
    assert one.name == two.name
    for name in ("train.bin", "train.idx", "held_out.bin", "held_out.idx", "tokenizer/tokenizer.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_finished_cache_is_reused_until_something_changes(tmp_path, cache, monkeypatch):
    path = corpus(tmp_path, [text(i) for i in range(50)])
    first = prepare_data(config(path), cache, 300)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_build", lambda *_: pytest.fail("tokenized again"))
        again = prepare_data(config(path, sequence_length=16, order="stored"), cache, 300)
        assert again.directory == first.directory
        assert again.train.sequence_length == 16
    assert prepare_data(config(path, held_out=0.2), cache, 300).directory != first.directory
    corpus(tmp_path, [text(i) for i in range(51)])
    assert prepare_data(config(path), cache, 300).directory != first.directory


def test_the_tokenizer_learns_from_training_documents_only(tmp_path, cache, monkeypatch):
    seen = []

    def spy(texts, vocab_size):
        seen.extend(texts)
        return train_tokenizer(iter(seen), vocab_size)

    monkeypatch.setattr(prepare, "train_tokenizer", spy)
    prepared = prepare_data(config(corpus(tmp_path, [text(i) for i in range(100)])), cache, 300)
    assert seen == texts_of(prepared, "train")
    assert texts_of(prepared, "held_out")


def test_the_last_document_is_held_out_if_the_hash_chose_none(tmp_path, cache):
    texts = [text(1), text(0), text(2), text(0)]
    prepared = prepare_data(config(corpus(tmp_path, texts), held_out=1e-9), cache, 300)
    assert texts_of(prepared, "train") == [text(1), text(2)]
    assert texts_of(prepared, "held_out") == [text(0), text(0)]


def test_a_text_file_is_one_document(tmp_path):
    """Found before anything is prepared, so that a dry run says it, too."""
    path = tmp_path / "a.txt"
    path.write_text("\n".join(text(i) for i in range(50)))
    data = DataConfig(source="text", path=str(path), train_tokenizer=300, held_out=0.01)
    with pytest.raises(DataError, match=r"data\.held_out: .*a\.txt holds fewer than 2 different documents"):
        check_data(data, 300)
    check_data(data.model_copy(update={"held_out": 0.0}), 300)


@pytest.mark.parametrize("content", ["", " \n"])
def test_no_tokenizer_of_nothing(tmp_path, capsys, content):
    (tmp_path / "a.txt").write_text(content)
    words = ["tokenizer", "train", str(tmp_path / "a.txt"), "--output", str(tmp_path / "t.json"), "--vocab-size", "300"]
    assert main(words) == 2
    assert "a.txt holds no text" in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize("texts", [[text(0)], [text(0)] * 3])
def test_nothing_to_hold_out(tmp_path, cache, texts):
    path = corpus(tmp_path, texts)
    with pytest.raises(DataError, match=r"data\.held_out: .* fewer than 2 different documents"):
        prepare_data(config(path, held_out=1e-9), cache, 300)
    assert list(cache.iterdir()) == []
    prepared = prepare_data(config(path, held_out=0.0), cache, 300)
    assert (prepared.held_out, prepared.held_out_tokens) == (None, 0)
    assert texts_of(prepared, "train") == texts


def test_max_tokens_stops_after_the_document_that_reaches_it(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 500)
    path = corpus(tmp_path, [text(i) for i in range(300)])
    whole = prepare_data(config(path), cache, 300)
    (lengths,) = IndexedTokens(whole.directory / "train").lengths_in_chunks()
    prepared = prepare_data(config(path, max_tokens=1000), cache, 300)
    assert 1000 <= prepared.train_tokens < 1000 + lengths.max()
    assert prepared.train.tokens.tolist() == whole.train.tokens[: prepared.train_tokens].tolist()
    assert 0 < prepared.held_out_tokens < whole.held_out_tokens


def test_max_tokens_reached_before_the_first_held_out_document(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1)
    texts = [text(i) for i in range(30)]
    prepared = prepare_data(config(corpus(tmp_path, texts), held_out=1e-9, max_tokens=10), cache, 300)
    assert texts_of(prepared, "train") == texts[:1]
    assert texts_of(prepared, "held_out") == texts[-1:]


def test_a_hub_set_is_read_as_far_as_needed(tmp_path, cache, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(sources, "_CHUNK_ROWS", 5)
    (tmp_path / "set").mkdir()
    corpus(tmp_path, [text(i) for i in range(300)]).rename(tmp_path / "set" / "train.jsonl")
    short, long = (
        prepare_data(config(tmp_path / "set", source="hub", max_tokens=limit), cache, 300) for limit in (500, 1000)
    )
    assert 500 <= short.train_tokens < 1000 <= long.train_tokens < 2000
    assert short.directory != long.directory


def test_long_documents_are_cut_without_changing_tokens(tmp_path, cache, monkeypatch):
    texts = [text(0, 3000), "a  b\n\n c\t d" * 200, "x" * 5000, text(1)]
    path = corpus(tmp_path, texts)
    whole = prepare_data(config(path, held_out=0.0), cache, 300)
    monkeypatch.setattr(encode, "_PIECE_CHARACTERS", 50)
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 300)
    cut = prepare_data(config(path, held_out=0.0), tmp_path / "other", 300)
    assert cut.train.tokens.tolist() == whole.train.tokens.tolist()
    assert texts_of(cut, "train") == texts
    assert all("".join(encode.pieces(t)) == t for t in texts)
    assert len(list(encode.pieces(texts[0]))) > 100


def test_worker_processes_give_the_same_bytes_also_from_a_thread(tmp_path, monkeypatch):
    data = config(corpus(tmp_path, [text(i) for i in range(50)]))
    alone = prepare_data(data, tmp_path / "alone", 300).directory
    monkeypatch.setattr(prepare, "_SMALL_BYTES", 0)
    with ThreadPoolExecutor() as threads:  # as rank 0 does it
        together = threads.submit(prepare_data, data, tmp_path / "together", 300).result().directory
    for name in ("train.bin", "train.idx", "held_out.bin", "held_out.idx"):
        assert (together / name).read_bytes() == (alone / name).read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from l2e_ds.config.sections import DataConfig
from l2e_ds.data import prepare, sources, token_files
sources.CHUNK_BYTES, token_files._COMMIT_EVERY, left = 500, 0, [7]
commit = token_files.TokenFiles.commit
def dying(self):
    commit(self)
    left[0] -= 1
    left[0] or os.kill(os.getpid(), signal.SIGKILL)
token_files.TokenFiles.commit = dying
prepare.prepare_data(DataConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), 300)
"""


def test_a_killed_preparation_goes_on(tmp_path, cache, monkeypatch):
    data = config(corpus(tmp_path, [text(i) for i in range(50)]))
    expected = prepare_data(data, tmp_path / "undisturbed", 300)
    # a process of its own, not a fork: a fork of a process with threads may wait for them for ever
    done = subprocess.run(
        [sys.executable, "-c", KILLED, data.model_dump_json(), str(cache)],
        env={**os.environ, "PYTHONPATH": str(Path(prepare.__file__).parents[2])},
        timeout=600,
    )
    assert done.returncode == -signal.SIGKILL
    assert [path.suffix for path in cache.iterdir()] == [".partial"]
    read = []
    monkeypatch.setattr(encode.Encoder, "__call__", spy(read, encode.Encoder.__call__))
    prepared = prepare_data(data, cache, 300)
    assert 0 < sum(len(encoded.lengths) for encoded in read) < 40  # the first 7 chunks were not read again
    assert [path.name for path in cache.iterdir()] == [prepared.directory.name]
    for name in ("train.bin", "train.idx", "held_out.bin", "held_out.idx", "meta.json", "tokenizer/tokenizer.json"):
        assert (prepared.directory / name).read_bytes() == (expected.directory / name).read_bytes()


def spy(results, method):
    def called(*arguments):
        results.append(method(*arguments))
        return results[-1]

    return called


def test_an_interrupted_preparation_leaves_no_more_than_it_can_use(tmp_path, cache, monkeypatch):
    data = config(corpus(tmp_path, [text(i) for i in range(50)]))
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(TokenFiles, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(data, cache, 300)
    assert list(cache.iterdir()) == []


def test_a_folder_without_meta_is_replaced(tmp_path, cache):
    data = config(corpus(tmp_path, [text(i) for i in range(50)]))
    folder = prepare_data(data, cache, 300).directory
    expected = (folder / "train.bin").read_bytes()
    (folder / "meta.json").unlink()
    (folder / "train.bin").write_bytes(b"junk")
    assert prepare_data(data, cache, 300).directory == folder
    assert (folder / "train.bin").read_bytes() == expected
    assert len(list(cache.iterdir())) == 1


def test_of_two_at_once_one_waits_for_the_other(tmp_path, cache, monkeypatch):
    data = config(corpus(tmp_path, [text(i) for i in range(50)]))
    build, built, has_begun, other_waits = prepare._build, [], threading.Event(), threading.Event()
    is_locked = Exclusive._is_locked

    def built_while_the_other_waits(*arguments):
        built.append(arguments)
        has_begun.set()
        assert other_waits.wait(600)
        build(*arguments)

    def noted(exclusive):
        got_it = is_locked(exclusive)
        if not got_it:
            other_waits.set()
        return got_it

    monkeypatch.setattr(prepare, "_build", built_while_the_other_waits)
    monkeypatch.setattr(Exclusive, "_is_locked", noted)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(prepare_data, data, cache, 300)
        assert has_begun.wait(600)
        second = prepare_data(data, cache, 300)
        assert first.result().directory == second.directory
    assert len(built) == 1
    assert np.array_equal(first.result().train[3], second.train[3])
    assert [path.name for path in cache.iterdir()] == [second.directory.name]
    assert sorted(path.name for path in second.directory.iterdir()) == [
        *("held_out.bin", "held_out.idx", "meta.json", "tokenizer", "train.bin", "train.idx")
    ]


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    data = config(corpus(tmp_path, [text(i) for i in range(50)]))
    with pytest.raises(DataError, match=r"data\.cache: cannot write .*file"):
        prepare_data(data, tmp_path / "file" / "cache", 300)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((text(i) for i in range(50)), 300).save_pretrained(folder)
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize(
    ("changes", "vocab_size", "message"),
    [
        ({"tokenizer": "FILE"}, 299, r"^data\.tokenizer: .* has 300 entries, more than model\.vocab_size 299"),
        ({"train_tokenizer": 301}, 300, r"^data\.train_tokenizer: got 301, .+ model\.vocab_size, which is 300$"),
        ({"tokenizer": "gone.json"}, 300, r"^data\.tokenizer: no such file"),
        ({"path": "gone.jsonl"}, 300, r"^data\.path: no such file"),
    ],
)
def test_preflight_and_preparation_refuse_alike(tmp_path, cache, tokenizer_file, changes, vocab_size, message):
    changes = {key: tokenizer_file if value == "FILE" else value for key, value in changes.items()}
    path = changes.pop("path", corpus(tmp_path, [text(i) for i in range(50)]))
    bad = config(path, **changes)
    with pytest.raises(DataError, match=message):
        check_data(bad, vocab_size)
    assert not cache.exists()
    with pytest.raises(DataError, match=message):
        prepare_data(bad, cache, vocab_size)
    assert list(cache.rglob("*")) == []


def test_preflight_writes_nothing(tmp_path, tokenizer_file):
    path = corpus(tmp_path, [text(0)])
    check_data(config(path, tokenizer=tokenizer_file), 300)
    check_data(config(path, train_tokenizer=300), 300)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("length", "held_out", "message"),
    [
        (5000, 0.0, r"data\.sequence_length: the training documents .* tokens, a sequence needs 5001"),
        (500, 1e-9, r"data\.held_out: the held-out documents .* hold \d+ tokens, a sequence needs 501; raise"),
    ],
)
def test_too_short(tmp_path, cache, length, held_out, message):
    path = corpus(tmp_path, [text(i) for i in range(20)])
    with pytest.raises(DataError, match=message):
        prepare_data(config(path, sequence_length=length, held_out=held_out), cache, 300)


# --- indexed ----------------------------------------------------------------------------------------------------


def indexed(tmp_path, documents, name="tokens"):
    write_pair(tmp_path / name, documents, np.uint16)
    return tmp_path / name


def open_indexed(prefix, vocab_size=1000, **more):
    data = DataConfig(source="indexed", path=str(prefix), **({"sequence_length": 4} | more))
    check_data(data, vocab_size)
    return prepare_data(data, prefix.parent / "unused", vocab_size)


def test_indexed_holds_out_the_last_documents(tmp_path):
    prefix = indexed(tmp_path, [range(i * 10, i * 10 + 9) for i in range(10)])
    prepared = open_indexed(prefix, held_out=0.2)
    assert (prepared.train_tokens, prepared.held_out_tokens) == (72, 18)
    assert prepared.train[0].tolist() == [0, 1, 2, 3, 4]
    assert prepared.train[1].tolist() == [4, 5, 6, 7, 8]
    assert prepared.held_out[0].tolist() == [80, 81, 82, 83, 84]
    assert prepared.tokenizer is prepared.directory is None
    assert not (tmp_path / "unused").exists()
    assert open_indexed(prefix, held_out=0.001).held_out_tokens == 9
    whole = open_indexed(prefix, held_out=0.0)
    assert (whole.train_tokens, whole.held_out) == (90, None)


def test_indexed_holds_out_the_set_beside_it(tmp_path):
    prefix = indexed(tmp_path, [range(i * 10, i * 10 + 9) for i in range(10)])
    indexed(tmp_path, [range(500 + i * 5, 505 + i * 5) for i in range(3)], "tokens_held_out")
    prepared = open_indexed(prefix, held_out=1e-6)
    assert (prepared.train_tokens, prepared.held_out_tokens) == (90, 15)
    assert prepared.held_out.batch(range(3)).tolist() == np.arange(500, 515).reshape(3, 5).tolist()  # stored apart
    assert prepared.train[1].tolist() == [4, 5, 6, 7, 8]  # in one row
    limited = open_indexed(prefix.with_suffix(".idx"), held_out=0.5, max_documents=5, max_tokens=28)
    assert (limited.train_tokens, limited.held_out_tokens) == (36, 15)
    assert open_indexed(prefix, held_out=0.0).held_out is None
    with pytest.raises(DataError, match=r"tokens_held_out\.bin: token id 500"):
        open_indexed(prefix, 500)
    with pytest.raises(DataError, match=r"hold 15 tokens, .* hold out more in .*tokens_held_out\.bin or lower"):
        open_indexed(prefix, sequence_length=15)

    # the last documents of all, unless every prefix has such a set
    other = indexed(tmp_path, [range(900, 909)] * 10, "other")
    both = {"source": "indexed", "path": [str(prefix), str(other)], "sequence_length": 4, "held_out": 0.05}
    prepared = prepare_data(DataConfig(**both), tmp_path, 1000)
    assert (prepared.train_tokens, prepared.held_out_tokens) == (171, 9)
    indexed(tmp_path, [range(800, 807)], "other_held_out")
    prepared = prepare_data(DataConfig(**both), tmp_path, 1000)
    assert (prepared.train_tokens, prepared.held_out_tokens) == (180, 22)
    assert prepared.held_out[4].tolist() == [801, 802, 803, 804, 805]


def test_indexed_sequences_stored_apart_share_no_token(tmp_path):
    prefix = indexed(tmp_path, [range(i * 5, i * 5 + 5) for i in range(10)])
    prepared = open_indexed(prefix, held_out=0.1)
    assert [row.tolist() for row in prepared.train.batch(range(9))] == [list(range(i, i + 5)) for i in range(0, 45, 5)]
    assert len(prepared.train) == 9
    assert prepared.held_out.batch([0]).tolist() == [[45, 46, 47, 48, 49]]
    assert len(open_indexed(prefix, held_out=0.0, sequence_length=3).train) == 16


def test_a_sequence_stored_apart_must_be_a_document(tmp_path):
    """Opening a set checks only some of its sequences; reading checks each that is read."""
    lengths = [5] * 20_000
    lengths[280:282] = [4, 6]
    prefix = indexed(tmp_path, [range(length) for length in lengths])
    config = DataConfig(source="indexed", path=str(prefix), sequence_length=4, held_out=0.0)
    train = prepare_data(config, tmp_path / "unused", 1000).train
    assert len(train) == 20_000
    assert train.batch([279, 282, 19_999]).tolist() == [[0, 1, 2, 3, 4]] * 3
    for sequence, tokens in ((280, "1400 to 1404"), (281, "1404 to 1410")):
        with pytest.raises(DataError, match=rf"tokens\.bin: document {sequence} holds tokens {tokens}, expected"):
            train.batch([0, sequence])


def test_indexed_of_several_pairs(tmp_path):
    prefixes = []
    for first in (0, 50):
        (tmp_path / str(first)).mkdir()
        prefixes.append(
            str(indexed(tmp_path / str(first), [range(first + i * 5, first + i * 5 + 5) for i in range(10)]))
        )
    config = DataConfig(source="indexed", path=prefixes, sequence_length=4, held_out=0.05)
    check_data(config, 1000)
    prepared = prepare_data(config, tmp_path / "unused", 1000)
    assert prepared.train.batch(range(19)).tolist() == np.arange(95).reshape(19, 5).tolist()
    assert prepared.held_out[0].tolist() == [95, 96, 97, 98, 99]
    with pytest.raises(DataError, match=r"0/tokens\.bin \(and 1 more\): token id 52 at position 52"):
        check_data(config, 52)


def test_indexed_limits(tmp_path):
    prefix = indexed(tmp_path, [range(9)] * 10)
    first = open_indexed(prefix, held_out=0.2, max_documents=5)
    assert (first.train_tokens, first.held_out_tokens) == (36, 9)
    stops = [open_indexed(prefix, held_out=0.1, max_tokens=n).train_tokens for n in (5, 9, 10, 81, 500)]
    assert stops == [9, 9, 18, 81, 81]


def test_indexed_tokenizer_and_refusals(tmp_path, tokenizer_file):
    prefix = indexed(tmp_path, [range(9)] * 3)
    assert open_indexed(prefix, held_out=0.0, tokenizer=tokenizer_file).tokenizer.eos_token_id == 0
    with pytest.raises(DataError, match=r"data\.tokenizer: .* has 300 entries"):
        open_indexed(prefix, 299, tokenizer=tokenizer_file)
    with pytest.raises(DataError, match=r"data\.held_out: 3 of 3 documents"):
        open_indexed(prefix, held_out=0.9)
    with pytest.raises(DataError, match=r"data\.sequence_length: the training documents .* hold 27 tokens"):
        open_indexed(prefix, held_out=0.0, sequence_length=27)
    with pytest.raises(DataError, match=r"data\.held_out: the held-out documents .* hold 9 tokens"):
        open_indexed(prefix, held_out=0.1, sequence_length=9)
    with pytest.raises(DataError, match=r"tokens\.bin: token id 8 at position 8"):
        open_indexed(prefix, 8, held_out=0.0).train[1]
