"""What a run reports: names, units, reductions and where each number comes from.

Lines of `metrics.jsonl`, one JSON object a line. `kind: train`, every `logging.every` steps and before each checkpoint
(means are over the steps since the line before; all numbers are global, over every rank):

| key | unit | what, and where it comes from |
|---|---|---|
| step | steps | global batches consumed so far (`TrainState.step`) |
| applied_steps | steps | of these, optimizer steps that changed the weights (engine.was_step_applied) |
| tokens | tokens | consumed so far |
| tokens/NAME | tokens | of these, from the set NAME of `data.sets` (from the mixture's schedule) |
| epochs/NAME | 1 | how often the set NAME was gone through so far |
| lm_loss | nats/token | mean cross-entropy of the training batches, without the inhibition loss; mean over ranks |
| inhibition_loss | nats | raw L_MS summed over hooked layers (docs/method.md, eq. 5, n = share * tokens * N); mean |
| inhibition_loss_weighted | nats | coefficient times L_MS, step by step; mean; 0 where a deactivation takes its place |
| coefficient | 1 | lambda of the newest step, mean over hooked layers |
| strength | 1 | inhibition loss's gradient over the LM's, RMS at the selected activations, in the step before the |
| | | newest; mean over hooked layers |
| observed_share | 1 | share of (token, neuron) pairs selected, mean over hooked layers; mean |
| layerI/observed_share | 1 | the same for layer I |
| layerI/tau | 1 | threshold on the score that selected in the newest step (docs/method.md, 4) |
| layerI/selected_score | 1 | mean MS (eq. 1) of the selected activations; mean |
| layerI/coefficient | 1 | lambda of layer I in the newest step |
| layerI/strength | 1 | as strength, of layer I |
| layerI/mean_s | activation | mean over neurons of the running standard deviation S; shows a run that only shrinks |
| gradient_norm | 1 | global 2-norm before clipping, loss scale removed (engine.get_global_grad_norm); newest step |
| learning_rate | 1 | of the newest step |
| loss_scale | 1 | present dynamic loss scale; 1 without fp16 |
| skipped_steps | steps | steps since the line before that were skipped for non-finite gradients |
| tokens_per_second | tokens/s | all ranks, evaluation and checkpoints not counted |
| step_seconds | s | mean time of a step |
| data_wait_seconds | s | of this, waiting for the batch, which is read in the background; mean, largest of all ranks |
| mfu | 1 | model FLOPs utilisation, (6 P + 6 L h T) * tokens/s over the devices' peak (PaLM, appendix B, causal |
| | | attention counted half; P without the input embedding); left out where the peak is not known |
| peak_memory_gib | GiB | largest device memory allocated so far (on CPUs: resident memory), largest of all ranks |

`kind: evaluation`, on held-out text, inhibition off:

| key | unit | what, and where it comes from |
|---|---|---|
| step, tokens | | as above |
| held_out_loss | nats/token | mean cross-entropy; of several sets the mean of the losses below by their weights |
| held_out_loss/NAME | nats/token | the same on the held-out text of the set NAME of `data.sets` |
| layerI/top_share_score | 1 | mean MS of the highest `target_share` of pairs, moments of the held-out text itself |
| layerI/mean_s | activation | mean over neurons of S on the held-out text |
| layerI/kurtosis | 1 | median over live neurons of E[phi^2]; 3 for a normal distribution |
| layerI/dead_share | 1 | share of neurons that never vary |
| comparison_layerI/... | | the same four of layer I without inhibition: as many as are inhibited, the nearest |
| | | (not with `inhibition.guard: off`, nor where nothing is inhibited) |

On GPUs top_share_score may differ in its last digits from one evaluation of the same weights to the next (the
histogram is summed by atomic additions).

`kind: tasks`, every `evaluation.every` steps (with standard errors and more in evaluations.jsonl, docs/evaluation.md):

| key | unit | what, and where it comes from |
|---|---|---|
| step, tokens | | as above |
| TASK/N-shot/METRIC | | of lm-evaluation-harness, inhibition off; a group without those of its tasks |
| error | | instead of these: why the tasks failed |

`kind: checkpoint`, when a checkpoint has been published (`step` is the checkpoint's):

| key | unit | what, and where it comes from |
|---|---|---|
| blocked_seconds | s | for which training stood still: DeepSpeed's shards and our state are written |
| published_seconds | s | from the same beginning until the checkpoint counted; fsync, checksums and deleting are done |
| | | beside training |
| bytes | B | size of all its files |
| error | | instead of these: why it could not be written (`checkpoint.on_error: continue`) |

`kind: guard`, after an evaluation at which a layer is for the first time what inhibition should not make of it
(`inhibition.guard`; a line for each). Figures are compared with the reference, the newest evaluation before inhibition
began (where a run's checkpoint knows of none: the first one after resuming):

| key | unit | what, and where it comes from |
|---|---|---|
| layerI/shrank | 1 | mean S over its reference, below half of that and of the comparison layers' |
| layerI/grew | 1 | the same, above twice |
| layerI/rose | 1 | top_share_score over its reference, by 10 % above the comparison layers', three times in a row |
| comparison | 1 | mean over the comparison layers over its reference; left out where every layer is inhibited |
| reference_step | steps | of the reference |
| text, advice | | in words: what was seen, and what to do |

`kind: start`, whenever a run starts or resumes: time, git commit and whether files were changed, versions, device,
ranks, host of rank 0 (its cores and GPUs), number of hosts, parameters, tokens of the data; `changes`: what the run
file says otherwise than when the checkpoint was written; `guard`, where the run has one.

Numbers of all kinds but `start` also go to what the section `logging` asks for, as `KIND/KEY` at x = step: CSV files
(one for each), TensorBoard, Weights & Biases. Where a run goes on from an earlier checkpoint, all files are cut back to
it. What Weights & Biases was sent stays there: it has repeated steps twice. A run directory is one run of it, whose id
the file `wandb-id` holds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from l2e_ds.config.sections import RunConfig
from l2e_ds.console import say
from l2e_ds.run_directory import results
from l2e_ds.run_directory.metrics import FILE, drop_lines_after
from l2e_ds.training.monitors import Monitors


class MetricsWriter:
    """Writes metrics on rank 0: JSON lines, the monitors of `logging`, and a progress bar or plain lines."""

    def __init__(self, config: RunConfig, first_step: int, main: bool) -> None:
        self.main = main
        run_directory = Path(config.training.run_directory)
        self.path = run_directory / FILE
        self.bar: tqdm | None = None
        self.plain = False
        if not main:
            return
        run_directory.mkdir(parents=True, exist_ok=True)
        for path in (self.path, run_directory / results.FILE):
            drop_lines_after(path, first_step)
        self._file = self.path.open("ab", buffering=0)
        self._size = self.path.stat().st_size
        self._writable = True
        if config.logging.progress:
            self.plain = not sys.stderr.isatty()
            if not self.plain:
                self.bar = tqdm(total=config.training.steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._monitors = Monitors(config, first_step, self.say)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line; numbers also go to the monitors, under `kind/key`."""
        if not self.main:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = {"kind": kind, "step": step, **finite}  # NaN is no JSON
        self._append((json.dumps(line) + "\n").encode())
        if kind != "start":
            self._monitors.write(kind, step, finite)

    def _append(self, line: bytes) -> None:
        """Whole lines only. A full disk costs lines, not the run: whether that goes on, its checkpoints decide."""
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(self._size)
            if self._writable:
                self.say(
                    f"l2e-ds: warning: {self.path}: {error.strerror}; lines are lost until it can be written again"
                )
            self._writable = False
        else:
            self._size += len(line)
            self._writable = True

    def show(self, step: int, values: dict[str, Any], steps: int) -> None:
        """Progress: on a terminal a bar, else a line, so that log files stay readable."""
        shown = {
            "loss": f"{values['lm_loss']:.3f}",
            **({"share": f"{values['observed_share']:.2%}"} if "observed_share" in values else {}),
            "tok/s": f"{values['tokens_per_second']:,.0f}",
        }
        if self.bar is not None:
            self.bar.set_postfix(shown)
        elif self.plain and self.main:
            minutes = (steps - step) * values["step_seconds"] / 60
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            self.say(f"step {step}/{steps}  {text}  {minutes:.1f} min left")

    def advance(self) -> None:
        """One step further on the progress bar."""
        if self.bar is not None:
            self.bar.update()

    def say(self, text: str) -> None:
        """A line for the user that does not tear the progress bar."""
        if self.main and self.bar is not None:
            with contextlib.suppress(OSError):
                tqdm.write(text, file=sys.stderr)
        elif self.main:
            say(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.main:
            self._file.close()
            self._monitors.close()
