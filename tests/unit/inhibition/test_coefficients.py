"""lambda: its schedule, and its size relative to the LM gradient. Shapes: M tokens, N neurons, L layers."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch

from l2e_ds.inhibition import Inhibitor, Settings
from l2e_ds.inhibition.coefficients import WINDOW
from l2e_ds.inhibition.losses import FrozenStatistics
from tests.unit.inhibition.test_hook import NEURONS, Network, lm_loss, settings, sites, text, train
from tests.unit.inhibition.test_losses import written_out

# --- the schedule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"start": 3}, [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"start": 2, "warmup": 2}, [0, 0, 0.5, 1, 1, 1, 1, 1, 1, 1]),
        ({"decay": 4}, [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"end": 6}, [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]),
        ({"start": 0.3, "warmup": 0.2, "decay": 0.2, "end": 0.9}, [0, 0, 0, 0.5, 1, 1, 1, 1, 0.5, 0]),
    ],
    ids=str,
)
def test_schedule(schedule, expected):
    """Share of the full strength in each of a run's ten steps."""
    of_run = Settings(**schedule).in_steps(10)
    assert [of_run.schedule(step) for step in range(10)] == pytest.approx(expected)


def test_an_open_end_stays_open():
    """Without an end, and without a decay towards it, a run that is trained on stays inhibited."""
    assert Settings(start=0.5).in_steps(10).schedule(1000) == 1
    assert Settings().in_steps(None).schedule(1000) == 1


@pytest.mark.parametrize(
    ("schedule", "steps", "words"),
    [
        ({"start": 0.3}, None, "Settings.start: got 0.3, a share of the run, whose length is not known; give whole"),
        ({"decay": 5}, None, "Settings.decay: got 5, but where the run ends is not known; give Settings.end, or"),
        ({"end": 11}, 10, "Settings.end: got 11, which is step 11 of the run's 10"),
        ({"end": 0.01}, 10, "Settings.end: got 0.01, which is step 0 of the run's 10"),
        ({"start": 10}, 10, "got 10 + 0 + 0 steps, allowed: a start before 10 and a sum up to 10, where"),
        ({"start": 8, "warmup": 3}, 10, "got 8 + 3 + 0 steps, allowed: a start before 10 and a sum up to 10, where"),
        ({"start": 5, "decay": 2, "end": 6}, None, "got 5 + 0 + 2 steps, allowed: a start before 6 and a sum up to 6"),
    ],
    ids=str,
)
def test_schedules_that_cannot_be(schedule, steps, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Inhibitor(sites(Network()), Settings(**schedule), run_steps=steps)


@pytest.mark.parametrize(
    "method", ["published", pytest.param("fused strength", marks=pytest.mark.full), "strength", "memel", "naive"]
)
def test_outside_its_time_a_run_is_plain(method):
    """Before `start` and from `end` on, losses and gradients are those without inhibition, to the bit; between they are
    not."""
    network, plain = Network(), Network()
    inhibitor = Inhibitor(sites(network), settings(method, start=4, end=7))
    with inhibitor:
        ours, theirs = (train(n, i, range(4)) for n, i in ((network, inhibitor), (plain, None)))
        assert ours[0] == theirs[0]
        for (gradients, _), (expected, _) in zip(ours[1], theirs[1], strict=True):
            assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))
        assert float(inhibitor.last[:, 0].min()) > 0
        inhibited = train(network, inhibitor, [4])[1][0][0]
        assert not torch.equal(inhibited[1], train(plain, None, [4])[1][0][0][1])
        train(network, inhibitor, [5, 6])
        plain.load_state_dict(network.state_dict())
        after, expected = train(network, inhibitor, [7, 8]), train(plain, None, [7, 8])
        assert after[0] == expected[0]
        assert all(torch.equal(*pair) for pair in zip(after[1][1][0], expected[1][1][0], strict=True))


# --- relative strength -------------------------------------------------------------------------------------------


def measured(network, micro_batches, inhibitor):
    """Sums over the selected activations of a step, [L, 2], by definition in float64: of the squared gradient that
    arrives at the neurons (of the LM loss's sum, and of what later layers inhibit), and of the inhibition loss's."""
    state, chosen = inhibitor.state_dict(), inhibitor.settings
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for tokens in micro_batches:
        neurons = {}
        handles = [
            network.blocks[layer].act.register_forward_hook(lambda _m, _i, z, to=neurons, at=layer: to.update({at: z}))
            for layer in (0, 2)
        ]
        total = lm_loss(network, tokens)
        for handle in handles:
            handle.remove()
        losses, selections = [], []
        for index, (layer, z) in enumerate(neurons.items()):
            count, mean, m2, tau = (state[f"layers.{layer}.{name}"] for name in ("count", "mean", "m2", "tau"))
            flat, variance = z.flatten(0, 1), m2 / (count - 1)
            selections.append((flat.detach() - mean) ** 2 / variance >= tau)
            at_start = state[f"layers.{layer}.variance_at_start"]
            kept = (1 - 4 * (variance / at_start).sqrt().log()).clamp(0, 1)
            statistics = FrozenStatistics.of(mean, variance, tau, variance)
            losses.append(written_out(flat, selections[-1], statistics, chosen.regulariser, kept))
            tokens_here = flat.shape[0]
            value = float(inhibitor.coefficients.values[index])
            total = total + value * losses[-1] / (chosen.target_share * tokens_here * NEURONS)
        for index, z in enumerate(neurons.values()):
            (whole,) = torch.autograd.grad(total, z, retain_graph=True)
            (own,) = torch.autograd.grad(losses[index], z, retain_graph=True)
            value = float(inhibitor.coefficients.values[index]) / (chosen.target_share * tokens_here * NEURONS)
            arrived = (whole - value * own).flatten(0, 1) * tokens_here
            for column, gradient in enumerate((arrived, own.flatten(0, 1))):
                sums[index, column] += gradient[selections[index]].square().sum()
    return sums


@pytest.mark.parametrize(
    ("power", "fused", "recompute", "scale"),
    [
        *((power, False, *how) for power in (0, 1, 2) for how in [(None, 1.0), (True, 8.0)]),
        pytest.param(0, True, None, 512.0, marks=pytest.mark.full),
    ],
)
def test_lambda_is_relative_to_the_lm_gradient(power, fused, recompute, scale):
    """lambda of each step and layer from its definition in float64: ratios of the steps up to the last but one, older
    ones of which fade; with accumulation, a loss scale, recomputation and a step that is skipped. Weights stay."""
    network = Network(recompute=recompute)
    reference = copy.deepcopy(network).double()
    reference.recompute = None
    inhibitor = Inhibitor(sites(network), settings("strength", fused=fused, power=power, warmup=8))
    fade, newest = math.exp(-1 / WINDOW), torch.zeros(2, 2).double()
    ratios: list[torch.Tensor] = []
    values_before = torch.zeros(2).double()
    with inhibitor:
        for step, seed in enumerate([0, 1, 2, 99, 3, 4, 5, 6]):
            skipped = seed == 99
            applied_before = step - (step > 3)
            weights = [fade ** (len(ratios) - 1 - age) for age in range(len(ratios))]
            logarithm = sum(w * ratio.log() for w, ratio in zip(weights, ratios, strict=True))
            ratio = (logarithm / sum(weights)).exp() if ratios else torch.zeros(2).double()
            expected = 0.5 * (applied_before + 1) / 8 * 0.05 * NEURONS * ratio
            # float32 gradients of sums of a hundred terms, squared
            torch.testing.assert_close(inhibitor.coefficients.values.double(), expected, rtol=1e-4, atol=0)
            micro_batches = text(seed).chunk(2)
            found = measured(reference, micro_batches, inhibitor) if applied_before else torch.zeros(2, 2).double()
            for micro_batch in micro_batches:
                (inhibitor.attach_loss(lm_loss(network, micro_batch)) * (scale / 2)).backward()
            inhibitor.step(applied=not skipped)
            if not skipped:
                lm, inhibition = newest.unbind(1)
                reached = values_before / (0.05 * NEURONS) * (inhibition / lm.clamp(min=1e-30)).sqrt()
                torch.testing.assert_close(inhibitor.last[:, 6], reached, rtol=1e-4, atol=0)
                torch.testing.assert_close(inhibitor.last[:, 7], lm.sqrt(), rtol=1e-4, atol=0)
                if newest.count_nonzero():
                    ratios.append((lm / inhibition).sqrt())
                newest, values_before = found, expected
    assert bool((expected > 0).all()) and bool((reached > 0.1).all())


def test_a_coefficient_has_a_strength_too():
    """With lambda given, the strength that it amounts to is measured, and lambda stays."""
    network = Network()
    inhibitor = Inhibitor(sites(network), settings("published"))
    with inhibitor:
        train(network, inhibitor, range(5))
    found = inhibitor.metrics()
    assert found["coefficient"] == pytest.approx(0.3) and found["strength"] > 0
    assert found["strength"] == pytest.approx((found["layer0/strength"] + found["layer2/strength"]) / 2)


def test_a_state_that_lacks_something_is_refused():
    """Nothing is filled in, so that a run cannot go on with other numbers than it would have had."""
    inhibitor = Inhibitor(sites(Network()), settings("published"))
    for name in inhibitor.state_dict():
        state = inhibitor.state_dict()
        del state[name]
        with pytest.raises(ValueError, match=f"^inhibition state: does not fit .+: {re.escape(name)}$"):
            inhibitor.load_state_dict(state)
