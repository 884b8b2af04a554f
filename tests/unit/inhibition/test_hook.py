"""`Inhibitor` in a plain PyTorch training loop. Shapes: B sequences, T tokens, N neurons, V vocabulary."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from l2e_ds.errors import SelfTestError
from l2e_ds.inhibition import Inhibitor, NeuronSite, Settings

HIDDEN, NEURONS, VOCABULARY = 12, 40, 17

# Every combination of what the hooks can do; the numbers of each fused loss are in test_fused.py.
METHODS = {
    "published": {"loss": "published"},
    "scale-invariant": {"loss": "scale-invariant"},
    "projected": {},
    "fused": {"loss": "published", "fused": True},
    "strength": {"coefficient": None, "strength": 0.5},
    "fused strength": {"coefficient": None, "strength": 0.5, "fused": True, "power": 0},
    "forward": {"loss": "published", "reduce": "forward"},
    "exact": {"loss": "scale-invariant", "reduce": "forward"},
    "projected forward": {"reduce": "forward", "power": 0},
    "top-k regulariser": {"loss": "published", "retrieval": "top-k"},
    "top-k projected": {"retrieval": "top-k", "power": 2},
    "memel": {"retrieval": "top-k", "mechanism": "reverse-deactivation"},
    "naive": {"mechanism": "naive-deactivation"},
}
STATISTICS = ("count", "mean", "m2", "tau", "selected", "selectable", "variance_at_start")
# both of the fused ones are compiled, which takes seconds: one of them shows it in the short tests
every_method = pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=pytest.mark.full) if METHODS[name].get("fused") and name != "fused strength" else name
        for name in METHODS
    ],
)


def settings(method: str = "published", **changes) -> Settings:
    return Settings(**({"target_share": 0.05, "coefficient": 0.3} | METHODS[method] | changes))


class Block(nn.Module):
    """A residual MLP; with `gated` the neurons exist only as the input of the down projection."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, NEURONS)
        self.gate = nn.Linear(HIDDEN, NEURONS) if gated else None
        self.act = nn.GELU()
        self.down = nn.Linear(NEURONS, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return x + self.down(z)


class Network(nn.Module):
    """Token by token, so that tokens can be padded, split and joined without changing each other."""

    def __init__(self, gated: bool = False, recompute: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block(gated) for _ in range(3))
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.recompute = recompute  # None: no checkpointing; else use_reentrant

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x) if self.recompute is None else checkpoint(block, x, use_reentrant=self.recompute)
        return self.head(x)


def sites(
    network: Network, kind: str = "activation", layers: tuple[int, ...] = (0, 2), function: str | None = None
) -> list[NeuronSite]:
    attribute = {"activation": "act", "projection": "down"}[kind]
    return [NeuronSite(i, network.blocks[i], attribute, kind, NEURONS, function) for i in layers]


def text(seed: int, sequences: int = 8) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (sequences, 17), generator=torch.Generator().manual_seed(seed))


def lm_loss(network: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(network, inhibitor, seeds, split=1, rate=0.1, run=None):
    """SGD steps with one batch a seed in `split` micro-batches; returns losses and each step's gradients and sums."""
    losses, records = [], []
    device = next(network.parameters()).device
    for seed in seeds:
        network.zero_grad()
        for micro_batch in text(seed).to(device).chunk(split):
            loss = lm_loss(network if run is None else run, micro_batch)
            (inhibitor.attach_loss(loss) / split if inhibitor else loss / split).backward()
            losses.append(float(loss.detach()))
        sums = inhibitor._packed.clone() if inhibitor else None
        records.append(([p.grad.clone() for p in network.parameters()], sums))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= rate * parameter.grad
        if inhibitor:
            inhibitor.step()
    return losses, records


def assert_same(one, other, rtol=0.0, atol=0.0):
    """Equal losses, gradients and sums of all steps; bit for bit unless a tolerance is given."""
    torch.testing.assert_close(torch.tensor(one[0]), torch.tensor(other[0]), rtol=rtol, atol=atol)
    for (gradients, sums), (other_gradients, other_sums) in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(gradients, other_gradients, rtol=rtol, atol=atol)
        if sums is not None and other_sums is not None:
            torch.testing.assert_close(sums, other_sums, rtol=rtol, atol=100 * atol)


def assert_same_state(one: Inhibitor, other: Inhibitor, rtol=0.0, atol=0.0):
    state, other_state = one.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    for name in state:
        torch.testing.assert_close(state[name], other_state[name], rtol=rtol, atol=atol, msg=name)


# --- on and off --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "gated"), [("activation", False), ("projection", False), ("projection", True)])
def test_hooks_are_removed_after_an_exception(kind, gated):
    """After an exception inside `with` the model is as it was: same modules, same outputs, no hooks."""
    network = Network(gated)
    acts = [block.act for block in network.blocks]
    before = network(text(0))
    inhibitor = Inhibitor(sites(network, kind), settings("memel"))
    with pytest.raises(RuntimeError, match="stop"), inhibitor:
        train(network, inhibitor, range(2), rate=0.0)
        assert not torch.equal(network(text(0)), before), "the hooks were never there"
        raise RuntimeError("stop")
    assert [block.act for block in network.blocks] == acts
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())
    assert torch.equal(network(text(0)), before)


@every_method
def test_both_kinds_of_site_are_the_same(method):
    """Seen after the activation or before the down projection, the same neurons give the same run."""
    runs = []
    for kind in ("activation", "projection"):
        network = Network()
        inhibitor = Inhibitor(sites(network, kind), settings(method))
        with inhibitor:
            runs.append((train(network, inhibitor, range(4)), inhibitor))
    assert_same(runs[0][0], runs[1][0])
    assert_same_state(runs[0][1], runs[1][1])


def test_gated_mlp_sees_the_product():
    """For a gated MLP the neurons are act(gate) * up: the moments are those of that product."""
    network = Network(gated=True)
    inhibitor = Inhibitor(sites(network, "projection", (0,)), settings())
    with inhibitor:
        train(network, inhibitor, [1], rate=0.0)
    x = network.embedding(text(1)[:, :-1])
    block = network.blocks[0]
    z = (block.act(block.gate(x)) * block.up(x)).detach().double().reshape(-1, NEURONS)
    torch.testing.assert_close(inhibitor.hooks[0].running.moments.mean, z.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(inhibitor.hooks[0].running.moments.variance, z.var(0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", ["published", "scale-invariant", "forward", "exact", "top-k regulariser"])
@pytest.mark.parametrize("kind", ["activation", "projection"])
def test_coefficient_zero_is_plain_training(method, kind):
    """lambda = 0: losses and gradients are bit-identical to no hooks at all, while statistics are kept."""
    network, plain = Network(), Network()
    inhibitor = Inhibitor(sites(network, kind), settings(method, coefficient=0.0, strength=None))
    with inhibitor:
        assert_same(train(network, inhibitor, range(5)), train(plain, None, range(5)))
    assert float(inhibitor.last[:, 0].min()) > 0


@every_method
def test_the_method_does_change_training(method):
    """The converse: with lambda > 0 gradients of the hooked layers differ from plain training's."""
    network, plain = Network(), Network()
    inhibitor = Inhibitor(sites(network), settings(method))
    with inhibitor:
        ours, theirs = train(network, inhibitor, range(5)), train(plain, None, range(5))
    assert not torch.equal(ours[1][-1][0][1], theirs[1][-1][0][1])


@every_method
@pytest.mark.parametrize("kind", ["activation", "projection"])
def test_evaluation_is_untouched(method, kind):
    """In eval mode outputs are the plain ones, and nothing is counted."""
    network = Network()
    inhibitor = Inhibitor(sites(network, kind), settings(method))
    with inhibitor:
        train(network, inhibitor, range(3))
        state = inhibitor.state_dict()
        network.eval()
        with torch.no_grad():
            out = network(text(9))
        assert inhibitor._packed.count_nonzero() == 0
        assert all(hook.calls.forward == 0 for hook in inhibitor.hooks)
        assert all(torch.equal(value, inhibitor.state_dict()[name]) for name, value in state.items())
    assert torch.equal(network(text(9)), out)


@pytest.mark.parametrize("kind", ["activation", "projection"])
def test_a_network_in_eval_mode_stays_in_it(kind):
    """As `from_pretrained` leaves one: evaluated after the hooks are put on, it counts nothing."""
    network = Network().eval()
    inhibitor = Inhibitor(sites(network, kind), settings())
    with inhibitor:
        assert not any(module.training for module in network.modules())
        with torch.no_grad():
            network(text(9))
        assert inhibitor._packed.count_nonzero() == 0
        train(network.train(), inhibitor, range(2))


@pytest.mark.parametrize("kind", ["activation", "projection"])
def test_hooks_are_put_on_once(kind):
    """Twice, or another Inhibitor's on the same layer, is refused, with nothing half put on; not again after detach."""
    network = Network()
    inhibitor, other = (Inhibitor(sites(network, kind, layers), settings()) for layers in ((0, 2), (1, 2)))
    with inhibitor:
        with pytest.raises(ValueError, match=r"^Inhibitor\.attach: is attached already$"):
            inhibitor.attach()
        with pytest.raises(ValueError, match=r"^Inhibitor\.attach: layer 2 has the hook of another Inhibitor; detach"):
            other.attach()
        train(network, inhibitor, range(2))
        assert not inhibitor.self_test_pending and other._packed.count_nonzero() == 0
        assert all(hook.calls.forward == 0 for hook in other.hooks)
    with other:
        train(network, other, range(2))
    with inhibitor:
        train(network, inhibitor, range(1))


def test_no_sites():
    """An empty list of sites is an error, not a run without the method."""
    with pytest.raises(ValueError, match=r"^Inhibitor: got no sites, allowed: one or more$"):
        Inhibitor([])


@pytest.mark.parametrize(
    ("changes", "compiled", "recompute"),
    [
        *(({}, *how) for how in [(False, None), (False, False), (False, True), (True, None), (True, False)]),
        ({"loss": "projected"}, False, None),
    ],
)
def test_within_the_gelu(changes, recompute, compiled):
    """A site that says its activation is the GELU, whose backward then adds the gradient: as with plain operations."""
    runs = []
    for function, fused in ((None, False), ("gelu", True)):
        network = Network(recompute=recompute)
        inhibitor = Inhibitor(sites(network, function=function), settings(fused=fused, **changes))
        with inhibitor:
            run = torch.compile(network, backend="aot_eager") if compiled else None
            runs.append((train(network, inhibitor, range(5), split=2, run=run), inhibitor))
        assert not inhibitor.self_test_pending
    assert all(hook.implementation.computes_gelu for hook in runs[1][1].hooks)
    assert not any(hook.implementation.computes_gelu for hook in runs[0][1].hooks)
    assert_same(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-6)
    assert_same_state(runs[0][1], runs[1][1], rtol=1e-5, atol=1e-7)


# --- recomputation, accumulation, padding ------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("kind", ["activation", "projection"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("split", [1, 2])
def test_activation_checkpointing_changes_nothing(method, kind, reentrant, split):
    """Recomputation counts nothing twice: losses, gradients, sums and state are those without it, bit for bit."""
    runs = []
    for recompute in (None, reentrant):
        network = Network(recompute=recompute)
        inhibitor = Inhibitor(sites(network, kind), settings(method))
        with inhibitor:
            runs.append((train(network, inhibitor, range(5), split), inhibitor))
        assert not inhibitor.self_test_pending
    assert_same(runs[0][0], runs[1][0])
    assert_same_state(runs[0][1], runs[1][1])


@pytest.mark.parametrize("method", ["published", "scale-invariant", "top-k regulariser", "memel", "naive"])
@pytest.mark.parametrize("recompute", [None, False])
def test_accumulation_equals_one_big_batch(method, recompute):
    """4 micro-batches a step give the moments, tau, shares and gradients of one batch (`reduce: step`)."""
    runs = []
    for split in (1, 4):
        network = Network(recompute=recompute)
        inhibitor = Inhibitor(sites(network), settings(method))
        with inhibitor:
            runs.append((train(network, inhibitor, range(6), split), inhibitor))
    (one, big), (other, accumulated) = runs
    means = torch.tensor(other[0]).reshape(-1, 4).mean(1).tolist()
    assert_same(one, (means, other[1]), rtol=1e-3, atol=1e-5)
    assert_same_state(big, accumulated, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(big.last, accumulated.last, rtol=1e-4, atol=1e-6)
    assert float(big.last[:, 0].min()) > 0


@every_method
@pytest.mark.parametrize("kind", ["activation", "projection"])
def test_padding_counts_nowhere(method, kind):
    """With a token mask, sums, gradients and state are those of the unpadded tokens, whatever the padding holds."""
    padded, plain = Network(), Network()
    with torch.no_grad():  # a padding token with extreme activations
        for network in (padded, plain):
            network.embedding.weight[VOCABULARY - 1] = 30.0
    inhibitors = [Inhibitor(sites(network, kind), settings(method)) for network in (padded, plain)]
    with inhibitors[0], inhibitors[1]:
        for seed in range(4):
            inputs = text(seed)[:, :-1] % (VOCABULARY - 1)
            targets = text(seed)[:, 1:]
            mask = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(100 + seed)) < 0.7
            inhibitors[0].set_token_mask(mask.long())
            logits = padded(torch.where(mask, inputs, VOCABULARY - 1))
            loss = functional.cross_entropy(logits.flatten(0, 1), torch.where(mask, targets, -100).flatten())
            inhibitors[0].attach_loss(loss).backward()
            logits = plain(inputs[mask].unsqueeze(0))
            inhibitors[1].attach_loss(functional.cross_entropy(logits[0], targets[mask])).backward()
            torch.testing.assert_close(inhibitors[0]._packed, inhibitors[1]._packed, rtol=1e-4, atol=1e-3)
            for ours, theirs in zip(padded.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
                ours.grad = theirs.grad = None
            for inhibitor in inhibitors:
                inhibitor.step()
    assert_same_state(*inhibitors, rtol=1e-4, atol=1e-5)
    assert float(inhibitors[0].last[:, 0].min()) > 0


def test_mask_of_another_size():
    """A mask that does not fit the activations is an error that says both sizes."""
    network = Network()
    inhibitor = Inhibitor(sites(network), settings())
    with inhibitor:
        inhibitor.set_token_mask(torch.ones(2, 3))
        with pytest.raises(ValueError, match="set_token_mask: got a mask of 6 tokens, allowed: one of 128"):
            network(text(0)[:, :-1])


# --- steps -------------------------------------------------------------------------------------------------------


@every_method
def test_a_skipped_step_moves_nothing(method):
    """step(applied=False) leaves moments, tau and counts as they were, and the run goes on as if it never was."""
    runs = []
    for skip in (False, True):
        network = Network()
        inhibitor = Inhibitor(sites(network), settings(method))
        with inhibitor:
            train(network, inhibitor, range(3))
            if skip:
                before, last = inhibitor.state_dict(), inhibitor.last.clone()
                inhibitor.attach_loss(lm_loss(network, text(50)) * float("inf")).backward()
                inhibitor.step(applied=False)
                assert all(torch.equal(value, inhibitor.state_dict()[name]) for name, value in before.items())
                assert torch.equal(inhibitor.last, last)
            runs.append((train(network, inhibitor, range(3, 6)), inhibitor))
    assert_same(runs[0][0], runs[1][0])
    assert_same_state(runs[0][1], runs[1][1])


@pytest.mark.parametrize("method", ["published", "fused", "exact", "top-k regulariser", "memel"])
def test_a_step_that_is_not_finite_moves_nothing(method):
    """A NaN in one micro-batch of one layer, and step() as after any other: no layer's moments or tau move, as with
    step(applied=False); the step's figures show it. What lambda is relative to may lose a step."""
    runs = []
    for applied in (True, False):
        network = Network()
        inhibitor = Inhibitor(sites(network), settings(method))
        with inhibitor:
            train(network, inhibitor, range(3), split=2)
            bias, before = network.blocks[2].up.bias, inhibitor.state_dict()
            for value in (0.0, math.nan):
                kept = bias.detach().clone()
                bias.data[0] += value
                inhibitor.attach_loss(lm_loss(network, text(50))).backward()
                bias.data.copy_(kept)
            inhibitor.step(applied=applied)
            assert math.isnan(inhibitor.metrics()["layer2/mean_s"]) == applied
            state = inhibitor.state_dict()
            assert int(state["steps"]) == 3 + applied
            statistics = [name for name in state if name.split(".")[-1] in STATISTICS]
            assert len(statistics) == 2 * len(STATISTICS)
            assert all(torch.equal(state[name], before[name]) for name in statistics)
            runs.append((train(network, inhibitor, range(3, 33)), inhibitor))
        state = inhibitor.state_dict()
        assert all(bool(value.isfinite().all()) for value in state.values())
        assert 0.01 < float(inhibitor.last[:, 0].mean()) < 0.2
    assert_same(runs[0][0], runs[1][0])
    states = [inhibitor.state_dict() for _, inhibitor in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in statistics)


def test_a_first_step_that_is_not_finite():
    """Statistics begin with the first finite one."""
    network = Network()
    inhibitor = Inhibitor(sites(network), settings())
    with inhibitor:
        inhibitor.attach_loss(lm_loss(network, text(0))).backward()
        inhibitor._packed[5] = math.inf
        inhibitor.step()
        assert float(inhibitor.hooks[0].running.moments.count) == 0
        train(network, inhibitor, range(3))
    assert float(inhibitor.hooks[0].running.moments.count) > 0 and not inhibitor.self_test_pending
    assert float(inhibitor.last[:, 0].min()) > 0


def test_skipped_first_step():
    """As fp16 begins: the first steps overflow; statistics start with the first applied one."""
    runs = []
    for skipped in (0, 2):
        network = Network()
        inhibitor = Inhibitor(sites(network), settings())
        with inhibitor:
            for _ in range(skipped):
                inhibitor.attach_loss(lm_loss(network, text(50))).backward()
                inhibitor.step(applied=False)
            runs.append((train(network, inhibitor, range(3)), inhibitor))
    assert_same(runs[0][0], runs[1][0])
    assert_same_state(runs[0][1], runs[1][1])


def test_coefficient_warmup():
    """lambda rises linearly over its warm-up, on applied steps, and stays; injected gradients rise with it."""
    network = Network()
    inhibitor = Inhibitor(sites(network), settings(coefficient=0.4, warmup=4))
    seen = []
    with inhibitor:
        for seed in range(6):
            seen.append(float(inhibitor.coefficients.values[0]))
            inhibitor.attach_loss(lm_loss(network, text(seed))).backward()
            inhibitor.step(applied=False)
            assert float(inhibitor.coefficients.values[0]) == seen[-1]
            train(network, inhibitor, [seed])
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])

    def added(coefficient: float, warmup: int) -> torch.Tensor:
        network = Network()
        inhibitor = Inhibitor(sites(network), settings(coefficient=coefficient, warmup=warmup))
        with inhibitor:
            return train(network, inhibitor, [0, 1], rate=0.0)[1][-1][0][1]

    plain, full, half = added(0.0, 0), added(0.4, 0), added(0.4, 4)
    torch.testing.assert_close(half - plain, (full - plain) / 2, rtol=1e-3, atol=1e-6)


def test_statistics_of_the_newest_step():
    """`last`: observed share, tau that selected, mean selected score, mean S, loss, from a written-out reference."""
    network = Network()
    inhibitor = Inhibitor(sites(network, layers=(0,)), settings("published", statistics_window=None))
    with inhibitor:
        train(network, inhibitor, [1, 2], rate=0.0)
    block = network.blocks[0]
    first, second = (
        block.act(block.up(network.embedding(text(s)[:, :-1]))).detach().double().reshape(-1, NEURONS) for s in (1, 2)
    )
    from scipy.stats import chi2

    tau = float(chi2.isf(0.05, 1))  # where nothing could be selected in the first step, tau has not moved
    d2 = (second - first.mean(0)) ** 2
    phi = d2 / first.var(0)
    selected = phi >= tau
    expected = [
        float(selected.double().mean()),
        tau,
        float(phi[selected].mean()),
        float(torch.cat([first, second]).std(0).mean()),
        float(d2[selected].log().sum() / (0.05 * second.numel())),
    ]
    assert inhibitor.last[0, :5].tolist() == pytest.approx(expected, rel=1e-4)


class Identity(nn.Module):
    """A layer whose neurons are just its input."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Identity()


@pytest.mark.parametrize("window", [2, None])
def test_selection_rates_fade_like_the_moments(window):
    """The rate of the scale-invariant loss: selected over seen tokens per neuron, k steps old ones weigh
    exp(-k / window); the first step, in which nothing could be selected, does not count."""
    layer = Identity()
    inhibitor = Inhibitor([NeuronSite(0, layer, "act", "activation", 6)], settings(statistics_window=window))
    kept = 1.0 if window is None else math.exp(-1 / window)
    generator = torch.Generator().manual_seed(0)
    selected, seen = torch.zeros(6, dtype=torch.float64), 0.0
    with inhibitor:
        for step in range(5):
            z = torch.randn(1, 50 + 30 * step, 6, generator=generator).requires_grad_()
            state = inhibitor.state_dict()
            count, mean, m2, tau = (state[f"layers.0.{name}"] for name in ("count", "mean", "m2", "tau"))
            selected, seen = selected * kept, seen * kept
            if step:
                phi = (z.detach()[0].double() - mean) ** 2 / (m2 / (count - 1))
                selected, seen = selected + (phi >= tau).sum(0), seen + z.shape[1]
            inhibitor.attach_loss(layer.act(z).sum()).backward()
            inhibitor.step()
    assert float(selected.min()) > 0
    torch.testing.assert_close(inhibitor.hooks[0].step_statistics.rate.double(), selected / seen, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduce", ["step", "forward"])
def test_activations_far_from_zero(reduce):
    """Mean 1000, deviation 1, from the first step on, when the mean is not known yet: NumPy's moments."""
    layer = Identity()
    inhibitor = Inhibitor(
        [NeuronSite(0, layer, "act", "activation", 6)], settings(statistics_window=None, reduce=reduce)
    )
    batches = [1000 + torch.randn(2, 300, 6, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    with inhibitor:
        for number, z in enumerate(batches, 1):
            inhibitor.attach_loss(layer.act(z.clone().requires_grad_()).sum()).backward()
            inhibitor.step()
            so_far = torch.cat(batches[:number]).double().flatten(0, 1)
            torch.testing.assert_close(inhibitor.hooks[0].running.moments.mean, so_far.mean(0), rtol=1e-9, atol=0)
            torch.testing.assert_close(inhibitor.hooks[0].running.moments.variance, so_far.var(0), rtol=1e-5, atol=0)


# --- the self-test -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["published", "memel"])
def test_self_test_finds_a_loss_that_was_not_attached(method):
    """A loss that did not go through attach_loss would train without the method: SelfTestError."""
    network = Network()
    inhibitor = Inhibitor(sites(network), settings(method))
    with inhibitor, pytest.raises(SelfTestError):
        lm_loss(network, text(0)).backward()
        inhibitor.step()


@pytest.mark.parametrize("split", [1, 3])
def test_self_test_finds_a_gradient_that_does_not_arrive(split):
    """A hooked layer whose output is detached is named."""
    network = Network()
    network.blocks[2].register_forward_hook(lambda module, inputs, output: inputs[0] + (output - inputs[0]).detach())
    inhibitor = Inhibitor(sites(network), settings())
    with inhibitor:
        for micro_batch in text(0).chunk(split):
            inhibitor.attach_loss(lm_loss(network, micro_batch)).backward()
        with pytest.raises(SelfTestError, match=f"layer 2 saw {split} forward, 0 recomputed and 0 backward"):
            inhibitor.step()


def test_self_test_finds_a_layer_called_twice():
    """A layer that runs twice a micro-batch would count its tokens twice."""
    network = Network()
    first = network.blocks[0]
    network.blocks[0].register_forward_hook(lambda module, inputs, output: output + Block.forward(first, output))
    inhibitor = Inhibitor(sites(network), settings())
    with inhibitor, pytest.raises(SelfTestError, match="layer 0 saw 2 forward"):
        train(network, inhibitor, [0])


def test_self_test_finds_hooks_that_are_not_there():
    """Hooks that were never attached (or dropped by a compiler) are found in the first step."""
    network = Network()
    inhibitor = Inhibitor(sites(network), settings())
    with pytest.raises(SelfTestError, match="layer 0 saw 0 forward"):
        train(network, inhibitor, [0])


@every_method
def test_self_test_passes_where_all_is_well(method):
    """It passes, with accumulation too, as soon as every layer has selected something."""
    network = Network()
    inhibitor = Inhibitor(sites(network), settings(method))
    with inhibitor:
        train(network, inhibitor, range(5), split=2)
    assert not inhibitor.self_test_pending


# --- state -------------------------------------------------------------------------------------------------------


@every_method
def test_state_round_trip_continues_bit_identically(method):
    """A new Inhibitor with the loaded state goes on exactly as the one that went on."""
    network = Network()
    inhibitor = Inhibitor(sites(network), settings(method, warmup=5))
    with inhibitor:
        train(network, inhibitor, range(3))
        weights, state = copy.deepcopy(network.state_dict()), copy.deepcopy(inhibitor.state_dict())
        assert all(tensor.dtype in (torch.float64, torch.int64) for tensor in state.values())
        went_on = train(network, inhibitor, range(3, 8))
    again = Network()
    again.load_state_dict(weights)
    resumed = Inhibitor(sites(again), settings(method, warmup=5))
    resumed.load_state_dict(state)
    with resumed:
        assert_same(went_on, train(again, resumed, range(3, 8)))
    assert_same_state(inhibitor, resumed)


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_an_earlier_start_begins_where_the_state_is_loaded(start):
    """A run that would begin at step 6 is saved after 4 and goes on with an earlier start: S_start is its S there."""
    network = Network()
    saved = Inhibitor(sites(network), settings("strength", start=6))
    with saved:
        train(network, saved, range(4))
    assert not any(bool(hook.variance_at_start.any()) for hook in saved.hooks)
    resumed = Inhibitor(sites(Network()), settings("strength", start=start))
    resumed.load_state_dict(saved.state_dict())
    for hook in resumed.hooks:
        assert bool((hook.variance_at_start > 0).all())
        torch.testing.assert_close(hook.variance_at_start, hook.running.moments.variance, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [(0, 1), (0,), (0, 1, 2)])
def test_state_of_other_layers_is_refused(layers):
    """Loading a state of other hooked layers names what does not fit, and changes nothing."""
    network = Network()
    inhibitor, other = (Inhibitor(sites(network, layers=chosen), settings()) for chosen in ((0, 2), layers))
    before = inhibitor.state_dict()
    with pytest.raises(ValueError, match=r"layers\.[12]\."):
        inhibitor.load_state_dict(other.state_dict())
    assert all(torch.equal(value, inhibitor.state_dict()[name]) for name, value in before.items())


def test_state_of_another_size_is_refused():
    """The same layers with another number of neurons do not fit either."""
    network = Network()
    inhibitor = Inhibitor(sites(network), settings())
    state = inhibitor.state_dict()
    state["layers.0.mean"] = torch.zeros(NEURONS + 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"layers\.0\.mean"):
        inhibitor.load_state_dict(state)


def test_a_later_micro_batch_sees_frozen_statistics():
    """Within a step moments and tau do not move: they do between any two steps."""
    network = Network()
    inhibitor = Inhibitor(sites(network), settings())
    taus = []
    with inhibitor:
        for seed in range(4):
            before = inhibitor.state_dict()
            for micro_batch in text(seed).chunk(2):
                inhibitor.attach_loss(lm_loss(network, micro_batch) / 2).backward()
                assert all(torch.equal(value, inhibitor.state_dict()[name]) for name, value in before.items())
            inhibitor.step()
            taus.append(float(inhibitor.hooks[0].running.tau))
    assert all(a != b for a, b in pairwise(taus[1:]))


# --- torch.compile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("published", "activation"),
        ("scale-invariant", "activation"),
        ("strength", "activation"),
        ("memel", "activation"),
        ("published", "projection"),
    ],
)
def test_compiled_model_equals_eager(method, kind):
    """Under torch.compile hooks run as often and give the same sums and gradients; the self-test passes. Nothing is
    compiled anew once the first steps are over."""
    runs = []
    for compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        network = Network()
        inhibitor = Inhibitor(sites(network, kind), settings(method))
        with inhibitor:
            run = torch.compile(network, backend="aot_eager") if compiled else None
            runs.append((train(network, inhibitor, range(4), split=2, run=run), inhibitor))
            graphs = counters["stats"]["unique_graphs"]
            train(network, inhibitor, [4], split=2, run=run)
            assert counters["stats"]["unique_graphs"] == graphs and (graphs > 0) == compiled
        assert not inhibitor.self_test_pending
    assert_same(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-6)
    assert_same_state(runs[0][1], runs[1][1], rtol=1e-5, atol=1e-7)
