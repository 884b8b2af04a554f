"""Run the training loop. `Trainer.train` reads from top to bottom.

Shapes: B sequences per micro-batch, T tokens per sequence. A step is one global batch: `accumulation` micro-batches on
each rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2e_ds.checkpoint.manager import CheckpointManager, Identity, changes_since, open_checkpoints, read_state
from l2e_ds.checkpoint.schedule import is_due
from l2e_ds.checkpoint.state import TrainState, seed_everything
from l2e_ds.config.batch import BatchArithmetic
from l2e_ds.config.reading import find_file
from l2e_ds.config.sections import RunConfig
from l2e_ds.data import PreparedData, PreparedText, TrainingSequences
from l2e_ds.distributed import collectives, heartbeat
from l2e_ds.engine.configuration import zero_stage
from l2e_ds.engine.engine import (
    group_rates,
    is_plain_float32,
    loss_scale,
    norm_within_step,
    set_learning_rate,
    skip_steps_when,
)
from l2e_ds.engine.schedule import schedule_of
from l2e_ds.errors import DataError, Interrupted, SaveError, TrainingError
from l2e_ds.inhibition import NeuronSite
from l2e_ds.models import counts
from l2e_ds.models.counts import matrix_parameters
from l2e_ds.models.sites import neuron_sites
from l2e_ds.system import gpus
from l2e_ds.system.determinism import deterministic_algorithms
from l2e_ds.training import guard, metrics, preemption
from l2e_ds.training.building import build_training_stack, forward_and_backward
from l2e_ds.training.held_out import evaluate, evaluate_texts
from l2e_ds.training.interval import Interval
from l2e_ds.training.loader import Loader
from l2e_ds.training.profile import Profile
from l2e_ds.training.samples import Samples
from l2e_ds.training.spikes import Spike, find_spike
from l2e_ds.training.streams import StreamedSequences
from l2e_ds.training.task_evaluation import TaskEvaluation


def evaluation_is_due(config: RunConfig, state: TrainState) -> bool:
    """Return whether a held-out evaluation is due at this step, for a run that has held-out text."""
    return state.evaluated != state.step and _is_regularly_due(config.training.evaluate_every, config, state)


def task_evaluation_is_due(config: RunConfig, state: TrainState) -> bool:
    """Return whether an evaluation on tasks is due at this step."""
    return state.evaluated_on_tasks != state.step and _is_regularly_due(config.evaluation.every, config, state)


def _is_regularly_due(every: int, config: RunConfig, state: TrainState) -> bool:
    return bool(every) and (state.step % every == 0 or state.step == config.training.steps)


def is_finished(config: RunConfig, checkpoints: CheckpointManager) -> bool:
    """Return whether a run has no steps and no evaluations left. checkpoints: of `open_checkpoints`."""
    path = checkpoints.resume_from
    if path is None or not checkpoints.is_own(path):
        return False
    state = TrainState(**read_state(path)["train"])
    held_out = any(part.held_out for _, _, part in config.data.parts())
    evaluation = (held_out and evaluation_is_due(config, state)) or task_evaluation_is_due(config, state)
    return state.step >= config.training.steps and not evaluation


def _given_file(config: RunConfig) -> str:
    """Return what identifies the content of `model.config`: a run must not resume as another network."""
    if config.model.config is None:
        return ""
    path = find_file(config.model.config)
    assert path is not None  # network_config has read it
    return f", config.json {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


class Trainer:
    """Trains one run on this rank: holds engine, inhibitor, data position, checkpoints and metrics.

    As a context manager it closes them at the end.
    """

    def __init__(
        self,
        config: RunConfig,
        ds: dict,
        batch: BatchArithmetic,
        network: Any,
        data: Sequence[PreparedData],
        device: torch.device,
        tasks: TaskEvaluation | None = None,
        checkpoints: CheckpointManager | None = None,
        texts: Sequence[PreparedText] = (),
        samples: Samples | None = None,
    ) -> None:
        """Build everything, and load the checkpoint to resume from, if there is one. Collective.

        ds: the resolved DeepSpeed configuration. network: the Hugging Face configuration of the model. data: the sets.
        tasks: of `load_task_evaluation`. checkpoints: of `open_checkpoints` (default: it is called). texts, samples:
        for each held-out evaluation. Raises CheckpointError, and what `build_training_stack` raises.
        """
        self.config, self.batch, self.device, self.tasks = config, batch, device, tasks
        self.texts, self.samples = texts, samples
        self.held_out = [part for part in data if part.held_out is not None]
        self.state = TrainState()
        self.skipped_in_row = self.spikes_in_row = 0
        self.saved_step: int | None = None
        self._stop_asked = self._saving = False  # on any rank, as of the newest step
        self.checkpoints = checkpoints or open_checkpoints(config)
        resume_from = self.checkpoints.resume_from

        seed_everything(config.training.seed, collectives.rank())
        stack = build_training_stack(config, ds, network, device)
        self.sites, self.inhibitor, self.head, self.engine = stack.sites, stack.inhibitor, stack.head, stack.engine
        self._schedule = schedule_of(config)
        self._rate_shares = [rate / self._schedule.peak for rate in group_rates(self.engine)]
        self.plain_float32 = is_plain_float32(config, ds)
        self._plain_norm: float | None = None  # of `_clip_plain_float32` in this step
        self._norm: float | None = None  # of this step, as rank 0 knows it, where spikes are looked for
        self._spike: Spike | None = None
        if config.training.spike_deviations is not None:
            skip_steps_when(self.engine, self._is_spike)
        self.is_guarded = self._is_inhibited() and config.inhibition.guard != "off" and bool(self.held_out)
        self.comparison: list[NeuronSite] = []
        if self.is_guarded:
            inhibited = [site.layer for site in self.sites]
            layers = guard.comparison_layers(inhibited, network.num_hidden_layers)
            self.comparison = neuron_sites(stack.model, layers) if layers else []
        order = config.data.order
        self.sequences = TrainingSequences(
            data,
            batch.global_batch,
            config.training.seed,
            order,
            open_stream=lambda part, seed: StreamedSequences(part, seed, order),
        )
        self.identity = Identity(
            ranks=collectives.size(),
            zero_stage=zero_stage(ds),
            precision=config.training.precision,
            data=self.sequences.fingerprint(),
            sequence_length=config.data.sequence_length,
            global_batch=batch.global_batch,
            seed=config.training.seed,
            order=config.data.order,
            network=f"{network.num_hidden_layers} layers x {network.hidden_size}, {network.num_attention_heads} heads,"
            f" {network.vocab_size} rows{_given_file(config)}",
            layers=[site.layer for site in self.sites] if self.inhibitor else [],
        )
        if resume_from is not None:
            self.state = self.checkpoints.load(resume_from, self.engine, self.inhibitor, self.identity)
            if self.checkpoints.is_own(resume_from):
                self.saved_step = self.state.step
            self.sequences.restore_streams(self.state.streams)
        if config.training.spike_deviations is None:
            self.state.gradient_norms = []  # if it is set again later, these would be too old to compare with
        self.metrics = metrics.MetricsWriter(config, self.state.step, collectives.is_main(), is_new=resume_from is None)
        self.changes: list[str] = []
        """What the user has changed in the run file since the checkpoint, one line each."""
        if resume_from is not None:
            changes = changes_since(resume_from, config)
            self.changes = changes.lines()
            self.metrics.say(f"resumed from {resume_from}")
            for change in self.changes:
                self.metrics.say(f"changed since that checkpoint: {change}")
            if changes.other_inhibition():
                self.state.guard = {}  # what was found belongs to other settings
        self._flops_per_token = counts.flops_per_token(
            matrix_parameters(stack.model), network.num_hidden_layers, network.hidden_size, config.data.sequence_length
        )
        self._interval = Interval(batch, device)
        steps = config.logging.profile if collectives.is_main() else None
        self._profile = Profile(steps, Path(config.training.run_directory), device, self.metrics.say)
        self.loader = Loader(self._read_step, self.state.step, config.training.steps, device)  # starts a thread

    # --- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train from the current step to `training.steps`, with evaluations, metrics and checkpoints on the way.

        Raises Interrupted, after saving, if any rank was asked to stop; TrainingError if the run cannot continue; and
        SaveError if a checkpoint that must not fail fails. Collective.
        """
        try:
            self._train()
        except Interrupted as reason:
            raise Interrupted(f"{reason}; {self._save_before_stopping()}") from None
        except TrainingError:
            with suppress(SaveError):
                self._carry_on_saving(wait=True)  # a checkpoint that has been written should count
            raise

    def _train(self) -> None:
        logging, last = self.config.logging, self.config.training.steps
        preemption.stop_if_asked()
        while True:
            paused = self._evaluation_is_due() or self._task_evaluation_is_due() or self._checkpoint_is_due()
            if self._evaluation_is_due():
                self.evaluate()
            if self._task_evaluation_is_due():
                self.evaluate_on_tasks()
            if self._checkpoint_is_due():
                self.save()
            if self.state.step >= last:
                break
            self._stop_if_guard_says_so()
            if paused:
                preemption.stop_if_asked()
            deterministic = deterministic_algorithms(self.config.training.deterministic)
            with deterministic, self._profile.step(self.state.step + 1):
                self.train_step()
            self.metrics.advance()
            if self._profile.is_complete(self.state.step):
                with self._interval.paused():
                    self._profile.write()
            if not self._saving:
                self._carry_on_saving()
            # A checkpoint begins a new interval, so that a resumed run writes the lines of one that never stopped.
            if self.state.step % logging.every == 0 or self.state.step == last or self._checkpoint_is_due():
                self.log()
            if self._stop_asked:
                preemption.stop()
        self._carry_on_saving(must_succeed=True)

    def _evaluation_is_due(self) -> bool:
        return bool(self.held_out) and evaluation_is_due(self.config, self.state)

    def _task_evaluation_is_due(self) -> bool:
        return self.tasks is not None and task_evaluation_is_due(self.config, self.state)

    def _checkpoint_is_due(self) -> bool:
        step, checkpoint = self.state.step, self.config.checkpoint
        return self.saved_step != step and is_due(step, self.config.training.steps, checkpoint.every, checkpoint.early)

    def _is_inhibited(self) -> bool:
        """Return whether the run is inhibited at any time."""
        if self.inhibitor is None:
            return False
        settings = self.inhibitor.settings
        return settings.mechanism != "regulariser" or settings.is_regularising

    def _stop_if_guard_says_so(self) -> None:
        """Save and raise TrainingError if the guard found something, so that the same command does not continue."""
        found = list(self.state.guard.get("found", {}).values())
        if self.is_guarded and self.config.inhibition.guard == "stop" and found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise TrainingError(
                f"inhibition.guard: {found[0]}{more}; {self._save_before_stopping()} (inhibition.guard=warn resumes"
                f" from there); {guard.advice(self.config.inhibition)}"
            )

    def _save_before_stopping(self) -> str:
        """Save the current step, unless it is saved, and return what to tell the user. Collective. Raises SaveError."""
        step = self.state.step
        if step > 0 and self.saved_step != step:
            if self._interval.steps:
                self.log()
            self.save(must_succeed=True)
        self._carry_on_saving(must_succeed=True)
        preemption.honoured()
        return f"step {step} is saved" if step > 0 else "nothing was done yet"

    def train_step(self) -> bool:
        """Take one optimizer step on one global batch, and return whether it changed the weights. Collective.

        The result is the same on every rank. Raises TrainingError after `training.max_skipped_steps` steps in a row
        that did not.
        """
        rate = self._schedule.rate(self.state.applied)
        set_learning_rate(self.engine, rate, self._rate_shares)
        *others, last = self._next_batch()  # [B, T+1] int64 each
        for micro_batch in others:
            self._forward_and_backward(micro_batch, is_last=False)
            self.engine.step()
        self._forward_and_backward(last, is_last=True)
        self._norm = self._spike = None
        self._plain_norm = norm = self._clip_plain_float32() if self.plain_float32 else None
        answer = collectives.ask_all(preemption.is_asked(), self.checkpoints.is_busy)
        self.engine.step()
        self._stop_asked, self._saving = answer()
        applied = (norm is None or math.isfinite(norm)) and self.engine.was_step_applied() and self._spike is None
        if self.inhibitor is not None:
            self.inhibitor.step(applied)
        self._count_step(applied, rate, norm)
        return applied

    def _forward_and_backward(self, micro_batch: Tensor, is_last: bool) -> None:
        """Run forward and backward of a micro-batch, [B, T+1] int64. is_last: the next step is the optimizer's."""
        heartbeat.beat()
        self._interval.add_loss(forward_and_backward(self.engine, self.head, self.inhibitor, micro_batch, is_last))

    def _read_step(self, step: int) -> np.ndarray:
        """Return this rank's sequences of a global batch, [accumulation, B, T+1] int64. Runs in the loader's thread."""
        return self.sequences.read(step, collectives.rank(), collectives.size(), self.batch.micro_batch)

    def _next_batch(self) -> Tensor:
        """Return what `_read_step` does for the current step, on the device."""
        heartbeat.progress(f"step {self.state.step + 1}, reading a batch")
        with self._interval.waiting_for_data():
            batch = self.loader.take()
        heartbeat.progress(f"step {self.state.step + 1}")
        return batch

    def _clip_plain_float32(self) -> float:
        """Clip the gradients, and return their norm before that; if it is not finite, the optimizer changes nothing.

        In float32 under ZeRO-0, DeepSpeed neither reports a gradient norm nor skips non-finite steps
        (docs/deepspeed.md). After the last micro-batch's all-reduce all ranks have the same gradients and decide alike.
        """
        parameters = list(self.engine.module.parameters())
        limit = self.config.optimizer.gradient_clipping or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None  # AdamW skips parameters without a gradient
        return norm

    def _is_spike(self) -> bool:
        """Return whether the optimizer is to skip the step that it is about to take. Collective."""
        settings = self.config.training
        if self._norm is None:  # the first time in this step
            norm = self._plain_norm if self._plain_norm is not None else norm_within_step(self.engine)
            self._norm = collectives.main_decides(norm)  # a rank that skips alone would part from the others
            assert settings.spike_deviations is not None
            before = self.state.gradient_norms
            self._spike = find_spike(self._norm, before, settings.spike_deviations, settings.spike_window)
        return self._spike is not None

    def _count_step(self, applied: bool, rate: float, norm: float | None) -> None:
        """Count a step. rate: its learning rate; norm: of `_clip_plain_float32`. Raises TrainingError."""
        self.state.step += 1
        self.state.applied += applied
        self.state.tokens += self.batch.tokens_per_step
        statistics = self.inhibitor.last if self.inhibitor is not None and applied else None
        self._interval.add_step(applied, rate, norm, statistics, is_spike=self._spike is not None)
        if self._norm is not None and applied:
            self.state.gradient_norms = [*self.state.gradient_norms, self._norm][-self.config.training.spike_window :]
        if self._spike is not None:
            self.metrics.say(
                f"step {self.state.step} is skipped for its gradient norm: {self._spike} (training.spike_deviations)"
            )
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1
        self.spikes_in_row = 0 if applied else self.spikes_in_row + (self._spike is not None)
        if self.skipped_in_row >= self.config.training.max_skipped_steps:
            self._give_up()

    def _give_up(self) -> None:
        """Raise TrainingError for too many skipped steps in a row. Collective."""
        skipped, limit = f"training: {self.skipped_in_row} steps in a row", "the limit is training.max_skipped_steps"
        if self._spike is not None:
            raise TrainingError(
                f"{skipped} were skipped, the last one, step {self.state.step}, for its gradient norm ({self._spike});"
                f" {limit}; if the norm has risen for good, resume with another training.spike_deviations, or with"
                " null, and name that key in training.allow_changes"
            )
        all_finite = collectives.all_gather_objects(self._interval.is_loss_finite())
        bad = [rank for rank, finite in enumerate(all_finite) if not finite]
        where = f"loss not finite on rank {', '.join(map(str, bad))}" if bad else "every rank's loss is finite"
        if self.spikes_in_row:
            where += f"; {self.spikes_in_row} of them were skipped for their norm (training.spike_deviations)"
        raise TrainingError(
            f"{skipped} had non-finite gradients (step {self.state.step}, loss scale {loss_scale(self.engine):g};"
            f" {where}); {limit}"
        )

    def evaluate(self) -> None:
        """Evaluate on held-out text, without inhibition, and write the metrics of `kind: evaluation`. Collective.

        Raises Interrupted.
        """
        heartbeat.progress(f"the evaluation of step {self.state.step}")
        with self._interval.paused():
            values = evaluate(
                self.engine,
                self.head,
                self.held_out,
                self.sites,
                self.comparison,
                self.config.inhibition.target_share,
                self.config.training.evaluation_sequences,
                self.batch.micro_batch,
                preemption.stop_if_asked,
            )
            if self.texts:
                values |= evaluate_texts(
                    self.engine, self.head, self.texts, self.batch.micro_batch, preemption.stop_if_asked
                )
            if self.samples is not None:
                self.samples.write(self.engine, self.state, preemption.stop_if_asked, self.metrics.say)
            self.state.evaluated = self.state.step
            self.metrics.write("evaluation", self.state.step, {"tokens": self.state.tokens, **values})
            shown = [f"{text.name} {values[f'text_loss/{text.name}']:.4f}" for text in self.texts[:4]]
            self.metrics.say(
                f"step {self.state.step}  " + ", ".join([f"held-out loss {values['held_out_loss']:.4f}", *shown])
            )
            if self.is_guarded:
                self._judge(values)

    def _judge(self, values: dict[str, float]) -> None:
        """Warn of the harm that inhibition does to its layers, and write it as `kind: guard`. Collective."""
        assert self.inhibitor is not None
        steps, settings = self.inhibitor.steps, self.inhibitor.settings
        if settings.end is not None and steps > settings.end:
            return
        inhibited, comparison = ([site.layer for site in sites] for sites in (self.sites, self.comparison))
        found = guard.judged(
            self.state.guard, self.state.step, values, inhibited, comparison, has_begun=steps > settings.start
        )
        # Rank 0 decides, as sums on GPUs differ between ranks in their last digits.
        self.state.guard, findings = collectives.main_decides(found)
        advice = guard.advice(self.config.inhibition)
        for finding in findings:
            self.metrics.write("guard", self.state.step, {**finding.values(), "advice": advice})
            self.metrics.say(f"l2e-ds: warning: step {self.state.step}: {finding.seen}; {advice}")

    def evaluate_on_tasks(self) -> None:
        """Evaluate on the tasks of the section `evaluation`, without inhibition, and write `kind: tasks`. Collective.

        Raises DataError if tasks fail at step 0; later it prints a warning. Raises Interrupted.
        """
        heartbeat.progress(f"the evaluation on tasks of step {self.state.step}")
        with self._interval.paused():
            self._evaluate_on_tasks()
            self.state.evaluated_on_tasks = self.state.step

    def _evaluate_on_tasks(self) -> None:
        assert self.tasks is not None
        try:
            results = self.tasks.evaluate(
                self.engine, self.state, self.config.training.precision, preemption.stop_if_asked
            )
        except DataError as error:
            if self.state.step == 0:  # no step is lost
                raise
            self.metrics.write("tasks", self.state.step, {"error": str(error)})
            self.metrics.say(f"l2e-ds: warning: step {self.state.step}: {error}; training continues")
        else:
            self.metrics.write("tasks", self.state.step, {"tokens": self.state.tokens, **results})
            shown = ", ".join(f"{name} {value:.4f}" for name, value in list(results.items())[:4])
            self.metrics.say(f"step {self.state.step}  {shown}{', ...' if len(results) > 4 else ''}")

    def save(self, must_succeed: bool = False) -> None:
        """Write a checkpoint of this step, which counts once `_carry_on_saving` has seen it published. Collective.

        must_succeed: whether to raise SaveError even with `checkpoint.on_error: continue`, as for the last step.
        """
        must_succeed = must_succeed or self.state.step >= self.config.training.steps
        self._carry_on_saving(wait=True)
        heartbeat.progress(f"the checkpoint of step {self.state.step}")
        with self._interval.paused():
            self.state.streams = self.sequences.stream_states(self.state.step)
            with self._allowing_failure(must_succeed):
                self.checkpoints.save(
                    self.engine, self.inhibitor, self.state, self.identity, self.config.model_dump(mode="json")
                )
                self.saved_step = self.state.step

    def _carry_on_saving(self, wait: bool = False, must_succeed: bool = False) -> None:
        """Write the metrics of a checkpoint that has been published meanwhile. Collective. Raises SaveError."""
        with self._allowing_failure(must_succeed):
            done = self.checkpoints.advance(until_done=wait or must_succeed)
            if done is not None:
                values = asdict(done)
                self.metrics.write("checkpoint", values.pop("step"), values)

    @contextmanager
    def _allowing_failure(self, must_succeed: bool) -> Iterator[None]:
        """Raise SaveError if saving must succeed or `checkpoint.on_error` is `stop`, and otherwise print a warning."""
        try:
            yield
        except SaveError as error:
            if must_succeed or self.config.checkpoint.on_error == "stop":
                raise
            self.saved_step = None
            self.metrics.write("checkpoint", self.state.step, {"error": str(error)})
            self.metrics.say(f"l2e-ds: warning: {error}; training continues (checkpoint.on_error)")

    # --- metrics -------------------------------------------------------------------------------------------------

    def log(self) -> None:
        """Write the metrics of `kind: train`, and begin a new interval. Collective.

        Only here are the sums of the steps read back from the device.
        """
        layers = [hook.site.layer for hook in self.inhibitor.hooks] if self.inhibitor is not None else []
        values = self._interval.values(layers)
        norm = self._interval.gradient_norm if self.plain_float32 else self.engine.get_global_grad_norm()
        values |= {
            "applied_steps": self.state.applied,
            "tokens": self.state.tokens,
            **self._consumed_values(),
            "gradient_norm": None if norm is None or not math.isfinite(norm) else float(norm),
            "loss_scale": loss_scale(self.engine),
        }
        if self.config.training.spike_deviations is not None:
            values["spikes"] = self._interval.spikes
        peak = gpus.peak_tflops(self.device, self.config.logging.peak_tflops)
        if peak is not None:
            speed = self._flops_per_token * values["tokens_per_second"]
            values["mfu"] = speed / (peak * 1e12 * collectives.size())
        self.metrics.write("train", self.state.step, values)
        self.metrics.show(self.state.step, values, self.config.training.steps)
        self._interval = Interval(self.batch, self.device)

    def _consumed_values(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, (sequences, epochs) in self.sequences.consumed(self.state.step).items():
            values |= {f"tokens/{name}": sequences * self.config.data.sequence_length, f"epochs/{name}": epochs}
        return values

    # --- end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the loader, remove the hooks, and close files and engine. To be called after an exception, too."""
        self._profile.write()
        if self.loader.close():
            self.sequences.close()
        if self.inhibitor is not None:
            self.inhibitor.detach()
        self.metrics.close()
        self.checkpoints.close()
        self.engine.destroy()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
