"""Trains every case of OUTPUT/cases.json (see tests/distributed/training_case.py) on each rank: the real Trainer on a
tiny network and random tokens."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from l2e_ds.checkpoint.elastic import ElasticLoad, _master_weights
from l2e_ds.config.reading import checked
from l2e_ds.config.sections import DataConfig, RunConfig
from l2e_ds.data import PreparedData, PreparedText, TokenDataset
from l2e_ds.data.stream import TokenStream
from l2e_ds.data.tokenizer import load_tokenizer
from l2e_ds.distributed import collectives, launch, process_group
from l2e_ds.errors import Interrupted
from l2e_ds.run_directory.stop_file import stop_file
from l2e_ds.system.process import leave_process, prepare_libraries
from l2e_ds.training import preemption
from l2e_ds.training.held_out import load_samples
from l2e_ds.training.preflight import resolve_config
from l2e_ds.training.task_evaluation import load_tasks_of, task_evaluation
from l2e_ds.training.trainer import RunData, Trainer
from tests.distributed.training_case import LENGTH, SPIKE, TINY_RUN, VOCABULARY, Interruption, TrainingCase


def mixture(weights: Sequence[float]) -> dict:
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
    if collectives.is_main() and not text.exists():
        vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
        words = Tokenizer(WordLevel(vocabulary, unk_token="w1"))
        words.pre_tokenizer = Whitespace()
        words.save(str(tokenizer))
        random = np.random.default_rng(7)
        documents = [random.integers(1, VOCABULARY, random.integers(5, 40)) for _ in range(30)]
        lines = [json.dumps({"text": " ".join(f"w{i}" for i in ids)}) for ids in documents]
        text.write_text("\n".join(lines))
    collectives.raise_on_all(None)
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
    for index, (name, weight, part) in enumerate(config.all_sets() if config is not None else [("", 1.0, None)]):
        train = dataset(200 // (1 + 9 * index), 2 * index, "train")
        held_out = dataset(20 - 15 * index, 2 * index + 1, "held out") if part is None or part.held_out else None
        sets.append(PreparedData(train, held_out, name=name, weight=weight))
        if part is not None and part.streaming:
            tokenizer = load_tokenizer(part.tokenizer)
            sets[-1] = PreparedData(None, held_out, tokenizer, name=name, weight=weight, stream=part)
            if twin:
                rows = TokenStream(part, tokenizer, LENGTH, 0, workers=0, shuffle_buffer=0).take(80)
                array = np.append(rows[:, :-1].ravel(), rows[-1, -1])
                train = TokenDataset(array, 0, len(array), LENGTH, VOCABULARY, "twin")
                sets[-1] = PreparedData(train, held_out, name=name, weight=weight)
    return sets


def texts() -> list[PreparedText]:
    """Two texts, of eleven sequences and a rest, and of one sequence."""
    arrays = {"long": tokens(11 * LENGTH + 8, 100), "single": tokens(LENGTH + 1, 101)}
    return [
        PreparedText(name, TokenDataset(array, 0, len(array), LENGTH, VOCABULARY, name), num_bytes=3 * len(array))
        for name, array in arrays.items()
    ]


def make_trainer(
    case: TrainingCase, directory: Path, device: torch.device, sections: dict | None = None, steps: int | None = None
) -> Trainer:
    """sections: in place of the case's of the same names; steps: instead of all that the case trains."""
    given = case.sections | (sections or {})
    raw = {section: {**values, **given.get(section, {})} for section, values in TINY_RUN.items()}
    if case.mixture is not None:
        raw["data"] = mixture(case.mixture)
    if case.stream is not None:
        raw["data"] = streamed(directory.parent)
    if {"pretrained", "config"} & raw["model"].keys():
        raw["model"] = given["model"]
    raw["training"]["run_directory"] = str(directory)
    raw["training"].setdefault("micro_batch", raw["training"]["global_batch"] // collectives.size())
    if steps is not None:
        raw["training"]["steps"] = steps
    if case.begins_from is not None:
        raw["training"]["resume"] = str(directory.parent / case.begins_from)
    if "evaluation" in given:
        raw["evaluation"] = given["evaluation"]
    run = resolve_config(checked(RunConfig, raw, "case"), collectives.size())
    config = run.config
    directory.mkdir(parents=True, exist_ok=True)
    if collectives.is_main():
        run.hf_config.save_pretrained(directory / "model")
    sets, tasks = data(config.data, case.stream == "stored beforehand"), None
    if config.evaluation.every:
        words = load_tokenizer(str(Path(given["evaluation"]["include_path"][0]) / "words.json"))
        tasks = task_evaluation(config, load_tasks_of(config), [replace(part, tokenizer=words) for part in sets])
    samples = None
    if config.evaluation.samples:
        words = load_tokenizer(str(Path(given["evaluation"]["include_path"][0]) / "words.json"))
        samples = load_samples(config, run.hf_config, [replace(part, tokenizer=words) for part in sets])
    return Trainer(run, RunData(sets, texts() if case.texts else (), samples, tasks), device)


def multiply_loss(trainer: Trainer, factor: float, steps: Sequence[int]) -> None:
    real = trainer.head.loss

    def loss(engine, inputs, targets):
        lm_loss, z_loss = real(engine, inputs, targets)
        return lm_loss * (factor if trainer.state.step in steps else 1.0), z_loss

    trainer.head.loss = loss


class Killed(Exception):
    """Ends a trainer at a place where its process would be killed."""


def train_until_interrupted(
    case: TrainingCase, directory: Path, device: torch.device, interruption: Interruption
) -> None:
    preemption.listen()
    preemption.watch(directory, None)
    rank, how, where, step = interruption
    with make_trainer(case, directory, device) as trainer:

        def ask() -> None:
            if how == "kill" and trainer.state.step == step:
                raise Killed
            if collectives.rank() == rank and trainer.state.step == step:
                if how == "stop file":
                    stop_file(directory).touch()
                else:
                    os.kill(os.getpid(), signal.Signals[how])

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
        elif where == "evaluation":
            before(trainer.engine, "eval")
        else:
            raise ValueError(interruption)
        try:
            trainer.train()
        except Killed:
            pass
        except Interrupted as stopped:
            (directory / f"interrupted-rank{collectives.rank()}.txt").open("a").write(f"{stopped}\n")
        else:
            raise AssertionError(f"{interruption} was not heard")
    preemption.listen()


@contextmanager
def loading_wrongly() -> Iterator[None]:
    real = ElasticLoad.copy_own_part

    def copy(load: ElasticLoad) -> None:
        real(load)
        _master_weights(load.engine)[0].data.view(-1)[0] += 1

    ElasticLoad.copy_own_part = copy
    try:
        yield
    finally:
        ElasticLoad.copy_own_part = real


def save_logits(trainer: Trainer, file: Path) -> None:
    trainer.engine.eval()
    inputs = torch.arange(2 * LENGTH, device=trainer.device).reshape(2, LENGTH) % VOCABULARY
    with torch.no_grad():
        output = trainer.engine(input_ids=inputs, use_cache=False).logits
    if collectives.is_main():
        save_file({"logits": output.contiguous()}, file)


def save_engine_state(trainer: Trainer, file: Path) -> None:
    """Master weights, moments, step counts and low-precision weights, whole, by DeepSpeed's own functions."""
    import deepspeed

    found, wrapper = {}, trainer.engine.optimizer
    adam = getattr(wrapper, "optimizer", wrapper)
    if trainer.state.applied and hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
        wrapper._lazy_init_hp_params_optimizer_state()  # as DeepSpeed does after its first step: its functions need it
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
    if collectives.is_main():
        save_file({key: tensor.detach().cpu().clone().contiguous() for key, tensor in found.items()}, file)


def train_case(name: str, case: TrainingCase, output: Path, device: torch.device) -> None:
    directory = output / (case.in_directory_of or name)
    raised = None
    if case.copy_of is not None and collectives.is_main():
        shutil.copytree(case.copy_of, directory)
    if case.begins_from is not None and collectives.is_main():
        directory.mkdir()
        left = {"kind": "evaluation", "step": 0, "tokens": 0, "held_out_loss": 9.9}
        (directory / "metrics.jsonl").write_text(json.dumps(left) + "\n")
    collectives.raise_on_all(None)  # the files are there
    try:
        if case.stop_after is not None:
            with make_trainer(case, directory, device, case.before_stopping, case.stop_after) as first:
                multiply_loss(first, SPIKE, case.loss_spikes)
                first.train()
        for interruption in case.interruptions:
            train_until_interrupted(case, directory, device, interruption)
        with (
            loading_wrongly() if case.loads_wrongly else nullcontext(),
            make_trainer(case, directory, device) as trainer,
        ):
            if case.non_finite_loss is not None and case.non_finite_loss[0] == collectives.rank():
                multiply_loss(trainer, float("nan"), case.non_finite_loss[1])
            multiply_loss(trainer, SPIKE, case.loss_spikes)
            if case.token_outside_vocabulary_at is not None:
                row = trainer.sequences.rows(case.token_outside_vocabulary_at)[2]
                trainer.sequences.sets[0].train.tokens[row * LENGTH + 3] = VOCABULARY
            if case.save_engine_state:
                save_engine_state(trainer, directory / "engine_state.safetensors")
            trainer.train()
            if case.save_logits:
                save_logits(trainer, directory / "logits.safetensors")
    except Exception as error:
        raised = error
        if type(error).__name__ != case.fails_with:
            raise
    assert not any(thread.name == "loader" for thread in threading.enumerate())
    if case.fails_with is not None:
        assert raised is not None, f"{name}: expected {case.fails_with}"
        (output / f"{name}-rank{collectives.rank()}.txt").write_text(str(raised))


def main() -> None:
    prepare_libraries()
    from deepspeed.accelerator import get_accelerator

    # torch computes fp16 on CPUs; DeepSpeed only doubts it
    type(get_accelerator()).is_fp16_supported = lambda self: True
    output = Path(sys.argv[1])
    device = process_group.join(launch.find_launch(), timeout_minutes=5)
    for name, fields in json.loads((output / "cases.json").read_text()).items():
        begin = time.perf_counter()
        train_case(name, TrainingCase(**fields), output, device)
        if collectives.is_main():
            print(f"{time.perf_counter() - begin:6.2f} s  {name}", flush=True)
    process_group.leave()


if __name__ == "__main__":
    main()
    leave_process(0)
