"""Runs on every rank: the real Trainer on a tiny network and random tokens, for each case of OUTPUT/cases.json.

Options of a case: "stop_after": k (train k steps, close, and go on in a second Trainer; "before": sections of the first
one in place of the case's), "nan": [rank, steps]
(that rank's loss is not a number in those steps), "logits": true (save the engine's logits at the end),
"expect": name of the exception that training must raise, "continues": another case whose run directory to use,
"interrupt": [[rank, signal or "stop", where, step], ...]: so many trainers before the last one, each of which is sent
that signal (or finds the stop file) on that rank at that place of that step: "step", "evaluation", "tasks" or "saving".
"broken": k (a token outside the vocabulary in every row of step k).
"evaluation": a section of that name, with the tasks of tests/task_files.py in its include_path.
"copies": the run directory to begin with a copy of, "held": true (save what the engine holds before it trains).
A case's section "model" replaces the base's where it names a pretrained one. "weights": [...]
instead of a section "data": three sets, mixed; the last holds nothing out. "streamed": such sets, of which the first
is a stream of text ("stream"), or what that stream gives, stored ("twin").
"""

import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from l2e_ds import distributed
from l2e_ds.config import DataConfig, run_config_from_dict
from l2e_ds.data import PreparedData, TokenDataset
from l2e_ds.data.stream import TokenStream
from l2e_ds.data.tokenizer import load_tokenizer
from l2e_ds.errors import Interrupted
from l2e_ds.models import network_config
from l2e_ds.train import leave_process, quiet_libraries
from l2e_ds.training import preemption
from l2e_ds.training.deepspeed_config import resolve
from l2e_ds.training.task_evaluation import load_task_evaluation
from l2e_ds.training.trainer import Trainer

VOCABULARY, LENGTH = 64, 16

BASE = {
    "model": {"name": "pythia-14m", "vocab_size": VOCABULARY, "num_layers": 4, "hidden_size": 32, "num_heads": 2},
    "data": {"source": "stdlib", "train_tokenizer": 300, "sequence_length": LENGTH},
    "optimizer": {"peak_learning_rate": 3e-3, "warmup": 0.2, "schedule_steps": 20},
    "training": {"steps": 10, "global_batch": 8, "precision": "fp32", "evaluate_every": 5, "evaluation_sequences": 7},
    "inhibition": {"coefficient": 1e-2, "statistics_window": 5},
    "deepspeed": {"config": "ds_configs/zero1.json"},
    "checkpoint": {"every": 0},
    "logging": {"every": 1, "progress": False},
}


def mixture(weights: list[float]) -> dict:
    """A section `data` of several sets; sources and paths are for the run file's checks only."""
    names = ("short", "long", "silent")
    sets = [
        {
            "name": name,
            "weight": weight,
            "source": "text",
            "path": "none",
            "held_out": 0.0 if name == "silent" else None,
        }
        for name, weight in zip(names, weights, strict=True)
    ]
    return {"tokenizer": "none", "sequence_length": LENGTH, "sets": sets}


def streamed(folder: Path) -> dict:
    """A section `data` of a stream and a set; rank 0 writes words and their tokenizer."""
    text, tokenizer = folder / "words.jsonl", folder / "words.json"
    if distributed.is_main() and not text.exists():
        vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
        words = Tokenizer(WordLevel(vocabulary, unk_token="w1"))
        words.pre_tokenizer = Whitespace()
        words.save(str(tokenizer))
        random = np.random.default_rng(7)
        documents = [random.integers(1, VOCABULARY, random.integers(5, 40)) for _ in range(30)]
        lines = [json.dumps({"text": " ".join(f"w{i}" for i in ids)}) for ids in documents]
        text.write_text("\n".join(lines))
    distributed.agree(None)
    stream = {"name": "words", "weight": 2, "source": "jsonl", "path": str(text), "streaming": True}
    stored = {"name": "stored", "weight": 1, "source": "text", "path": "none"}
    common = {"tokenizer": str(tokenizer), "sequence_length": LENGTH, "order": "stored", "held_out": 0.1, "workers": 1}
    return {**common, "sets": [stream, stored]}


def tokens(count: int, seed: int) -> np.ndarray:
    """A text of sorts: a random walk, so that there is something to learn."""
    steps = np.random.default_rng(seed).integers(-2, 3, count)
    return (np.cumsum(steps) % VOCABULARY).astype(np.uint16)


def data(config: DataConfig | None = None, twin: bool = False) -> list[PreparedData]:
    """Of the first set 200 sequences to train on and 20 held out, of the next ones fewer.

    twin: instead of a stream, its first sequences as a set.
    """

    def dataset(sequences: int, seed: int, name: str) -> TokenDataset:
        array = tokens(sequences * LENGTH + 1, seed)
        return TokenDataset(array, 0, len(array), LENGTH, VOCABULARY, name)

    sets = []
    for index, (name, weight, part) in enumerate(config.parts() if config is not None else [("", 1.0, None)]):
        train = dataset(200 // (1 + 9 * index), 2 * index, "train")
        held_out = dataset(20 - 15 * index, 2 * index + 1, "held out") if part is None or part.held_out else None
        sets.append(PreparedData(train, held_out, None, train.num_tokens, 0, None, name, weight))
        if part is not None and part.streaming:
            tokenizer = load_tokenizer(part.tokenizer)
            sets[-1] = PreparedData(None, held_out, tokenizer, None, 0, None, name, weight, stream=part)
            if twin:
                rows = TokenStream(part, tokenizer, LENGTH, 0, workers=0, shuffle_buffer=0).take(80)
                array = np.append(rows[:, :-1].ravel(), rows[-1, -1])
                train = TokenDataset(array, 0, len(array), LENGTH, VOCABULARY, "twin")
                sets[-1] = PreparedData(train, held_out, None, train.num_tokens, 0, None, name, weight)
    return sets


def make_trainer(case: dict, directory: Path, device: torch.device, steps: int | None = None) -> Trainer:
    raw = {section: {**values, **case.get(section, {})} for section, values in BASE.items() if section != "data"}
    raw["data"] = mixture(case["weights"]) if "weights" in case else BASE["data"]
    if "streamed" in case:
        raw["data"] = streamed(directory.parent)
    if "pretrained" in raw["model"]:
        raw["model"] = case["model"]
    raw["training"]["run_directory"] = str(directory)
    raw["training"].setdefault("micro_batch", raw["training"]["global_batch"] // distributed.size())
    if steps is not None:
        raw["training"]["steps"] = steps
    if "evaluation" in case:
        raw["evaluation"] = case["evaluation"]
    config, ds, batch = resolve(run_config_from_dict(raw, "case"), distributed.size())
    directory.mkdir(parents=True, exist_ok=True)
    network = network_config(config.model, LENGTH)
    if distributed.is_main():
        network.save_pretrained(directory / "model")
    sets, tasks = data(config.data, case.get("streamed") == "twin"), None
    if case.get("evaluation", {}).get("every"):
        words = load_tokenizer(str(Path(case["evaluation"]["include_path"][0]) / "words.json"))
        tasks = load_task_evaluation(config, [replace(part, tokenizer=words) for part in sets])
    return Trainer(config, ds, batch, network, sets, device, tasks)


def poison(rank: int, steps: list[int], trainer: Trainer) -> None:
    real = trainer.head.loss

    def poisoned(engine, inputs, targets):
        bad = distributed.rank() == rank and trainer.state.step in steps
        return real(engine, inputs, targets) * (float("nan") if bad else 1.0)

    trainer.head.loss = poisoned


def interrupted(case: dict, directory: Path, device: torch.device, rank: int, kind: str, where: str, step: int) -> None:
    """A trainer that is asked to stop: by a real signal to this very process, or by the stop file."""
    preemption.listen()
    preemption.watch(directory, None)
    with make_trainer(case, directory, device) as trainer:

        def ask() -> None:
            if distributed.rank() == rank and trainer.state.step == step:
                if kind == "stop":
                    (directory / "stop").touch()
                else:
                    os.kill(os.getpid(), signal.Signals[kind])

        def before(owner: object, name: str) -> None:
            real = getattr(owner, name)

            def asked(*arguments, **named):
                ask()
                return real(*arguments, **named)

            setattr(owner, name, asked)

        if where == "step":
            before(trainer, "train_step")
        elif where == "tasks":
            before(trainer, "evaluate_on_tasks")
        elif where == "saving":
            before(trainer.checkpoints, "save")
        else:
            before(trainer.engine, "eval")
        try:
            trainer.train()
        except Interrupted as stopped:
            (directory / f"interrupted-rank{distributed.rank()}.txt").open("a").write(f"{stopped}\n")
        else:
            raise AssertionError(f"{kind} on rank {rank} at {where} of step {step} was not heard")
    preemption.listen()


def finish(trainer: Trainer, directory: Path, logits: bool) -> None:
    if logits:
        trainer.engine.eval()
        inputs = torch.arange(2 * LENGTH, device=trainer.device).reshape(2, LENGTH) % VOCABULARY
        with torch.no_grad():
            output = trainer.engine(input_ids=inputs, use_cache=False).logits
        if distributed.is_main():
            save_file({"logits": output.contiguous()}, directory / "logits.safetensors")


def save_held(trainer: Trainer, file: Path) -> None:
    """Master weights, moments, step counts and low-precision weights, whole, by DeepSpeed's own functions."""
    import deepspeed

    found, wrapper = {}, trainer.engine.optimizer
    adam = getattr(wrapper, "optimizer", wrapper)
    for name, parameter in trainer.engine.module.named_parameters():
        found[f"{name}/fp32"] = deepspeed.utils.safe_get_full_fp32_param(parameter)
        for key in ("exp_avg", "exp_avg_sq") if trainer.state.applied else ():
            found[f"{name}/{key}"] = deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
            if trainer.engine.zero_optimization_stage() == 0:
                found[f"{name}/fp32"], found[f"{name}/{key}"] = parameter, adam.state[parameter][key]
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[f"{name}/weights"] = parameter.detach().clone()
    found["steps"] = torch.tensor(sorted({float(state["step"]) for state in adam.state.values()}))
    found["weight_decay"] = torch.tensor([group["weight_decay"] for group in adam.param_groups])
    if distributed.is_main():
        save_file({key: tensor.detach().cpu().clone().contiguous() for key, tensor in found.items()}, file)


def run_case(name: str, case: dict, output: Path, device: torch.device) -> None:
    options = case.pop("options", {})
    directory = output / options.get("continues", name)
    raised = None
    if "copies" in options and distributed.is_main():
        shutil.copytree(options["copies"], directory)
    distributed.agree(None)  # the copy is there
    try:
        if "stop_after" in options:
            with make_trainer({**case, **options.get("before", {})}, directory, device, options["stop_after"]) as first:
                first.train()
        for interruption in options.get("interrupt", []):
            interrupted(case, directory, device, *interruption)
        with make_trainer(case, directory, device) as trainer:
            if "nan" in options:
                poison(*options["nan"], trainer)
            if "broken" in options:
                train = trainer.sequences.sets[0].train
                train.tokens[trainer.sequences.rows(options["broken"])[2] * LENGTH + 3] = VOCABULARY
            if options.get("held"):
                save_held(trainer, directory / "held.safetensors")
            trainer.train()
            finish(trainer, directory, options.get("logits", False))
    except Exception as error:
        raised = error
        if type(error).__name__ != options.get("expect"):
            raise
    assert not any(thread.name == "loader" for thread in threading.enumerate())
    if "expect" in options:
        assert raised is not None, f"{name}: expected {options['expect']}"
        (output / f"{name}-rank{distributed.rank()}.txt").write_text(str(raised))


def main() -> None:
    quiet_libraries()
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: (
        True
    )  # torch computes fp16 on CPUs; DeepSpeed only doubts it
    output = Path(sys.argv[1])
    launch = distributed.find_launch()
    device = distributed.join(launch, timeout_minutes=5)
    for name, case in json.loads((output / "cases.json").read_text()).items():
        run_case(name, case, output, device)
    distributed.leave()


if __name__ == "__main__":
    main()
    leave_process(0)
