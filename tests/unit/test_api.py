"""The Python API is cheap to import and easy to use, and the code in its documentation runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import l2e_ds
from l2e_ds import Inhibitor, NeuronSite, Settings
from l2e_ds.config import sections
from l2e_ds.inhibition import settings as of_inhibition

PAGE = Path(__file__).resolve().parents[2] / "docs/python-api.md"


def test_the_package_itself_imports_nothing():
    """The package imports neither torch, which `l2e-ds doctor` must do without, nor any other module."""
    code = "import sys; before = set(sys.modules); import l2e_ds; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['l2e_ds']"


def test_help_of_plan_needs_no_torch():
    code = "import contextlib, sys\nfrom l2e_ds.cli import main\nwith contextlib.suppress(SystemExit):\n"
    code += "    main(['plan', '--help'])\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--gpus" in done.stdout and done.stdout.splitlines()[-1] == "False"


def test_one_default_strength():
    """It stands in two places: the configuration must not import PyTorch, nor `inhibition` the configuration."""
    assert sections.DEFAULT_STRENGTH == of_inhibition.DEFAULT_STRENGTH


def test_every_name_is_there():
    for name in l2e_ds.__all__:
        assert getattr(l2e_ds, name) is not None
    assert set(l2e_ds.__all__) <= set(dir(l2e_ds))
    with pytest.raises(AttributeError, match="module 'l2e_ds' has no attribute 'nonsense'"):
        _ = l2e_ds.nonsense


def test_code_of_the_page_runs(capsys):
    """A network of one's own, as docs/python-api.md has it."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    torch.manual_seed(0)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})
    assert 0.005 < float(capsys.readouterr().out) < 0.08


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_share": 1}, "Settings.target_share: got 1, allowed: between 0 and 1"),
        ({"target_share": "x"}, "Settings.target_share: got 'x', allowed: between 0 and 1"),
        ({"coefficient": "1"}, "Settings.coefficient: got '1', allowed: 0 or more"),
        ({"strength": -0.1}, "Settings.strength: got -0.1, allowed: 0 or more"),
        ({"strength": 0.1, "coefficient": 0.1}, "Settings.strength: got 0.1 with coefficient 0.1, allowed: one of the"),
        ({"strength": 0.1, "mechanism": "naive-deactivation"}, "Settings.strength: got 0.1 with mechanism naive-deact"),
        ({"loss": "exact"}, "Settings.loss: got 'exact', allowed: published or scale-invariant or projected"),
        ({"power": 3}, "Settings.power: got 3, allowed: 0 or 1 or 2"),
        ({"start": 1.5}, "Settings.start: got 1.5, allowed: whole steps, or a share between 0 and 1"),
        ({"decay": -1}, "Settings.decay: got -1, allowed: whole steps, or a share between 0 and 1"),
        ({"end": 0}, "Settings.end: got 0, allowed: 1 step or more, a share between 0 and 1, or None"),
        ({"statistics_window": "50"}, "Settings.statistics_window: got '50', allowed: 1 step or more, or None"),
        ({"fused": "auto"}, "Settings.fused: got 'auto', allowed: True, False or None"),
        ({"fused": True, "reduce": "forward"}, "Settings.fused: got True with threshold, regulariser, forward"),
        ({"fused": True, "retrieval": "top-k"}, "Settings.fused: got True with top-k, regulariser, step"),
        ({"coefficient": -1.0}, "Settings.coefficient: got -1.0, allowed: 0 or more"),
        ({"coefficient": float("nan")}, "Settings.coefficient: got nan"),
        ({"warmup": -5}, "Settings.warmup: got -5, allowed: whole steps, or a share between 0 and 1"),
        ({"statistics_window": 0}, "Settings.statistics_window: got 0, allowed: 1 step or more, or None"),
        ({"retrieval": "topk"}, "Settings.retrieval: got 'topk', allowed: threshold or top-k"),
        ({"mechanism": "none"}, "Settings.mechanism: got 'none', allowed: regulariser or reverse-deactivation"),
        ({"reduce": "never"}, "Settings.reduce: got 'never', allowed: step or forward"),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Settings(**changes)


def test_a_share_of_zero_is_no_step():
    """As in run files, where a duration may be 0.0."""
    settings = Settings(start=0.0, warmup=0.0, decay=0.0).in_steps(100)
    assert (settings.start, settings.warmup, settings.decay) == (0, 0, 0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


def test_the_device_is_the_models():
    """Where it is not allowed, the error is one line."""
    layer = Layer()
    site = NeuronSite(3, layer, "act", "activation", 8)
    assert Inhibitor([site])._packed.device == torch.device("cpu")
    assert Inhibitor([NeuronSite(0, layer.to("meta"), "act", "activation", 8)])._packed.device == torch.device("meta")
    layer = Layer()
    for attribute, kind in (("act", "activation"), ("down", "projection")):
        elsewhere = Inhibitor([NeuronSite(3, layer, attribute, kind, 8)], device="meta")
        with elsewhere, pytest.raises(ValueError, match="is on meta, but the activations of layer 3 are on cpu"):
            layer(torch.randn(2, 5, 4))


def test_sites_that_cannot_be():
    """An unknown kind, a repeated layer (the loss would act twice) or number (its metrics would collide) is refused."""
    layer = Layer()
    with pytest.raises(ValueError, match=r"^NeuronSite\.kind: got 'proj', allowed: activation or projection$"):
        NeuronSite(0, layer, "down", "proj", 8)
    site = NeuronSite(0, layer, "act", "activation", 8)
    for other in (site, NeuronSite(0, Layer(), "act", "activation", 8)):
        with pytest.raises(
            ValueError, match=r"^Inhibitor: two sites have the layer number 0, allowed: one site a layer$"
        ):
            Inhibitor([site, other])
    with pytest.raises(ValueError, match=r"^Inhibitor: the sites of layers 0 and 1 are the same 'act' of the same mod"):
        Inhibitor([site, NeuronSite(1, layer, "act", "activation", 8)])


@pytest.mark.parametrize(("attribute", "kind"), [("act", "activation"), ("down", "projection")])
@pytest.mark.parametrize("neurons", [4, 16, 7])
def test_a_wrong_number_of_neurons(attribute, kind, neurons):
    """A wrong number of neurons is refused, also a divisor or multiple, which would count a wrong number of tokens."""
    layer = Layer()
    function = "gelu" if kind == "activation" else None
    inhibitor = Inhibitor([NeuronSite(3, layer, attribute, kind, neurons, function)])
    for inhibitor.steps in (0, 1):  # the second as after load_state_dict, when a GELU may be computed within the hook
        words = rf"^Inhibitor: NeuronSite\.neurons of layer 3 is {neurons}, but there are 8$"
        with inhibitor, pytest.raises(ValueError, match=words):
            layer(torch.randn(2, 5, 4))


def test_losses_that_cannot_be_attached():
    """The error is one line that names attach_loss; nothing was counted."""
    loss = torch.ones((), requires_grad=True)
    inhibitor = Inhibitor([NeuronSite(0, Layer(), "act", "activation", 8)])
    for given, error, words in (
        (1.0, TypeError, "got a loss of type float"),
        (torch.ones(2, requires_grad=True), ValueError, "got a loss of shape [2]"),
        (loss.detach(), ValueError, "got a loss without a gradient"),
    ):
        with pytest.raises(error, match=re.escape(f"attach_loss: {words}, allowed: a scalar tensor that requires a")):
            inhibitor.attach_loss(given)
    for weight in (-1, float("nan"), float("inf"), "1"):
        words = f"attach_loss: weight: got {weight!r}, allowed: 0 or more, or a tensor []"
        with pytest.raises(ValueError, match=re.escape(words)):
            inhibitor.attach_loss(loss, weight=weight)
    assert inhibitor._micro_batches == 0


def test_forward_passes_and_losses_out_of_order():
    """What a hook keeps of a micro-batch must not leak into the next one."""
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(2, 64, 4)
    for settings, mask, words in (
        (Settings(), None, "layer 0 saw 2 forward passes for 1 losses of this step; attach each loss directly after"),
        (Settings(), torch.ones(2, 64), "the loss before has not been through backward; with a token mask"),
        (Settings(reduce="forward"), None, "the loss before has not been through backward; with a token mask"),
    ):
        with Inhibitor([NeuronSite(0, layer, "act", "activation", 8)], settings) as inhibitor:
            for _ in range(2):  # nothing is projected before there is history
                inhibitor.attach_loss(layer(x).square().mean()).backward()
                inhibitor.step()
            inhibitor.set_token_mask(mask)
            with pytest.raises(ValueError, match=re.escape(f"attach_loss: {words}")):
                if words.startswith("layer"):
                    losses = [layer(x).square().mean() for _ in range(2)]
                    inhibitor.attach_loss(losses[0])
                else:
                    for _ in range(2):
                        inhibitor.attach_loss(layer(x).square().mean())
        with Inhibitor([NeuronSite(0, layer, "act", "activation", 8)], Settings()) as inhibitor:
            for _ in range(3):  # both losses in one backward pass
                sum(inhibitor.attach_loss(layer(x).square().mean()) for _ in range(2)).backward()
                inhibitor.step()


def test_weight_of_a_part_of_a_loss():
    """With a loss that is its share of a larger batch's, the gradient is that of the mean, divided afterwards."""
    gradients = []
    for inside in (False, True):
        torch.manual_seed(0)
        layer = Layer()
        with Inhibitor([NeuronSite(0, layer, "act", "activation", 8)], Settings(coefficient=0.5)) as inhibitor:
            for seed in range(3):
                layer.zero_grad()
                x = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(seed))
                loss = layer(x).square().mean()
                attached = (
                    inhibitor.attach_loss(loss / 4, weight=torch.tensor(0.25))
                    if inside
                    else inhibitor.attach_loss(loss) / 4
                )
                attached.backward()
                inhibitor.step()
            assert float(inhibitor.last[0, 0]) > 0
        gradients.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(*gradients)


def test_metrics_are_those_of_the_newest_step():
    torch.manual_seed(0)
    layers = [Layer(), Layer()]
    sites = [NeuronSite(i, layer, "act", "activation", 8) for i, layer in zip((1, 4), layers, strict=True)]
    with Inhibitor(sites, Settings(coefficient=0.5, warmup=4)) as inhibitor:
        assert inhibitor.metrics() == {}
        for _ in range(2):
            loss = sum(layer(torch.randn(2, 64, 4)).square().mean() for layer in layers)
            inhibitor.attach_loss(loss).backward()
            inhibitor.step()
    found = inhibitor.metrics()
    assert found["coefficient"] == 0.25
    assert found["observed_share"] == (found["layer1/observed_share"] + found["layer4/observed_share"]) / 2 > 0
    names = ("observed_share", "tau", "selected_score", "mean_s", "inhibition_loss", "coefficient", "strength")
    names += ("lm_gradient",)
    rows = dict(zip((1, 4), (dict(zip(names, row, strict=True)) for row in inhibitor.last.tolist()), strict=True))
    for layer, row in rows.items():
        assert {name: found[f"layer{layer}/{name}"] for name in names if name != "inhibition_loss"} == {
            name: value for name, value in row.items() if name != "inhibition_loss"
        }
    assert found["inhibition_loss"] == pytest.approx(rows[1]["inhibition_loss"] + rows[4]["inhibition_loss"])
