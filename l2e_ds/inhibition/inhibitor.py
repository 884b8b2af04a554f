"""Put the method into any PyTorch training loop.

    inhibitor = Inhibitor(neuron_sites(model, "mid-2"))
    with inhibitor:                                    # attaches hooks, and removes them, also after an exception
        for batch in batches:
            loss = inhibitor.attach_loss(language_model_loss(model(batch)))
            loss.backward()                            # or engine.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            inhibitor.step()                           # one packed all-reduce; moments and tau move

docs/python-api.md explains this and has whole programs.

Shapes: B sequences per micro-batch, T tokens per sequence, M = B * T, N neurons of a layer, L hooked layers.
Running statistics and tau are the same on every rank, constant within an optimizer step, and move only in `step`.
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
from l2e_ds.inhibition.hook import Calls, InhibitedActivation, NeuronHook, freeze, update
from l2e_ds.inhibition.losses import Correction
from l2e_ds.inhibition.moments import Moments, fade_factor
from l2e_ds.inhibition.running_statistics import RunningStatistics, row_of, stacked
from l2e_ds.inhibition.settings import NeuronSite, Settings, require

_NOT_ATTACHED = "inhibition: backward ran on a loss that did not go through Inhibitor.attach_loss"


class Inhibitor:
    """Owns the hooks of a model, their running statistics and thresholds.

    As a context manager it attaches the hooks, and detaches them at the end.
    """

    STATISTICS = (
        *("observed_share", "tau", "selected_score", "mean_s", "inhibition_loss"),
        *("coefficient", "strength", "lm_gradient"),
    )
    """The metrics of a hooked layer and step (docs/metrics.md), in the order of the columns of `last`."""

    def __init__(
        self,
        sites: Sequence[NeuronSite],
        settings: Settings | None = None,
        device: torch.device | str | None = None,
        group: Any = None,
        run_steps: int | None = None,
    ) -> None:
        """Make the hooks, without attaching them.

        sites: where the neurons are, one site per layer. settings: default `Settings()`. device: where the model
        computes (default: where it is now). group: the data-parallel process group over whose tokens statistics are
        taken (default: all ranks). run_steps: optimizer steps of the run, which a schedule in shares of it needs.

        Raises ValueError for no site, two sites of one layer, or a schedule that does not fit into the run.
        """
        if not sites:
            raise ValueError("Inhibitor: got no sites, allowed: one or more")
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
        self.in_backward = False  # whether the backward pass of an attached loss is running
        self.self_test_pending = True
        self.last: Tensor | None = None  # [L, len(STATISTICS)] float64, of the newest applied step
        self._loss_gradient: Tensor | None = None
        self._micro_batches = self._backwards = 0  # losses attached in this step, and backward passes begun
        self._reduced: Callable[[], None] | None = None  # waits for the reduction that has begun
        self._token_mask: Tensor | None = None
        self._projection: Callable[[], dict[int, Correction]] | None = None  # of the micro-batch that is in backward
        self.coefficients = Coefficients(self.settings, [site.neurons for site in sites], device, group)
        sizes = [NeuronHook.buffer_size(site.neurons) for site in sites]
        self._packed = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.hooks = [
            NeuronHook(self, index, site, sums)
            for index, (site, sums) in enumerate(zip(sites, self._packed.split(sizes), strict=True))
        ]
        # Their small operations of a step are done together, which on a GPU saves launches.
        widths = dict.fromkeys(site.neurons for site in sites)
        self._by_width = [[hook for hook in self.hooks if hook.site.neurons == width] for width in widths]
        self._undo: list[Any] = []
        self._decide_on_coming_step()

    def _decide_on_coming_step(self) -> None:
        # These are flags because torch.compile compiles a layer anew for every value of a number that it reads.
        self.has_history = self.steps > 0  # whether a step has been applied before
        self.coefficients.decide(self.steps)
        # whether activations or gradients are changed
        self.is_inhibiting = self.coefficients.is_inhibiting
        # whether gradients are measured: while inhibiting, and some steps before
        self.is_measuring = self.coefficients.is_measuring
        # whether micro-batches need a projection
        self.is_projecting = self.is_measuring and self.settings.loss == "projected"
        if self.steps == max(self.settings.start, 1):
            self._note_start()

    def _note_start(self) -> None:
        for hook in self.hooks:
            hook.note_start()

    # --- hooks on and off ----------------------------------------------------------------------------------------

    def __enter__(self) -> Inhibitor:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the hooks into the model. Under ZeRO-3, call it before `deepspeed.initialize`.

        Raises ValueError if there are hooks already, this Inhibitor's or another's, as two would act twice.
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
        """Remove the hooks, which leaves the model as it was."""
        while self._undo:
            self._undo.pop()()

    # --- every micro-batch ---------------------------------------------------------------------------------------

    def attach_loss(self, loss: Tensor, is_last: bool = False, weight: Tensor | float = 1.0) -> Tensor:
        """Return the same LM loss, []; in its backward the hooks add the gradient of the inhibition loss.

        Call it for each micro-batch, directly after its forward pass. is_last: whether this is the last micro-batch of
        the step; the step's sums are then reduced over the ranks during its backward. weight: a number or a tensor [];
        if the loss is not the mean over the micro-batch's tokens, but weight * mean, as a part of a larger batch's
        loss. Collective if the loss is projected or is_last.

        Raises TypeError for a loss that is not a tensor, and ValueError for one that is not a scalar with a gradient,
        for a negative weight, for losses and forward passes out of order, and for a loss after the last one.
        """
        allowed = "allowed: a scalar tensor that requires a gradient"
        if not isinstance(loss, Tensor):
            raise TypeError(f"attach_loss: got a loss of type {type(loss).__name__}, {allowed}")
        if loss.dim() or not loss.requires_grad:
            given = f"of shape {[*loss.shape]}" if loss.dim() else "without a gradient"
            raise ValueError(f"attach_loss: got a loss {given}, {allowed}")
        if not isinstance(weight, Tensor):  # to read the value of a tensor, the host would wait for the device
            require("attach_loss: weight", weight, lambda share: 0 <= share < math.inf, "0 or more, or a tensor []")
        if self._reduced is not None:
            raise ValueError("attach_loss: got a loss after that of the last micro-batch (is_last) of its step")
        self._micro_batches += 1
        self._check_order()
        projection = self._begin_projection(weight) if self.is_projecting else None
        if is_last:
            self._reduced = begin_all_reduce_sum(self._packed, self.group)
        return losses.note_loss_gradient(loss, lambda gradient: self._begin_backward(gradient * weight, projection))

    def _check_order(self) -> None:
        """Raise ValueError if a forward pass overwrote what the hooks keep of a micro-batch before it was used."""
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
                "attach_loss: the loss before has not been through backward; with a token mask or reduce: forward, each"
                " micro-batch must go through backward before the next forward pass"
            )

    def _begin_projection(self, weight: Tensor | float) -> Callable[[], dict[int, Correction]]:
        """Begin to reduce what the projection of this micro-batch needs over the ranks. Collective.

        Returns a function that waits for it and returns each layer's correction, by the index of its hook. A rank's
        tokens weigh what they weigh in the gradient: `weight` over their number.
        """
        sums = torch.cat([hook.projection_sums for hook in self.hooks]) * weight
        wait = begin_all_reduce_sum(sums, self.group)

        @cache
        def corrections() -> dict[int, Correction]:
            wait()
            parts = sums.split([hook.projection_sums.numel() for hook in self.hooks])
            found: dict[int, Correction] = {}
            for hooks in self._by_width:
                kept = torch.stack([hook.kept_pull for hook in hooks])
                together = losses.projection(torch.stack([parts[hook.index] for hook in hooks]), kept)
                found |= {hook.index: row_of(together, place) for place, hook in enumerate(hooks)}
            return found

        return corrections

    def projection_here(self, index: int) -> Correction:
        """Return the projection of the micro-batch that is in backward, for the hook with this index.

        Raises SelfTestError if its loss was not attached.
        """
        if not self.in_backward or self._projection is None:
            raise SelfTestError(_NOT_ATTACHED)
        return self._projection()[index]

    def set_token_mask(self, mask: Tensor | None) -> None:
        """Set the mask of the following micro-batches, so that their padding does not count.

        mask: [B, T], any dtype, nonzero where a token counts; None: every token counts.
        """
        self._token_mask = mask

    def token_weight(self, z: Tensor) -> Tensor | None:
        """Return the token mask as [M, 1] float32 of 0 and 1, or None if there is none. z: [M, N] activations.

        Raises ValueError for a mask of another number of tokens.
        """
        if self._token_mask is None:
            return None
        weight = (self._token_mask != 0).reshape(-1, 1).to(z.device, torch.float32)
        if weight.shape[0] != z.shape[0]:
            raise ValueError(f"set_token_mask: got a mask of {weight.shape[0]} tokens, allowed: one of {z.shape[0]}")
        return weight

    def _begin_backward(self, gradient: Tensor, projection: Callable[[], dict[int, Correction]] | None) -> None:
        self._loss_gradient, self._projection = gradient, projection
        self._backwards += 1
        self.in_backward = True
        # DDP and FSDP, too, learn in this way that a backward pass is over.
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self.in_backward = False

    def loss_gradient_here(self) -> Tensor:
        """Return the gradient that arrived at the LM loss, times its weight, [] (loss scale / accumulation steps).

        Raises SelfTestError if the loss in backward was not attached.
        """
        if not self.in_backward or self._loss_gradient is None:
            raise SelfTestError(_NOT_ATTACHED)
        return self._loss_gradient

    # --- every step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, applied: bool = True) -> None:
        """Move moments and tau by the step's sums over all ranks, and begin a new step. Collective.

        Call it after the optimizer's step. applied: whether that changed the weights, the same on every rank; if not
        (after an overflow or a non-finite gradient), the sums are dropped. If the sums themselves are not finite,
        moments and tau stay, but the step counts in the schedule.

        Raises SelfTestError if a hook missed a call in a step before the self-test has passed, which a regulariser does
        once every layer has injected a gradient, or if in the first steps with inhibition that gradient was zero.
        """
        if self.self_test_pending:
            self._check_calls()
        if self._reduced is not None:
            self._reduced()  # even if they are dropped
        elif applied:
            all_reduce_sum(self._packed, self.group)
        self._reduced = None
        if applied:
            # All layers move or none, the same on every rank, and the host does not wait to know.
            finite = self._packed.isfinite().all()
            rows: dict[int, Tensor] = {}
            for hooks in self._by_width:
                rows |= zip((hook.index for hook in hooks), update(hooks, finite), strict=True)
            statistics = torch.stack([rows[hook.index] for hook in self.hooks])
            self.last = torch.cat([statistics, self.coefficients.advance(finite)], dim=1)
            if self.self_test_pending:
                self._check_gradients()
            self.steps += 1
            self._decide_on_coming_step()
        else:
            self.coefficients.squares.zero_()
        self._packed.zero_()
        self._micro_batches = self._backwards = 0
        self.in_backward = False
        for hook in self.hooks:
            hook.calls = Calls()

    def _check_calls(self) -> None:
        """Check that each hook ran once per micro-batch forward and backward, and was recomputed never or once.

        Raises SelfTestError.
        """
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
        """Check that every layer which selected something injected a gradient other than zero. Collective.

        The test is over once all layers have passed. Raises SelfTestError.
        """
        assert self.last is not None
        if not self.settings.is_regularising:
            self.self_test_pending = False
        if not self.self_test_pending or not self.is_inhibiting:
            return
        # In a small batch one rank may select nothing in a layer; over all ranks the gradient must be there.
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
        """Return the metrics of the newest applied step by the names of docs/metrics.md, over all ranks.

        There are none before the first applied step. The host waits for the device.
        """
        if self.last is None:
            return {}
        columns = dict(zip(self.STATISTICS, self.last.T, strict=True))
        values = {name: float(columns[name].mean()) for name in ("observed_share", "coefficient", "strength")}
        values["inhibition_loss"] = float(columns["inhibition_loss"].sum())
        left_out = {"inhibition_loss"} if self.settings.retrieval == "threshold" else {"inhibition_loss", "tau"}
        for hook, row in zip(self.hooks, self.last.tolist(), strict=True):
            named = zip(self.STATISTICS, row, strict=True)
            values |= {f"layer{hook.site.layer}/{name}": value for name, value in named if name not in left_out}
        return values

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the method remembers, the same on every rank.

        The tensors are float64 on the CPU, except `steps`, which is int64.
        """
        state = {"steps": torch.tensor(self.steps)}
        measured = self.coefficients.state_dict()
        for hook in self.hooks:
            state |= {
                f"layers.{hook.site.layer}.{name}": tensor.detach().cpu().clone()
                for name, tensor in {
                    "count": hook.running.moments.count[0],
                    "mean": hook.running.moments.mean,
                    "m2": hook.running.moments.m2,
                    "tau": hook.running.tau[0],
                    "selected": hook.running.selected,
                    "selectable": hook.running.selectable[0],
                    "variance_at_start": hook.variance_at_start,
                    **{name: tensor[hook.index] for name, tensor in measured.items()},
                }.items()
            }
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned. Raises ValueError for a state of other layers or sizes."""
        measured = self.coefficients.state_dict()
        expected = {name: tensor.shape for name, tensor in self.state_dict().items()}
        given = {name: tensor.shape for name, tensor in state.items()}
        if expected != given:
            different = sorted(n for n in expected.keys() | given.keys() if expected.get(n) != given.get(n))
            raise ValueError(f"inhibition state: does not fit this model's hooked layers: {', '.join(different[:4])}")
        self.steps = int(state["steps"])
        layers = [f"layers.{hook.site.layer}." for hook in self.hooks]
        self.coefficients.load_state_dict(
            {name: torch.stack([state[layer + name] for layer in layers]).to(self._packed.device) for name in measured}
        )
        for hook in self.hooks:
            prefix, device = f"layers.{hook.site.layer}.", self._packed.device
            part = {n.removeprefix(prefix): t.to(device) for n, t in state.items() if n.startswith(prefix)}
            moments = Moments(part["count"][None], part["mean"], part["m2"])
            hook.running = RunningStatistics(moments, part["tau"][None], part["selected"], part["selectable"][None])
            hook.variance_at_start = part["variance_at_start"]
        for hooks in self._by_width:
            freeze(hooks, stacked([hook.running for hook in hooks]))
        self._decide_on_coming_step()
        is_noted = any(bool(hook.variance_at_start.any()) for hook in self.hooks)
        if self.steps > self.settings.start and not is_noted:
            # The run that was saved had not begun to inhibit; this one should have, and begins here.
            self._note_start()


def _device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's weights or buffers, or the CPU if it has none."""
    tensor = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _is_hooked(child: nn.Module) -> bool:
    """Return whether an `InhibitedActivation` has taken the child's place, or it has a `_projection_hook`."""
    before = getattr(child, "_forward_pre_hooks", {}).values()
    return isinstance(child, InhibitedActivation) or any(getattr(f, "__module__", None) == __name__ for f in before)


def _projection_hook(hook: NeuronHook) -> Any:
    """Return a forward pre-hook that passes a projection's input through the hook, in training only."""

    def before_forward(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (hook(inputs[0]), *inputs[1:]) if module.training else None

    return before_forward
