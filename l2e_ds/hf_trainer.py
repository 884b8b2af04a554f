"""Inhibit in the Hugging Face Trainer, without a subclass of it:

    Trainer(model, args, train_dataset=..., callbacks=[InhibitionCallback(strength=0.05, start=0.3, warmup=0.2)])

While the Trainer trains, a forward hook on the model attaches the inhibition to the loss that the model returns. The
Trainer has its causal language models divide that loss by the predicted tokens of the whole step (on all ranks, in all
accumulated micro-batches): each micro-batch's inhibition loss then weighs what its LM loss weighs,

    L = sum over micro-batches i of w_i * (mean cross-entropy of i + lambda * L_MS of i)

w_i being its share of those tokens. Sequences of one length give the same numbers however they are divided.
"""

from __future__ import annotations

import base64
import logging
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from l2e_ds.errors import CheckpointError, ConfigError
from l2e_ds.inhibition import Inhibitor, Settings
from l2e_ds.inhibition.settings import steps_of_duration
from l2e_ds.models.sites import neuron_sites

_SCHEDULE = ("start", "warmup", "decay", "end")
IGNORED = -100  # a label that is not predicted, in transformers


class InhibitionCallback(TrainerCallback, ExportableState):
    """Trains with inhibition; after training the model has no hooks left.

    Logs gain `Inhibitor.metrics`. Moments and thresholds are saved in trainer_state.json and resumed.
    """

    def __init__(self, layers: str | list[int] = "mid-2", **settings: Any) -> None:
        """Check the settings. layers: as for `neuron_sites`; settings: the fields of `Settings`. Raises ValueError."""
        self.layers, self.settings = layers, Settings(**settings)
        self.inhibitor: Inhibitor | None = None  # that of the newest training
        self._handles: list[Any] = []
        self._run_steps: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Attach the inhibitor to the model, which has its weights by now. Raises ConfigError, CheckpointError."""
        self.detach()  # left over from a training that failed
        if args.n_gpu > 1:
            raise ConfigError(
                f"InhibitionCallback: {args.n_gpu} GPUs in one process (DataParallel) are not supported; start one"
                " process a GPU: torchrun --nproc-per-node=gpu ..."
            )
        sites, self._run_steps = neuron_sites(model, self.layers), state.max_steps
        self.inhibitor = Inhibitor(sites, self.settings, args.device, run_steps=state.max_steps)
        self._resume(state)
        self.inhibitor.attach()
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Detach the inhibitor."""
        self.detach()

    def detach(self) -> None:
        """Remove all hooks from the model. Call it after an exception or Ctrl-C, which the Trainer does not report."""
        while self._handles:
            self._handles.pop().remove()
        if self.inhibitor is not None:
            self.inhibitor.detach()

    # A compiled graph, traced once, would not run what these two note and change.
    @torch.compiler.disable
    def _before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.inhibitor is not None and model.training:
            mask = kwargs.get("attention_mask")
            is_padded = mask is not None and mask.dim() == 2 and not bool(mask.all())
            self.inhibitor.set_token_mask(mask if is_padded else None)  # without a mask the pass is faster

    @torch.compiler.disable
    def _after_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the model's output with its loss attached. Raises ConfigError."""
        if self.inhibitor is None or not model.training or not torch.is_grad_enabled():
            return None
        loss = output.get("loss") if isinstance(output, dict) else output[0]  # where the Trainer looks for it
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ConfigError(
                "InhibitionCallback: the model returned no loss of its own; batches need labels, and"
                " label_smoothing_factor and compute_loss_func, which take them away, are not supported"
            )
        attached = self.inhibitor.attach_loss(loss, weight=_weight(kwargs))  # the Trainer multiplies it in place
        if isinstance(output, dict):
            output["loss"] = attached
            return output
        return (attached, *output[1:])

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Update moments and thresholds."""
        if self.inhibitor is not None:
            self.inhibitor.step(applied=not getattr(optimizer, "step_was_skipped", False))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add inhibition's metrics for later callbacks, and to the Trainer's history, which was written before."""
        if self.inhibitor is not None and logs is not None and "loss" in logs:  # a log of training
            values = self.inhibitor.metrics()
            logs |= values
            state.log_history[-1] |= values

    def state(self) -> dict[str, Any]:
        """Return what trainer_state.json gets: this callback's arguments and `Inhibitor.state_dict`."""
        saved = None if self.inhibitor is None else base64.b64encode(save(self.inhibitor.state_dict())).decode("ascii")
        arguments = {"layers": self.layers, **asdict(self.settings)}
        return {"args": arguments, "attributes": {}, "statistics": saved, "run_steps": self._run_steps}

    def _compare(self, of_checkpoint: dict[str, Any]) -> None:
        """Warn where the checkpoint was trained in another way. of_checkpoint: what `state` returned then."""

        def in_its_steps(settings: dict[str, Any], run_steps: int | None) -> dict[str, Any]:
            if not run_steps:
                return settings
            given = {key: settings[key] for key in _SCHEDULE if settings.get(key) is not None}
            return settings | {key: steps_of_duration(value, run_steps) for key, value in given.items()}

        before = in_its_steps(of_checkpoint.get("args", {}), of_checkpoint.get("run_steps"))
        now = in_its_steps({"layers": self.layers, **asdict(self.settings)}, self._run_steps)
        changes = [f"{key}: {before[key]} -> {now.get(key)}" for key in before if before[key] != now.get(key)]
        if changes:
            logging.getLogger(__name__).warning(
                f"{type(self).__name__}: differs from the checkpoint's (the schedule in steps): {', '.join(changes)}"
            )

    def _resume(self, state: Any) -> None:
        name = type(self).__name__
        of_checkpoint = state.stateful_callbacks.setdefault(name, {})  # the Trainer expects this entry when it saves
        if state.global_step == 0:
            return
        self._compare(of_checkpoint)
        saved = of_checkpoint.get("statistics")
        if saved is None:
            logging.getLogger(__name__).warning(
                f"{name}: the checkpoint was saved without it; moments and thresholds begin anew"
            )
            return
        assert self.inhibitor is not None
        try:
            self.inhibitor.load_state_dict(load(base64.b64decode(saved)))
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None


def _weight(kwargs: dict[str, Any]) -> Tensor | float:
    """Return the share that a micro-batch's predicted tokens have of the step's, as the Trainer counts them, [].

    It is 1 where the loss is the micro-batch's mean. kwargs: of the model's forward.
    """
    tokens = kwargs.get("num_items_in_batch")
    if tokens is None:
        return 1.0
    labels = kwargs["shift_labels"] if kwargs.get("shift_labels") is not None else kwargs["labels"][..., 1:]
    return (labels != IGNORED).sum() / tokens
