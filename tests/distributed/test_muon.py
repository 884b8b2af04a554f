"""`optimizer.name: muon` trains as written out in float64, on any ranks and stage that it allows, and resumes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from l2e_ds.checkpoint.shards import Shards
from tests.distributed.test_elastic import TOLERANCE
from tests.distributed.test_runs import timeless
from tests.distributed.training_case import TrainingCase, zero

pytestmark = pytest.mark.full

ADAM_PEAK, PEAK, MOMENTUM, DECAY, CLIPPING = 3e-3, 0.03, 0.9, 5.0, 0.1
STOP, LAST = 5, 10
STAGES = {"0": (0, "fp32"), "0-bf16": (0, "bf16"), "1-bf16": (1, "bf16")}
"""Name of a set-up: ZeRO stage and precision. Those that allow Muon."""

set_ups = pytest.mark.parametrize("set_up", STAGES)
# ZeRO-0 in bf16 keeps its master weights where `Shards` does not look for them
with_shards = pytest.mark.parametrize("set_up", ["0", "1-bf16"])


def case(set_up: str, name: str = "muon", steps: int = LAST, **fields) -> TrainingCase:
    stage, precision = STAGES[set_up]
    own = {"muon_learning_rate": PEAK, "muon_momentum": MOMENTUM} if name == "muon" else {}
    common = {"peak_learning_rate": ADAM_PEAK, "warmup": 0.2, "schedule_steps": 20, "weight_decay": DECAY}
    sections = {
        # 36,000 elements of matrices and 3,840 of embeddings: two ranks split one of each
        "model": {"hidden_size": 30, "num_heads": 3, "num_layers": 3},
        "optimizer": {**common, "gradient_clipping": CLIPPING, "name": name, **own},
        "training": {"steps": steps, "precision": precision, **fields.pop("training", {})},
        "inhibition": {"layers": [0, 1]},
        "checkpoint": {"every": 0, "early": True},
    }
    return TrainingCase(zero(stage, **sections), **fields)


@pytest.fixture(scope="module")
def runs(train_cases) -> dict[str, Path]:
    """Run directories by name, of three launches. "chain": after step 5 on 1 rank, after step 8 on 2 again."""
    found: dict[str, Path] = {}

    def launch(ranks: int, cases: dict[str, TrainingCase]) -> None:
        output = train_cases(ranks, cases)
        found.update({name: output / name for name in cases})

    keys = ("name", "muon_learning_rate", "muon_momentum")
    allowed = {"training": {"allow_changes": [f"optimizer.{key}" for key in keys]}, "fails_with": "CheckpointError"}
    two = {"stopped": case("1-bf16", steps=STOP)}
    for name in STAGES:
        two |= {f"muon{name}": case(name), f"adamw{name}": case(name, "adamw", steps=1)}
        two |= {f"resumed{name}": case(name, stop_after=STOP), f"nan{name}": case(name, non_finite_loss=(1, [2, 3]))}
        two |= {f"other{name}": case(name, "adamw", in_directory_of=f"muon{name}", **allowed)}
    launch(2, two)
    one = {f"one{name}": case(name) for name in STAGES}
    launch(1, one | {"chain1": case("1-bf16", steps=8, copy_of=str(found["stopped"]))})
    launch(2, {"chain": case("1-bf16", copy_of=str(found["chain1"]))})
    return found


def is_matrix(name: str) -> bool:
    return ".layers." in name and name.endswith("weight") and "norm" not in name


def states(run: Path, step: int) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds of each parameter: "fp32" and the moments."""
    checkpoint = run / f"checkpoints/step{step:08d}"
    weights = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    shapes = {name: tensor.shape for name, tensor in weights.items() if "rotary" not in name}
    muon = [name for name in shapes if is_matrix(name) and not run.name.startswith("adamw")]
    muon.sort(key=lambda name: shapes[name], reverse=True)
    others = sorted(shapes.keys() - muon, key=lambda name: (len(shapes[name]) < 2, list(shapes).index(name)))
    shards = Shards(checkpoint, [*muon, *others])
    return {
        name: {key: shards.read(name, key, 0, shape.numel()).view(shape) for key in shards.flats[pieces[0].flat]}
        for name, shape, pieces in ((name, shapes[name], shards.pieces[name]) for name in shapes)
    }


def distance(found: Tensor, expected: Tensor) -> float:
    return float(((found.double() - expected.double()).norm() / expected.double().norm()).detach())


@with_shards
def test_first_step_is_of_the_clipped_gradient(runs, metric_lines, set_up):
    """Muon's momentum holds the gradient that AdamW's has in the same run; the rest is AdamW's to begin with."""
    muon, adamw = (states(runs[f"{name}{set_up}"], 1) for name in ("muon", "adamw"))
    gradients = {
        name: state["momentum_buffer"] / (1 - MOMENTUM) if is_matrix(name) else state["exp_avg"] / (1 - 0.9)
        for name, state in muon.items()
    }
    norm = sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5
    assert metric_lines(runs[f"muon{set_up}"])[0]["gradient_norm"] > 10 * CLIPPING
    assert norm == pytest.approx(CLIPPING, rel=1e-4)  # DeepSpeed adds 1e-6 to what it divides by
    roundings = 4 * 2.0**-24
    for name, state in adamw.items():
        assert distance(gradients[name], state["exp_avg"] / (1 - 0.9)) < roundings
        assert is_matrix(name) or distance(muon[name]["fp32"], state["fp32"]) < roundings


def orthogonalised(matrix: Tensor) -> Tensor:
    """Five steps of Newton-Schulz with the coefficients of Jordan et al. 2024, in float64: of each singular value s
    becomes a s + b s^3 + c s^5."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


@with_shards
def test_second_step_is_the_one_written_out(runs, metric_lines, set_up):
    """From the momentum of two steps follows the gradient of the second, and from both the update of the weights.

    DeepSpeed iterates in half precision. To 11 bits, the matrix (norm 1) is off by 2^-11, which each of five steps
    multiplies by 3.4445 at most; later roundings are multiplied less often, in all by 1 + 1/3.4 + ... < 1.41 times as
    much: by 0.34, of a matrix whose 30 singular values are near 1 (0.7 to 1.2), whose norm is at least 3.8.
    """
    tolerance = 0.34 / 3.8
    before, after = (states(runs[f"muon{set_up}"], step) for step in (1, 2))
    rate = metric_lines(runs[f"muon{set_up}"])[1]["learning_rate"] / ADAM_PEAK * PEAK
    names = [name for name in before if is_matrix(name)]
    assert len(names) == 3 * 4
    for name in names:
        old, momentum, new = before[name]["fp32"], after[name]["momentum_buffer"].double(), after[name]["fp32"]
        gradient = (momentum - MOMENTUM * before[name]["momentum_buffer"].double()) / (1 - MOMENTUM)
        nesterov = (1 - MOMENTUM) * gradient + MOMENTUM * momentum
        scale = rate * max(1, old.shape[0] / old.shape[1]) ** 0.5
        update = (1 - rate * DECAY) * old.double() - new.double()
        assert distance(update, scale * orthogonalised(nesterov)) < tolerance, name
        assert distance(update, scale * orthogonalised(momentum)) > tolerance, name  # so much Nesterov's part changes
        assert distance(old.double() - new.double(), scale * orthogonalised(nesterov)) > tolerance, name  # and decay


def assert_close(metric_lines, run: Path, other: Path, precision: str) -> None:
    """Of each step's loss, gradient norm and scale, and of the last held-out loss, relative to their means.

    Ranks and stages add up in another order. In float32 alone that is a few 2^-24, but it changes how a few elements
    are rounded to the half precision of the iteration, which has fp16's 11 bits at least.
    """

    def compare(key: str, of_run: list[dict], of_other: list[dict]) -> None:
        ours, theirs = (torch.tensor([line[key] for line in lines]) for lines in (of_run, of_other))
        found = float(((ours - theirs).abs() / theirs.mean()).max())
        print(run.name, other.name, key, f"{found:.1e}")
        assert found < TOLERANCE[precision]["lm_loss" if key.endswith("loss") else "rest"], key

    for key in ("lm_loss", "gradient_norm", "layer0/mean_s"):
        compare(key, metric_lines(run), metric_lines(other))
    compare("held_out_loss", metric_lines(run, "evaluation")[-1:], metric_lines(other, "evaluation")[-1:])


@set_ups
def test_same_numbers_on_one_rank(runs, metric_lines, set_up):
    precision = "bf16" if set_up.endswith("bf16") else "fp16"
    assert_close(metric_lines, runs[f"one{set_up}"], runs[f"muon{set_up}"], precision)
    losses = [line["lm_loss"] for line in metric_lines(runs[f"muon{set_up}"])]
    assert losses[-1] < losses[0] - 0.3  # it learns


def test_same_numbers_in_each_stage_and_precision(runs, metric_lines):
    for set_up in ("0", "0-bf16"):
        assert_close(metric_lines, runs[f"muon{set_up}"], runs["muon1-bf16"], "bf16")


@set_ups
def test_resume_is_bit_identical(runs, metric_lines, set_up):
    straight, resumed = (runs[f"{name}{set_up}"] for name in ("muon", "resumed"))
    assert timeless(metric_lines(resumed)) == timeless(metric_lines(straight))
    assert_same(straight, LAST, resumed, LAST)


def assert_same(run: Path, step: int, other: Path, other_step: int) -> None:
    """All tensors of DeepSpeed's files in two checkpoints, weights and states, are the same to the bit."""
    checkpoints = run / f"checkpoints/step{step:08d}", other / f"checkpoints/step{other_step:08d}"
    for files in zip(*(sorted(checkpoint.glob("*_states.pt")) for checkpoint in checkpoints), strict=True):
        ours, theirs = (tensors(torch.load(file, weights_only=False)) for file in files)
        assert len(ours) > 3
        assert all(torch.equal(one, another) for one, another in zip(ours, theirs, strict=True))


def tensors(content: object) -> list[Tensor]:
    if isinstance(content, Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def test_elastic_resume_on_one_rank_and_back(runs, metric_lines):
    """What the engine then holds is compared with the shards by the program itself (checkpoint/elastic.py)."""
    assert_close(metric_lines, runs["chain"], runs["muon1-bf16"], "bf16")


@set_ups
def test_non_finite_steps_move_nothing(runs, metric_lines, set_up):
    lines = metric_lines(runs[f"nan{set_up}"])
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert_same(runs[f"nan{set_up}"], 4, runs[f"muon{set_up}"], 2)


@set_ups
def test_another_optimizer_is_refused(runs, set_up):
    for rank in (0, 1):
        message = (runs[f"other{set_up}"].parent / f"other{set_up}-rank{rank}.txt").read_text()
        assert "was written with optimizer muon, this run has optimizer adamw, which no resume may change" in message


def test_zero_0_in_bf16_takes_the_first_step_of_the_others(runs):
    """DeepSpeed's optimizer takes one more when it is made, after which Adam's first would be a quarter smaller."""
    moved = []
    for name in ("adamw0-bf16", "adamw1-bf16"):
        checkpoints = [runs[name] / f"checkpoints/step{step:08d}/mp_rank_00_model_states.pt" for step in (0, 1)]
        first, second = (torch.load(path, weights_only=False)["module"]["lm_head.weight"] for path in checkpoints)
        moved.append(float((second - first).float().abs().mean()))
    # single weights by a rounding to bf16 more or less; there are 1,920
    assert moved[0] == pytest.approx(moved[1], rel=0.02)
