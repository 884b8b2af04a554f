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
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from l2e_ds.distributed import all_reduce_sum, begin_all_reduce_sum
from l2e_ds.errors import SelfTestError
from l2e_ds.inhibition import losses, memel
from l2e_ds.inhibition.losses import FrozenStatistics
from l2e_ds.inhibition.moments import Moments, exact_sums, fade_factor, sample_count, shifted_sums
from l2e_ds.inhibition.running_statistics import moved_statistics
from l2e_ds.inhibition.threshold import initial_threshold

if TYPE_CHECKING:
    from l2e_ds.inhibition.fused import ColumnSums


# Activations of a layer and micro-batch from which compiling (ten seconds, once a machine) pays on a CPU; fewer cost a
# few milliseconds in plain operations.
WORTH_COMPILING = 2**20


@dataclass(frozen=True)
class NeuronSite:
    """Where one layer's neurons are: what `module.attribute` returns (activation) or is given (projection).

    function: what an activation computes, where a GPU kernel may compute it in the same pass: the exact GELU.
    Raises ValueError.
    """

    layer: int
    module: nn.Module
    attribute: str
    kind: Literal["activation", "projection"]
    neurons: int
    function: Literal["gelu"] | None = None

    def __post_init__(self) -> None:
        _require("NeuronSite.kind", self.kind, lambda kind: kind in _KINDS, " or ".join(_KINDS))


@dataclass(frozen=True)
class Settings:
    """What the hooks do; the run file's section `inhibition` documents the choices. Raises ValueError."""

    retrieval: Literal["threshold", "top-k"] = "threshold"
    mechanism: Literal["regulariser", "reverse-deactivation", "naive-deactivation"] = "regulariser"
    scale_invariant: bool = False
    target_share: float = 0.02
    coefficient: float = 1e-3
    coefficient_warmup: int = 0
    statistics_window: int | None = 50
    reduce: Literal["step", "forward"] = "step"
    fused: bool | None = None  # one compiled pass (fused.py); None: where it pays

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            self._check(name, choices.__contains__, " or ".join(choices))
        self._check("scale_invariant", lambda value: isinstance(value, bool), "True or False")
        self._check("target_share", lambda share: 0 < share < 1, "between 0 and 1")
        self._check("coefficient", lambda coefficient: 0 <= coefficient < math.inf, "0 or more")
        self._check("coefficient_warmup", lambda steps: steps >= 0, "0 or more steps")
        window = "1 step or more, or None: all steps"
        self._check("statistics_window", lambda steps: steps is None or steps >= 1, window)
        self._check("fused", lambda value: value is None or isinstance(value, bool), "True, False or None")

    def _check(self, name: str, holds: Callable[[Any], bool], allowed: str) -> None:
        _require(f"Settings.{name}", getattr(self, name), holds, allowed)


_KINDS = ("activation", "projection")
_CHOICES: dict[str, tuple[str, ...]] = {
    "retrieval": ("threshold", "top-k"),
    "mechanism": ("regulariser", "reverse-deactivation", "naive-deactivation"),
    "reduce": ("step", "forward"),
}


def _require(where: str, given: Any, holds: Callable[[Any], bool], allowed: str) -> None:
    try:
        fine = holds(given)
    except TypeError:  # no number, compared with one
        fine = False
    if not fine:
        raise ValueError(f"{where}: got {given!r}, allowed: {allowed}")


@dataclass
class Calls:
    """How often a hook ran within this optimizer step (for the self-test)."""

    forward: int = 0
    recomputed: int = 0
    backward: int = 0


class NeuronHook:
    """One layer's share of the method: sees its neurons, sums statistics, selects, inhibits."""

    HEADER = 3  # tokens, inhibition loss (sum over the selected), score (sum over the selected)

    def __init__(self, owner: Inhibitor, site: NeuronSite, sums: Tensor) -> None:
        self.owner, self.site, self.settings = owner, site, owner.settings
        self.sums = sums  # [HEADER + 3 N] float64, a view of the packed buffer: d, d^2, selected per neuron
        self.moments = Moments.empty(site.neurons, sums.device)
        self.tau = torch.tensor(initial_threshold(self.settings.target_share), dtype=torch.float64, device=sums.device)
        self.selected = torch.zeros(site.neurons, dtype=torch.float64, device=sums.device)  # faded count per neuron
        self.selectable = torch.zeros((), dtype=torch.float64, device=sums.device)  # faded count of tokens
        self.calls = Calls()
        self.fused = self.is_gelu = self.in_kernel = False  # this micro-batch
        self.has_triton = getattr(find_spec("triton"), "origin", None) is not None  # a mere folder has none
        self.interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # tests: Triton runs on a CPU, too
        self.largest_gradient = torch.zeros((), device=sums.device)
        self.weight: Tensor | None = None
        self._freeze()

    @staticmethod
    def buffer_size(neurons: int) -> int:
        return NeuronHook.HEADER + 3 * neurons

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of the sums: header [3], d [N], d^2 [N], selected [N]."""
        n = self.site.neurons
        header, d, d2, selected = self.sums.split([self.HEADER, n, n, n])
        return header, d, d2, selected

    def _freeze(self) -> None:
        """Make float32 constants of the state, for one optimizer step."""
        self.frozen = self.frozen_now = self.for_loss = self._statistics(self.moments)

    def _is_fused(self, z: Tensor) -> bool:
        """Whether forward and backward of this micro-batch go through fused.py.

        Not padding, nor the methods that cost what top-k or an all-reduce in forward costs.
        """
        settings = self.settings
        if settings.fused is False or (settings.retrieval, settings.mechanism) != ("threshold", "regulariser"):
            return False
        if settings.reduce == "forward" or self.weight is not None:
            return False
        return bool(settings.fused) or z.is_cuda or (z.device.type == "cpu" and z.numel() >= WORTH_COMPILING)

    def computes(self, x: Tensor) -> bool:
        """Whether the activation function of x [B, T, N] is to be computed by `gelu`.

        Not with lambda 0, when a run is to be the same to the bit as without inhibition, and not without history, when
        moments need a second pass. Recomputation goes the way that its forward went.
        """
        if not self.owner.in_backward:
            self.in_kernel = self.is_gelu = False
            if self.site.function == "gelu" and self.owner.is_inhibiting:
                self._check(x)
                self.weight = self.owner.token_weight(x.reshape(-1, self.site.neurons))
                self.in_kernel = self._has_kernel(x) and self._is_fused(x)
                self.is_gelu = self.in_kernel or (x.device.type == "cpu" and self._is_fused(x))
        return self.is_gelu

    def _has_kernel(self, x: Tensor) -> bool:
        """Whether Triton takes it."""
        return self.has_triton and (x.is_cuda or self.interpreted) and x.dtype != torch.float64

    def _statistics(self, moments: Moments) -> FrozenStatistics:
        rate = self.selected / self.selectable.clamp(min=1)
        return FrozenStatistics(moments.mean.float(), moments.variance.float(), self.tau.float(), rate.float())

    # --- forward -------------------------------------------------------------------------------------------------

    def _check(self, activations: Tensor) -> None:
        if activations.shape[-1] != self.site.neurons:
            raise ValueError(
                f"Inhibitor: NeuronSite.neurons of layer {self.site.layer} is {self.site.neurons}, found are"
                f" {activations.shape[-1]}"
            )
        if activations.device != self.sums.device:
            raise ValueError(
                f"Inhibitor: is on {self.sums.device}, the activations of layer {self.site.layer} on"
                f" {activations.device}; make it after the model was moved, or give it device="
            )

    def __call__(self, activations: Tensor) -> Tensor:
        """[B, T, N] -> [B, T, N]: the same activations (regulariser), or with the selected ones replaced."""
        self._check(activations)
        z = activations.reshape(-1, self.site.neurons)
        if self.owner.in_backward:  # activation checkpointing runs forward again: same statistics, nothing counted
            self.calls.recomputed += 1
            selected = None
        else:
            self.calls.forward += 1
            self.weight = self.owner.token_weight(z)
            self.fused = self._is_fused(z)
            selected = None
            if self.fused:
                self._observe_in_one_pass(z.detach())
            else:
                selected = self._observe(z.detach())
        if self.settings.mechanism == "regulariser":
            return losses.add_inhibition_gradient(z, self._add_gradient).view_as(activations)
        deactivate = {
            "reverse-deactivation": memel.reverse_deactivation,
            "naive-deactivation": memel.naive_deactivation,
        }[self.settings.mechanism]
        if selected is None:
            selected = self._select(losses.score(z.detach(), self.frozen_now))
        return deactivate(z, self.frozen_now.mean, selected, self._count_backward).view_as(activations)

    def gelu(self, x: Tensor) -> Tensor:
        """As `__call__` of the GELU of x, [B, T, N] -> [B, T, N]."""
        from l2e_ds.inhibition import fused  # here: with torch's compiler, which takes seconds to import

        flat = x.reshape(-1, self.site.neurons)
        keep = not self.in_kernel
        return fused.with_inhibition(flat, self._compute_gelu, self._gelu_gradient, keep).view_as(x)

    def _compute_gelu(self, x: Tensor) -> Tensor:
        counted = not self.owner.in_backward
        self.calls.forward += counted
        self.calls.recomputed += not counted
        if counted:
            self.fused = True
            self.frozen_now = self.for_loss = self.frozen
        if self.in_kernel:
            from l2e_ds.inhibition import triton_gelu

            z, sums = triton_gelu.forward(x, self.frozen)
            if counted:
                self._count(sums, x.shape[0])
        else:
            z = nn.functional.gelu(x)
            if counted:
                self._observe_in_one_pass(z)
        return z

    @torch.no_grad()
    def _observe(self, z: Tensor) -> Tensor:
        """Add this micro-batch to the step's sums; with `reduce: forward` ask the other ranks first.

        Returns what is selected, [M, N] bool.
        """
        header, d, d2, selected_per_neuron = self._parts()
        shift = self.frozen.mean
        sums = shifted_sums if self.owner.has_history else exact_sums  # without history the mean may be far away
        sum_d, sum_d2 = sums(z, shift, self.weight)
        tokens = sample_count(z, self.weight)
        self.frozen_now = self.for_loss = self.frozen
        if self.settings.reduce == "forward":
            self._freeze_for_micro_batch(tokens, sum_d, sum_d2)
        scores = losses.score(z, self.frozen_now)
        selected = self._select(scores)
        count = selected.sum(0).double()
        if self.settings.reduce == "forward" and self.settings.scale_invariant:
            self._freeze_for_exact_loss(count.clone(), tokens, sum_d, sum_d2)
        loss = losses.inhibition_loss(z, selected, self.for_loss, self.settings.scale_invariant, self.weight)
        header += torch.stack([tokens, loss.double(), torch.where(selected, scores, 0.0).sum().double()])
        d += sum_d
        d2 += sum_d2
        selected_per_neuron += count
        return selected

    def _observe_in_one_pass(self, z: Tensor) -> None:
        """As `_observe`."""
        from l2e_ds.inhibition import fused  # here: with torch's compiler, which takes seconds to import

        self.frozen_now = self.for_loss = self.frozen
        sums = fused.column_sums if self.owner.has_history else fused.exact_column_sums
        self._count(sums(z, self.frozen), z.shape[0])

    @torch.no_grad()
    def _count(self, sums: ColumnSums, samples: int) -> None:
        """Add a micro-batch's sums to the step's."""
        header, d, d2, selected = self._parts()
        loss = sums.inhibition_loss(self.frozen, self.settings.scale_invariant, samples)
        header += torch.stack([loss.new_full((), samples), loss, sums.score])
        d += sums.d
        d2 += sums.d2
        selected += sums.selected

    def _freeze_for_micro_batch(self, tokens: Tensor, sum_d: Tensor, sum_d2: Tensor) -> None:
        """`reduce: forward`: statistics of all earlier steps and of this micro-batch of every rank."""
        packed = all_reduce_sum(torch.cat([tokens.reshape(1), sum_d, sum_d2]), self.owner.group)
        count, sum_d, sum_d2 = packed.split([1, self.site.neurons, self.site.neurons])
        batch = Moments.from_sums(count[0], sum_d, sum_d2, self.frozen.mean.double())
        self.frozen_now = self.for_loss = self._statistics(self.moments.fade(self.owner.fade).merge(batch))

    def _freeze_for_exact_loss(self, selected: Tensor, tokens: Tensor, sum_d: Tensor, sum_d2: Tensor) -> None:
        """`reduce: forward`, scale-invariant: rate and mean d^2 of this very micro-batch over all ranks."""
        n = self.site.neurons
        packed = all_reduce_sum(torch.cat([tokens.reshape(1), sum_d, sum_d2, selected]), self.owner.group)
        count, sum_d, sum_d2, selected = packed.split([1, n, n, n])
        offset = self.frozen.mean.double() - self.frozen_now.mean.double()
        spread = (sum_d2 + 2 * offset * sum_d) / count + offset * offset
        self.for_loss = replace(self.frozen_now, variance=spread.float(), rate=(selected / count).float())

    def _select(self, scores: Tensor) -> Tensor:
        if self.settings.retrieval == "threshold":
            selected = losses.select_by_threshold(scores, self.frozen_now)
        else:
            selected = losses.select_top_k(scores, self.frozen_now, self.settings.target_share)
        return selected if self.weight is None else selected & (self.weight > 0)

    # --- backward ------------------------------------------------------------------------------------------------

    def _count_backward(self) -> None:
        self.calls.backward += 1

    def _add_gradient(self, incoming: Tensor, z: Tensor) -> Tensor:
        """The gradient of z [M, N] with the inhibition's: + loss gradient * lambda / n * dL/dz, unless lambda is 0."""
        self._count_backward()
        if self.owner.coefficient == 0:
            return incoming
        strength = self.strength(z)
        if self.fused:
            outgoing = self._fused_gradient(incoming, z, strength)
            if self.owner.self_test_pending:
                self._note_largest(self._fused_gradient(torch.zeros_like(incoming), z, strength))
            return outgoing
        selected = self._select(losses.score(z, self.frozen_now))
        gradient = losses.inhibition_gradient(z, selected, self.for_loss, self.settings.scale_invariant) * strength
        if self.weight is not None:
            gradient = gradient * self.weight
        if self.owner.self_test_pending:
            self._note_largest(gradient)
        return incoming + gradient.to(incoming.dtype)

    def _fused_gradient(self, incoming: Tensor, z: Tensor, strength: Tensor) -> Tensor:
        from l2e_ds.inhibition import fused

        return fused.add_gradient(incoming, z, self.for_loss, self.settings.scale_invariant, strength)

    def _gelu_gradient(self, incoming: Tensor, x: Tensor, z: Tensor | None) -> Tensor:
        """The gradient of x [M, N] from that of its GELU z, with the inhibition's."""
        self._count_backward()
        constants = (self.for_loss, self.settings.scale_invariant, self.strength(x))

        def gradient(incoming: Tensor) -> Tensor:
            if z is None:
                from l2e_ds.inhibition import triton_gelu

                return triton_gelu.backward(x, incoming, *constants)
            from l2e_ds.inhibition import fused

            return fused.gelu_backward(x, z, incoming, *constants)

        if self.owner.self_test_pending:
            self._note_largest(gradient(torch.zeros_like(incoming)))
        return gradient(incoming)

    def _note_largest(self, gradient: Tensor) -> None:
        self.largest_gradient = torch.maximum(self.largest_gradient, gradient.abs().max().float())

    def strength(self, z: Tensor) -> Tensor:
        """[] float32: gradient that arrived at the LM loss * lambda / n, n = share * tokens * N; z: [M, N]."""
        tokens = z.shape[0] if self.weight is None else self.weight.sum().clamp(min=1)
        scale = self.owner.loss_gradient_here().float() * self.owner.coefficient
        return scale / (self.settings.target_share * tokens * self.site.neurons)

    # --- once a step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, finite: Tensor) -> Tensor:
        """Move moments and tau by the (reduced) sums of this step; returns the layer's `STATISTICS`, [5] float64.

        finite: [] bool; where False they stay, and the statistics show what was seen.
        """
        move: Callable[..., Any] = moved_statistics
        if self.fused:
            from l2e_ds.inhibition import fused

            move = fused.moved_statistics
        settings = self.settings
        self.moments, self.tau, self.selected, self.selectable, statistics = move(
            *(self.moments, self.tau, self.selected, self.selectable, self._parts(), finite),
            *(self.frozen.mean, self.owner.fade, settings.target_share, settings.reduce == "forward"),
        )
        self._freeze()
        return statistics


class InhibitedActivation(nn.Module):
    """Stands in the place of an activation function; survives torch.compile, unlike a forward hook."""

    def __init__(self, activation: nn.Module, hook: NeuronHook) -> None:
        super().__init__()
        self.activation = activation
        self._hook = hook

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self._hook.computes(x):
            return self._hook.gelu(x)
        z = self.activation(x)
        return self._hook(z) if self.training else z


class Inhibitor:
    """Owns the hooks of a model, their running statistics and thresholds. A context manager."""

    STATISTICS = ("observed_share", "tau", "selected_score", "mean_s", "inhibition_loss")

    def __init__(
        self,
        sites: Sequence[NeuronSite],
        settings: Settings | None = None,
        device: torch.device | str | None = None,
        group: Any = None,
    ) -> None:
        """`device`: where the model computes (default: where it is now); `group`: the data-parallel process group whose
        tokens count together (default: all ranks). Raises ValueError."""
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
        self.settings = settings or Settings()
        self.group = group
        self.steps = 0  # applied optimizer steps that the statistics have seen
        self.fade = fade_factor(self.settings.statistics_window)
        self.in_backward = False
        self.self_test_pending = True
        self.last: Tensor | None = None  # [L, len(STATISTICS)] float64, of the newest applied step
        self.last_coefficient = 0.0  # lambda of that step; 0 where the mechanism is a deactivation
        self._loss_gradient: Tensor | None = None
        self._micro_batches = 0
        self._reduced: Callable[[], None] | None = None  # waits for the reduction that goes on
        self._token_mask: Tensor | None = None
        sizes = [NeuronHook.buffer_size(site.neurons) for site in sites]
        self._packed = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.hooks = [NeuronHook(self, site, sums) for site, sums in zip(sites, self._packed.split(sizes), strict=True)]
        self._undo: list[Any] = []
        self._decide_on_coming_step()

    def _decide_on_coming_step(self) -> None:
        # flags, because a compiled layer is compiled anew for every value of a number that it looks at
        self.has_history = self.steps > 0
        self.is_inhibiting = self.has_history and self.coefficient > 0

    @property
    def coefficient(self) -> float:
        """lambda of the coming step, after its warm-up."""
        warmup = self.settings.coefficient_warmup
        return self.settings.coefficient * (min(1.0, (self.steps + 1) / warmup) if warmup else 1.0)

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
        """The same LM loss []; its backward tells the hooks the scale at which gradients arrive.

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
            _require("attach_loss: weight", weight, lambda share: 0 <= share < math.inf, "0 or more, or a tensor []")
        if self._reduced is not None:
            raise ValueError("attach_loss: the micro-batch before was said to be the last of its step")
        self._micro_batches += 1
        if is_last:
            self._reduced = begin_all_reduce_sum(self._packed, self.group)
        return losses.note_loss_gradient(loss, lambda gradient: self._begin_backward(gradient * weight))

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

    def _begin_backward(self, gradient: Tensor) -> None:
        self._loss_gradient = gradient
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
            self.last = torch.stack([hook.update(finite) for hook in self.hooks])
            self.last_coefficient = self.coefficient if self.settings.mechanism == "regulariser" else 0.0
            if self.self_test_pending:
                self._check_gradients()
            self.steps += 1
            self._decide_on_coming_step()
        self._packed.zero_()
        self._micro_batches = 0
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
        if self.settings.mechanism != "regulariser" or self.coefficient == 0:
            self.self_test_pending = False
            return
        # one rank may have selected nothing of a layer in a small batch; over all ranks the gradient must be there
        largest = all_reduce_sum(torch.stack([hook.largest_gradient for hook in self.hooks]), self.group)
        shares = self.last[:, 0]
        for hook, share, gradient in zip(self.hooks, shares.tolist(), largest.tolist(), strict=True):
            if share > 0 and gradient == 0:
                raise SelfTestError(
                    f"inhibition self-test: layer {hook.site.layer} selected {share:.2%} of its activations,"
                    " but the gradient it injected is zero on every rank"
                )
        self.self_test_pending = not bool((shares > 0).all())

    def metrics(self) -> dict[str, float]:
        """Of the newest applied step, by the names of docs/metrics.md; empty before the first. Waits for the device."""
        if self.last is None:
            return {}
        share, loss = self.STATISTICS.index("observed_share"), self.STATISTICS.index("inhibition_loss")
        values = {
            "observed_share": float(self.last[:, share].mean()),
            "inhibition_loss": float(self.last[:, loss].sum()),
            "coefficient": self.last_coefficient,
        }
        for hook, row in zip(self.hooks, self.last.tolist(), strict=True):
            named = zip(self.STATISTICS, row, strict=True)
            values |= {f"layer{hook.site.layer}/{name}": value for name, value in named if name != "inhibition_loss"}
        return values

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the method remembers, as tensors on the CPU (float64 and int64), the same on every rank."""
        state = {"steps": torch.tensor(self.steps)}
        for hook in self.hooks:
            state |= {
                f"layers.{hook.site.layer}.{name}": tensor.detach().cpu().clone()
                for name, tensor in {
                    "count": hook.moments.count,
                    "mean": hook.moments.mean,
                    "m2": hook.moments.m2,
                    "tau": hook.tau,
                    "selected": hook.selected,
                    "selectable": hook.selectable,
                }.items()
            }
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError where the state is of other layers or sizes."""
        expected = {name: tensor.shape for name, tensor in self.state_dict().items()}
        given = {name: tensor.shape for name, tensor in state.items()}
        if expected != given:
            different = sorted(n for n in expected.keys() | given.keys() if expected.get(n) != given.get(n))
            raise ValueError(f"inhibition state does not fit this model's hooked layers: {', '.join(different[:4])}")
        self.steps = int(state["steps"])
        self._decide_on_coming_step()
        for hook in self.hooks:
            prefix, device = f"layers.{hook.site.layer}.", self._packed.device
            part = {n.removeprefix(prefix): t.to(device) for n, t in state.items() if n.startswith(prefix)}
            hook.moments = Moments(part["count"], part["mean"], part["m2"])
            hook.tau, hook.selected, hook.selectable = part["tau"], part["selected"], part["selectable"]
            hook._freeze()


def _device_of(module: nn.Module) -> torch.device:
    """Of its weights; the CPU where it has none."""
    tensor = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _is_hooked(child: nn.Module) -> bool:
    """Whether an `InhibitedActivation` stands in its place, or a `_projection_hook` before it."""
    before = getattr(child, "_forward_pre_hooks", {}).values()
    return isinstance(child, InhibitedActivation) or any(getattr(f, "__module__", None) == __name__ for f in before)


def _projection_hook(hook: NeuronHook) -> Any:
    def before_forward(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (hook(inputs[0]), *inputs[1:]) if module.training else None

    return before_forward
