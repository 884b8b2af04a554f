"""Feature sets. The tokenizer is one of bytes: as many tokens as characters, and `decode` gives a text's beginning."""

import gzip
import hashlib
import json
import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet
from tokenizers.processors import TemplateProcessing

from l2e_ds.analysis import features
from l2e_ds.analysis.features import MINIMUM_TEXTS, format_report, load_feature_set
from l2e_ds.data.tokenizer import tokenizer_digest, train_tokenizer
from l2e_ds.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("without_hub")

T = 12


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter([]), 257)


def texts(feature, count, length=T + 5):
    """Each is another one within its first T characters."""
    return [{"text": f"{feature[:4]}{i:04d}".ljust(length, "."), "feature": feature} for i in range(count)]


def short(feature, count):
    return texts(feature, count, T - 1)


RECORDS = texts("bravo", 26) + short("alfa", 3) + texts("alfa", 30) + texts("charlie", 22) + short("charlie", 1)


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def load(tokenizer):
    def load(source, **options):
        settings = {"sequence_length": T, "texts_per_feature": None, "seed": 0}
        return load_feature_set(str(source), tokenizer, **(settings | options))

    return load


@pytest.fixture
def decoded(tokenizer):
    """{feature: its texts' beginnings, in the order of the set}"""

    def decoded(found):
        beginnings = {feature: [] for feature in found.features}
        for row, label in zip(found.tokens, found.labels, strict=True):
            beginnings[found.features[label]].append(tokenizer.decode(row))
        return beginnings

    return decoded


def test_as_many_of_each_as_the_scarcest_has(tmp_path, load, decoded):
    found = load(jsonl(tmp_path / "a.jsonl", RECORDS))
    assert found.features == ("alfa", "bravo", "charlie")
    assert found.tokens.shape == (66, T) and found.tokens.dtype == np.int32
    assert found.labels.shape == (66,) and found.labels.dtype == np.int64
    for feature, beginnings in decoded(found).items():
        assert len(set(beginnings)) == len(beginnings) == 22
        assert set(beginnings) <= {r["text"][:T] for r in RECORDS if r["feature"] == feature and len(r["text"]) >= T}
    assert set(decoded(found)["charlie"]) == {record["text"][:T] for record in texts("charlie", 22)}
    # Shuffled: every third of the set holds all features, and no feature's texts stand in the order of the source.
    assert all(set(third) == {0, 1, 2} for third in np.split(found.labels, 3))
    assert all(beginnings != sorted(beginnings) for beginnings in decoded(found).values())


def test_report(tmp_path, load, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", RECORDS)
    found = load(path, seed=3, texts_per_feature=20)
    sha = hashlib.sha256(b'["alfa", "bravo", "charlie"]')
    sha.update(b"".join(int(i).to_bytes(4, "little") for i in found.tokens.flat))
    sha.update(b"".join(int(i).to_bytes(8, "little") for i in found.labels))
    same = {"kept": 20, "tokens": 20 * T, "share": 1 / 3}
    assert json.loads(json.dumps(found.report)) == {
        "source": str(path),
        "tokenizer": "SHA-256 " + tokenizer_digest(tokenizer)[:12],
        "digest": sha.hexdigest(),
        "seed": 3,
        "sequence_length": T,
        "texts_per_feature": 20,
        "features": [
            {"feature": "alfa", "found": 33, "too_short": 3, **same},
            {"feature": "bravo", "found": 26, "too_short": 0, **same},
            {"feature": "charlie", "found": 23, "too_short": 1, **same},
        ],
        "total": {"found": 82, "too_short": 4, "kept": 60, "tokens": 60 * T, "share": 1.0},
    }
    lines = format_report(found.report).splitlines()
    assert [line.split()[-1] for line in lines[:5]] == [
        str(path),
        found.report["tokenizer"][8:],
        "12",
        "3",
        sha.hexdigest(),
    ]
    assert [line.split() for line in lines[6:]] == [
        ["feature", "found", "too", "short", "kept", "tokens", "share"],
        ["alfa", "33", "3", "20", "240", "33.3%"],
        ["bravo", "26", "0", "20", "240", "33.3%"],
        ["charlie", "23", "1", "20", "240", "33.3%"],
        ["all", "82", "4", "60", "720", "100.0%"],
    ]
    assert len({len(line) for line in lines[6:]}) == 1


def test_seed_decides_and_smaller_sets_are_parts_of_larger_ones(tmp_path, load, decoded):
    path = jsonl(tmp_path / "a.jsonl", texts("a", 60) + texts("b", 70))
    first, again, other = load(path), load(path), load(path, seed=1)
    assert first.report == again.report and np.array_equal(first.tokens, again.tokens)
    assert first.report["digest"] != other.report["digest"]
    assert set(decoded(first)["b"]) != set(decoded(other)["b"])
    smaller = load(path, texts_per_feature=25)
    for feature in "ab":
        assert set(decoded(smaller)[feature]) < set(decoded(first)[feature])


def test_features_do_not_disturb_each_other(tmp_path, load, decoded):
    a, b, c = texts("a", 40), texts("b", 40), texts("c", 40)
    one_after_another = load(jsonl(tmp_path / "1.jsonl", a + b + c), texts_per_feature=20)
    mixed = [record for records in zip(c, a, b, strict=True) for record in records]
    interleaved = load(jsonl(tmp_path / "2.jsonl", mixed), texts_per_feature=20)
    assert one_after_another.report["digest"] == interleaved.report["digest"]
    without_c = load(jsonl(tmp_path / "3.jsonl", b + a), texts_per_feature=20)
    for feature in "ab":
        assert set(decoded(without_c)[feature]) == set(decoded(interleaved)[feature])


def test_every_text_is_as_likely_as_any_other():
    from array import array

    rows, seeds = array("q", range(100, 140)), 600
    counts = np.zeros(40)
    for seed in range(seeds):
        chosen = features._choice(rows, 10, seed, "a")
        assert len(set(chosen)) == 10
        counts[chosen - 100] += 1
        assert set(chosen) != set(features._choice(rows, 10, seed, "b"))
    expected, deviation = seeds / 4, np.sqrt(seeds * 0.25 * 0.75)
    assert np.abs(counts - expected).max() < 4 * deviation


def as_table(labels=None):
    """The records as a data set; with `labels`, features are a ClassLabel."""
    table = datasets.Dataset.from_list([{"number": i, **record} for i, record in enumerate(RECORDS)])
    return table.cast_column("feature", datasets.ClassLabel(names=labels)) if labels else table


LABELS = ["charlie", "alfa", "unused", "bravo"]
WRITERS = {
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(path.with_name("x"), RECORDS).read_bytes())),
    "a.jsonl.zst": lambda path: path.write_bytes(
        zstandard.compress(jsonl(path.with_name("x"), RECORDS).read_bytes()[:99])
        + zstandard.compress(path.with_name("x").read_bytes()[99:])
    ),
    "a.parquet": lambda path: parquet.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=30),
    "labels.parquet": lambda path: as_table(LABELS).to_parquet(path),
    "saved": lambda path: as_table(LABELS).save_to_disk(path),
    "splits": lambda path: datasets.DatasetDict(train=as_table(LABELS), other=as_table().select([0])).save_to_disk(
        path
    ),
    "part-*.jsonl": lambda path: (
        jsonl(path.with_name("part-0.jsonl"), RECORDS[:40]),
        jsonl(path.with_name("part-1.jsonl"), RECORDS[40:]),
    ),
    "folder": lambda path: (path.mkdir(), jsonl(path / "train.jsonl", RECORDS)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_set(tmp_path, load, name):
    WRITERS[name](tmp_path / name)
    expected = load(jsonl(tmp_path / "plain.jsonl", RECORDS))
    found = load(tmp_path / name)
    assert found.features == expected.features
    assert found.report["digest"] == expected.report["digest"]


def test_columns_and_split(tmp_path, load):
    renamed = as_table(LABELS).rename_columns({"text": "code", "feature": "language"})
    datasets.DatasetDict(train=renamed.select([0]), test=renamed).save_to_disk(tmp_path / "saved")
    found = load(tmp_path / "saved", text_column="code", feature_column="language", split="test")
    assert found.report["digest"] == load(jsonl(tmp_path / "plain.jsonl", RECORDS)).report["digest"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("owner/name/config", ("owner/name", "config", None)),
        ("owner/name@v1", ("owner/name", None, "v1")),
        ("owner/name/de-en@refs/convert/parquet", ("owner/name", "de-en", "refs/convert/parquet")),
        ("name", ("name", None, None)),
    ],
)
def test_names_of_the_hub(source, expected):
    config = features._on_hub(source, "validation")
    assert (config.path, config.subset, config.revision) == expected
    assert config.split == "validation" and config.source == "hub"


def test_text_is_cut_without_special_tokens_and_the_tokenizer_is_left_alone(tmp_path, load):
    tokenizer = train_tokenizer(iter([]), 257)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.enable_truncation(5, direction="left")
    backend.enable_padding(length=40)
    before = backend.to_str()
    path = jsonl(tmp_path / "a.jsonl", RECORDS)
    found = load_feature_set(str(path), tokenizer, sequence_length=T, texts_per_feature=None, seed=0)
    assert found.report["digest"] == load(path).report["digest"]
    assert backend.to_str() == before


def test_batches_change_nothing(tmp_path, load, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", RECORDS)
    whole = load(path).report
    monkeypatch.setattr(features, "_BATCH_CHARACTERS", 40)
    assert load(path).report == whole


def test_memory_does_not_hold_the_texts(tmp_path, load, monkeypatch):
    long = texts("a", 60, 20_000) + texts("b", 60, 20_000)  # 2.4 MB
    path = jsonl(tmp_path / "a.jsonl", long)
    del long
    monkeypatch.setattr(features, "_BATCH_CHARACTERS", 50_000)
    load(path)  # imports
    tracemalloc.start()
    try:
        assert load(path).tokens.shape == (120, T)
        assert tracemalloc.get_traced_memory()[1] < 600_000
    finally:
        tracemalloc.stop()


BAD = {
    b"{": "not JSON",
    b"[1]": "a JSON list; each line must be an object",
    b'{"text": "abc"}': "no column 'feature'; set --feature-column to one of: text",
    b'{"feature": "abc", "code": ""}': "no column 'text'; set --text-column to one of: feature, code",
    b'{"text": "abc", "feature": null}': "'feature' is empty",
    b'{"text": "abc", "feature": " "}': "'feature' is empty",
    b'{"text": "\\n", "feature": "a"}': "'text' is empty",
    b'{"text": "abc", "feature": 3}': "'feature' is a int, must be text",
    b'{"text": ["abc"], "feature": "a"}': "'text' is a list, must be text",
    b'{"text": "\xff", "feature": "a"}': "not UTF-8 text (byte 10 of the line)",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_record_is_named_by_file_and_line(tmp_path, load, line):
    path = jsonl(tmp_path / "a.jsonl", RECORDS[:3])
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as raised:
        load(path)
    assert str(raised.value).startswith(f"{path}:5: {BAD[line]}")


def test_bad_rows_of_other_formats(tmp_path, load):
    rows = [*RECORDS[:70], {"text": "abc", "feature": None}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 70: 'feature' is empty$"):
        load(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'code'; set --text-column to one of: text, feature$"):
        load(tmp_path / "a.parquet", text_column="code")
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read as Parquet"):
        load(tmp_path / "b.parquet")
    unlabelled = datasets.Features(text=datasets.Value("string"), feature=datasets.ClassLabel(names=["a", "b"]))
    datasets.Dataset.from_dict({"text": ["x", "y"], "feature": [1, -1]}, features=unlabelled).save_to_disk(
        tmp_path / "s"
    )
    with pytest.raises(DataError, match=r"s: row 1: 'feature' is -1, the data set names 0 to 1$"):
        load(tmp_path / "s")
    with pytest.raises(DataError, match=r"s: row 0: no column 'label'; set --feature-column to one of: text, feature$"):
        load(tmp_path / "s", feature_column="label")


def test_half_a_surrogate_pair_is_replaced(tmp_path, load, decoded):
    records = [{"text": "\ud800" + record["text"], "feature": record["feature"]} for record in RECORDS]
    found = load(jsonl(tmp_path / "a.jsonl", records))
    assert all(text.startswith("\ufffd") for beginnings in decoded(found).values() for text in beginnings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./none.jsonl", "--features: no such file or folder: ./none.jsonl"),
        ("none.parquet", "--features: no such file or folder: none.parquet"),
        ("./none", "--features: no such file or folder: ./none"),
        ("a/b/c/d", "--features: got 'a/b/c/d', must be a file, a folder or owner/name[/config][@revision]"),
        ("owner/name", "--features: cannot load data set 'owner/name': "),
        ("a.csv", "--features: a.csv must be .jsonl (also .gz, .bz2, .xz, .zst), .parquet or a folder"),
        ("saved", "--split: saved has no split 'train'; allowed: test"),
    ],
)
def test_sources_that_are_not_there(tmp_path, load, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("text,feature\n")
    datasets.DatasetDict(test=as_table()).save_to_disk("saved")
    with pytest.raises(DataError) as raised:
        load(name)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_sets_that_cannot_be_balanced(tmp_path, load, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "none.jsonl", [])
    jsonl(tmp_path / "one.jsonl", texts("a", 30))
    jsonl(tmp_path / "few.jsonl", texts("a", 30) + texts("b", 19) + short("c", 40) + texts("c", 3) + texts("d", 20))
    jsonl(tmp_path / "all.jsonl", RECORDS)
    expected = {
        "none.jsonl": "--features: none.jsonl holds no text; at least two features are needed",
        "one.jsonl": "--features: one.jsonl holds only the feature 'a'; at least two features are needed",
        "few.jsonl": "--features: few.jsonl has fewer than 20 texts of at least 12 tokens of: b (19 of 19 texts),"
        " c (3 of 43 texts); give a smaller --sequence-length, add or join texts, or take these features out of the"
        " source",
    }
    assert MINIMUM_TEXTS == 20
    for name, message in expected.items():
        for count in (None, 20):
            with pytest.raises(ConfigError) as raised:
                load(name, texts_per_feature=count)
            assert str(raised.value) == message
    with pytest.raises(ConfigError) as raised:
        load("all.jsonl", texts_per_feature=27)
    assert str(raised.value) == (
        "--texts-per-feature: got 27, all.jsonl has fewer texts of at least 12 tokens of: bravo (26), charlie (22);"
        " allowed: 20 to 22"
    )
    for option in ({"texts_per_feature": 19}, {"sequence_length": 0}, {"seed": -1}):
        name = next(iter(option)).replace("_", "-")
        with pytest.raises(ConfigError, match=f"^--{name}: got .*, allowed: an integer >= "):
            load("all.jsonl", **option)


def test_a_file_that_changes_meanwhile(tmp_path, load, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", RECORDS)
    decide = features._balanced_count
    for changed in (RECORDS[:50], RECORDS[1:], [*reversed(RECORDS)]):

        def change(*arguments, changed=changed):
            jsonl(path, changed)
            return decide(*arguments)

        jsonl(path, RECORDS)
        monkeypatch.setattr(features, "_balanced_count", change)
        with pytest.raises(DataError, match=r"^--features: .*a\.jsonl changed while it was read$"):
            load(path)
