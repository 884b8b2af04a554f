"""Files written here and read by Megatron-core, and the other way round."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from l2e_ds.data.indexed import DTYPE_CODES, IndexedTokens, write_pair
from tests.unit.data.reading import documents_in

DTYPES = [dtype.__name__ for dtype in DTYPE_CODES.values()]


def documents_of(dtype):
    """One sequence a document, as our writer writes. With the extremes of the dtype and empty documents."""
    limits = np.iinfo(dtype)
    return [[int(limits.max), 0, int(limits.min)], [], [5], list(range(100)), []]


# What only foreign writers write: documents of no, of three and of one sequence.
SEVERAL = [[], [[1, 2], [], [3]], [], [[4]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "foreign").mkdir()
    (folder / "ours").mkdir()
    content = {"several": ("uint16", SEVERAL)}
    for dtype in DTYPES:
        content[dtype] = (dtype, [[document] for document in documents_of(dtype)])
        write_pair(folder / "ours" / dtype, documents_of(dtype), getattr(np, dtype))
    (folder / "documents.json").write_text(json.dumps(content))
    script = Path(__file__).with_name("foreign_indexed.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bytes(folder, dtype):
    for ending in ("bin", "idx"):
        foreign, ours = (folder / who / f"{dtype}.{ending}" for who in ("foreign", "ours"))
        assert ours.read_bytes() == foreign.read_bytes()


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_reads_what_we_write(folder, dtype):
    documents = documents_of(dtype)
    read = json.loads((folder / "read.json").read_text())[dtype]
    assert read == {"dtype": dtype, "sequences": documents, "documents": list(range(len(documents) + 1))}


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_what_megatron_writes(folder, dtype):
    read = IndexedTokens(folder / "foreign" / dtype)
    assert read.dtype == dtype
    assert documents_in(read) == documents_of(dtype)


@pytest.mark.full
def test_we_read_documents_of_several_sequences(folder):
    read = IndexedTokens(folder / "foreign" / "several")
    assert documents_in(read) == [[], [1, 2, 3], [], [4]]
    assert [one for chunk in read.lengths_in_chunks() for one in chunk.tolist()] == [0, 3, 0, 1]
    assert read.num_sequences == 4
    read.check_index(lambda count: None)
