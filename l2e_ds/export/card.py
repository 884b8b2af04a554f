"""The model card (README.md) of an exported model: what was trained, on what, what was inhibited, how to load it.

Says what the run directory knows of the exported step; of the training machine it tells base names only. Text from the
run is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from l2e_ds.run_directory.metrics import FILE, read_metrics
from l2e_ds.run_directory.results import TaskResult, read_results

METHODS = {
    "l2e": "Learning Towards Emergence (L2E)",
    "memel": "MEmeL, the method before L2E",
    "none": "none: plain pretraining",
}
SOURCES = """* Wang et al. 2025, Learning Towards Emergence (L2E), arXiv 2503.23298
* Wang et al. 2024, Learning from Emergence (MEmeL), arXiv 2312.11560
* Biderman et al. 2023, Pythia, arXiv 2304.01373"""


@dataclass(frozen=True)
class Exported:
    """What a card is written of. state: the checkpoint's; network: of transformers; licence: an id of the hub, or None;
    repository: where it will be pushed, or None."""

    run: Path
    state: dict[str, Any]
    network: Any
    parameters: int
    precision: str
    tokenizer: bool
    licence: str | None
    repository: str | None

    @property
    def step(self) -> int:
        return self.state["train"]["step"]

    @property
    def config(self) -> dict[str, Any]:
        return self.state["config"]

    @property
    def name(self) -> str:
        return self.repository.rpartition("/")[2] if self.repository else self.run.resolve().name

    def newest(self, kind: str) -> dict[str, Any]:
        """The newest line of the metrics at or before the step; empty without one."""
        path = self.run / FILE
        lines = read_metrics(path, kind) if path.is_file() else []
        return next((line for line in reversed(lines) if line["step"] <= self.step), {})


def model_card(of: Exported) -> str:
    """README.md: front matter that the hub reads, and text."""
    results = [r for r in read_results(of.run) if r.step == of.step and math.isfinite(r.value)]
    parts = [
        f"# {_escaped(of.name)}",
        _summary(of),
        "## Model\n\n" + _table(_model_rows(of)),
        "## Inhibition\n\n" + _table(_inhibition_rows(of)),
        "## Training\n\n" + _table(_training_rows(of)),
        "## Results\n\n" + _results(of, results),
        "## How to load it\n\n" + _loading(of),
        "## Limits\n\n" + _limits(of, results),
        "## Licence\n\n" + (_escaped(of.licence) if of.licence else "No licence was chosen for this model."),
        "## Sources\n\n" + SOURCES,
    ]
    return str(ModelCard(f"---\n{_front_matter(of, results).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _front_matter(of: Exported, results: Sequence[TaskResult]) -> ModelCardData:
    model, method = of.config["model"], of.config["inhibition"]["method"]
    figures = [
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
    return ModelCardData(
        license=of.licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            "l2e-ds",
            *([] if method == "none" else [method]),
            *(["pythia"] if model["name"] else []),
            of.network.model_type,
        ],
        base_model=model["pretrained"] if model["pretrained"] and _is_on_hub(model["pretrained"]) else None,
        datasets=[part["path"] for part in _sets(of) if part["source"] == "hub" and _is_on_hub(part["path"])] or None,
        model_name=of.name if figures else None,
        eval_results=figures or None,
    )


def _summary(of: Exported) -> str:
    model, inhibition = of.config["model"], of.config["inhibition"]
    start = (
        f"Further trained from {_public(model['pretrained'])}"
        if model["pretrained"]
        else f"A language model of the form of {_escaped(model['name'])}, trained from scratch"
    )
    how = (
        "without inhibition of monosemantic neurons"
        if inhibition["method"] == "none"
        else f"while its most monosemantic neurons were inhibited: {METHODS[inhibition['method']]}"
    )
    return (
        f"{start} with l2e-ds on DeepSpeed, {how}. This is step {of.step:,} ({of.state['train']['tokens']:,} tokens)."
    )


# --- what was trained, and how -----------------------------------------------------------------------------------


def _model_rows(of: Exported) -> list[tuple[str, str]]:
    network = of.network
    rows = [
        ("architecture", f"{_escaped(network.model_type)}, {network.num_hidden_layers} layers"),
        ("hidden size, heads", f"{network.hidden_size}, {network.num_attention_heads}"),
        ("vocabulary rows", f"{network.vocab_size:,}"),
        ("parameters", f"{of.parameters:,}"),
        ("precision of these weights", of.precision),
    ]
    pretrained, revision = of.config["model"]["pretrained"], of.config["model"]["revision"]
    if pretrained:
        rows.append(("started from", _public(pretrained) + (f", revision {_escaped(revision)}" if revision else "")))
    return rows


def _weight_rows(section: dict[str, Any]) -> list[tuple[str, str]]:
    """Which loss, how strong, and when; `section` may be of a version that had no strength."""
    if section.get("strength") is None and section.get("coefficient") is None:  # a deactivation
        return []
    loss = f"{section['loss']}, power {section['power']}" if section["loss"] == "projected" else section["loss"]
    name = "coefficient" if section.get("strength") is None else "strength"
    schedule = {key: section.get(key) for key in ("start", "warmup", "decay", "end")}
    schedule["warmup"] = section.get("coefficient_warmup", schedule["warmup"])
    when = ", ".join(f"{key} {value}" for key, value in schedule.items() if value)
    return [("loss", loss), (name, f"{section[name]:g}" + (f" ({when}; steps, or shares of the run)" if when else ""))]


def _inhibition_rows(of: Exported) -> list[tuple[str, str]]:
    section, line = of.config["inhibition"], of.newest("train")
    rows = [("method", METHODS[section["method"]])]
    if section["method"] == "none":
        return rows
    rows += [
        ("layers", ", ".join(map(str, of.state["identity"]["layers"])) + f" ({_escaped(section['layers'])})"),
        ("target share", f"{section['target_share']:.2%} of (token, neuron) pairs"),
        *_weight_rows(section),
        ("retrieval", _escaped(section["retrieval"] or "as the method has it")),
        ("mechanism", _escaped(section["mechanism"] or "as the method has it")),
        ("statistics", f"window of {section['statistics_window']} steps, reduced once a {section['reduce']}"),
    ]
    if "observed_share" in line:
        rows.append((f"observed share, step {line['step']:,}", f"{line['observed_share']:.2%}"))
    for layer in of.state["identity"]["layers"]:
        figures = {name: line.get(f"layer{layer}/{name}") for name in ("mean_s", "selected_score", "tau")}
        if None not in figures.values():
            rows.append(
                (
                    f"layer {layer}, step {line['step']:,}",
                    f"mean S {figures['mean_s']:.4g}, MS of the selected {figures['selected_score']:.4g},"
                    f" tau {figures['tau']:.4g}",
                )
            )
    return rows


def _training_rows(of: Exported) -> list[tuple[str, str]]:
    data, optimizer, training = (of.config[name] for name in ("data", "optimizer", "training"))
    start, line, identity = of.newest("start"), of.newest("train"), of.state["identity"]
    rows = [(f"data{_named(part)}", _source(part)) for part in _sets(of)]
    if start.get("train_tokens"):
        times = of.state["train"]["tokens"] / start["train_tokens"]
        rows.append(("tokens of that data", f"{start['train_tokens']:,}, read {times:.3g} times"))
    rows += [
        (f"epochs of {_escaped(key.partition('/')[2])}", f"{value:.3g}")
        for key, value in line.items()
        if key.startswith("epochs/")
    ]
    tokenizer = (
        f"byte-level BPE trained on the data, {data['train_tokenizer']:,} entries"
        if data["train_tokenizer"]
        else _public(data["tokenizer"] or "not given")
    )
    rows += [
        ("tokenizer", tokenizer),
        ("sequence length", f"{data['sequence_length']:,} tokens"),
        ("steps", f"{of.step:,} of {training['steps']:,}"),
        ("global batch", f"{training['global_batch']:,} sequences"),
        ("tokens", f"{of.state['train']['tokens']:,}"),
        (
            "optimizer",
            f"AdamW, betas {optimizer['betas'][0]:g} and {optimizer['betas'][1]:g}, eps {optimizer['eps']:g},"
            f" weight decay {optimizer['weight_decay']:g}, gradient clipping {optimizer['gradient_clipping']:g}",
        ),
        (
            "learning rate",
            f"peak {optimizer['peak_learning_rate']:g}, cosine to {optimizer['final_ratio']:g} of it over"
            f" {optimizer['schedule_steps'] or training['steps']:,} steps, warm-up {optimizer['warmup']:g} of them",
        ),
        ("precision, ZeRO stage, ranks", f"{identity['precision']}, {identity['zero_stage']}, {identity['ranks']}"),
        ("seed", str(training["seed"])),
    ]
    if start.get("versions"):
        rows.append(("versions", ", ".join(f"{_escaped(k)} {_escaped(v)}" for k, v in start["versions"].items())))
    git = start.get("git") or {}
    if git.get("commit"):
        rows.append(("code", f"commit {_escaped(git['commit'])}" + (", with changes" if git.get("changed") else "")))
    return rows


def _sets(of: Exported) -> list[dict[str, Any]]:
    """The sets of data, as in the run file."""
    data = of.config["data"]
    return data["sets"] or [data]


def _named(part: dict[str, Any]) -> str:
    return f", {_escaped(part['name'])} (weight {part['weight']:g})" if "name" in part else ""


def _source(part: dict[str, Any]) -> str:
    if part["source"] == "stdlib":
        return "the sources of the Python standard library"
    paths = [part["path"]] if isinstance(part["path"], str) else part["path"]
    named = ", ".join(_public(path) if part["source"] == "hub" else _escaped(_base_name(path)) for path in paths)
    detail = [f"{key} {part[key]}" for key in ("subset", "split", "revision") if part["source"] == "hub" and part[key]]
    return f"{part['source']}: {named}" + (f" ({_escaped(', '.join(detail))})" if detail else "")


# --- what came of it ---------------------------------------------------------------------------------------------


def _results(of: Exported, results: Sequence[TaskResult]) -> str:
    line = of.newest("evaluation")
    if line:
        loss = line["held_out_loss"]
        said = "not finite" if loss is None else f"{loss:.4f} nats/token"
        text = f"Held-out LM loss at step {line['step']:,}: {said}."
    else:
        text = "The run was not evaluated on held-out text."
    if not results:
        return f"{text}\n\nNo evaluation tasks were run at this step."
    rows = [
        f"| {_escaped(r.task)} | {r.num_fewshot} | {_escaped(r.metric)} | {r.value:.4f} |"
        f" {'' if r.stderr is None else f'{r.stderr:.4f}'} | {r.samples:,} |"
        for r in results
    ]
    head = "| task | shots | metric | value | standard error | documents |\n|---|---|---|---|---|---|\n"
    return f"{text}\n\n{head}" + "\n".join(rows)


def _loading(of: Exported) -> str:
    where = f'"{of.repository}"' if of.repository else '"."  # this folder'
    lines = ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "", f"where = {where}"]
    lines.append("model = AutoModelForCausalLM.from_pretrained(where)")
    if of.tokenizer:
        lines += [
            "tokenizer = AutoTokenizer.from_pretrained(where)",
            'tokens = tokenizer("The", return_tensors="pt")',
            'print(tokenizer.decode(model.generate(tokens["input_ids"], max_new_tokens=20)[0]))',
        ]
        return "\n".join([*lines, "```"])
    lines[1] = "from transformers import AutoModelForCausalLM"
    return "\n".join([*lines, "```", "", "The run had no tokenizer of its own: use that of its data."])


def _limits(of: Exported, results: Sequence[TaskResult]) -> str:
    limits = ["A base model: it continues text, and was not trained to follow instructions or to be safe."]
    if of.step < of.config["training"]["steps"]:
        limits.append(f"Training was to go on to step {of.config['training']['steps']:,}.")
    longer = longer_than_trained(of.network, of.config)
    if longer is not None:
        limits.append(longer[0].upper() + longer[1:] + ".")
    cut = [f"{_escaped(r.task)} ({r.num_fewshot}-shot, {r.cut:,} of {r.samples:,})" for r in results if r.cut]
    if cut:
        limits.append(f"Prompts that do not fit the context were cut from the left: {', '.join(dict.fromkeys(cut))}.")
    if any(result.limit for result in results):
        limits.append("Evaluation tasks were cut to their first documents (`limit`): not comparable with full ones.")
    section = of.config["inhibition"]
    if section["method"] == "l2e" and section["loss"] == "published":
        limits.append("The published inhibition loss also falls when a whole layer shrinks: compare mean S.")
    return "\n".join(f"* {limit}" for limit in limits)


def longer_than_trained(network: Any, config: dict[str, Any]) -> str | None:
    """A sentence for a model that takes more tokens than its run trained at once; None for another.

    network: of transformers; config: of the run.
    """
    longest, trained = getattr(network, "max_position_embeddings", None), config["data"]["sequence_length"]
    if longest is not None and longest <= trained:
        return None
    context = "its context, which has no limit," if longest is None else f"its context of {longest:,} tokens"
    where = " in this run" if config["model"]["pretrained"] else ""
    return f"{context} is longer than the sequences of {trained:,} tokens that it was trained on{where}"


# --- text --------------------------------------------------------------------------------------------------------


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {label} | {value} |" for label, value in rows)


def _escaped(value: object) -> str:
    """On one line, with nothing in it that Markdown or HTML would take for its own."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", " ".join(str(value).split()))


def _base_name(path: str) -> str:
    return Path(path).name or path


def _is_on_hub(name: str) -> bool:
    """Whether it is a name of the hub, as NAME or OWNER/NAME, and no path of this machine."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None and not Path(name).exists()


def _public(name: str) -> str:
    return _escaped(name if _is_on_hub(name) else _base_name(name))
