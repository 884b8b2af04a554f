"""The training loop: `Trainer.train` reads top to bottom.

Shapes: B micro-batch sequences, T tokens a sequence, L hooked layers. One step = one global batch = `accumulation`
micro-batches on each of R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2e_ds.checkpoint.manager import CheckpointManager, Identity, changes_since, is_due, open_checkpoints, read_state
from l2e_ds.checkpoint.state import TrainState, seed_everything
from l2e_ds.config.batch import BatchArithmetic
from l2e_ds.config.sections import RunConfig
from l2e_ds.data import PreparedData, PreparedText, TrainingSequences
from l2e_ds.distributed import collectives, heartbeat
from l2e_ds.engine.configuration import zero_stage
from l2e_ds.engine.engine import is_plain_float32, learning_rate, loss_scale, set_learning_rate
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
from l2e_ds.training.samples import Samples
from l2e_ds.training.streams import StreamedSequences
from l2e_ds.training.task_evaluation import TaskEvaluation


def evaluation_is_due(config: RunConfig, state: TrainState) -> bool:
    """Return whether a held-out evaluation is due at this step, in a run that holds text out."""
    return state.evaluated != state.step and _is_regularly_due(config.training.evaluate_every, config, state)


def task_evaluation_is_due(config: RunConfig, state: TrainState) -> bool:
    """Return whether an evaluation on tasks is due at this step."""
    return state.evaluated_on_tasks != state.step and _is_regularly_due(config.evaluation.every, config, state)


def _is_regularly_due(every: int, config: RunConfig, state: TrainState) -> bool:
    return bool(every) and (state.step % every == 0 or state.step == config.training.steps)


def is_finished(config: RunConfig, checkpoints: CheckpointManager) -> bool:
    """Return whether the run has neither steps nor evaluations before it. checkpoints: of `open_checkpoints`."""
    path = checkpoints.resume_from
    if path is None or not checkpoints.is_own(path):
        return False
    state = TrainState(**read_state(path)["train"])
    held_out = any(part.held_out for _, _, part in config.data.parts())
    evaluation = (held_out and evaluation_is_due(config, state)) or task_evaluation_is_due(config, state)
    return state.step >= config.training.steps and not evaluation


class Trainer:
    """One run on this rank: engine, inhibitor, data position, checkpoints and metrics. A context manager."""

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
        """network: the Hugging Face configuration of the model; data: the sets; checkpoints: of `open_checkpoints`;
        texts, samples: for each held-out evaluation. Builds everything; resumes if there is something to resume.
        Collective. Raises CheckpointError."""
        self.config, self.ds, self.batch, self.device, self.tasks = config, ds, batch, device, tasks
        self.texts, self.samples = texts, samples
        self.held_out = [part for part in data if part.held_out is not None]
        self.run_directory = Path(config.training.run_directory)
        self.state = TrainState()
        self.skipped_in_row = 0
        self.saved_step: int | None = None
        self._stop_asked = self._saving = False  # on any rank, as of the newest step
        self.checkpoints = checkpoints or open_checkpoints(config)
        resume_from = self.checkpoints.resume_from

        seed_everything(config.training.seed, collectives.rank())
        stack = build_training_stack(config, ds, network, device)
        self.sites, self.inhibitor, self.head, self.engine = stack.sites, stack.inhibitor, stack.head, stack.engine
        self.plain_float32 = is_plain_float32(config, ds)
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
            f" {network.vocab_size} rows",
            layers=[site.layer for site in self.sites] if self.inhibitor else [],
        )
        if resume_from is not None:
            self.state = self.checkpoints.load(resume_from, self.engine, self.inhibitor, self.identity)
            if self.checkpoints.is_own(resume_from):
                self.saved_step = self.state.step
            self.sequences.restore_streams(self.state.streams)
        self.metrics = metrics.MetricsWriter(config, self.state.step, collectives.is_main())
        self.changes: list[str] = []
        """Since the checkpoint, by the user."""
        if resume_from is not None:
            changes = changes_since(resume_from, config)
            self.changes = changes.lines()
            self.metrics.say(f"resumed from {resume_from}")
            for change in self.changes:
                self.metrics.say(f"changed since that checkpoint: {change}")
            if changes.other_inhibition():
                self.state.guard = {}  # what was found came of other settings
        assert config.optimizer.peak_learning_rate is not None  # filled in by engine.configuration.resolve
        self._peak_rate = config.optimizer.peak_learning_rate
        self._schedule_steps = config.optimizer.schedule_steps or config.training.steps
        self._flops_per_token = counts.flops_per_token(
            matrix_parameters(stack.model), network.num_hidden_layers, network.hidden_size, config.data.sequence_length
        )
        self._interval = Interval(batch, device)
        self.loader = Loader(self._read_step, self.state.step, config.training.steps, device)  # last: a thread

    # --- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """From the present step to `training.steps`, with evaluations, metrics and checkpoints on the way.

        Raises Interrupted, after saving, where any rank was asked to stop.
        """
        try:
            self._train()
        except Interrupted as reason:
            raise Interrupted(f"{reason}; {self._save_before_stopping()}") from None
        except TrainingError:
            with suppress(SaveError):
                self._carry_on_saving(wait=True)  # a checkpoint that is written should count
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
            with deterministic_algorithms(self.config.training.deterministic):
                self.train_step()
            self.metrics.advance()
            if not self._saving:
                self._carry_on_saving()
            # a checkpoint begins a new interval, so that the lines of a resumed run are those of the run itself
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
        """At any time of the run."""
        if self.inhibitor is None:
            return False
        settings = self.inhibitor.settings
        return settings.mechanism != "regulariser" or settings.is_regularising

    def _stop_if_guard_says_so(self) -> None:
        """Raises TrainingError, after saving: the same command is not to go on."""
        found = list(self.state.guard.get("found", {}).values())
        if self.is_guarded and self.config.inhibition.guard == "stop" and found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise TrainingError(
                f"inhibition.guard: {found[0]}{more}; {self._save_before_stopping()} (inhibition.guard=warn goes on"
                f" from there); {guard.advice(self.config.inhibition)}"
            )

    def _save_before_stopping(self) -> str:
        """Returns what to tell the user."""
        step = self.state.step
        if step > 0 and self.saved_step != step:
            if self._interval.steps:
                self.log()
            self.save(must_succeed=True)
        self._carry_on_saving(must_succeed=True)
        preemption.honoured()
        return f"step {step} is saved" if step > 0 else "nothing was done yet"

    def train_step(self) -> bool:
        """Take one optimizer step on one global batch.

        Returns whether it changed the weights (same on every rank).
        """
        rate = learning_rate(self.state.applied, self._peak_rate, self._schedule_steps, self.config.optimizer)
        set_learning_rate(self.engine, rate)
        *others, last = self._next_batch()  # [B, T+1] int64 each
        for micro_batch in others:
            self._forward_and_backward(micro_batch, is_last=False)
            self.engine.step()
        self._forward_and_backward(last, is_last=True)
        norm = self._clip_plain_float32() if self.plain_float32 else None
        answer = collectives.ask_all(preemption.is_asked(), self.checkpoints.is_busy)
        self.engine.step()
        self._stop_asked, self._saving = answer()
        applied = (norm is None or math.isfinite(norm)) and self.engine.was_step_applied()
        if self.inhibitor is not None:
            self.inhibitor.step(applied)
        self._count_step(applied, rate, norm)
        return applied

    def _forward_and_backward(self, micro_batch: Tensor, is_last: bool) -> None:
        """micro_batch: [B, T+1] int64; is_last: the engine's next step is the optimizer's."""
        heartbeat.beat()
        self._interval.add_loss(forward_and_backward(self.engine, self.head, self.inhibitor, micro_batch, is_last))

    def _read_step(self, step: int) -> np.ndarray:
        """Return this rank's sequences of a global batch, int64 [accumulation, B, T+1]; in the loader's thread."""
        return self.sequences.read(step, collectives.rank(), collectives.size(), self.batch.micro_batch)

    def _next_batch(self) -> Tensor:
        """Return the same of the present step, on the device."""
        heartbeat.progress(f"step {self.state.step + 1}, reading a batch")
        with self._interval.waiting_for_data():
            batch = self.loader.take()
        heartbeat.progress(f"step {self.state.step + 1}")
        return batch

    def _clip_plain_float32(self) -> float:
        """Float32 under ZeRO-0 is plain data parallelism, where DeepSpeed neither reports a gradient norm nor skips
        non-finite steps: clip, measure and skip here. Returns the norm before clipping; where it is not finite the
        optimizer's step will change nothing.

        After the last micro-batch's all-reduce every rank holds the same gradients, so all decide alike.
        """
        parameters = list(self.engine.module.parameters())
        limit = self.config.optimizer.gradient_clipping or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None  # AdamW passes over parameters without a gradient
        return norm

    def _count_step(self, applied: bool, rate: float, norm: float | None) -> None:
        """rate: the step's learning rate; norm: of `_clip_plain_float32`."""
        self.state.step += 1
        self.state.applied += applied
        self.state.tokens += self.batch.tokens_per_step
        statistics = self.inhibitor.last if self.inhibitor is not None and applied else None
        self._interval.add_step(applied, rate, norm, statistics)
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1
        if self.skipped_in_row >= self.config.training.max_skipped_steps:
            all_finite = collectives.all_gather_objects(self._interval.is_loss_finite())
            bad = [rank for rank, finite in enumerate(all_finite) if not finite]
            where = f"loss not finite on rank {', '.join(map(str, bad))}" if bad else "every rank's loss is finite"
            raise TrainingError(
                f"training: {self.skipped_in_row} steps in a row had non-finite gradients (step {self.state.step},"
                f" loss scale {loss_scale(self.engine):g}; {where}); the limit is training.max_skipped_steps"
            )

    def evaluate(self) -> None:
        """Held-out loss and scores of the hooked layers, inhibition off."""
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
                self.samples.write(self.engine, self.state, preemption.stop_if_asked)
            self.state.evaluated = self.state.step
            self.metrics.write("evaluation", self.state.step, {"tokens": self.state.tokens, **values})
            shown = [f"{text.name} {values[f'text_loss/{text.name}']:.4f}" for text in self.texts[:4]]
            self.metrics.say(
                f"step {self.state.step}  " + ", ".join([f"held-out loss {values['held_out_loss']:.4f}", *shown])
            )
            if self.is_guarded:
                self._judge(values)

    def _judge(self, values: dict[str, float]) -> None:
        """Say what inhibition does to its layers that it must not. Collective."""
        assert self.inhibitor is not None
        steps, settings = self.inhibitor.steps, self.inhibitor.settings
        if settings.end is not None and steps > settings.end:
            return
        inhibited, comparison = ([site.layer for site in sites] for sites in (self.sites, self.comparison))
        found = guard.judged(
            self.state.guard, self.state.step, values, inhibited, comparison, has_begun=steps > settings.start
        )
        # a GPU's sums differ from rank to rank in their last digits
        self.state.guard, findings = collectives.main_decides(found)
        advice = guard.advice(self.config.inhibition)
        for finding in findings:
            self.metrics.write("guard", self.state.step, {**finding.values(), "advice": advice})
            self.metrics.say(f"l2e-ds: warning: step {self.state.step}: {finding.seen}; {advice}")

    def evaluate_on_tasks(self) -> None:
        """Figures on the tasks of section `evaluation`, inhibition off. Tasks that fail end a run only at its start."""
        heartbeat.progress(f"the evaluation on tasks of step {self.state.step}")
        with self._interval.paused():
            self._evaluate_on_tasks()
            self.state.evaluated_on_tasks = self.state.step

    def _evaluate_on_tasks(self) -> None:
        assert self.tasks is not None
        try:
            figures = self.tasks.evaluate(
                self.engine, self.state, self.config.training.precision, preemption.stop_if_asked
            )
        except DataError as error:
            if self.state.step == 0:  # nothing is lost
                raise
            self.metrics.write("tasks", self.state.step, {"error": str(error)})
            self.metrics.say(f"l2e-ds: warning: step {self.state.step}: {error}; training goes on")
        else:
            self.metrics.write("tasks", self.state.step, {"tokens": self.state.tokens, **figures})
            shown = ", ".join(f"{name} {value:.4f}" for name, value in list(figures.items())[:4])
            self.metrics.say(f"step {self.state.step}  {shown}{', ...' if len(figures) > 4 else ''}")

    def save(self, must_succeed: bool = False) -> None:
        """Write a checkpoint of this step; collective. It counts once `_carry_on_saving` has seen it published."""
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
        """Collective, once a step: note a checkpoint that has been published meanwhile."""
        with self._allowing_failure(must_succeed):
            done = self.checkpoints.advance(until_done=wait or must_succeed)
            if done is not None:
                values = asdict(done)
                self.metrics.write("checkpoint", values.pop("step"), values)

    @contextmanager
    def _allowing_failure(self, must_succeed: bool) -> Iterator[None]:
        """As `checkpoint.on_error` says. Raises SaveError."""
        try:
            yield
        except SaveError as error:
            if must_succeed or self.config.checkpoint.on_error == "stop":
                raise
            self.saved_step = None
            self.metrics.write("checkpoint", self.state.step, {"error": str(error)})
            self.metrics.say(f"l2e-ds: warning: {error}; training goes on (checkpoint.on_error)")

    # --- metrics -------------------------------------------------------------------------------------------------

    def log(self) -> None:
        """Write the metrics of `kind: train` and begin a new interval; the only place that reads numbers back from the
        device. Collective."""
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
        """End the loader, remove the hooks and close the files; also after an exception."""
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
