"""What DeepSpeed is about to apply equals float64 autograd of the written-out loss, whatever the set-up."""

import json
import math
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "workers/gradient_matrix.py"
# float32: a few tens of roundings of 2^-24 each, for the sums on the way from one end of the network to the other and
# back. Half precisions: activations near the threshold fall on the other side of it, so the bound is wide; it still
# lies far below what the inhibition loss contributes, which is what would be missing.
LARGEST_ERROR = {"fp32": 2e-6, "fp16": 0.03, "bf16": 0.1}
COMBINATIONS = (4 * 3 - 1) * 2 + 4 * 2 + 4 * 2 * 2


@pytest.fixture(scope="module")
def matrix(run_ranks, tmp_path_factory, is_full) -> dict:
    output = tmp_path_factory.mktemp("matrix")
    run_ranks(2, WORKER, output, "all" if is_full else "pairwise")
    return json.loads((output / "matrix.json").read_text())


def test_matrix_is_whole(matrix, is_full):
    """The full one: stages 0-3, three precisions (not fp16 under stage 0), accumulation 1 and 2, checkpointing off and
    on: every three of these values together, which is half of all; the scale-invariant loss for every stage with and
    without checkpointing, and the projected one for every stage in two precisions."""
    assert len(matrix) == (COMBINATIONS if is_full else 9)


def test_gradients_equal_float64_autograd(matrix):
    for name, result in matrix.items():
        assert result["part"] > 0.4, name
        assert result["error"] < LARGEST_ERROR[name.split("-")[1]], (name, result)
        assert 0.01 < result["selected"] < 0.1, name


def test_norms_of_layers(matrix):
    """Those that `logging.layer_gradients` writes: of the same numbers, in float64. DeepSpeed's own norm is of all; it
    sums up to 4,096 squares of a parameter in float32."""
    parts = {f"gradient_norm/{part}" for part in ("layer0", "layer1", "layer2", "layer3", "rest")}
    for name, result in matrix.items():
        assert result["norms"].keys() == parts, name
        for key, (logged, expected) in result["norms"].items():
            assert logged == pytest.approx(expected, rel=1e-12), (name, key)
        whole = math.hypot(*(logged for logged, _ in result["norms"].values()))
        assert whole == pytest.approx(result["norm"], rel=(4096 / 2 + 10) * 2**-24), name


def test_hooks_are_called_once_a_micro_batch(matrix):
    for name, result in matrix.items():
        micro_batches = {"4": 1, "2": 2}[name.split("-")[2]]
        recomputed = micro_batches if name.split("-")[3] == "True" else 0
        expected = [micro_batches, recomputed, micro_batches]
        assert result["calls"] == {"1": expected, "2": expected}, name
