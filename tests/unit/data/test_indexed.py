import struct

import numpy as np
import pytest

from l2e_ds.data.indexed import IndexedTokens, IndexedWriter, best_dtype
from l2e_ds.errors import DataError

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


def write_pair(tmp_path, idx):
    (tmp_path / "a.idx").write_bytes(idx)
    (tmp_path / "a.bin").write_bytes(struct.pack("<4H", 1, 2, 3, 4))
    return tmp_path / "a"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_round_trip(tmp_path, dtype):
    with IndexedWriter(tmp_path / "a", dtype) as writer:
        for document in DOCUMENTS:
            writer.add(document)
        assert (writer.tokens, writer.documents) == (6, 4)
    read = IndexedTokens(tmp_path / "a")
    assert read.dtype == dtype
    assert (read.num_documents, read.num_tokens) == (4, 6)
    assert read.lengths.tolist() == [3, 0, 1, 2]
    assert [read.document(i).tolist() for i in range(4)] == DOCUMENTS
    assert isinstance(read.tokens, np.memmap)
    assert read.tokens.tolist() == [5, 6, 7, 65499, 0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    assert IndexedTokens(tmp_path / "a.bin").num_tokens == 6


def test_layout_is_megatrons(tmp_path):
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add([1, 2, 3])
        writer.add(np.array([4]))
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
    read = IndexedTokens(write_pair(tmp_path, index((1, 2, 1), (0, 2, 6), (0, 2, 3), sequences=3)))
    assert read.num_documents == 2
    assert read.lengths.tolist() == [3, 1]
    assert [read.document(i).tolist() for i in range(2)] == [[1, 2, 3], [4]]
    assert [read.start(i) for i in range(3)] == [0, 3, 4]


@pytest.mark.parametrize("documents", [(), (0,)])
def test_without_a_document_index_sequences_are_documents(tmp_path, documents):
    read = IndexedTokens(write_pair(tmp_path, index(documents=documents, entries=len(documents))))
    assert [read.document(i).tolist() for i in range(read.num_documents)] == [[1, 2, 3], [4]]


def test_empty_pair(tmp_path):
    with IndexedWriter(tmp_path / "a", np.uint16):
        pass
    read = IndexedTokens(tmp_path / "a")
    assert (read.num_documents, read.num_tokens, read.lengths.tolist()) == (0, 0, [])


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
        IndexedTokens(write_pair(tmp_path, idx))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a") in str(caught.value)


@pytest.mark.parametrize("missing", ["a.bin", "a.idx"])
def test_missing_file_is_named(tmp_path, missing):
    write_pair(tmp_path, index())
    (tmp_path / missing).unlink()
    with pytest.raises(DataError, match=f"{missing}: no such file"):
        IndexedTokens(tmp_path / "a")


@pytest.mark.parametrize(
    ("dtype", "tokens"), [(np.uint16, [65536]), (np.uint16, [-1]), (np.int32, [2**31]), (np.uint16, [0.5])]
)
def test_tokens_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path, dtype, tokens):
    with pytest.raises(DataError), IndexedWriter(tmp_path / "a", dtype) as writer:
        writer.add([1, 2])
        writer.add(tokens)
    assert list(tmp_path.iterdir()) == []


def test_float_dtype_is_refused(tmp_path):
    with pytest.raises(DataError, match="float32"):
        IndexedWriter(tmp_path / "a", np.float32)


def test_interrupted_writing_keeps_the_old_pair(tmp_path):
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add([1])
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add([2, 3])
        raise KeyboardInterrupt
    assert IndexedTokens(tmp_path / "a").tokens.tolist() == [1]
    assert len(list(tmp_path.iterdir())) == 2


def test_best_dtype():
    assert best_dtype(65499) is np.uint16
    assert best_dtype(65500) is np.int32
