import bz2
import gzip
import json
import lzma
import pickle
import sysconfig
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from l2e_ds.config.sections import DataConfig
from l2e_ds.data import sources
from l2e_ds.data.indexed import write_pair
from l2e_ds.data.sources import check_source, chunks, documents, input_bytes, source_files, unread_files
from l2e_ds.errors import DataError

pytestmark = pytest.mark.usefixtures("without_hub")


def config(source, path=None, **more):
    if source != "indexed":
        more.setdefault("train_tokenizer", 300)
    return DataConfig(source=source, path=path if path is None or isinstance(path, list) else str(path), **more)


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_stdlib_is_sorted_and_without_tests():
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root).as_posix() for path in source_files(config("stdlib"))]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/")[:-1])]
    first = list(documents(config("stdlib", max_documents=3)))
    assert len(first) == 3
    assert first == list(documents(config("stdlib", max_documents=3)))


def test_text_from_file_folder_glob_and_list(tmp_path):
    for name, text in {"b.txt": "B", "a.txt": "A", "blank.txt": " \n", "c.md": "C", "sub/d.txt": "D"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(documents(config("text", tmp_path / "c.md"))) == ["C"]
    assert list(documents(config("text", tmp_path))) == ["A", "B"]
    assert list(documents(config("text", f"{tmp_path}/**/*.txt"))) == ["A", "B", "D"]
    both = [str(tmp_path / "c.md"), str(tmp_path), f"{tmp_path}/a*"]
    assert list(documents(config("text", both))) == ["C", "A", "B"]
    assert list(documents(config("text", both, max_documents=2))) == ["C", "A"]


def test_text_keeps_line_ends_and_drops_the_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo \xc3\xa9")
    assert list(documents(config("text", tmp_path / "a.txt"))) == ["one\r\ntwo é"]


PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.compress(data[:9]) + zstandard.compress(data[9:]),  # frames, as pzstd writes them
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_text_of_a_folder_may_be_compressed(tmp_path, suffix):
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / f"b.txt{suffix}").write_bytes(PACKERS[suffix](b"B"))
    assert list(documents(config("text", tmp_path))) == ["A", "B"]
    assert unread_files(config("text", tmp_path)) is None


def test_files_that_are_passed_over_are_counted(tmp_path):
    """All files below a folder are read, or in subfolders, or of other kinds."""
    for name in ("a.txt", "b.txt.gz", "c.md", "d.json", "README", "sub/e.txt", "sub/deep/f.txt", "sub/g.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(gzip.compress(b"B") if name.endswith("gz") else b"A")
    left = "3 of other kinds (.json, .md, README), 3 in subfolders"
    assert unread_files(config("text", tmp_path)) == f"{tmp_path}: 2 read; files passed over: {left}"
    both = [str(tmp_path), str(tmp_path / "sub/e.txt")]
    assert unread_files(config("text", both)).endswith("(.json, .md, README), 2 in subfolders")
    assert unread_files(config("text", f"{tmp_path}/*.txt*")) is None
    assert unread_files(config("text", f"{tmp_path}/**/*.txt")) is None
    assert unread_files(config("text", f"{tmp_path}/*")) == f"{tmp_path}/*: 5 read; files passed over: 3 in subfolders"
    assert unread_files(config("text", tmp_path / "c.md")) is None
    assert unread_files(config("stdlib")) is None


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_counts_once_however_it_is_named(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    for name in "ab":
        Path(f"set/{name}.txt{suffix}").write_bytes(PACKERS[suffix](name.encode()))
    Path(f"set/0.txt{suffix}").symlink_to(f"b.txt{suffix}")
    Path("other").symlink_to("set")
    names = ["set", str(tmp_path / "set"), f"set/../set/a.txt{suffix}", "other", f"./se*/b.txt{suffix}"]
    for name in names[:2]:
        assert list(documents(config("text", name))) == ["b", "a"]
    assert unread_files(config("text", "set")) is None
    assert list(documents(config("text", names))) == ["b", "a"]
    assert list(documents(config("text", names[::-1]))) == ["b", "a"]
    assert list(documents(config("text", names[2:]))) == ["a", "b"]
    assert unread_files(config("text", names)) is None


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_and_its_compressed_form_are_refused(tmp_path, monkeypatch, name):
    """`gzip -k` leaves both files. They are refused in a folder, by a pattern and by name."""
    monkeypatch.chdir(tmp_path)
    source = {".txt": "text"}.get(Path(name).suffix, "jsonl")
    Path(name).write_text('{"text": "A"}\n')
    Path(f"{name}.zst").write_bytes(PACKERS[".zst"](Path(name).read_bytes()))
    for path in (".", f"{name}*", [name, str(tmp_path / f"{name}.zst")], [f"{name}.zst", name]):
        with pytest.raises(DataError, match=rf"^data\.path: .*{name}.* are the same text twice") as error:
            check_source(config(source, path))
        assert "\n" not in str(error.value)
    Path("sub").mkdir()
    Path(name).rename(f"sub/{name}")
    assert len(source_files(config(source, [".", "sub"]))) == 2  # of the same name, in another folder


@pytest.mark.parametrize("suffix", PACKERS)
def test_jsonl(tmp_path, suffix):
    lines = (
        b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": "\\u00e9", "meta": 1}\n{"text": null}\n{"text": "x\\ud800y\\r\\n"}'
    )
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACKERS[suffix](lines))
    assert list(documents(config("jsonl", tmp_path))) == ["one", "é", "x\ufffdy\r\n"]


@pytest.mark.parametrize("suffix", [suffix for suffix in PACKERS if suffix])
def test_a_truncated_compressed_file(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](b'{"text": "one"}\n' * 1000)[:-5])
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix}: Compressed file ended before the end-of-stream marker"):
        list(documents(config("jsonl", path)))


# --- positions ----------------------------------------------------------------------------------------------------


def written(tmp_path, kind):
    """A corpus of many small documents in several files and its configuration."""
    texts = [f"document {i} é\n" * (i % 4) for i in range(60)]
    records = [{"meta": i, "text": text} for i, text in enumerate(texts)]
    folder = tmp_path / "set"
    folder.mkdir()
    if kind == "text":
        for i, text in enumerate(texts):
            (folder / f"{i:02}.txt").write_text(text)
    elif kind == "saved":
        datasets.Dataset.from_list(records).save_to_disk(folder)
    else:
        for part in range(3):
            rows, path = records[20 * part : 20 * part + 20], folder / f"train-{part}"
            if kind.endswith("parquet"):
                parquet.write_table(pa.Table.from_pylist(rows), f"{path}.parquet", row_group_size=7)
            else:
                lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
                suffix = kind.removeprefix("hub").removeprefix("jsonl")
                Path(f"{path}.jsonl{suffix}").write_bytes(PACKERS[suffix](lines))
    source = "hub" if kind.startswith(("hub", "saved")) else kind.split(".")[0]
    return texts, config(source, folder)


KINDS = ["text", "jsonl", *(f"jsonl{suffix}" for suffix in PACKERS if suffix), "parquet", "hub", "hub.gz", "hubparquet"]


@pytest.mark.parametrize("kind", [*KINDS, "saved"])
def test_reading_goes_on_from_every_position(tmp_path, kind, monkeypatch):
    for name, value in {"CHUNK_BYTES": 120, "_CHUNK_ROWS": 5, "_BATCH_ROWS": 3}.items():
        monkeypatch.setattr(sources, name, value)
    texts, data = written(tmp_path, kind)
    read = [(list(pickle.loads(pickle.dumps(chunk))("text")), position) for chunk, position in chunks(data)]
    assert len(read) >= 10
    assert [text for part, _ in read for text in part] == texts
    for done, (_, position) in enumerate(read, 1):
        position = json.loads(json.dumps(position))
        assert list(chunks(data, position)) == [] or done < len(read)
        rest = [text for chunk, _ in chunks(data, position) for text in chunk("text")]
        assert rest == [text for part, _ in read[done:] for text in part]
    progress = [position["bytes"] for _, position in read]
    assert progress == sorted(progress)
    assert progress[-1] == (0 if data.source == "hub" else input_bytes(data))


def test_a_bad_record_does_not_hide_the_others(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "one"}\n{"text": \n[]\n{}\n{"text": 3}\n{"text": "caf\xe9"}\n{"text": "two"}'
    )
    found = [record for chunk, _ in chunks(config("jsonl", tmp_path)) for record in chunk("text")]
    assert [found[0], found[-1]] == ["one", "two"]
    assert [str(error).split(": ")[0].rsplit(":")[-1] for error in found[1:-1]] == ["2", "3", "4", "5", "6"]
    assert list(documents(config("jsonl", tmp_path), skip_bad=True)) == ["one", "two"]


def test_parquet_text_that_is_no_utf8(tmp_path):
    text = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"one"], pa.binary()).buffers())
    parquet.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    assert list(documents(config("parquet", tmp_path), skip_bad=True)) == ["one"]
    with pytest.raises(DataError, match=r"a\.parquet: row 0: not UTF-8 text \(byte 3\)"):
        list(documents(config("parquet", tmp_path)))


def test_parquet(tmp_path):
    parquet.write_table(pa.table({"body": ["one", " ", None, "two"], "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert list(documents(config("parquet", tmp_path, text_key="body"))) == ["one", "two"]


def test_hub_reads_a_local_folder(tmp_path):
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "train.jsonl", [{"text": "one"}, {"text": " "}, {"text": "two"}])
    hub = config("hub", tmp_path / "set")
    check_source(hub)
    assert list(documents(hub)) == ["one", "two"]
    with pytest.raises(DataError, match="set data.text_key to one of: text"):
        list(documents(config("hub", tmp_path / "set", text_key="content")))


def test_hub_reads_what_save_to_disk_wrote(tmp_path):
    part = datasets.Dataset.from_dict({"text": ["one", "two"]})
    part.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"validation": part}).save_to_disk(tmp_path / "dict")
    assert list(documents(config("hub", tmp_path / "one"))) == ["one", "two"]
    assert list(documents(config("hub", tmp_path / "dict", split="validation"))) == ["one", "two"]
    with pytest.raises(DataError, match=r"data\.split: .* no split 'train'; allowed: validation"):
        list(documents(config("hub", tmp_path / "dict")))


def test_hub_errors_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"^data\.path: cannot load data set .*empty") as caught:
        list(documents(config("hub", tmp_path / "empty")))
    assert "\n" not in str(caught.value)
    check_source(config("hub", "owner/name"))  # not asked for
    with pytest.raises(DataError, match=r"data\.path: no such file or folder"):
        check_source(config("hub", tmp_path / "gone"))


def bad_inputs(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"text": "one"}\n')
    jsonl(tmp_path / "keys.jsonl", [{"body": "x", "meta": 1}])
    jsonl(tmp_path / "number.jsonl", [{"text": 5}])
    (tmp_path / "no.parquet").write_bytes(b"nothing")
    parquet.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "keys.parquet")


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("text", "gone.txt", r"data\.path: no such file or folder: .*gone\.txt"),
        ("text", "folder", r"data\.path: folder .*folder holds no \*\.txt"),
        ("text", "gone*.txt", r"data\.path: no file matches .*gone\*\.txt"),
        ("text", "latin.txt", r"latin\.txt: not UTF-8 text \(byte 3\)"),
        ("text", "blank.txt", r"data\.path: .*blank\.txt holds no text"),
        ("jsonl", "broken.jsonl", r"broken\.jsonl:2: not JSON"),
        ("jsonl", "list.jsonl", r"list\.jsonl:1: a JSON list"),
        ("jsonl", "bytes.jsonl", r"bytes\.jsonl:1: not UTF-8 text \(byte \d+ of the line\)"),
        ("jsonl", "keys.jsonl", r"keys\.jsonl:1: no key 'text'; set data\.text_key to one of: body, meta"),
        ("jsonl", "number.jsonl", r"number\.jsonl:1: 'text' is a int, must be text"),
        ("jsonl", "plain.jsonl.gz", r"plain\.jsonl\.gz: Not a gzipped file"),
        ("parquet", "no.parquet", r"no\.parquet: cannot be read as Parquet"),
        ("parquet", "keys.parquet", r"keys\.parquet: no key 'text'; set data\.text_key to one of: body, n"),
        ("indexed", "gone", r"gone\.bin: no such file"),
    ],
)
def test_bad_input(tmp_path, source, path, message):
    bad_inputs(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    bad = config(source, tmp_path / path)
    with pytest.raises(DataError, match=message) as caught:
        check_source(bad)
        list(documents(bad))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("source", ["hub", "parquet"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_parquet_file_without_rows(tmp_path, source, place):
    """One row group of no rows, as a filter leaves it, beside files with rows."""
    texts = [[] if i == place else [f"{i} {row}" for row in range(3)] for i in range(3)]
    for i, part in enumerate(texts):
        parquet.write_table(pa.table({"text": pa.array(part, pa.string())}), tmp_path / f"train-{i}.parquet")
    assert list(documents(config(source, tmp_path))) == [*chain(*texts)]


@pytest.mark.parametrize("name", ["b.parquet", "b.jsonl"])
def test_a_broken_file_of_a_hub_set_is_named(tmp_path, name):
    if name.endswith("parquet"):
        parquet.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    else:
        jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    (tmp_path / name).write_text('{"text": ')
    with pytest.raises(DataError, match=rf"^data\.path: reading .* failed: {tmp_path / name}: ") as error:
        list(documents(config("hub", tmp_path)))
    assert "\n" not in str(error.value)


def test_indexed(tmp_path):
    write_pair(tmp_path / "a", [], np.uint16)
    with pytest.raises(DataError, match="holds no tokens"):
        check_source(config("indexed", tmp_path / "a"))
    with pytest.raises(DataError, match="holds tokens, not text"):
        documents(config("indexed", tmp_path / "a"))
    write_pair(tmp_path / "a", [[1]], np.uint16)
    check_source(config("indexed", tmp_path / "a"))


def test_no_entry_at_all():
    with pytest.raises(DataError, match=r"data\.path: got \[\]"):
        check_source(config("text", []))
