"""Define the sections of a run file: one run file (YAML) becomes one frozen, fully checked `RunConfig`.

Unknown keys, wrong types and values out of range are refused with the key's dotted path. What depends on the number of
ranks (`batch_arithmetic`) and on the DeepSpeed JSON (`l2e_ds.engine.configuration`) is checked elsewhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from l2e_ds.config.yaml_text import dump_yaml

LayerChoice = Literal["mid-2", "mid-third", "top-bottom", "all"]
Method = Literal["none", "l2e", "memel"]
Retrieval = Literal["threshold", "top-k"]
Mechanism = Literal["regulariser", "reverse-deactivation", "naive-deactivation"]

# What each method is made of (docs/method.md, 4 to 6). The other pairs are the paper's ablation.
METHODS: dict[str, tuple[Retrieval, Mechanism]] = {
    "none": ("threshold", "regulariser"),
    "l2e": ("threshold", "regulariser"),
    "memel": ("top-k", "reverse-deactivation"),
}

# Beginnings of the dotted keys that say where, how safely and how visibly a run is computed, not what. They change its
# times, and its results by rounding only (with the projected loss and with `reduce: forward`, which are those of a
# micro-batch, by a little more: docs/method.md, 5.2 and 8). Whatever else a DeepSpeed JSON can set has a key in
# `optimizer` or `training`.
DECIDES_NO_RESULT = (
    *("checkpoint.", "deepspeed.", "evaluation.", "logging.", "data.cache", "data.workers"),
    *("training.allow_changes", "training.evaluate_every", "training.max_skipped_steps", "training.micro_batch"),
    *("training.resume", "training.run_directory", "training.time_limit", "training.timeout", "inhibition.guard"),
)

DEFAULT_STRENGTH = 0.05
"""The strength of a regulariser that has neither a strength nor a coefficient."""

SMALLEST_SHARE = 1e-6
"""The smallest share of a mixture that a set may have; the schedule's block is as long as its inverse."""


class Section(BaseModel):
    """Base class of the sections: frozen, strict, without unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,  # docs/generate.py makes docs/run-files.md of them
    )


Checked = TypeVar("Checked", bound=Section)


def _expand(path: str) -> str:
    """Return a path with the values of `~` and `$VARIABLE` in it. Raises PydanticCustomError if there is no value."""
    unset = next((name for name in re.findall(r"\$\{?(\w+)", path) if name not in os.environ), None)
    if unset is not None:
        raise PydanticCustomError("path", "the environment variable {name} is not set", {"name": unset})
    expanded = os.path.expanduser(os.path.expandvars(path))
    if path.startswith("~") and expanded == path:
        raise PydanticCustomError("path", "there is no such user")
    if path == "null":
        raise PydanticCustomError("path", "must be a path; ./null is a file or folder of that name")
    return expanded


LocalPath = Annotated[str, AfterValidator(_expand)]
"""A file or folder. Some such keys may also hold a name of the hub, which never contains `~` or `$`."""


class ModelConfig(Section):
    """The network, and where its first weights come from."""

    name: str | None = None
    """A size of Pythia (`pythia-14m` ... `pythia-12b`), randomly initialised."""
    config: LocalPath | None = None
    """Instead of `name`: a config.json of transformers, or its folder, of a family in docs/families.md; randomly
    initialised."""
    pretrained: LocalPath | None = None
    """Instead of `name`: the folder or hub name of weights to start from, of such a family."""
    revision: str | None = None
    """Branch, tag or commit of `pretrained` on the hub."""
    vocab_size: int | None = Field(None, gt=0)
    """Rows of the embedding. Default: the published number."""
    num_layers: int | None = Field(None, gt=0)
    """Number of layers, instead of the published one."""
    hidden_size: int | None = Field(None, gt=0)
    """Hidden size, instead of the published one."""
    num_heads: int | None = Field(None, gt=0)
    """Number of attention heads, instead of the published one."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Implementation of attention in transformers; BLOOM has `eager` only."""
    activation_checkpointing: bool = False
    """Recompute every layer in backward."""
    compile: bool = False
    """Compile every layer with torch.compile (ZeRO 0 to 2). This changes numbers by rounding."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if [self.name, self.config, self.pretrained].count(None) != 2:
            raise ValueError("give exactly one of model.name, model.config and model.pretrained")
        if self.revision is not None and self.pretrained is None:
            raise ValueError("model.revision needs model.pretrained")
        if self.name is None:
            of = "a pretrained model" if self.config is None else "a model.config: write it there"
            for key in ("vocab_size", "num_layers", "hidden_size", "num_heads"):
                if getattr(self, key) is not None:
                    raise ValueError(f"model.{key} cannot change {of}; remove it")
        return self

    @property
    def origin(self) -> str:
        """The size, file or pretrained model that was given."""
        return self.name or self.config or str(self.pretrained)


class SourceConfig(Section):
    """The source of text or tokens."""

    source: Literal["stdlib", "text", "jsonl", "parquet", "hub", "indexed"] | None = None
    """Kind of corpus; required without `data.sets`. `stdlib`: this machine's Python standard library. `indexed`: a
    Megatron .bin/.idx pair."""
    path: LocalPath | list[LocalPath] | None = None
    """Files, folders or patterns; for `indexed` the prefix of a pair, or of several; for `hub` the data set."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    streaming: bool = False
    """Tokenize text while training (docs/data.md); nothing is prepared on disk."""
    shuffle_buffer: int = Field(10_000, gt=0)
    """Documents that a stream shuffles together; none with `order: stored`."""
    text_key: str = "text"
    """The field of the text in jsonl, parquet and hub data."""
    max_documents: int | None = Field(None, gt=0)
    """Take only the first documents."""
    max_tokens: int | None = Field(None, gt=0)
    """Stop tokenizing after this many tokens."""

    def check_source(self, where: str) -> None:
        """Raise ValueError if the keys do not go together. where: the dotted key of this section."""
        if self.source is None:
            raise ValueError(f"{where}.source: is required")
        if self.source == "stdlib":
            if self.path is not None:
                raise ValueError(f"{where}.path is not used with {where}.source: stdlib; remove it")
        elif self.path is None:
            raise ValueError(f"{where}.path is required with {where}.source: {self.source}")
        if self.source == "hub" and not isinstance(self.path, str):
            raise ValueError(f"{where}.path must be one string with {where}.source: hub")
        if self.source == "indexed" and not self.path:
            raise ValueError(f"{where}.path: got {self.path!r}, give the prefix of a .bin/.idx pair or a list of them")
        if self.source != "hub":
            for key in ("subset", "split", "revision"):
                if getattr(self, key) != SourceConfig.model_fields[key].default:
                    raise ValueError(f"{where}.{key} is for {where}.source: hub only; remove it")
        if self.streaming and self.source == "indexed":
            raise ValueError(f"{where}.streaming needs text; {where}.source: indexed holds tokens")
        if self.streaming and self.max_tokens is not None:
            raise ValueError(
                f"{where}.max_tokens cannot be used with {where}.streaming, which reads as far as the steps go; remove"
                " one of them"
            )
        if not self.streaming and self.shuffle_buffer != SourceConfig.model_fields["shuffle_buffer"].default:
            raise ValueError(f"{where}.shuffle_buffer is for {where}.streaming only; remove it")


class SetConfig(SourceConfig):
    """One set of a mixture (docs/data.md)."""

    name: str = Field(pattern="^[A-Za-z0-9_-]+$")
    """Its name in the metrics (`tokens/NAME`). With the seed, it decides the set's order."""
    weight: float = Field(gt=0)
    """Its share of the training sequences, relative to the sum of all weights."""
    held_out: float | None = Field(None, ge=0, lt=1)
    """As `data.held_out`, which is the default."""


class TextConfig(SourceConfig):
    """One text that is only evaluated, neither `indexed` nor `streaming` (docs/evaluation.md)."""

    name: str = Field(pattern="^[A-Za-z0-9_-]+$")
    """Its name in the metrics (`text_loss/NAME`)."""


_TRAIN_FIRST = "train one first (l2e-ds tokenizer train) and give it as data.tokenizer"


class DataConfig(SourceConfig):
    """The source of the text, and how it becomes sequences of tokens."""

    sets: list[SetConfig] | None = Field(None, min_length=1)
    """Instead of the keys above: several sets, mixed by weight."""
    tokenizer: LocalPath | None = None
    """A tokenizer.json, a folder or a hub name. `indexed` needs it only for export."""
    train_tokenizer: int | None = Field(None, ge=260)
    """Instead of `tokenizer`: train a byte-level BPE of this vocabulary on the training documents."""
    sequence_length: int = Field(2048, ge=2)
    """Tokens a sequence, T."""
    held_out: float = Field(0.01, ge=0, lt=1)
    """Share of the documents kept for evaluation: by a hash of their content; of `indexed` the last, or all of
    PREFIX_held_out where every prefix has one (`l2e-ds tokenize --held-out`) and the share is above 0."""
    order: Literal["shuffled", "stored"] = "shuffled"
    """`stored`: in the order of the file, as for the preshuffled Pile."""
    cache: LocalPath | None = None
    """Folder of tokenized text. Default: `data/` in the run directory."""
    workers: int | None = Field(None, gt=0)
    """Processes that tokenize. Default: rank 0's cores; for each stream half of them."""

    @model_validator(mode="after")
    def _source_needs(self) -> DataConfig:
        if self.sets is not None:
            self._check_sets(self.sets)
            return self
        self.check_source("data")
        if self.source == "indexed":
            if self.train_tokenizer is not None:
                raise ValueError("data.train_tokenizer needs text; data.source: indexed holds tokens")
        elif (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ValueError("give exactly one of data.tokenizer and data.train_tokenizer")
        elif self.streaming and self.tokenizer is None:
            raise ValueError(f"data.train_tokenizer cannot be used with data.streaming; {_TRAIN_FIRST}")
        return self

    def _check_sets(self, sets: list[SetConfig]) -> None:
        for key, field in SourceConfig.model_fields.items():
            if getattr(self, key) != field.default:
                raise ValueError(f"data.{key} cannot stand beside data.sets; put it into each set")
        if self.train_tokenizer is not None:
            raise ValueError(f"data.train_tokenizer cannot be used with data.sets; {_TRAIN_FIRST}")
        names = [part.name for part in sets]
        total = sum(part.weight for part in sets)
        for index, part in enumerate(sets):
            where = f"data.sets.{index}"
            part.check_source(where)
            if part.name in names[:index]:
                raise ValueError(f"{where}.name: {part.name!r} is the name of data.sets.{names.index(part.name)} too")
            if part.weight < SMALLEST_SHARE * total:
                raise ValueError(
                    f"{where}.weight: {part.weight:g} of {total:g} in all is a smaller share than"
                    f" {SMALLEST_SHARE:g}; leave the set out or raise its weight"
                )
            if part.source != "indexed" and self.tokenizer is None:
                raise ValueError(f"data.tokenizer is required with {where}.source: {part.source}")

    def all_sets(self) -> list[tuple[str, float, DataConfig]]:
        """Return name, weight and configuration of each set; without `sets` one set with an empty name."""
        found = [("", 1.0, self)] if self.sets is None else []
        for part in self.sets or []:
            own = {key: getattr(part, key) for key in SourceConfig.model_fields} | {"sets": None}
            own |= {} if part.held_out is None else {"held_out": part.held_out}
            found.append((part.name, part.weight, self.model_copy(update=own)))
        return found


def _duration(value: float) -> float:
    if value >= 0 if isinstance(value, int) else 0 <= value < 1:
        return value
    raise PydanticCustomError("duration", "must be a whole number of steps, or a share of the run between 0 and 1")


Duration = Annotated[int | float, AfterValidator(_duration)]


class OptimizerConfig(Section):
    """The optimizer and its learning rate; Pythia's published values are the defaults (docs/method.md, 10)."""

    name: Literal["adamw", "muon", "adamw-8bit"] = "adamw"
    """`muon`: DeepSpeed's, for the matrices of the layers, and AdamW for the rest; `adamw-8bit`: that of bitsandbytes
    (docs/recipes.md)."""
    peak_learning_rate: float | None = Field(None, gt=0)
    """Default: the published one of `model.name`."""
    muon_learning_rate: float = Field(0.02, gt=0)
    """Peak of Muon's matrices, which follow the same schedule."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of Muon's momentum."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.95], min_length=2, max_length=2)
    """Decay of Adam's first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(0.1, ge=0)
    """Not applied to biases and norms."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest global 2-norm of the gradient; 0: no clipping."""
    schedule: Literal["cosine", "linear", "warmup-stable-decay", "inverse-square-root", "constant"] = "cosine"
    """How the learning rate moves after its warm-up: to `final_ratio` of the peak over the whole schedule (`cosine`,
    `linear`) or over its last steps (`warmup-stable-decay`), with the inverse square root of the step, or not at
    all."""
    warmup: Duration = 0.01
    """Steps, or share of `schedule_steps`, of the linear rise to the peak."""
    decay: Duration = 0.2
    """Steps, or share of `schedule_steps`, of the fall of `warmup-stable-decay`."""
    schedule_steps: int | None = Field(None, gt=0)
    """Length of the schedule in steps. Default: `training.steps`."""
    final_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end of the schedule, as a share of the peak."""

    @model_validator(mode="after")
    def _muon_for_muon(self) -> OptimizerConfig:
        for key in ("muon_learning_rate", "muon_momentum"):
            if self.name != "muon" and getattr(self, key) != OptimizerConfig.model_fields[key].default:
                given = getattr(self, key)
                raise ValueError(
                    f"optimizer.{key}: got {given:g}, but optimizer.name is {self.name}; allowed with muon"
                )
        return self

    def schedule_lengths(self, run_steps: int) -> tuple[int, float, float]:
        """Return length, warm-up and decay (0 without one) of the schedule, in steps, which as in Megatron are not
        rounded."""
        steps = self.schedule_steps or run_steps
        decay = self.decay if self.schedule == "warmup-stable-decay" else 0
        warmup, decay = (value * steps if isinstance(value, float) else value for value in (self.warmup, decay))
        return steps, warmup, decay


class TrainingConfig(Section):
    """The length of the run, its batches and its precision."""

    run_directory: LocalPath = ""
    """Folder of all files of the run. Default: `runs/` and the run file's name; for the `config.yaml` in a run
    directory, that directory."""
    steps: int = Field(gt=0, le=10**10)
    """Optimizer steps, one global batch each."""
    global_batch: int = Field(1024, gt=0)
    """Sequences a step, over all ranks."""
    micro_batch: Annotated[int, Field(gt=0)] | Literal["auto"] = 1
    """Sequences that a rank computes at once. `auto`: the largest that fits (docs/micro-batch.md)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 on an accelerator that has it, else fp32."""
    seed: int = Field(1234, ge=0, lt=2**62)
    """Decides first weights and order of the data, for any number of ranks."""
    deterministic: bool = False
    """Use deterministic algorithms only, which are slower. A run on GPUs that is repeated or resumed is then the same
    bit for bit, otherwise up to rounding. On CPUs every run is deterministic."""
    resume: LocalPath = "auto"
    """`auto`: from the newest checkpoint of the run directory, if there is one. `never`: refuse a directory that has
    one. A path (another run, or one of its checkpoints): start from there, but from the run directory's own checkpoints
    once there are some."""
    allow_changes: list[str] = []
    """Keys that decide results and may differ from the checkpoint's, e.g. `[optimizer.peak_learning_rate]`
    (docs/checkpoints.md)."""
    evaluate_every: int = Field(1000, ge=0)
    """Steps between held-out evaluations, besides those at the start and the end; 0: never."""
    evaluation_sequences: int = Field(64, gt=0)
    """Held-out sequences per evaluation, of each set that has any."""
    z_loss: float = Field(0.0, ge=0, le=1)
    """Coefficient of the z-loss (docs/looking-inside.md), which keeps logits small; PaLM's is 1e-4. 0: none."""
    spike_deviations: float | None = Field(None, gt=0)
    """Skip a step whose gradient norm is more than this many standard deviations (say 6) above the mean of the
    `spike_window` applied steps before it (docs/looking-inside.md). Default: skip none."""
    spike_window: int = Field(128, ge=2)
    """Applied steps that `spike_deviations` compares with."""
    max_skipped_steps: int = Field(20, gt=0)
    """End the run after this many skipped steps in a row."""
    time_limit: float | None = Field(None, gt=0)
    """Minutes, or a time of SLURM's form (H:M:S, D-H:M:S, ...), after which the run saves and stops with exit code 75.
    The same command resumes it. Each start, also a restart after a failure, has this time anew."""
    timeout: float = Field(30, gt=0)
    """Minutes, or such a time, without progress after which a run ends with an error. Must be longer than a step and
    than reading or writing a checkpoint."""

    @field_validator("time_limit", "timeout", mode="before")
    @classmethod
    def _minutes(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, str):
            return given
        seconds = slurm_seconds(given)
        if seconds is None:
            raise ValueError(
                f"training.{info.field_name}: got {given!r}, allowed: minutes, or a time such as 12:00:00 (hours,"
                " minutes, seconds) or 2-12:00:00"
            )
        return seconds / 60


class InhibitionConfig(Section):
    """The method (docs/method.md, 3 to 7)."""

    method: Method = "l2e"
    """`l2e`: threshold + regulariser. `memel`: top-k + reverse deactivation. `none`: plain pretraining."""
    retrieval: Retrieval | None = None
    """How activations are selected, instead of the method's way (ablation)."""
    mechanism: Mechanism | None = None
    """What happens to selected activations, instead of the method's way (ablation)."""
    loss: Literal["published", "scale-invariant", "projected"] = "projected"
    """The regulariser (docs/method.md, 5). Shrinking a layer lowers `published`, eq. 5 of the paper; neither scaling
    nor shifting a neuron lowers `projected`."""
    power: Literal[0, 1, 2] = 1
    """q of the projected loss: the force on an activation u deviations from its mean is |u|^(q-1)."""
    layers: LayerChoice | list[int] = "mid-2"
    """Layers whose neurons are inhibited, or with `none` measured."""
    target_share: float = Field(0.02, gt=0, lt=1)
    """Share of the (token, neuron) pairs to select."""
    strength: float | None = Field(None, ge=0)
    """Gradient of the inhibition loss relative to the language model's, at each layer's selected activations. Default:
    0.05 for a regulariser without `coefficient`."""
    coefficient: float | None = Field(None, ge=0)
    """Instead of `strength`: lambda, the weight of the inhibition loss."""
    start: Duration = 0
    """Step, or share of `training.steps`, at which inhibition begins. The default is the paper's; the recipes of
    Pythia's sizes and `l2e-ds init` set 0.3."""
    warmup: Duration = 0
    """Steps, or share, over which inhibition rises linearly after `start`. The same recipes set 0.2."""
    decay: Duration = 0
    """Steps, or share, over which inhibition falls linearly before `end`."""
    end: Duration | None = None
    """Step, or share, at which inhibition ends. Default: the end of the run."""
    statistics_window: Annotated[int, Field(ge=1)] | Literal["cumulative"] = 50
    """Steps after which an old sample weighs 1/e in mean and variance; `cumulative`: it never fades."""
    reduce: Literal["step", "forward"] = "step"
    """When statistics cross ranks: once a step, or in every forward before selection (slower)."""
    fused: bool | Literal["auto"] = "auto"
    """One compiled pass over the activations (docs/speed.md), for `threshold`, `regulariser` and `reduce: step`.
    `auto`: on GPUs, and on CPUs from a million activations per layer and micro-batch."""
    guard: Literal["warn", "stop", "off"] = "warn"
    """What to do when inhibition harms a layer (docs/looking-inside.md): warn, or also save and end with exit code 3
    (`stop`, which needs held-out evaluations)."""

    @model_validator(mode="after")
    def _method_parts(self) -> InhibitionConfig:
        is_regulariser = self.method != "none" and self.retrieval_and_mechanism[1] == "regulariser"
        is_weighted = self.strength is not None or self.coefficient is not None
        if self.method == "none":
            for key in ("retrieval", "mechanism"):
                if getattr(self, key) is not None:
                    raise ValueError(f"inhibition.{key} has no meaning with inhibition.method: none; remove it")
        elif not is_regulariser and self.strength is not None:
            raise ValueError(
                f"inhibition.strength: got {self.strength:g} with {self.retrieval_and_mechanism[1]}, which has none;"
                " remove it, or give null"
            )
        elif is_regulariser and self.strength is not None and self.coefficient is not None:
            raise ValueError(
                f"inhibition.strength: got {self.strength:g} and inhibition.coefficient {self.coefficient:g}, allowed:"
                " one of the two"
            )
        elif is_regulariser and not is_weighted and "strength" in self.model_fields_set:
            raise ValueError("inhibition.strength: got null without inhibition.coefficient; give one of the two")
        if not is_regulariser or not is_weighted:  # so that equal runs have equal configurations, in spite of `frozen`
            self.__dict__.update(strength=DEFAULT_STRENGTH if is_regulariser else None, coefficient=None)
        if (
            self.method != "none"
            and self.fused is True
            and (self.retrieval_and_mechanism != METHODS["l2e"] or self.reduce == "forward")
        ):
            raise ValueError(
                "inhibition.fused: true goes with retrieval threshold, mechanism regulariser and reduce: step; allowed"
                " here: auto, false"
            )
        return self

    def steps_of(self, key: str, steps: int) -> int | None:
        """Return the value of `start`, `warmup`, `decay` or `end` in steps, in a run of this many steps; None: not
        given."""
        value: float | None = getattr(self, key)
        # 1e-6, so that shares that sum to 1 fit the run
        return int(value * steps + 1e-6) if isinstance(value, float) else value

    @property
    def retrieval_and_mechanism(self) -> tuple[Retrieval, Mechanism]:
        """The retrieval and the mechanism, after the overrides."""
        retrieval, mechanism = METHODS[self.method]
        return self.retrieval or retrieval, self.mechanism or mechanism


class DeepSpeedConfig(Section):
    """The configuration of DeepSpeed."""

    config: LocalPath = "ds_configs/zero1.json"
    """A DeepSpeed JSON: one of `ds_configs/` or your own."""


class CheckpointConfig(Section):
    """When checkpoints are written, and how many are kept."""

    every: int = Field(1000, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    early: bool = False
    """Also at steps 0, 1, 2, 4 ... 512, as Pythia did."""
    keep_last: int | None = Field(None, gt=0)
    """Keep only this many of the newest. Default: all."""
    on_error: Literal["stop", "continue"] = "stop"
    """What to do if one cannot be written, as on a full disk: end the run, or warn and try again when the next is due.
    The last of a run must succeed."""


class LoggingConfig(Section):
    """What is logged, and how often."""

    every: int = Field(10, gt=0)
    """Steps between lines of metrics."""
    progress: bool = True
    """Show a progress bar on rank 0."""
    tensorboard: bool = False
    """Also log to TensorBoard, in `tensorboard/` of the run directory."""
    csv: bool = False
    """Also log to CSV files, one for each metric, in `csv/` of the run directory."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one device in TFLOP/s, for MFU. Default: the run's precision in a table of known accelerators."""
    layer_gradients: bool = False
    """On each line also the norm of the gradient of each layer's weights (docs/looking-inside.md)."""
    profile: list[int] | None = Field(None, min_length=2, max_length=2)
    """First and last step of a trace of rank 0, e.g. `[100, 102]` (docs/looking-inside.md)."""

    @model_validator(mode="after")
    def _steps_in_order(self) -> LoggingConfig:
        if self.profile is not None and not 2 <= self.profile[0] <= self.profile[1]:
            raise ValueError(
                f"logging.profile: got {self.profile}, allowed: the first step, from 2 on, and the last, not before it"
            )
        return self


class EvaluationConfig(Section):
    """Evaluation while training, on tasks of lm-evaluation-harness (extra `eval`) and on texts (docs/evaluation.md)."""

    every: int = Field(0, ge=0)
    """Steps between evaluations on tasks, besides those at the start and the end; 0: never."""
    tasks: list[str] = []
    """Tasks and groups of the harness, or `paper`: those of the paper."""
    num_fewshot: int | list[int] | None = None
    """Examples in each prompt; each number of a list in turn. Default: each task's own."""
    include_path: list[LocalPath] = []
    """Folders of your own task files."""
    limit: int | None = Field(None, gt=0)
    """Only the first documents of each task."""
    batch_size: int | None = Field(None, gt=0)
    """Requests that a rank computes at once. Default: `training.micro_batch`."""
    texts: list[TextConfig] | None = Field(None, min_length=1)
    """Texts whose loss every held-out evaluation gives. The run does not train on them."""
    samples: list[str] = []
    """Prompts that every held-out evaluation continues, into `samples.jsonl`."""
    sample_tokens: int = Field(64, gt=0)
    """Tokens of each continuation."""

    @model_validator(mode="after")
    def _tasks_and_texts(self) -> EvaluationConfig:
        if self.every and not self.tasks:
            raise ValueError("evaluation.tasks is required with evaluation.every")
        if self.tasks and "every" not in self.model_fields_set:
            raise ValueError("evaluation.every is required with evaluation.tasks; 0: never")
        for shots in self.shots:
            if shots is not None and shots < 0:
                raise ValueError(f"evaluation.num_fewshot: got {shots}, allowed: an integer >= 0 or a list of them")
        if not self.shots:
            raise ValueError("evaluation.num_fewshot: got [], give at least one number")
        names = [text.name for text in self.texts or []]
        for index, text in enumerate(self.texts or []):
            where = f"evaluation.texts.{index}"
            text.check_source(where)
            if text.source == "indexed":
                raise ValueError(
                    f"{where}.source: got 'indexed', which holds tokens; allowed: 'stdlib', 'text', 'jsonl', 'parquet'"
                    " or 'hub', whose bytes can be counted"
                )
            if text.streaming:
                raise ValueError(f"{where}.streaming: got True, allowed: False; the text is tokenized once")
            if text.name in names[:index]:
                raise ValueError(
                    f"{where}.name: {text.name!r} is the name of evaluation.texts.{names.index(text.name)} too"
                )
        return self

    @property
    def shots(self) -> list[int] | list[None]:
        """The value of `num_fewshot` as a list."""
        if self.num_fewshot is None:
            return [None]
        return self.num_fewshot if isinstance(self.num_fewshot, list) else [self.num_fewshot]


class RunConfig(Section):
    """Everything that defines a run; `dump` returns it as YAML."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    inhibition: InhibitionConfig = InhibitionConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _sections_go_together(self) -> RunConfig:
        unknown = next((key for key in self.training.allow_changes if key not in flat(self)), None)
        if unknown is not None:
            raise ValueError(
                f"training.allow_changes: got {unknown!r}, allowed: keys of a run file, e.g. inhibition.coefficient"
            )
        profile, steps = self.logging.profile, self.training.steps
        if profile is not None and profile[1] > steps:
            raise ValueError(f"logging.profile: got {profile}, allowed: up to training.steps, which is {steps}")
        key = next((key for key in ("texts", "samples") if getattr(self.evaluation, key)), None)
        if key is not None and not self.training.evaluate_every:
            raise ValueError(f"training.evaluate_every: got 0 with evaluation.{key}, allowed: an integer > 0")
        if key is not None and not any(part.held_out for _, _, part in self.data.all_sets()):
            raise ValueError(f"data.held_out: got 0 with evaluation.{key}, allowed: a number > 0")
        key = "every" if self.evaluation.every else key
        if key is not None and self.data.tokenizer is None and self.data.train_tokenizer is None:
            raise ValueError(f"data.tokenizer is required with evaluation.{key}")
        return self

    @model_validator(mode="after")
    def _schedule_within_the_run(self) -> RunConfig:
        section = self.optimizer
        steps, warmup, decay = section.schedule_lengths(self.training.steps)
        has_end = section.schedule not in ("inverse-square-root", "constant")
        if has_end and warmup + decay > steps * (1 + 1e-6):
            keys = ["warmup", "decay"] if section.schedule == "warmup-stable-decay" else ["warmup"]
            given = " and ".join(f"{key} {getattr(section, key):g}" for key in keys)
            raise ValueError(
                f"optimizer.{keys[-1]}: got {given}, in all {warmup + decay:,.0f} steps, allowed: up to"
                f" optimizer.schedule_steps, which is {steps:,}"
            )
        return self

    @model_validator(mode="after")
    def _inhibition_within_the_run(self) -> RunConfig:
        section, steps = self.inhibition, self.training.steps
        if section.method == "none":
            return self
        start, warmup, decay, end = (section.steps_of(key, steps) for key in ("start", "warmup", "decay", "end"))
        assert start is not None and warmup is not None and decay is not None
        if end is not None and not 0 < end <= steps:
            raise ValueError(f"inhibition.end: got step {end}, allowed: 1 to training.steps, which is {steps}")
        last, name = (steps, "training.steps") if end is None else (end, "inhibition.end")
        if start == last:
            raise ValueError(f"inhibition.start: got step {start}, allowed: below {name}, which is {last}")
        if start + warmup + decay > last:
            raise ValueError(
                f"inhibition.start: got {start} steps, with a warmup of {warmup} and a decay of {decay} they are"
                f" {start + warmup + decay}, allowed: up to {name}, which is {last}"
            )
        return self

    def dump(self) -> str:
        """Return the resolved configuration as YAML; `load_run_config` reads it back to an equal object."""
        return dump_yaml(self.model_dump(mode="json"))

    @property
    def data_cache(self) -> Path:
        """The folder of tokenized text: `data.cache`, or `data` in the run directory."""
        return Path(self.data.cache) if self.data.cache else Path(self.training.run_directory) / "data"

    def replace(self, section: str, **values: Any) -> RunConfig:
        """Return a copy with some keys of one section changed."""
        part = getattr(self, section).model_copy(update=values)
        return self.model_copy(update={section: part})


def slurm_seconds(limit: str) -> int | None:
    """Return the seconds of a time as sbatch takes it (M, M:S, H:M:S, D-H, D-H:M or D-H:M:S), else None."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None:  # minutes come first, unless there are three numbers
        hours, minutes, seconds = {1: (0, *numbers, 0), 2: (0, *numbers), 3: numbers}[len(numbers)]
    else:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def flat(config: RunConfig) -> dict[str, Any]:
    """Return the values of all keys, as JSON, by their dotted names."""
    return {
        f"{section}.{key}": value
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
    }
