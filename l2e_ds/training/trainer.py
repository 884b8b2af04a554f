"""Run the training loop. `Trainer.train` reads from top to bottom.

Shapes: B sequences per micro-batch, T tokens per sequence. A step is one global batch: `accumulation` micro-batches on
each rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from l2e_ds.checkpoint.disk import is_due
from l2e_ds.checkpoint.manager import CheckpointManager, Identity, changes_since, open_checkpoints, read_state
from l2e_ds.checkpoint.state import TrainState, seed_everything
from l2e_ds.config.reading import find_file
from l2e_ds.config.sections import RunConfig
from l2e_ds.data import PreparedData, PreparedText, TrainingSequences
from l2e_ds.distributed import collectives, heartbeat
from l2e_ds.engine.configuration import update_rule, zero_stage
from l2e_ds.engine.engine import group_rates, loss_scale, set_learning_rate
from l2e_ds.engine.schedule import schedule_of
from l2e_ds.errors import CheckpointError, DataError, Interrupted, SaveError, TrainingError
from l2e_ds.models.counts import attention_width, flops_per_token, matrix_parameters
from l2e_ds.models.sites import comparison_layers, neuron_sites
from l2e_ds.run_directory.metrics import evaluated_steps
from l2e_ds.system import gpus
from l2e_ds.system.determinism import deterministic_algorithms
from l2e_ds.training import guard, metrics, preemption
from l2e_ds.training.building import TrainingStack, forward_and_backward
from l2e_ds.training.held_out import Samples, evaluate_held_out, evaluate_texts
from l2e_ds.training.interval import Interval
from l2e_ds.training.layer_gradients import LayerGradients
from l2e_ds.training.loader import Loader
from l2e_ds.training.preflight import ResolvedRun
from l2e_ds.training.profile import Profile
from l2e_ds.training.spikes import SkippedSteps
from l2e_ds.training.streams import StreamedSequences
from l2e_ds.training.task_evaluation import TaskEvaluation


def evaluations_due(config: RunConfig, state: TrainState) -> tuple[bool, bool]:
    """Return two flags for the step of `state`: whether an evaluation on held-out text is due, and one on tasks.

    Whether the run has any held-out text is not looked at.
    """
    last = config.training.steps

    def due(every: int, newest: int) -> bool:
        is_first = newest < 0  # a run that begins from another run's checkpoint does so at any step
        return bool(every) and newest != state.step and (is_first or state.step % every == 0 or state.step == last)

    return (
        due(config.training.evaluate_every, state.evaluated),
        due(config.evaluation.every, state.evaluated_on_tasks),
    )


def is_finished(config: RunConfig, checkpoints: CheckpointManager) -> bool:
    """Return whether a run has no steps and no evaluations left. checkpoints: the manager that `open_checkpoints`
    returned."""
    path = checkpoints.resume_from
    if path is None or not checkpoints.is_own(path):
        return False
    state = TrainState(**read_state(path)["train"])
    if state.step < config.training.steps:
        return False
    on_held_out, on_tasks = evaluations_due(config, state)
    # a run that was stopped at its last step was evaluated by a later start, of which the checkpoint knows nothing
    made = evaluated_steps(Path(config.training.run_directory))
    on_held_out &= any(part.held_out for _, _, part in config.data.all_sets()) and state.step not in made["evaluation"]
    on_tasks &= state.step not in made["tasks"]
    return not on_held_out and not on_tasks


@dataclass(frozen=True)
class RunData:
    """Holds what a run reads: the sets to train on; texts, and prompts to continue, for each held-out evaluation; and
    the tasks to evaluate on."""

    sets: Sequence[PreparedData]
    texts: Sequence[PreparedText] = ()
    samples: Samples | None = None
    tasks: TaskEvaluation | None = None


def run_identity(run: ResolvedRun, data: str) -> Identity:
    """Return what must stay when a run resumes. data: the fingerprint of its sequences."""
    config, hf_config = run.config, run.hf_config
    given_file = ""  # what identifies its content: a run must not resume as another network
    if config.model.config is not None and (path := find_file(config.model.config)) is not None:
        given_file = f", config.json {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    return {
        "ranks": collectives.size(),
        "zero_stage": zero_stage(run.ds),
        "precision": config.training.precision,
        "optimizer": update_rule(config, run.ds),
        "data": data,
        "sequence_length": config.data.sequence_length,
        "global_batch": run.batch.global_batch,
        "seed": config.training.seed,
        "order": config.data.order,
        "network": f"{hf_config.num_hidden_layers} layers x {hf_config.hidden_size},"
        f" {hf_config.num_attention_heads} heads, {hf_config.vocab_size} rows{given_file}",
        "layers": run.inhibited_layers,
    }


class Trainer(AbstractContextManager):
    """Trains one run on this rank: holds engine, inhibitor, data, checkpoints and metrics. As a context it closes
    them."""

    def __init__(
        self, run: ResolvedRun, data: RunData, device: torch.device, checkpoints: CheckpointManager | None = None
    ) -> None:
        """Build everything, and load the checkpoint to resume from, if there is one. Collective.

        checkpoints: the manager that `open_checkpoints` returned (default: it is called). Raises ConfigError,
        DataError, CheckpointError, and what `TrainingStack` raises.
        """
        config, batch, hf_config = run.config, run.batch, run.hf_config
        self.config, self.batch, self.data, self.device = config, batch, data, device
        self.held_out = [part for part in data.sets if part.held_out is not None]
        self.state = TrainState()
        self.saved_step: int | None = None
        self._stop_asked = self._is_checkpoint_busy = False  # on any rank, as of the newest step
        self.checkpoints = checkpoints or open_checkpoints(config)
        resume_from = self.checkpoints.resume_from
        self.is_new = resume_from is None or not self.checkpoints.is_own(resume_from)  # without a checkpoint of its own

        seed_everything(config.training.seed, collectives.rank())
        stack = TrainingStack(config, run.ds, hf_config, device)
        self.sites, self.inhibitor, self.head, self.engine = stack.sites, stack.inhibitor, stack.head, stack.engine
        self._schedule = schedule_of(config)
        self._rate_shares = [rate / self._schedule.peak for rate in group_rates(self.engine)]
        is_inhibited = self.inhibitor is not None and self.inhibitor.settings.has_effect
        is_evaluated = bool(self.held_out) and config.training.evaluate_every > 0
        self.is_guarded = is_inhibited and config.inhibition.guard != "off" and is_evaluated
        # in every run: with the baseline's, those of an inhibited run tell whether MS moves to other layers
        nearest = comparison_layers([site.layer for site in self.sites], hf_config.num_hidden_layers)
        self.comparison = neuron_sites(stack.model, nearest) if nearest and self.held_out else []
        order = config.data.order
        self.sequences = TrainingSequences(
            data.sets, batch.global_batch, config.training.seed, order, partial(StreamedSequences, order=order)
        )
        self.identity = run_identity(run, self.sequences.fingerprint())
        self.changes: list[str] = []
        """What the user has changed in the run file since the checkpoint, one line each."""
        if resume_from is not None:
            self._resume(resume_from)
        self._skipped = SkippedSteps(self.engine, config.training, self.state)
        self._layer_gradients = LayerGradients(self.engine, stack.model) if config.logging.layer_gradients else None
        self.metrics = metrics.MetricsWriter(config, self.state, collectives.is_main(), self.is_new)
        if resume_from is not None:
            self.metrics.say(f"resumed from {resume_from}")
        for change in self.changes:
            self.metrics.say(f"changed since that checkpoint: {change}")
        self._flops_per_token = flops_per_token(
            matrix_parameters(stack.model),
            hf_config.num_hidden_layers,
            attention_width(hf_config),
            config.data.sequence_length,
        )
        self._interval = Interval(batch, device)
        steps = config.logging.profile if collectives.is_main() else None
        self._profile = Profile(steps, Path(config.training.run_directory), device, self.metrics.say)
        self.loader = Loader(self._read_step, self.state.step, config.training.steps, device)  # starts a thread

    def _resume(self, path: Path) -> None:
        """Load a checkpoint, and note what has changed in the run file since. Collective. Raises CheckpointError."""
        self.state = self.checkpoints.load(path, self.engine, self.inhibitor, self.identity)
        steps = self.config.training.steps
        if self.state.step > steps:
            raise CheckpointError(f"training.steps: got {steps}, but {path} is of step {self.state.step}")
        if self.is_new:  # it has evaluated nothing yet
            self.state.evaluated = self.state.evaluated_on_tasks = -1
        else:
            self.saved_step = self.state.step
        self.sequences.restore_streams(self.state.streams)
        changes = changes_since(path, self.config)
        self.changes = changes.lines()
        if changes.other_inhibition():
            self.state.guard = {}  # what was found belongs to other settings

    # --- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train from the current step to `training.steps`, with evaluations, metrics and checkpoints. Collective.

        Raises Interrupted, after saving, if any rank was asked to stop; TrainingError if the run cannot continue; and
        SaveError if a checkpoint that must not fail fails.
        """
        try:
            self._train()
        except Interrupted as reason:
            raise Interrupted(f"{reason}; {self._save_before_stopping()}") from None
        except TrainingError:
            with suppress(SaveError):
                self._advance_checkpoint(wait=True)  # a checkpoint that has been written should count
            raise

    def _train(self) -> None:
        last = self.config.training.steps
        preemption.stop_if_asked()
        while True:
            on_held_out, on_tasks = evaluations_due(self.config, self.state)
            on_held_out = on_held_out and bool(self.held_out)
            save_is_due = self._checkpoint_is_due(self.state.step)
            if on_held_out:
                self.evaluate_on_held_out()
            if on_tasks:
                self.evaluate_on_tasks()
            if save_is_due:
                self.save()
            if self.state.step >= last:
                break
            self._stop_if_guard_says_so()
            if on_held_out or on_tasks or save_is_due:
                preemption.stop_if_asked()
            deterministic = deterministic_algorithms(self.config.training.deterministic)
            with deterministic, self._profile.step(self.state.step + 1):
                self.train_step()
            self.metrics.advance()
            if self._profile.is_complete(self.state.step):
                with self._interval.paused():
                    self._profile.write()
            if not self._is_checkpoint_busy:
                self._advance_checkpoint()
            if self._line_is_due(self.state.step):
                self.log()
            if self._stop_asked:
                preemption.stop()
        self._advance_checkpoint(must_succeed=True)

    def _line_is_due(self, step: int) -> bool:
        # A checkpoint begins a new interval, so that a resumed run writes the lines of one that never stopped.
        is_regular = step % self.config.logging.every == 0 or step == self.config.training.steps
        return is_regular or self._checkpoint_is_due(step)

    def _checkpoint_is_due(self, step: int) -> bool:
        checkpoint = self.config.checkpoint
        return self.saved_step != step and is_due(step, self.config.training.steps, checkpoint.every, checkpoint.early)

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
        self._advance_checkpoint(must_succeed=True)
        preemption.honoured()
        return f"step {step} is saved" if step > 0 else "nothing was done yet"

    def train_step(self) -> bool:
        """Take one optimizer step on one global batch, and return, the same on every rank, whether it changed the
        weights. Collective. Raises TrainingError after too many steps in a row that did not (`SkippedSteps`)."""
        rate = self._schedule.rate(self.state.applied)
        set_learning_rate(self.engine, rate, self._rate_shares)
        self._skipped.begin_step()
        heartbeat.progress(f"step {self.state.step + 1}, reading a batch")
        with self._interval.waiting_for_data():
            *others, last = self.loader.take()  # [B, T+1] int64 each
        heartbeat.progress(f"step {self.state.step + 1}")
        for micro_batch in others:
            self._forward_and_backward(micro_batch, is_last=False)
            self.engine.step()
        self._forward_and_backward(last, is_last=True)
        # the hosts exchange these flags while the devices take the step
        answer = collectives.begin_any(preemption.is_asked(), self.checkpoints.is_busy)
        if self._layer_gradients is not None and self._line_is_due(self.state.step + 1):
            self._layer_gradients.measure()
        self.engine.step()
        self._stop_asked, self._is_checkpoint_busy = answer()
        spike = self._skipped.spike
        applied = self.engine.was_step_applied() and spike is None
        statistics = None
        if self.inhibitor is not None:
            self.inhibitor.step(applied)
            statistics = self.inhibitor.last if applied else None
        self.state.step += 1
        self.state.applied += applied
        self.state.tokens += self.batch.tokens_per_step
        self._interval.add_step(applied, rate, statistics, is_spike=spike is not None)
        if spike is not None:
            self.metrics.say(
                f"step {self.state.step} is skipped for its gradient norm: {spike} (training.spike_deviations)"
            )
        self._skipped.count(applied, self._interval.is_loss_finite)
        return applied

    def _forward_and_backward(self, micro_batch: Tensor, is_last: bool) -> None:
        """Run forward and backward of a micro-batch, [B, T+1] int64. is_last: the next step is the optimizer's."""
        heartbeat.beat()
        lm_loss, z_loss = forward_and_backward(self.engine, self.head, self.inhibitor, micro_batch, is_last)
        self._interval.add_loss(lm_loss, z_loss)

    def _read_step(self, step: int) -> np.ndarray:
        """Return this rank's sequences of a global batch, [accumulation, B, T+1] int64. Runs in the loader's thread."""
        return self.sequences.read(step, collectives.rank(), collectives.size(), self.batch.micro_batch)

    def evaluate_on_held_out(self) -> None:
        """Evaluate on held-out text and write the metrics of `kind: evaluation`. Collective. Raises Interrupted."""
        heartbeat.progress(f"the evaluation of step {self.state.step}")
        with self._interval.paused():
            values = evaluate_held_out(self.engine, self.head, self.config, self.held_out, self.sites, self.comparison)
            texts, samples = self.data.texts, self.data.samples
            if texts:
                values |= evaluate_texts(self.engine, self.head, texts)
            if samples is not None:
                samples.write(self.engine, self.state, self.metrics.warn)
            self.state.evaluated = self.state.step
            self.metrics.write("evaluation", self.state.step, {"tokens": self.state.tokens, **values})
            shown = [f"{text.name} {values[f'text_loss/{text.name}']:.4f}" for text in texts[:4]]
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
        found = guard.judge_evaluation(
            self.state.guard, self.state.step, values, inhibited, comparison, has_begun=steps > settings.start
        )
        # Rank 0 decides, as sums on GPUs differ between ranks in their last digits.
        self.state.guard, findings = collectives.broadcast_object(found)
        advice = guard.advice(self.config.inhibition)
        for finding in findings:
            self.metrics.write("guard", self.state.step, {**finding.values(), "advice": advice})
            self.metrics.warn(f"step {self.state.step}: {finding.seen}; {advice}")

    def evaluate_on_tasks(self) -> None:
        """Evaluate on the tasks of the section `evaluation`, without inhibition, and write `kind: tasks`. Collective.
        Raises Interrupted, and DataError if tasks fail at step 0; later it prints a warning."""
        tasks = self.data.tasks
        assert tasks is not None
        step = self.state.step
        heartbeat.progress(f"the evaluation on tasks of step {step}")
        with self._interval.paused():
            try:
                results = tasks.evaluate(self.engine, self.state)
            except DataError as error:
                if step == 0:  # no step is lost
                    raise
                self.metrics.write("tasks", step, {"error": str(error)})
                self.metrics.warn(f"step {step}: {error}; training continues")
            else:
                self.metrics.write("tasks", step, {"tokens": self.state.tokens, **results})
                shown = ", ".join(f"{name} {value:.4f}" for name, value in list(results.items())[:4])
                self.metrics.say(f"step {step}  {shown}{', ...' if len(results) > 4 else ''}")
            self.state.evaluated_on_tasks = step

    def save(self, must_succeed: bool = False) -> None:
        """Write a checkpoint of this step, which counts once `_advance_checkpoint` has seen it published. Collective.
        must_succeed: raise SaveError also with `checkpoint.on_error: continue`, as for the last step."""
        must_succeed = must_succeed or self.state.step >= self.config.training.steps
        with self._interval.paused():
            self._advance_checkpoint(wait=True)
            heartbeat.progress(f"the checkpoint of step {self.state.step}")
            self.state.streams = self.sequences.stream_states(self.state.step)
            with self._allowing_failure(must_succeed):
                self.checkpoints.save(
                    self.engine, self.inhibitor, self.state, self.identity, self.config.model_dump(mode="json")
                )
                self.saved_step = self.state.step

    def _advance_checkpoint(self, wait: bool = False, must_succeed: bool = False) -> None:
        """Go on publishing the pending checkpoint, and write its metrics once it is. Collective. Raises SaveError."""
        with self._allowing_failure(must_succeed):
            done = self.checkpoints.advance(until_done=wait or must_succeed)
            if done is not None:
                self.metrics.write("checkpoint", *done)

    @contextmanager
    def _allowing_failure(self, must_succeed: bool) -> Iterator[None]:
        """Raise SaveError if saving must succeed or `checkpoint.on_error` is `stop`, and otherwise print a warning."""
        try:
            yield
        except SaveError as error:
            if must_succeed or self.config.checkpoint.on_error == "stop":
                raise
            self.saved_step = None
            self.metrics.write("checkpoint", error.step, {"error": str(error)})
            self.metrics.warn(f"{error}; training continues (checkpoint.on_error)")

    # --- metrics -------------------------------------------------------------------------------------------------

    def log(self) -> None:
        """Write the metrics of `kind: train`, read back from the device, and begin a new interval. Collective."""
        layers = [hook.site.layer for hook in self.inhibitor.hooks] if self.inhibitor is not None else []
        values = self._interval.values(layers)
        norm = self.engine.get_global_grad_norm()
        values |= {"applied_steps": self.state.applied, "tokens": self.state.tokens}
        for name, (sequences, epochs) in self.sequences.consumed(self.state.step).items():
            values |= {f"tokens/{name}": sequences * self.config.data.sequence_length, f"epochs/{name}": epochs}
        values |= {
            "gradient_norm": None if norm is None or not math.isfinite(norm) else float(norm),
            "loss_scale": loss_scale(self.engine),
        }
        if self.config.training.spike_deviations is not None:
            values["spikes"] = self._interval.spikes
        if self._layer_gradients is not None:
            values |= self._layer_gradients.norms()
        peak = gpus.peak_tflops(self.device, self.config.training.precision, self.config.logging.peak_tflops)
        if peak is not None:
            speed = self._flops_per_token * values["tokens_per_second"]
            values["mfu"] = speed / (peak * 1e12 * collectives.size())
        self.metrics.write("train", self.state.step, values)
        self.metrics.show(self.state.step, values, self.config.training.steps)
        self._interval = Interval(self.batch, self.device)

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

    def __exit__(self, *_: object) -> None:
        self.close()
