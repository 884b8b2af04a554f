"""What an analysis found, beside what is published."""

import pytest

from l2e_ds.errors import DataError
from l2e_ds.report import analyses
from tests.unit.report.making import write_analysis


def rows(*folders):
    (table,) = analyses.all_tables(folders)
    heads = [column.full_head for column in table.columns]
    return [dict(zip(heads, row, strict=True)) for row in table.rows]


def test_beside_the_published_rate(tmp_path):
    made = write_analysis(tmp_path / "ours", "/somewhere/natural_language.jsonl.gz")
    own = made["fkr"].query("layer == -1 and share == 0.01").iloc[0]
    assert 0 < own["fkr_low"] < own["fkr"] < own["fkr_high"] < 1  # or the rest would tell little
    (row,) = rows(tmp_path / "ours")
    assert (row["model"], row["feature set"], row["share"]) == ("pythia-70m", "natural_language", 0.01)
    assert [row[f"FKR at that share: {name}"] for name in ("ours", "from", "to")] == [
        own["fkr"],
        own["fkr_low"],
        own["fkr_high"],
    ]
    assert row["FKR at that share: published"] == 0.052
    assert row["FKR at that share: ours − published"] == own["fkr"] - 0.052


def test_lowest_rate(tmp_path):
    together = write_analysis(tmp_path / "ours")["fkr"].query("layer == -1")
    best = together.loc[together["fkr"].idxmin()]
    (row,) = rows(tmp_path / "ours")
    assert (row["lowest FKR: share"], row["lowest FKR: FKR"]) == (best["share"], best["fkr"])
    assert row["lowest FKR: from"] <= row["lowest FKR: share"] <= row["lowest FKR: to"]
    assert row["lowest FKR: published share, near"] == 0.02


def test_nearest_share(tmp_path):
    """The table has no row for 1 %."""
    made = write_analysis(tmp_path / "ours")
    without = made["fkr"].query("share != 0.01")
    without.to_parquet(tmp_path / "ours/models/pythia-70m/fkr.parquet", index=False)
    (row,) = rows(tmp_path / "ours")
    assert row["share"] == 0.008


def test_several(tmp_path):
    """Each says where it is from; another model and other features have no published rate."""
    write_analysis(tmp_path / "first", "code_language.jsonl")
    write_analysis(tmp_path / "second", "prose/*.jsonl")
    write_analysis(tmp_path / "third", "data-subset", "pythia-410m", 405_334_016)
    found = rows(*(tmp_path / name for name in ("first", "second", "third")))
    assert [row["analysis"] for row in found] == [str(tmp_path / name) for name in ("first", "second", "third")]
    assert [row["feature set"] for row in found] == ["code_language", "prose/*.jsonl", "data-subset"]
    assert [row["FKR at that share: published"] for row in found] == [0.67, None, None]


def test_no_analysis():
    assert analyses.all_tables([]) == []


@pytest.mark.parametrize("name", ["analysis.json", "models/pythia-70m/fkr.parquet", "models/pythia-70m/scale.parquet"])
@pytest.mark.parametrize("content", [None, "{}"])
def test_broken(tmp_path, name, content):
    write_analysis(tmp_path / "ours")
    path = tmp_path / "ours" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError) as raised:
        analyses.all_tables([tmp_path / "ours"])
    assert str(raised.value).startswith(f"{path}: cannot be read: ")
    assert "\n" not in str(raised.value)
