"""Write the model card (README.md) of an exported model: what was trained, on what, what was inhibited, how to load it.

It holds what the run directory knows of the exported step. Of paths of the training machine it shows only the last
part. Text from the run is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from l2e_ds.checkpoint.changes import saved_config
from l2e_ds.engine.schedule import schedule_of
from l2e_ds.run_directory.metrics import FILE, read_metrics
from l2e_ds.run_directory.results import TaskResult, read_results
from l2e_ds.system.templates import template

METHODS = {
    "l2e": "Learning Towards Emergence (L2E)",
    "memel": "MEmeL, the method before L2E",
    "none": "none: plain pretraining",
}


@dataclass(frozen=True)
class Exported:
    """What a card describes.

    state: the checkpoint's own state; hf_config: the model's transformers configuration; tokenizer: whether there is
    one; license: the hub's id of a license, or None; repository: where the model will be pushed, or None; branch: to
    which of its branches, or None for the main one; branches: on the card of the main one, the branches of single
    steps.
    """

    run: Path
    state: dict[str, Any]
    hf_config: Any
    parameters: int
    precision: str
    tokenizer: bool
    license: str | None
    repository: str | None
    branch: str | None = None
    branches: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return self.state["train"]["step"]

    @property
    def config(self) -> dict[str, Any]:
        return self.state["config"]

    @property
    def sets(self) -> list[dict[str, Any]]:
        """The sets of data, as in the run file."""
        return self.config["data"]["sets"] or [self.config["data"]]

    @property
    def name(self) -> str:
        return self.repository.rpartition("/")[2] if self.repository else self.run.resolve().name

    def newest(self, kind: str, last: int | None = None) -> dict[str, Any]:
        """Return the newest line of the metrics at or before `last`, by default the step, or {} if there is none."""
        path, last = self.run / FILE, self.step if last is None else last
        lines = read_metrics(path, kind) if path.is_file() else []
        return next((line for line in reversed(lines) if line["step"] <= last), {})

    def newest_start(self) -> dict[str, Any]:
        """Return the line of the start that came to the step: one at the step itself only trains what follows it."""
        return self.newest("start", max(0, self.step - 1)) or self.newest("start")


def model_card(exported: Exported) -> str:
    """Return the content of README.md: front matter that the hub reads, and the text of card.md."""
    config, identity = exported.config, exported.state["identity"]
    start, line = exported.newest_start(), exported.newest("train")
    layers = [
        (layer, *(line.get(f"layer{layer}/{name}") for name in ("mean_s", "selected_score", "tau")))
        for layer in identity["layers"]
    ]
    found = [r for r in read_results(exported.run) if r.step == exported.step and math.isfinite(r.value)]
    found.sort(key=lambda r: r.precision == "fp32")  # of one in two precisions, that in fp32
    results = list({(r.task, r.num_fewshot, r.metric, r.limit): r for r in found}.values())
    cut = [f"{_escaped(r.task)} ({r.num_fewshot}-shot, {r.cut:,} of {r.samples:,})" for r in results if r.cut]
    card = template(Path(__file__).with_suffix(".md"), escaped=_escaped, public=_public, source=_source).render(
        exported=exported,
        front_matter=_front_matter(exported, results).to_yaml(),
        **{name: config[name] for name in ("model", "inhibition", "data", "optimizer", "training")},
        hf_config=exported.hf_config,
        tokens=exported.state["train"]["tokens"],
        identity=identity,
        method=METHODS[config["inhibition"]["method"]],
        weight=_weight(config["inhibition"]),
        schedule=_schedule(config["inhibition"]),
        learning_rate=schedule_of(saved_config(config, exported.run)),
        layers=[values for values in layers if None not in values],
        sets=exported.sets,
        start={"train_tokens": None, "versions": None} | start,
        git={"commit": None, "changed": False} | (start.get("git") or {}),
        line=line,
        evaluation=exported.newest("evaluation"),
        results=results,
        longer=longer_than_trained(exported.hf_config, config),
        cut=list(dict.fromkeys(cut)),
    )
    return str(ModelCard(card))


def _front_matter(exported: Exported, results: Sequence[TaskResult]) -> ModelCardData:
    model, method = exported.config["model"], exported.config["inhibition"]["method"]
    eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=result.task,
            dataset_name=result.task,
            dataset_args={"num_fewshot": result.num_fewshot} | ({"limit": result.limit} if result.limit else {}),
            metric_type=result.metric,
            metric_name=result.metric,
            metric_value=result.value,
        )
        for result in results
    ]
    datasets = [part["path"] for part in exported.sets if part["source"] == "hub" and _is_on_hub(part["path"])]
    return ModelCardData(
        license=exported.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            tag
            for tag in ("l2e-ds", method, model["name"] and "pythia", exported.hf_config.model_type)
            if tag and tag != "none"
        ],
        base_model=model["pretrained"] if model["pretrained"] and _is_on_hub(model["pretrained"]) else None,
        datasets=datasets or None,
        model_name=exported.name if eval_results else None,
        eval_results=eval_results or None,
    )


def _weight(section: dict[str, Any]) -> str | None:
    """Return the key that says how strong the inhibition loss is, else None."""
    return next((key for key in ("strength", "coefficient") if section[key] is not None), None)


def _schedule(section: dict[str, Any]) -> str:
    """Return start, warm-up, decay and end of inhibition, or "" if it lasts from the first step to the last."""
    return ", ".join(f"{key} {section[key]}" for key in ("start", "warmup", "decay", "end") if section[key])


def _source(part: dict[str, Any]) -> str:
    if part["source"] == "stdlib":
        return "the sources of the Python standard library"
    paths = [part["path"]] if isinstance(part["path"], str) else part["path"]
    named = ", ".join(_public(path) if part["source"] == "hub" else _escaped(_base_name(path)) for path in paths)
    detail = [f"{key} {part[key]}" for key in ("subset", "split", "revision") if part["source"] == "hub" and part[key]]
    return f"{part['source']}: {named}" + (f" ({_escaped(', '.join(detail))})" if detail else "")


def longer_than_trained(hf_config: Any, config: dict[str, Any]) -> str | None:
    """Return a clause that says so if a model takes longer sequences than it was trained on, else None.

    config: the run's, as plain values.
    """
    longest, trained = getattr(hf_config, "max_position_embeddings", None), config["data"]["sequence_length"]
    if longest is not None and longest <= trained:
        return None
    context = "its context, which has no limit," if longest is None else f"its context of {longest:,} tokens"
    where = " in this run" if config["model"]["pretrained"] else ""
    return f"{context} is longer than the sequences of {trained:,} tokens that it was trained on{where}"


def _escaped(value: object) -> str:
    """Return a text on one line, in which all characters that mean something in Markdown or HTML are escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", " ".join(str(value).split()))


def _base_name(path: str) -> str:
    return Path(path).name or path


def _is_on_hub(name: str) -> bool:
    """Return whether a name has the form NAME or OWNER/NAME of the hub and is not a path on this machine."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None and not Path(name).exists()


def _public(name: str) -> str:
    return _escaped(name if _is_on_hub(name) else _base_name(name))
