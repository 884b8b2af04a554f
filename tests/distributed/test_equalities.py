"""The same global batch gives the same numbers: for any number of ranks, ZeRO stage, accumulation, recomputation.

Every case is a real training run of 10 steps (see training_case.py); what is compared is what a user gets:
metrics.jsonl and the checkpoint's statistics.
"""

import itertools
import math

import pytest
from safetensors.torch import load_file

from tests.distributed.training_case import STRENGTH, TrainingCase, zero
from tests.tolerances import rounding, selection

METHODS = {
    "step-published": TrainingCase(),
    "step-scale-invariant": TrainingCase({"inhibition": {"loss": "scale-invariant"}}),
    "forward-published": TrainingCase({"inhibition": {"reduce": "forward"}}),
    "forward-scale-invariant": TrainingCase({"inhibition": {"reduce": "forward", "loss": "scale-invariant"}}),
    "fused": TrainingCase({"inhibition": {"fused": True}}),
    "fused-scale-invariant": TrainingCase({"inhibition": {"fused": True, "loss": "scale-invariant"}}),
    "projected": TrainingCase({"inhibition": {"loss": "projected", "coefficient": 0.1, "power": 0}}),
    "strength": TrainingCase({"inhibition": STRENGTH}),
    "fused-strength": TrainingCase({"inhibition": {**STRENGTH, "fused": True}}),
    "memel": TrainingCase({"inhibition": {"method": "memel"}}),
    "top-k-regulariser": TrainingCase({"inhibition": {"retrieval": "top-k"}}),
    "threshold-reverse": TrainingCase({"inhibition": {"mechanism": "reverse-deactivation"}}),
    "mixture": TrainingCase({"training": {"z_loss": 0.01}}, mixture=(0.2, 0.7, 0.1), texts=True),
}
SHORT = ["step-published", "forward-scale-invariant", "strength", "memel", "mixture"]
"""Methods that differ in every choice; the others are combinations of the same choices."""


def recomputed(sections: dict, **model) -> TrainingCase:
    return TrainingCase({**sections, "model": {"activation_checkpointing": True, **model}})


LAYERS = {"logging": {"layer_gradients": True}}
STAGES = {f"zero{stage}": TrainingCase(zero(stage, **LAYERS)) for stage in range(4)}
SET_UPS = {
    **STAGES,
    "accumulated": TrainingCase({"training": {"micro_batch": 1}}),
    "recomputed-step-published": recomputed({}),
    "recomputed-zero3": recomputed(zero(3, **LAYERS)),
    "recomputed-strength": recomputed(METHODS["strength"].sections),
}
MORE_SET_UPS = {
    "recomputed-forward-published": recomputed(METHODS["forward-published"].sections),
    "recomputed-memel": recomputed(METHODS["memel"].sections),
    "offload2": TrainingCase({"deepspeed": {"config": "ds_configs/zero2_offload.json"}, **LAYERS}),
    "offload3": TrainingCase({"deepspeed": {"config": "ds_configs/zero3_offload.json"}, **LAYERS}),
    "own-json": TrainingCase({"deepspeed": {"config": "tests/distributed/workers/own_deepspeed.json"}, **LAYERS}),
    "compiled": TrainingCase({"model": {"compile": True}}),
    "compiled-fused-strength-recomputed": recomputed(METHODS["fused-strength"].sections, compile=True),
}
# two cores: the rest is the same code
ON_FOUR_RANKS = ["step-published", "forward-scale-invariant", "strength", "memel", "mixture"]
full = pytest.mark.full

STEPS = 10
ROUNDING = rounding(STEPS, layers=4, tokens=8 * 16)
SELECTION = selection(tokens=8 * 16, neurons=128)

# unit-less numbers of metrics.jsonl that the set-up must not change, and by how much they may differ, relatively
SAME = {
    "learning_rate": 0.0,
    "lm_loss": ROUNDING,
    "gradient_norm": SELECTION,
    "observed_share": SELECTION,
    "inhibition_loss": SELECTION,
    "inhibition_loss_weighted": SELECTION,
    "coefficient": SELECTION,
    "strength": SELECTION,
}
SAME_PER_LAYER = {
    "observed_share": SELECTION,
    "tau": SELECTION,
    "selected_score": SELECTION,
    "mean_s": ROUNDING,
    "lm_gradient": SELECTION,
}


@pytest.fixture(scope="module")
def runs(train_cases, is_full) -> dict:
    """Folders of the runs by number of ranks."""
    on_one = METHODS | STAGES | {"accumulated": TrainingCase({"training": {"micro_batch": 2}})}
    for name in ("fused", "fused-scale-invariant"):  # in the shape that two ranks have, which is compiled once then
        on_one[name] = TrainingCase({**METHODS[name].sections, "training": {"micro_batch": 4}})
    if is_full:
        on_four = {name: METHODS[name] for name in ON_FOUR_RANKS}
        return {
            1: train_cases(1, on_one),
            2: train_cases(2, METHODS | SET_UPS | MORE_SET_UPS),
            4: train_cases(4, on_four),
        }
    short = {name: METHODS[name] for name in SHORT}
    on_one = short | STAGES | {"accumulated": on_one["accumulated"]}
    return {1: train_cases(1, on_one), 2: train_cases(2, short | SET_UPS)}


def largest_differences(line: dict, other: dict) -> dict[str, float]:
    """Of the numbers in SAME and SAME_PER_LAYER: the difference as a multiple of what is allowed."""
    allowed = SAME | {f"layer{layer}/{name}": by for layer in (1, 2) for name, by in SAME_PER_LAYER.items()}
    in_both = line.keys() & other.keys()
    allowed |= {"z_loss": ROUNDING} if "z_loss" in in_both else {}
    allowed |= {key: SELECTION for key in in_both if key.startswith("gradient_norm/")}
    found = {}
    for key, by in allowed.items():
        difference, larger = abs(line[key] - other[key]), max(abs(line[key]), abs(other[key]))
        found[key] = 0.0 if difference == 0 else difference / (by * larger) if by else math.inf
    return found


@pytest.fixture
def assert_same(metric_lines):
    def check(run, other):
        lines, others = metric_lines(run), metric_lines(other)
        assert len(lines) == len(others) == STEPS
        for line, against in zip(lines, others, strict=True):
            differences = largest_differences(line, against)
            assert max(differences.values()) <= 1, (line["step"], differences)
            assert line.keys() == against.keys()
        assert lines[-1]["observed_share"] > 0
        for held_out, against in zip(*(metric_lines(r, "evaluation") for r in (run, other)), strict=True):
            for key, value in against.items():
                if key != "kind":
                    # a share counts single activations, of fewer tokens than a step's
                    by = SELECTION if "share" in key else 10 * ROUNDING
                    assert held_out[key] == pytest.approx(value, rel=by, abs=by), key
        state, expected = (load_file(r / "checkpoints/step00000010/inhibition.safetensors") for r in (run, other))
        assert state.keys() == expected.keys()
        assert {"layers.1.mean", "layers.2.m2", "layers.1.tau", "steps"} <= state.keys()
        for name, tensor in state.items():
            scale = float(expected[name].abs().max())
            counted = name.endswith(("tau", "selected"))
            assert float((tensor - expected[name]).abs().max()) <= (SELECTION if counted else ROUNDING) * scale, name

    return check


@pytest.mark.parametrize("name", [name if name in SHORT else pytest.param(name, marks=full) for name in METHODS])
def test_two_ranks(runs, assert_same, name):
    assert_same(runs[2] / name, runs[1] / name)


@full
@pytest.mark.parametrize("name", ON_FOUR_RANKS)
def test_four_ranks(runs, assert_same, name):
    assert_same(runs[4] / name, runs[1] / name)


@full
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loss", ["published", "scale-invariant", "strength"])
def test_one_compiled_pass(runs, assert_same, loss, ranks):
    """`fused` gives the numbers of the plain operations."""
    plain = loss if loss == "strength" else f"step-{loss}"
    fused = "fused" if loss == "published" else f"fused-{loss}"
    assert_same(runs[ranks] / fused, runs[ranks] / plain)


@pytest.mark.parametrize("ranks", [1, 2])
def test_accumulation(runs, assert_same, ranks):
    """4 x 1 on one rank (micro-batch 2) and on two (micro-batch 1) against 1 x 4."""
    assert_same(runs[ranks] / "accumulated", runs[1] / "step-published")


@pytest.mark.parametrize(
    "name", ["zero0", "zero2", "zero3", pytest.param("offload2", marks=full), pytest.param("offload3", marks=full)]
)
def test_any_zero_stage(runs, assert_same, name):
    assert_same(runs[2] / name, runs[2] / "zero1")


@pytest.mark.parametrize("name", [*STAGES, *(pytest.param(f"offload{stage}", marks=full) for stage in (2, 3))])
def test_gradient_norms_of_layers(runs, metric_lines, assert_same, name):
    """Their squares sum to the square of DeepSpeed's norm, which sums up to 4,096 squares of a parameter in float32."""
    parts = {f"gradient_norm/{part}" for part in ("layer0", "layer1", "layer2", "layer3", "rest")}
    for ranks in (1, 2) if name in STAGES else (2,):
        for line in metric_lines(runs[ranks] / name):
            assert parts == {key for key in line if key.startswith("gradient_norm/")}
            whole = math.hypot(*(line[part] for part in parts))
            assert whole == pytest.approx(line["gradient_norm"], rel=(4096 / 2 + 10) * 2**-24), line["step"]
    if name in STAGES:
        assert_same(runs[2] / name, runs[1] / name)


@full
def test_a_user_s_own_json(runs, assert_same):
    """Optimizer and clipping set in a DeepSpeed JSON instead of the run file: DeepSpeed builds the same optimizer."""
    assert_same(runs[2] / "own-json", runs[2] / "zero2")


@pytest.mark.parametrize(
    "name",
    [
        "step-published",
        "zero3",
        "strength",
        pytest.param("forward-published", marks=full),
        pytest.param("memel", marks=full),
    ],
)
def test_activation_checkpointing_counts_nothing_twice(runs, assert_same, name):
    assert_same(runs[2] / f"recomputed-{name}", runs[2] / name)


@full
@pytest.mark.parametrize(
    ("name", "other"), [("compiled", "step-published"), ("compiled-fused-strength-recomputed", "fused-strength")]
)
def test_compiled_layers(runs, assert_same, name, other):
    """Also what is measured at evaluations, by hooks that a compiled layer would drop."""
    assert_same(runs[2] / name, runs[2] / other)


def test_methods_differ(runs, metric_lines, is_full):
    """The comparisons above could not pass for runs of two methods: each pair differs by ten times what is allowed."""
    different = [name for name in (METHODS if is_full else SHORT) if not name.startswith("fused")]
    lines = {name: metric_lines(runs[1] / name) for name in different}
    assert all(math.isfinite(line["lm_loss"]) for found in lines.values() for line in found)
    for one, other in itertools.combinations(different, 2):
        differences = [largest_differences(*pair) for pair in zip(lines[one], lines[other], strict=True)]
        assert max(max(found.values()) for found in differences) > 10, (one, other, differences)


def test_sets_of_a_mixture_are_counted(runs, metric_lines):
    """Tokens of the sets add up to all; the weights decide; the mean held-out loss is weighted; one set has none."""
    lines = metric_lines(runs[2] / "mixture")
    assert all(line["z_loss"] > 0 for line in lines)
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
        assert line["text_loss/long"] != line["text_loss/single"]
    assert not any("/" in key for key in metric_lines(runs[2] / "step-published")[0] if not key.startswith("layer"))
