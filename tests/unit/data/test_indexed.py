import mmap
import struct

import numpy as np
import pytest

from l2e_ds.data.indexed import IndexedTokens, best_dtype, write_pair
from l2e_ds.errors import DataError
from tests.unit.data.reading import documents_in

DOCUMENTS = [[5, 6, 7], [], [65499], [0, 1]]


def header(code=8, sequences=2, entries=3, magic=b"MMIDIDX\x00\x00", version=1):
    return magic + struct.pack("<QBQQ", version, code, sequences, entries)


def index(lengths=(3, 1), pointers=(0, 6), documents=(0, 1, 2), **changes):
    return (
        header(**changes)
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(documents)}q", *documents)
    )


def lengths(read):
    return [length for chunk in read.lengths_in_chunks() for length in chunk.tolist()]


def write_raw(tmp_path, idx):
    (tmp_path / "a.idx").write_bytes(idx)
    (tmp_path / "a.bin").write_bytes(struct.pack("<4H", 1, 2, 3, 4))
    return tmp_path / "a"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_round_trip(tmp_path, dtype):
    write_pair(tmp_path / "a", DOCUMENTS, dtype)
    read = IndexedTokens(tmp_path / "a")
    assert read.dtype == dtype
    assert (read.num_documents, read.num_tokens) == (4, 6)
    assert lengths(read) == [3, 0, 1, 2]
    assert documents_in(read) == DOCUMENTS
    assert type(read.tokens) is np.ndarray and isinstance(read.tokens.base.obj, mmap.mmap)
    assert not read.tokens.flags.writeable
    assert read.tokens.tolist() == [5, 6, 7, 65499, 0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    assert IndexedTokens(tmp_path / "a.bin").num_tokens == 6


def test_layout_is_megatrons(tmp_path):
    write_pair(tmp_path / "a", [[1, 2, 3], np.array([4])], np.uint16)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 4)
    assert (tmp_path / "a.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)  # version
        + struct.pack("<B", 8)  # uint16
        + struct.pack("<Q", 2)  # sequences
        + struct.pack("<Q", 3)  # entries of the document index
        + struct.pack("<ii", 3, 1)  # lengths
        + struct.pack("<qq", 0, 6)  # byte offsets
        + struct.pack("<qqq", 0, 1, 2)  # document index
    )


def test_documents_of_several_sequences(tmp_path):
    read = IndexedTokens(write_raw(tmp_path, index((1, 2, 1), (0, 2, 6), (0, 2, 3), sequences=3)))
    assert read.num_documents == 2
    assert lengths(read) == [3, 1]
    assert documents_in(read) == [[1, 2, 3], [4]]
    assert [read.start(i) for i in range(3)] == [0, 3, 4]


@pytest.mark.parametrize("documents", [(), (0,)])
def test_without_a_document_index_sequences_are_documents(tmp_path, documents):
    read = IndexedTokens(write_raw(tmp_path, index(documents=documents, entries=len(documents))))
    assert documents_in(read) == [[1, 2, 3], [4]]


def test_empty_pair(tmp_path):
    write_pair(tmp_path / "a", [], np.uint16)
    read = IndexedTokens(tmp_path / "a")
    assert (read.num_documents, read.num_tokens, lengths(read)) == (0, 0, [])


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (index(magic=b"TNTIDX\x00\x00\x00"), "not a Megatron index"),
        (b"", "not a Megatron index"),
        (header()[:20], "truncated"),
        (index(version=2), "version 2"),
        (index(code=6), "floating point"),
        (index(code=7), "floating point"),
        (index(code=9), "dtype code 9"),
        (index()[:-1], "81 bytes, but 2 sequences and 3 document entries take 82"),
        (index(sequences=2**40), "sequences"),
        (index(pointers=(0, 4)), "sequence 1 begins at byte 4, must be 6"),
        (index(pointers=(2, 8)), "sequence 0 begins at byte 2, must be 0"),
        (index(lengths=(4, -1), pointers=(0, 8)), "sequence 1 has a negative length"),
        (index(lengths=(3, 2)), "a.bin: 8 bytes, but a.idx describes 10"),
        (index(lengths=(2, 1), pointers=(0, 4)), "a.bin: 8 bytes, but a.idx describes 6"),
        (index(documents=(0, 1, 3)), "document index"),
        (index(documents=(1, 1, 2)), "document index"),
    ],
)
def test_bad_index(tmp_path, idx, message):
    with pytest.raises(DataError, match=message) as caught:
        IndexedTokens(write_raw(tmp_path, idx))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a") in str(caught.value)


def many(tmp_path, change, count=20_000):
    """A pair of sequences of 2 tokens, some of whose lengths, pointers or document index are changed."""
    arrays = {
        "lengths": np.full(count, 2, "<i4"),
        "pointers": np.arange(count, dtype="<i8") * 4,
        "documents": np.arange(count + 1, dtype="<i8"),
    }
    change(**arrays)
    content = b"".join(array.tobytes() for array in arrays.values())
    (tmp_path / "a.idx").write_bytes(header(sequences=count, entries=count + 1) + content)
    np.zeros(2 * count, "<u2").tofile(tmp_path / "a.bin")
    return tmp_path / "a"


def put(name, at, value):
    def change(**arrays):
        arrays[name][at] = value

    return change


# 20,000 sequences are more than opening looks at: 280 and 19,700 lie between its samples, 19,990 in the last one.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("lengths", 280, -1), "sequence 280 has a negative length"),
        (put("lengths", 280, 3), "sequence 281 begins at byte 1124, must be 1126"),
        (put("pointers", 19_700, 8), "sequence 19700 begins at byte 8, must be 78800"),
        (put("documents", 280, 282), "document index must rise"),
    ],
)
def test_only_the_whole_check_reads_all_of_a_long_index(tmp_path, monkeypatch, change, message):
    read = IndexedTokens(many(tmp_path, change))
    monkeypatch.setattr("l2e_ds.data.indexed._CHUNK", 280)  # some defects lie at the edge of a chunk
    with pytest.raises(DataError, match=message):
        read.check_index(lambda count: None)


@pytest.mark.parametrize("change", [put("lengths", 19_990, -1), put("pointers", 30, 2), put("documents", 19_990, 2)])
def test_opening_a_long_index_looks_at_samples(tmp_path, change):
    with pytest.raises(DataError):
        IndexedTokens(many(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("pointers", 280, 2**40), "sequence 280 begins at byte 1099511627776, outside"),
        (put("pointers", 280, -4), "sequence 280 begins at byte -4, outside"),
        (put("documents", 280, 20_001), "document index must rise"),
        (put("documents", 280, -1), "document index must rise"),
    ],
)
def test_entries_that_lead_outside_are_noticed_when_they_are_read(tmp_path, change, message):
    read = IndexedTokens(many(tmp_path, change))
    assert read.start(279) == 558
    with pytest.raises(DataError, match=message):
        read.start(280)


def test_whole_check_of_a_good_index(tmp_path):
    counted = []
    IndexedTokens(many(tmp_path, put("lengths", 5, 2))).check_index(counted.append)
    assert sum(counted) == 20_000


def test_all_documents_hold(tmp_path):
    read = IndexedTokens(many(tmp_path, put("lengths", 5, 2)))
    assert read.all_documents_hold(2)
    assert not read.all_documents_hold(1)
    assert not IndexedTokens(write_raw(tmp_path, index())).all_documents_hold(2)  # 2 documents, 4 tokens: 3 and 1


# --- several files ----------------------------------------------------------------------------------------------


def cut_bin(prefix, cuts, names):
    content = (prefix.parent / f"{prefix.name}.bin").read_bytes()
    (prefix.parent / f"{prefix.name}.bin").unlink()
    for name, begin, end in zip(names, [0, *cuts], [*cuts, len(content)], strict=True):
        (prefix.parent / name).write_bytes(content[begin:end])


def written(prefix, documents, dtype=np.uint16):
    write_pair(prefix, documents, dtype)
    return prefix


def flat(lists):
    return [entry for one in lists for entry in one]


def assert_equal_slices(read, tokens):
    assert len(read.tokens) == read.num_tokens == len(tokens)
    for start in range(len(tokens) + 1):
        for stop in range(len(tokens) + 2):
            found = read.tokens[start:stop]
            assert isinstance(found, np.ndarray) and found.tolist() == tokens[start:stop]


# Pythia's parts are numbered 0 to N of N; an empty part, and parts numbered 0 to N-1 of N, do no harm.
@pytest.mark.parametrize(("cuts", "total"), [((6, 6, 14), 3), ((6, 14), 3), ((2, 4, 6, 8, 10, 12, 14, 16, 18), 9)])
def test_parts_of_one_set(tmp_path, cuts, total):
    documents = [[5, 6, 7, 8], [], [9], [0, 1, 2, 3, 4]]
    prefix = written(tmp_path / "a", documents)
    (tmp_path / "a-part-00000-of-00007.bin").write_bytes(b"another set's")
    cut_bin(prefix, cuts, [f"a-{i:05}-of-{total:05}.bin" for i in range(len(cuts) + 1)])
    read = IndexedTokens(prefix)
    assert documents_in(read) == documents
    assert_equal_slices(read, flat(documents))
    assert read.tokens[:2].dtype == np.uint16


@pytest.mark.parametrize(
    ("names", "cuts", "message"),
    [
        (["a-00000-of-00002.bin", "a-00002-of-00002.bin"], (6,), r"a-00001-of-00002\.bin: no such file"),
        (["a-00000-of-00002.bin", "a-00001-of-00003.bin"], (6,), "parts of different sets"),
        (["a-00000-of-00001.bin", "a-00002-of-00001.bin"], (6,), "beyond 1"),
        (["a-00000-of-00001.bin", "a-00001-of-00001.bin"], (5,), "5 bytes are no whole number of tokens of 2 bytes"),
        (["a-00000-of-00002.bin", "a-00001-of-00002.bin", "a-00002-of-00002.bin~"], (6, 8), "8 bytes, but a.idx"),
    ],
)
def test_bad_parts(tmp_path, names, cuts, message):
    cut_bin(written(tmp_path / "a", [[1, 2, 3], [4, 5, 6]]), cuts, names)
    with pytest.raises(DataError, match=message) as caught:
        IndexedTokens(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_pairs_one_after_the_other(tmp_path):
    sets = [[[1, 2], []], [], [[3], [4, 5, 6]], [[]], [[7, 8]]]
    prefixes = [written(tmp_path / f"s{i}", documents) for i, documents in enumerate(sets)]
    cut_bin(prefixes[2], (4,), ["s2-00000-of-00001.bin", "s2-00001-of-00001.bin"])
    read, documents = IndexedTokens(prefixes), flat(sets)
    assert documents_in(read) == documents
    assert lengths(read) == [len(document) for document in documents]
    assert [read.document_at(position) for position in range(8)] == [0, 0, 2, 3, 3, 3, 5, 5]
    assert read.start(read.num_documents) == 8
    assert_equal_slices(read, flat(documents))
    read.check_index(lambda count: None)
    for wrong in (-1, read.num_documents + 1):
        with pytest.raises(IndexError):
            read.start(wrong)


def test_pairs_of_different_dtypes_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"b\.idx: holds int32, .*a\.idx uint16"):
        IndexedTokens([written(tmp_path / "a", [[1]]), written(tmp_path / "b", [[1]], np.int32)])


@pytest.mark.parametrize("missing", ["a.bin", "a.idx"])
def test_missing_file_is_named(tmp_path, missing):
    write_raw(tmp_path, index())
    (tmp_path / missing).unlink()
    with pytest.raises(DataError, match=f"{missing}: no such file"):
        IndexedTokens(tmp_path / "a")


def test_interrupted_writing_keeps_the_old_pair(tmp_path):
    def interrupted():
        yield [2, 3]
        raise KeyboardInterrupt

    write_pair(tmp_path / "a", [[1]], np.uint16)
    with pytest.raises(KeyboardInterrupt):
        write_pair(tmp_path / "a", interrupted(), np.uint16)
    assert IndexedTokens(tmp_path / "a").tokens.tolist() == [1]
    assert len(list(tmp_path.iterdir())) == 2


def test_best_dtype():
    assert best_dtype(65499) is np.uint16
    assert best_dtype(65500) is np.int32
