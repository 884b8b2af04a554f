"""Describe every key of metrics.jsonl in a table: its unit, its reduction and where it comes from.

To add a metric, write its value and add one entry here: docs/metrics.md is made from the entries, `read_lines` checks
lines by them, the report takes its labels and units from them, and the tests refuse a line with a key that has none.
Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

Reduction = Literal["mean", "sum", "newest", "so far", ""]
"""How the steps since the line before are reduced; "so far": since the run began; "": there is nothing to reduce."""

Type = Literal["number", "count", "text", "mapping", "any"]
"""The type of a value. A number may be null, where it was not finite; a count is a whole number from 0 on."""


@dataclass(frozen=True)
class Metric:
    """Describes one key, or one pattern of keys, of the lines of a kind.

    In `key`, layerI stands for the layer I, NAME for a set of `data.sets` or a text of `evaluation.texts`, and
    TASK/N-shot/METRIC for a result of an evaluation task. `label` is its name in the report (default: the last part of
    the key); a line without a `needed` key is refused by `read_lines`.
    """

    key: str
    unit: str
    description: str
    reduction: Reduction = ""
    source: str = ""
    label: str = ""
    type: Type = "number"
    needed: bool = False

    @property
    def title(self) -> str:
        """The name for readers, in lower case if it begins with a word."""
        return self.label or self.key.rpartition("/")[2].replace("_", " ")


@dataclass(frozen=True)
class Kind:
    """Describes the lines of one kind. `when` says when they are written, `note` what else one must know to read
    them."""

    when: str
    metrics: tuple[Metric, ...]
    note: str = ""


_STEP = Metric("step", "steps", "global batches consumed", "so far", "`TrainState.step`", type="count", needed=True)
_TOKENS = Metric("tokens", "tokens", "consumed", "so far", type="count", needed=True)

_OF_HELD_OUT_LAYERS = (
    Metric(
        "layerI/top_share_score",
        "1",
        "mean MS of the highest `target_share` of pairs, with the text's own moments",
        source="`inhibition/measure.py`",
        label="MS of the top share",
    ),
    Metric("layerI/mean_s", "activation", "mean S of the neurons", label="mean S"),
    Metric("layerI/kurtosis", "1", "median over live neurons of E[phi^2]; 3 for a normal distribution"),
    Metric("layerI/dead_share", "1", "share of neurons that never vary", label="dead neurons"),
)

KINDS: dict[str, Kind] = {
    "train": Kind(
        "every `logging.every` steps and before each checkpoint, over all ranks",
        (
            _STEP,
            Metric(
                "applied_steps",
                "steps",
                "of these, those that changed the weights",
                "so far",
                "`engine.was_step_applied`",
                type="count",
            ),
            _TOKENS,
            Metric(
                "tokens/NAME",
                "tokens",
                "of these, from the set NAME",
                "so far",
                "the mixture's schedule",
                type="count",
            ),
            Metric("epochs/NAME", "1", "passes through the set NAME", "so far", "the mixture's schedule"),
            Metric(
                "lm_loss",
                "nats/token",
                "cross-entropy, without the inhibition loss",
                "mean",
                label="LM loss",
                needed=True,
            ),
            Metric(
                "inhibition_loss",
                "nats",
                "L_MS, summed over hooked layers",
                "mean",
                "eq. 5; docs/method.md, 5",
            ),
            Metric(
                "inhibition_loss_weighted",
                "nats",
                "lambda times L_MS; 0 with a deactivation",
                "mean",
            ),
            Metric("coefficient", "1", "lambda, mean over hooked layers", "newest", "docs/method.md, 5.3"),
            Metric(
                "strength",
                "1",
                "inhibition loss's gradient over the LM loss's, RMS at the selected activations, one step earlier; mean"
                " over hooked layers",
                "newest",
                "docs/method.md, 5.3",
            ),
            Metric("observed_share", "1", "share of (token, neuron) pairs selected, mean over hooked layers", "mean"),
            Metric("layerI/observed_share", "1", "the same of layer I", "mean"),
            Metric(
                "layerI/selected_score",
                "1",
                "mean MS of the selected activations",
                "mean",
                "eq. 1; docs/method.md, 3",
                label="MS of the selected",
            ),
            Metric(
                "layerI/tau",
                "1",
                "threshold that selected",
                "newest",
                "docs/method.md, 4",
                "threshold tau",
            ),
            Metric(
                "layerI/mean_s",
                "activation",
                "mean running standard deviation S of the neurons; it falls where a layer shrinks",
                "newest",
                "docs/method.md, 3",
                "mean S",
            ),
            Metric("layerI/coefficient", "1", "lambda of layer I", "newest"),
            Metric("layerI/strength", "1", "`strength` of layer I", "newest"),
            Metric(
                "layerI/lm_gradient",
                "nats/activation",
                "2-norm over the selected activations of the LM loss's gradient, summed over the step's tokens, one"
                " step earlier; 0 where no inhibition loss is added",
                "newest",
                label="LM gradient",
            ),
            Metric(
                "gradient_norm",
                "1",
                "global 2-norm before clipping, loss scale removed",
                "newest",
                "`engine.get_global_grad_norm`",
            ),
            Metric("learning_rate", "1", "of the step", "newest"),
            Metric("loss_scale", "1", "of fp16; otherwise 1", "newest"),
            Metric(
                "skipped_steps",
                "steps",
                "steps that changed no weight: gradients were not finite, or a spike",
                "sum",
                type="count",
            ),
            Metric(
                "spikes",
                "steps",
                "of these, for a spike (`training.spike_deviations`)",
                "sum",
                type="count",
            ),
            Metric(
                "tokens_per_second",
                "tokens/s",
                "of all ranks, without evaluations and checkpoints",
                "mean",
                label="speed",
                needed=True,
            ),
            Metric("step_seconds", "s", "time of a step", "mean"),
            Metric(
                "data_wait_seconds",
                "s",
                "of this, waiting for the batch; largest of all ranks",
                "mean",
            ),
            Metric(
                "mfu",
                "1",
                "(6 P + 6 L h T) * tokens/s over the devices' peak (causal attention counted half; P without the input"
                " embedding); left out where the peak is unknown",
                "mean",
                "PaLM, appendix B",
            ),
            Metric(
                "peak_memory_gib",
                "GiB",
                "device memory allocated (on CPUs: resident), largest of all ranks",
                "so far",
            ),
        ),
    ),
    "evaluation": Kind(
        "after each held-out evaluation, for which inhibition is off",
        (
            _STEP,
            _TOKENS,
            Metric(
                "held_out_loss",
                "nats/token",
                "mean cross-entropy; of several sets, the mean by weight",
                label="held-out loss",
                needed=True,
            ),
            Metric("held_out_loss/NAME", "nats/token", "the same of the set NAME"),
            Metric(
                "text_loss/NAME",
                "nats/token",
                "the same of the text NAME of `evaluation.texts`",
                source="docs/evaluation.md",
                label="loss",
            ),
            Metric(
                "text_bits_per_byte/NAME",
                "bits/byte",
                "the same for each byte of the text's UTF-8",
                source="docs/evaluation.md",
                label="bits a byte",
            ),
            *_OF_HELD_OUT_LAYERS,
            *(
                replace(
                    metric,
                    key=f"comparison_{metric.key}",
                    description="the same of a comparison layer I",
                    source="",
                )
                for metric in _OF_HELD_OUT_LAYERS
            ),
        ),
        "`comparison_layerI/...` are those of the nearest layers without inhibition, as many as are inhibited (none"
        " with `inhibition.guard: off` or without inhibition). On GPUs the last digits of `top_share_score` may vary"
        " between evaluations of the same weights.",
    ),
    "tasks": Kind(
        "after each evaluation on tasks (with standard errors in `evaluations.jsonl`, docs/evaluation.md)",
        (
            _STEP,
            _TOKENS,
            Metric(
                "TASK/N-shot/METRIC",
                "",
                "a group without the results of its tasks",
                source="lm-evaluation-harness",
            ),
            Metric("error", "", "instead of these: why the tasks failed", type="text"),
        ),
    ),
    "checkpoint": Kind(
        "when a checkpoint has been published (`step` is the checkpoint's)",
        (
            _STEP,
            Metric(
                "blocked_seconds",
                "s",
                "for which training stood still",
            ),
            Metric(
                "published_seconds",
                "s",
                "from the same beginning until the checkpoint counted",
            ),
            Metric("bytes", "B", "size", type="count"),
            Metric(
                "error",
                "",
                "instead of these: why it could not be written",
                type="text",
            ),
        ),
    ),
    "guard": Kind(
        "when the guard first finds that inhibition harms a layer",
        (
            _STEP,
            Metric("layerI/shrank", "1", "mean S over its reference"),
            Metric("layerI/grew", "1", "the same"),
            Metric(
                "layerI/rose",
                "1",
                "`top_share_score` over its reference",
            ),
            Metric(
                "comparison",
                "1",
                "the same ratio, mean over the comparison layers",
            ),
            Metric("reference_step", "steps", "of the reference", type="count"),
            Metric("text", "", "what was seen, in words", type="text", needed=True),
            Metric("advice", "", "what to do, in words", type="text", needed=True),
        ),
        "The reference is the newest evaluation before inhibition began. docs/looking-inside.md has the rules.",
    ),
    "start": Kind(
        "whenever a run starts or resumes",
        (
            _STEP,
            Metric("time", "", "of the start, UTC", type="any"),
            Metric("git", "", "commit, and whether files were changed", type="mapping"),
            Metric("host", "", "name of rank 0's host", type="any"),
            Metric("hosts", "1", "number of hosts", type="count"),
            Metric("cores", "1", "CPU cores of rank 0's host", type="any"),
            Metric("gpus", "1", "GPUs of rank 0's host", type="any"),
            Metric("ranks", "1", "number of ranks", type="count"),
            Metric("launcher", "", "what started the ranks", type="any"),
            Metric("device", "", "what rank 0 computes on", type="any"),
            Metric("parameters", "1", "of the network", type="count"),
            Metric("train_tokens", "tokens", "to train on", type="any"),
            Metric("held_out_tokens", "tokens", "held out", type="any"),
            Metric("sets", "", "weight and tokens of each set of a mixture", type="any"),
            Metric("texts", "", "tokens, evaluated tokens and bytes of each text of `evaluation.texts`", type="any"),
            Metric("versions", "", "of l2e-ds and of the packages that compute", type="mapping"),
            Metric("guard", "", "`inhibition.guard`, where the run has one", type="any"),
            Metric(
                "changes",
                "",
                "how the run file differs from the checkpoint's",
                type="any",
            ),
        ),
    ),
}
"""The kinds of lines by their name, which is the value of a line's key `kind`."""

_PLACEHOLDERS = {"layerI": r"layer\d+", "NAME": ".+", "TASK": ".+", "N": r"\d+", "METRIC": ".+"}


@cache
def _patterns(kind: str) -> list[tuple[re.Pattern[str], Metric]]:
    def pattern(key: str) -> str:
        parts = re.split(r"(layerI|NAME|TASK|METRIC|N(?=-shot))", key)
        return "".join(_PLACEHOLDERS.get(part, re.escape(part)) for part in parts)

    return [(re.compile(pattern(metric.key)), metric) for metric in KINDS[kind].metrics]


@cache
def find(kind: str, key: str) -> Metric | None:
    """Return the entry that describes this key of a line of this kind, or None. Raises KeyError for an unknown kind.

    The report's `layers/NAME`, the mean over the hooked layers, is described as `layerI/NAME`.
    """
    if key.startswith("layers/"):
        key = f"layer0/{key.removeprefix('layers/')}"
    return next((metric for pattern, metric in _patterns(kind) if pattern.fullmatch(key)), None)


def described(kind: str, key: str) -> Metric:
    """Return the entry that describes this key of a line of this kind. Raises KeyError if there is none."""
    metric = find(kind, key)
    if metric is None:
        raise KeyError(f"kind: {kind}, {key}: is not in the table of metrics (l2e_ds/run_directory/metric_table.py)")
    return metric


def undescribed(kind: str, keys: Iterable[str]) -> list[str]:
    """Return the keys of a line of this kind, other than `kind`, that the table lacks; all of an unknown kind."""
    return [key for key in keys if key != "kind" and (kind not in KINDS or find(kind, key) is None)]
