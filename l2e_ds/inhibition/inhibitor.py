"""`Inhibitor` puts the method into any PyTorch training loop:

    inhibitor = Inhibitor(neuron_sites(model, "mid-2"))
    with inhibitor:                                    # hooks on; removed at the end, also after an exception
        for batch in batches:
            loss = inhibitor.attach_loss(language_model_loss(model(batch)))
            loss.backward()                            # or engine.backward(loss)
            optimizer.step()
            inhibitor.step()                           # one packed all-reduce; moments and tau move

docs/python-api.md has more of it, and whole programs.

Shapes: B micro-batch sequences, T tokens a sequence, M = B * T, N neurons of a layer, L hooked layers.
Statistics and tau are the same on every rank, frozen within an optimizer step, and move only in `step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn

from l2e_ds.distributed.collectives import all_reduce_sum, begin_all_reduce_sum
from l2e_ds.errors import SelfTestError
from l2e_ds.inhibition import losses
from l2e_ds.inhibition.coefficients import Coefficients
from l2e_ds.inhibition.hook import Calls, InhibitedActivation, NeuronHook
from l2e_ds.inhibition.losses import Correction
from l2e_ds.inhibition.moments import Moments, fade_factor
from l2e_ds.inhibition.running_statistics import RunningStatistics
from l2e_ds.inhibition.settings import NeuronSite, Settings, require


class Inhibitor:
    """Owns the hooks of a model, their running statistics and thresholds. A context manager."""

    STATISTICS = (
        *("observed_share", "tau", "selected_score", "mean_s", "inhibition_loss"),
        *("coefficient", "strength", "lm_gradient"),
    )

    def __init__(
        self,
        sites: Sequence[NeuronSite],
        settings: Settings | None = None,
        device: torch.device | str | None = None,
        group: Any = None,
        run_steps: int | None = None,
    ) -> None:
        """`device`: where the model computes (default: where it is now); `group`: the data-parallel process group whose
        tokens count together (default: all ranks); `run_steps`: optimizer steps of the run, for a schedule in shares of
        it. Raises ValueError."""
        if not sites:
            raise ValueError("no neurons to inhibit: sites is empty")
        for one, other in combinations(sites, 2):
            if one.layer == other.layer:
                raise ValueError(f"Inhibitor: two sites have the layer number {one.layer}, allowed: one site a layer")
            if one.module is other.module and one.attribute == other.attribute:
                raise ValueError(
                    f"Inhibitor: the sites of layers {one.layer} and {other.layer} are the same {one.attribute!r} of"
                    " the same module, allowed: one site a layer"
                )
        device = device or _device_of(sites[0].module)
        self.settings = (settings or Settings()).in_steps(run_steps)
        self.group = group
        self.steps = 0  # applied optimizer steps that the statistics have seen
        self.fade = fade_factor(self.settings.statistics_window)
        self.in_backward = False
        self.self_test_pending = True
        self.last: Tensor | None = None  # [L, len(STATISTICS)] float64, of the newest applied step
        self._loss_gradient: Tensor | None = None
        self._micro_batches = self._backwards = 0  # attached, and in backward so far
        self._reduced: Callable[[], None] | None = None  # waits for the reduction that goes on
        self._token_mask: Tensor | None = None
        self._projection: Callable[[], list[Correction]] | None = None  # of the micro-batch that is in backward
        self.coefficients = Coefficients(self.settings, [site.neurons for site in sites], device, group)
        sizes = [NeuronHook.buffer_size(site.neurons) for site in sites]
        self._packed = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.hooks = [
            NeuronHook(self, index, site, sums)
            for index, (site, sums) in enumerate(zip(sites, self._packed.split(sizes), strict=True))
        ]
        self._undo: list[Any] = []
        self._decide_on_coming_step()

    def _decide_on_coming_step(self) -> None:
        # flags, because a compiled layer is compiled anew for every value of a number that it looks at
        self.has_history = self.steps > 0
        self.coefficients.decide(self.steps)
        self.is_inhibiting = self.coefficients.is_inhibiting
        self.is_measuring = self.coefficients.is_measuring
        self.is_projecting = self.is_measuring and self.settings.loss == "projected"

    # --- hooks on and off ----------------------------------------------------------------------------------------

    def __enter__(self) -> Inhibitor:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the hooks into the model (before deepspeed.initialize under ZeRO-3).

        Raises ValueError where hooks are there already, this Inhibitor's or another's: they would act twice.
        """
        if self._undo:
            raise ValueError("Inhibitor.attach: is attached already")
        for hook in self.hooks:
            if _is_hooked(getattr(hook.site.module, hook.site.attribute)):
                raise ValueError(
                    f"Inhibitor.attach: layer {hook.site.layer} has the hook of another Inhibitor; detach that first"
                )
        for hook in self.hooks:
            module, attribute = hook.site.module, hook.site.attribute
            child = getattr(module, attribute)
            if hook.site.kind == "activation":
                setattr(module, attribute, InhibitedActivation(child, hook))
                self._undo.append(
                    lambda module=module, attribute=attribute, child=child: setattr(module, attribute, child)
                )
            else:
                self._undo.append(child.register_forward_pre_hook(_projection_hook(hook)).remove)

    def detach(self) -> None:
        """Leave the model as it was."""
        while self._undo:
            self._undo.pop()()

    # --- every micro-batch ---------------------------------------------------------------------------------------

    def attach_loss(self, loss: Tensor, is_last: bool = False, weight: Tensor | float = 1.0) -> Tensor:
        """Return the same LM loss []; its backward tells the hooks the scale at which gradients arrive.

        is_last: no other micro-batch of this step follows: its sums are reduced over the ranks behind its backward.
        weight: [], of this micro-batch where the loss is not its mean but already its share of a larger batch's, i.e.
        weight * mean. Raises ValueError and TypeError; ValueError also where one follows the last nonetheless.
        """
        allowed = "allowed: a scalar tensor that requires a gradient"
        if not isinstance(loss, Tensor):
            raise TypeError(f"attach_loss: got a loss of type {type(loss).__name__}, {allowed}")
        if loss.dim() or not loss.requires_grad:
            given = f"of shape {[*loss.shape]}" if loss.dim() else "without a gradient"
            raise ValueError(f"attach_loss: got a loss {given}, {allowed}")
        if not isinstance(weight, Tensor):  # whose value would have to be waited for
            require("attach_loss: weight", weight, lambda share: 0 <= share < math.inf, "0 or more, or a tensor []")
        if self._reduced is not None:
            raise ValueError("attach_loss: the micro-batch before was said to be the last of its step")
        self._micro_batches += 1
        self._check_order()
        projection = self._begin_projection(weight) if self.is_projecting else None
        if is_last:
            self._reduced = begin_all_reduce_sum(self._packed, self.group)
        return losses.note_loss_gradient(loss, lambda gradient: self._begin_backward(gradient * weight, projection))

    def _check_order(self) -> None:
        """The next forward overwrites what hooks keep of a micro-batch. Raises ValueError where that is needed."""
        for hook in self.hooks:
            if self.is_projecting and hook.calls.forward != self._micro_batches:
                raise ValueError(
                    f"attach_loss: layer {hook.site.layer} saw {hook.calls.forward} forward passes for"
                    f" {self._micro_batches} losses of this step; attach each loss directly after its forward pass"
                )
        if self._micro_batches > self._backwards + 1 and (
            self.settings.reduce == "forward" or self._token_mask is not None
        ):
            raise ValueError(
                "attach_loss: the loss before has not been through backward; with a token mask or reduce: forward each"
                " micro-batch must go through backward before the next forward pass"
            )

    def _begin_projection(self, weight: Tensor | float) -> Callable[[], list[Correction]]:
        """Add up over the ranks what the projection of this micro-batch needs, while its backward begins; the returned
        function waits. A rank's tokens count as they do in the gradient: `weight` over their number."""
        sums = torch.cat([hook.projection_sums for hook in self.hooks]) * weight
        wait = begin_all_reduce_sum(sums, self.group)

        @cache
        def corrections() -> list[Correction]:
            wait()
            return [
                losses.projection(part) for part in sums.split([hook.projection_sums.numel() for hook in self.hooks])
            ]

        return corrections

    def projection_here(self, index: int) -> Correction:
        """Of the layer with this index among the hooked ones, in the micro-batch that is in backward."""
        if not self.in_backward or self._projection is None:
            raise SelfTestError("inhibition: backward ran on a loss that did not go through Inhibitor.attach_loss")
        return self._projection()[index]

    def set_token_mask(self, mask: Tensor | None) -> None:
        """Mask of the coming micro-batches, [B, T], nonzero where a token counts. Padding never counts."""
        self._token_mask = mask

    def token_weight(self, z: Tensor) -> Tensor | None:
        """[M, 1] float32 of 0 and 1, or None without padding."""
        if self._token_mask is None:
            return None
        weight = (self._token_mask != 0).reshape(-1, 1).to(z.device, torch.float32)
        if weight.shape[0] != z.shape[0]:
            raise ValueError(f"token mask of {weight.shape[0]} tokens, activations of {z.shape[0]}")
        return weight

    def _begin_backward(self, gradient: Tensor, projection: Callable[[], list[Correction]] | None) -> None:
        self._loss_gradient, self._projection = gradient, projection
        self._backwards += 1
        self.in_backward = True
        # the way that DDP and FSDP learn that a backward pass is over
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self.in_backward = False

    def loss_gradient_here(self) -> Tensor:
        """[] gradient that arrived at the LM loss (loss scale / accumulation steps)."""
        if not self.in_backward or self._loss_gradient is None:
            raise SelfTestError("inhibition: backward ran on a loss that did not go through Inhibitor.attach_loss")
        return self._loss_gradient

    # --- every step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, applied: bool = True) -> None:
        """After the optimizer's step: reduce the step's sums over ranks, move moments and tau, start anew.

        `applied` False (an overflow, a non-finite gradient; the same on every rank): the sums are dropped. Where they
        are not finite themselves, moments and tau stay in any case, but the step counts as one.
        Raises SelfTestError in the first step if a hook missed a call, or later if its gradient was zero.
        """
        if self.self_test_pending:
            self._check_calls()
        if self._reduced is not None:
            self._reduced()  # also where they are dropped: every rank takes part
        elif applied:
            all_reduce_sum(self._packed, self.group)
        self._reduced = None
        if applied:
            # of every layer or of none, the same on every rank, and without the host knowing
            finite = self._packed.isfinite().all()
            statistics = torch.stack([hook.update(finite) for hook in self.hooks])
            self.last = torch.cat([statistics, self.coefficients.advance(finite)], dim=1)
            if self.self_test_pending:
                self._check_gradients()
            self.steps += 1
            self._decide_on_coming_step()
        else:
            self.coefficients.drop()
        self._packed.zero_()
        self._micro_batches = self._backwards = 0
        self.in_backward = False
        for hook in self.hooks:
            hook.calls = Calls()

    def _check_calls(self) -> None:
        """Each hook once a micro-batch forward and backward; recomputed never or once a micro-batch."""
        expected = self._micro_batches
        for hook in self.hooks:
            calls = hook.calls
            if expected == 0 or not (calls.forward == calls.backward == expected and calls.recomputed in (0, expected)):
                raise SelfTestError(
                    f"inhibition self-test: layer {hook.site.layer} saw {calls.forward} forward,"
                    f" {calls.recomputed} recomputed and {calls.backward} backward passes in a step of"
                    f" {expected} micro-batches; expected {expected}, 0 or {expected}, and {expected}."
                    " Something between the loss and the model drops the hook or its gradient."
                )

    def _check_gradients(self) -> None:
        """Passed once every layer that selected something has also injected a gradient that is not zero."""
        assert self.last is not None
        if not self.settings.is_regularising:
            self.self_test_pending = False
        if not self.self_test_pending or not self.is_inhibiting:
            return
        # one rank may have selected nothing of a layer in a small batch; over all ranks the gradient must be there
        largest = all_reduce_sum(torch.stack([hook.largest_gradient for hook in self.hooks]), self.group)
        shares, is_on = self.last[:, 0], self.coefficients.values > 0
        values = (shares.tolist(), is_on.tolist(), largest.tolist())
        for hook, share, on, gradient in zip(self.hooks, *values, strict=True):
            if on and share > 0 and gradient == 0:
                raise SelfTestError(
                    f"inhibition self-test: layer {hook.site.layer} selected {share:.2%} of its activations,"
                    " but the gradient it injected is zero on every rank"
                )
        self.self_test_pending = not bool((is_on & (shares > 0)).all())

    def metrics(self) -> dict[str, float]:
        """Of the newest applied step, by the names of docs/metrics.md; empty before the first. Waits for the device."""
        if self.last is None:
            return {}
        columns = dict(zip(self.STATISTICS, self.last.T, strict=True))
        values = {name: float(columns[name].mean()) for name in ("observed_share", "coefficient", "strength")}
        values["inhibition_loss"] = float(columns["inhibition_loss"].sum())
        for hook, row in zip(self.hooks, self.last.tolist(), strict=True):
            named = zip(self.STATISTICS, row, strict=True)
            values |= {f"layer{hook.site.layer}/{name}": value for name, value in named if name != "inhibition_loss"}
        return values

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the method remembers, as tensors on the CPU (float64 and int64), the same on every rank."""
        state = {"steps": torch.tensor(self.steps)}
        measured = self.coefficients.state_dict()
        for hook in self.hooks:
            state |= {
                f"layers.{hook.site.layer}.{name}": tensor.detach().cpu().clone()
                for name, tensor in {
                    "count": hook.running.moments.count,
                    "mean": hook.running.moments.mean,
                    "m2": hook.running.moments.m2,
                    "tau": hook.running.tau,
                    "selected": hook.running.selected,
                    "selectable": hook.running.selectable,
                    **{name: tensor[hook.index] for name, tensor in measured.items()},
                }.items()
            }
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError where the state is of other layers or sizes. One that was saved before there was a strength
        lacks what is measured for it, which begins anew."""
        measured = self.coefficients.state_dict()
        new = {
            f"layers.{hook.site.layer}.{name}": measured[name][hook.index] for name in measured for hook in self.hooks
        }
        state = {name: torch.zeros_like(tensor) for name, tensor in new.items()} | state
        expected = {name: tensor.shape for name, tensor in self.state_dict().items()}
        given = {name: tensor.shape for name, tensor in state.items()}
        if expected != given:
            different = sorted(n for n in expected.keys() | given.keys() if expected.get(n) != given.get(n))
            raise ValueError(f"inhibition state does not fit this model's hooked layers: {', '.join(different[:4])}")
        self.steps = int(state["steps"])
        layers = [f"layers.{hook.site.layer}." for hook in self.hooks]
        self.coefficients.load_state_dict(
            {name: torch.stack([state[layer + name] for layer in layers]).to(self._packed.device) for name in measured}
        )
        self._decide_on_coming_step()
        for hook in self.hooks:
            prefix, device = f"layers.{hook.site.layer}.", self._packed.device
            part = {n.removeprefix(prefix): t.to(device) for n, t in state.items() if n.startswith(prefix)}
            moments = Moments(part["count"], part["mean"], part["m2"])
            hook.running = RunningStatistics(moments, part["tau"], part["selected"], part["selectable"])
            hook.freeze()


def _device_of(module: nn.Module) -> torch.device:
    """Of its weights; the CPU where it has none."""
    tensor = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _is_hooked(child: nn.Module) -> bool:
    """Return whether an `InhibitedActivation` stands in its place, or a `_projection_hook` before it."""
    before = getattr(child, "_forward_pre_hooks", {}).values()
    return isinstance(child, InhibitedActivation) or any(getattr(f, "__module__", None) == __name__ for f in before)


def _projection_hook(hook: NeuronHook) -> Any:
    def before_forward(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (hook(inputs[0]), *inputs[1:]) if module.training else None

    return before_forward
