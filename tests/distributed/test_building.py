"""Networks under ZeRO-3 are built in shards; statistics and projections count tokens, not ranks; errors are shared."""

import json
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "workers/building.py"


@pytest.fixture(scope="module")
def ranks(run_ranks, tmp_path_factory) -> list[dict]:
    output = tmp_path_factory.mktemp("building")
    run_ranks(2, WORKER, output)
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("origin", ["random", "pretrained", "llama", "tied gpt2"])
def test_zero3_builds_shards_of_the_same_weights(ranks, origin):
    for rank in ranks:
        built = rank[origin]
        assert built["same"]
        assert built["rotary_kept"]  # in bf16 too
        assert built["held_outside_forward"] == 0
        assert built["whole"] / 2 <= built["shards"] < 0.51 * built["whole"]


def test_moments_of_unequal_token_counts_equal_numpy(ranks):
    for rank in ranks:
        assert rank["unequal"]["count"] == 0
        assert rank["unequal"]["mean"] < 1e-6
        assert rank["unequal"]["variance"] < 1e-6


def test_projection_is_over_the_tokens_of_all_ranks(ranks):
    """However a rank's tokens weigh in the gradient: zero up to float32's rounding of 170 terms."""
    for rank in ranks:
        assert max(rank["projection"]) < 20 * 170 * 2**-24


def test_others_wait_for_rank_0(ranks):
    assert [rank["work"] for rank in ranks] == [["done", "empty"], [None, "empty"]]


def test_error_of_one_rank_ends_all(ranks):
    assert [rank["error"] for rank in ranks] == ["DataError: broken here"] * 2
