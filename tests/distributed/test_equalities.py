"""The same global batch gives the same numbers: for any number of ranks, ZeRO stage, accumulation, recomputation.

Every case is a real training run of 10 steps (see workers/train_cases.py); what is compared is what a user gets:
metrics.jsonl and the checkpoint's statistics.
"""

import math

import pytest
from safetensors.torch import load_file

METHODS = {
    "step-published": {},
    "step-scale-invariant": {"inhibition": {"loss": "scale-invariant"}},
    "forward-published": {"inhibition": {"reduce": "forward"}},
    "forward-scale-invariant": {"inhibition": {"reduce": "forward", "loss": "scale-invariant"}},
    "fused": {"inhibition": {"fused": True}},
    "fused-scale-invariant": {"inhibition": {"fused": True, "loss": "scale-invariant"}},
    "memel": {"inhibition": {"method": "memel"}},
    "top-k-regulariser": {"inhibition": {"retrieval": "top-k"}},
    "threshold-reverse": {"inhibition": {"mechanism": "reverse-deactivation"}},
    "mixture": {"weights": [0.2, 0.7, 0.1]},
}


def stage(number: int, **training) -> dict:
    return {"deepspeed": {"config": f"ds_configs/zero{number}.json"}, "training": training}


def recomputed(case: dict) -> dict:
    return {**case, "model": {"activation_checkpointing": True}}


ON_TWO_RANKS = {
    **METHODS,
    **{f"zero{number}": stage(number) for number in range(4)},
    "offload2": {"deepspeed": {"config": "ds_configs/zero2_offload.json"}},
    "offload3": {"deepspeed": {"config": "ds_configs/zero3_offload.json"}},
    "own-json": {"deepspeed": {"config": "tests/distributed/workers/own_deepspeed.json"}},
    "accumulated": {"training": {"micro_batch": 1}},
    **{f"recomputed-{name}": recomputed(METHODS[name]) for name in ("step-published", "forward-published", "memel")},
    "recomputed-zero3": recomputed(stage(3)),
    "compiled": {"model": {"compile": True}},
    "compiled-memel": {"model": {"compile": True}, **METHODS["memel"]},
    "compiled-fused-recomputed": {"model": {"compile": True, "activation_checkpointing": True}, **METHODS["fused"]},
}
# two cores: the rest is the same code
ON_FOUR_RANKS = {
    name: METHODS[name] for name in ("step-published", "forward-scale-invariant", "fused", "memel", "mixture")
}
ON_ONE_RANK = {**METHODS, "accumulated": {"training": {"micro_batch": 2}}}

# unit-less numbers of metrics.jsonl that the set-up must not change
SAME = ("lm_loss", "inhibition_loss", "inhibition_loss_weighted", "observed_share", "gradient_norm", "learning_rate")
SAME_PER_LAYER = ("observed_share", "tau", "selected_score", "mean_s")


@pytest.fixture(scope="module")
def runs(train_cases) -> dict:
    """Folders of the runs by number of ranks."""
    return {1: train_cases(1, ON_ONE_RANK), 2: train_cases(2, ON_TWO_RANKS), 4: train_cases(4, ON_FOUR_RANKS)}


@pytest.fixture
def assert_same(metric_lines):
    def check(run, other, tolerance=1e-5):
        lines, others = metric_lines(run), metric_lines(other)
        assert len(lines) == len(others) == 10
        keys = [*SAME, *(f"layer{layer}/{name}" for layer in (1, 2) for name in SAME_PER_LAYER)]
        for line, against in zip(lines, others, strict=True):
            for key in keys:
                assert line[key] == pytest.approx(against[key], rel=tolerance, abs=tolerance), (line["step"], key)
        assert lines[-1]["observed_share"] > 0
        for held_out, against in zip(*(metric_lines(r, "evaluation") for r in (run, other)), strict=True):
            for key, value in against.items():
                if key != "kind":
                    assert held_out[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
        state, expected = (load_file(r / "checkpoints/step00000010/inhibition.safetensors") for r in (run, other))
        assert state.keys() == expected.keys()
        assert {"layers.1.mean", "layers.2.m2", "layers.1.tau", "steps"} <= state.keys()
        for name, tensor in state.items():
            scale = max(1.0, float(expected[name].abs().max()))
            assert float((tensor - expected[name]).abs().max()) <= tolerance * scale, name

    return check


@pytest.mark.parametrize(("ranks", "name"), [(2, name) for name in METHODS] + [(4, name) for name in ON_FOUR_RANKS])
def test_any_number_of_ranks(runs, assert_same, name, ranks):
    assert_same(runs[ranks] / name, runs[1] / name)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loss", ["published", "scale-invariant"])
def test_one_compiled_pass(runs, assert_same, loss, ranks):
    """`fused` gives the numbers of the plain operations."""
    fused = {"published": "fused", "scale-invariant": "fused-scale-invariant"}[loss]
    assert_same(runs[ranks] / fused, runs[ranks] / f"step-{loss}")


@pytest.mark.parametrize("ranks", [1, 2])
def test_accumulation(runs, assert_same, ranks):
    """4 x 1 on one rank (micro-batch 2) and on two (micro-batch 1) against 1 x 4."""
    assert_same(runs[ranks] / "accumulated", runs[1] / "step-published")


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "offload2", "offload3"])
def test_any_zero_stage(runs, assert_same, name):
    assert_same(runs[2] / name, runs[2] / "zero1")


def test_a_user_s_own_json(runs, assert_same):
    """Optimizer and clipping set in a DeepSpeed JSON instead of the run file: DeepSpeed builds the same optimizer."""
    assert_same(runs[2] / "own-json", runs[2] / "zero2")


@pytest.mark.parametrize("name", ["step-published", "forward-published", "memel", "zero3"])
def test_activation_checkpointing_counts_nothing_twice(runs, assert_same, name):
    assert_same(runs[2] / f"recomputed-{name}", runs[2] / name)


@pytest.mark.parametrize(
    ("name", "other"),
    [("compiled", "step-published"), ("compiled-memel", "memel"), ("compiled-fused-recomputed", "fused")],
)
def test_compiled_layers(runs, assert_same, name, other):
    """Also what is measured at evaluations, by hooks that a compiled layer would drop."""
    assert_same(runs[2] / name, runs[2] / other)


def test_methods_differ(runs, metric_lines):
    """The comparisons above could not fail if every method gave the same run."""
    different = [name for name in METHODS if not name.startswith("fused")]
    losses = {name: metric_lines(runs[1] / name)[-1]["lm_loss"] for name in different}
    assert len(set(losses.values())) == len(losses)
    assert all(math.isfinite(loss) for loss in losses.values())


def test_sets_of_a_mixture_are_counted(runs, metric_lines):
    """Tokens of the sets add up to all; the weights decide; the mean held-out loss is weighted; one set has none."""
    lines = metric_lines(runs[2] / "mixture")
    for line in lines:
        assert line["tokens/short"] + line["tokens/long"] + line["tokens/silent"] == line["tokens"]
    # 80 sequences of a block of 1024: hypergeometric, standard deviations 3.5, 4.0, 2.6
    for name, mean, spread in (("short", 16, 12), ("long", 56, 14), ("silent", 8, 8)):
        assert abs(lines[-1][f"tokens/{name}"] / 16 - mean) <= spread
        assert lines[-1][f"tokens/{name}"] > lines[0][f"tokens/{name}"]
    assert lines[-1]["epochs/long"] == lines[-1]["tokens/long"] / 16 / 20
    for line in metric_lines(runs[2] / "mixture", "evaluation"):
        expected = (0.2 * line["held_out_loss/short"] + 0.7 * line["held_out_loss/long"]) / 0.9
        assert line["held_out_loss"] == pytest.approx(expected, rel=1e-12)
        assert line["held_out_loss/short"] != line["held_out_loss/long"]
        assert "held_out_loss/silent" not in line
    assert not any("/" in key for key in metric_lines(runs[2] / "zero1")[0] if not key.startswith("layer"))
