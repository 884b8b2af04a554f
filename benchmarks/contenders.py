"""Train the contenders of `python -m benchmarks throughput`: the same network on the same batches.

Each has a process of its own on every rank, `python -m benchmarks.contenders SPEC.json RESULT.json`, with the
launcher's variables: DeepSpeed, accelerate and torch keep state as long as their process lives, and the peak memory
that the system reports never falls. B: sequences of a micro-batch, T: tokens of a sequence.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.about import device_name
from l2e_ds.config.reading import checked
from l2e_ds.config.sections import RunConfig
from l2e_ds.data import PreparedData, TokenDataset
from l2e_ds.distributed import collectives, process_group
from l2e_ds.distributed.launch import find_launch
from l2e_ds.distributed.watchdog import is_lost_contact
from l2e_ds.engine.configuration import check_device
from l2e_ds.errors import L2EError
from l2e_ds.models import counts
from l2e_ds.models.counts import matrix_parameters, unbuilt
from l2e_ds.models.network import build_network
from l2e_ds.run_directory.metrics import read_metrics
from l2e_ds.system import gpus, memory
from l2e_ds.system.process import prepare_libraries
from l2e_ds.training.preflight import ResolvedRun, resolve_config

if TYPE_CHECKING:
    from torch.utils.data import Dataset

OURS, PLAIN, HUGGING_FACE, MINIMAL = (
    "l2e-ds",
    "l2e-ds, method none",
    "Hugging Face Trainer",
    "minimal DeepSpeed loop",
)
WARMUP = 2
"""Steps before those that are counted, which allocate memory and import modules."""
LOG_EVERY = 10
"""Steps between two reports of the loss, after the first step's; the default of `logging.every`."""
FAILED, LOST_CONTACT = 1, 76
"""Exit codes beside L2EError's own. The second: another rank has failed, whose message matters more."""
SEED = 1234
TIMEOUT = 10.0  # minutes


@dataclass
class Work:
    """Holds one contender's training, and what it measures."""

    run: ResolvedRun
    dataset: TokenDataset
    device: torch.device
    folder: Path
    marks: list[float] = field(default_factory=list)  # times in seconds, before the first step and after each
    # losses of the first step's batch on all ranks, before and after training
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def mark(self) -> None:
        """Note the time. Call it before the first step, and after each step before anything is logged.

        It waits for the device at both ends of the counted steps only: in between, a loop may run ahead of it.
        """
        if self.device.type == "cuda" and len(self.marks) in (WARMUP, self.run.config.training.steps):
            torch.cuda.synchronize(self.device)
        self.marks.append(time.perf_counter())
        if len(self.marks) > self.run.config.training.steps:
            self.peak_bytes = memory.peak_memory_bytes(self.device)


# --- contenders --------------------------------------------------------------------------------------------------


def train_ours(work: Work) -> None:
    """Train with l2e-ds."""
    from l2e_ds.training.trainer import RunData, Trainer

    data = RunData([PreparedData(work.dataset)])
    trainer = Trainer(work.run, data, work.device)
    work.mark()
    for step in range(1, work.run.config.training.steps + 1):
        trainer.train_step()
        trainer.metrics.advance()
        work.mark()
        if step == 1 or step % LOG_EVERY == 0:
            trainer.log()
    first = read_metrics(trainer.metrics.path, "train")[0]["lm_loss"] if collectives.is_main() else None
    work.losses = [collectives.broadcast_object(first)]
    if trainer.inhibitor is not None:
        trainer.inhibitor.detach()
    work.losses.append(loss_of_first_batch(work, trainer.engine))


def train_hugging_face(work: Work) -> None:
    """Train with the Trainer as its users call it: the network's own loss, the Trainer's defaults, no trackers."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Note(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0 and not work.marks:
                work.mark()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            work.mark()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if state.global_step == 1:
                work.losses.append(float(logs["loss"]))

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not isinstance(trainer.model_wrapped, DeepSpeedEngine):
                raise L2EError(f"bench: the Hugging Face Trainer trained without DeepSpeed: {trainer.model_wrapped}")
            work.losses.append(loss_of_first_batch(work, trainer.model_wrapped))

    network = plain_network(work)  # before TrainingArguments, which under ZeRO-3 has transformers build in shards
    training, optimizer = work.run.config.training, work.run.config.optimizer
    assert optimizer.peak_learning_rate is not None
    arguments = TrainingArguments(
        output_dir=str(work.folder),
        deepspeed=named_optimizer(work),
        per_device_train_batch_size=work.run.batch.micro_batch,
        gradient_accumulation_steps=work.run.batch.accumulation,
        max_steps=training.steps,
        learning_rate=optimizer.peak_learning_rate,
        lr_scheduler_type="constant",
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        max_grad_norm=optimizer.gradient_clipping,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        use_cpu=work.device.type == "cpu",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,  # it would remove shift_labels
        logging_steps=LOG_EVERY,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=network, args=arguments, train_dataset=Examples(work.dataset), callbacks=[Note()])
    trainer.train()


def train_minimal(work: Work) -> None:
    """Train with a loop as one writes by hand: deepspeed.initialize, a DataLoader, forward, backward, step, a print."""
    import deepspeed

    from l2e_ds.engine.engine import parameter_groups

    network, ds, values = plain_network(work), named_optimizer(work), work.run.config.optimizer
    assert values.peak_learning_rate is not None
    groups = parameter_groups(network, values.weight_decay)
    optimizer = None
    if "optimizer" not in ds:
        betas = (values.betas[0], values.betas[1])
        optimizer = torch.optim.AdamW(groups, lr=values.peak_learning_rate, betas=betas, eps=values.eps, fused=True)
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=optimizer, model_parameters=groups, config=ds, dist_init_required=False
    )
    examples: Dataset = Examples(work.dataset)
    sampler: DistributedSampler = DistributedSampler(examples, shuffle=False)
    batches = iter(DataLoader(examples, batch_size=work.run.batch.micro_batch, sampler=sampler))
    work.mark()
    for step in range(1, work.run.config.training.steps + 1):
        total = torch.zeros((), device=work.device)
        for _ in range(work.run.batch.accumulation):
            batch = {name: tensor.to(work.device) for name, tensor in next(batches).items()}
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        work.mark()
        if step == 1 or step % LOG_EVERY == 0:
            mean = mean_of_ranks(total / work.run.batch.accumulation)
            print(f"step {step}: loss {mean:.4f}")
            work.losses = work.losses or [mean]
    work.losses.append(loss_of_first_batch(work, engine))


CONTENDERS: dict[str, Callable[[Work], None]] = {
    OURS: train_ours,
    PLAIN: train_ours,
    HUGGING_FACE: train_hugging_face,
    MINIMAL: train_minimal,
}


# --- what they share ---------------------------------------------------------------------------------------------


class Examples(torch.utils.data.Dataset):
    """Holds sequences as transformers' causal language models take them.

    With `labels` alone they train on T-1 of T targets, since the last target would be token T+1: `shift_labels` are all
    T. `labels` must be there too, but are not used.
    """

    def __init__(self, dataset: TokenDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        row = torch.from_numpy(self._dataset[index])
        return {"input_ids": row[:-1], "labels": row[:-1], "shift_labels": row[1:]}


def plain_network(work: Work) -> Any:
    """Return the network as transformers builds it, without the changes of `build_network`, with the same first
    weights."""
    from transformers import AutoModelForCausalLM

    model, hf_config, seed = work.run.config.model, work.run.hf_config, work.run.config.training.seed
    network = AutoModelForCausalLM.from_config(hf_config, attn_implementation=model.attention, dtype=torch.float32)
    network.load_state_dict(build_network(model, hf_config, seed, None).state_dict())
    network.config.use_cache = False
    if model.activation_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return network.train()


def named_optimizer(work: Work) -> dict:
    """Return the JSON. If it offloads the optimizer and names none, add the AdamW that DeepSpeed then uses on CPUs.

    (With an optimizer that the JSON names, the Hugging Face Trainer applies weight decay to biases and norms, too.)
    """
    ds: dict = json.loads(json.dumps(work.run.ds))
    offload = ds.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    if offload and "optimizer" not in ds:
        values = work.run.config.optimizer
        parameters = {"lr": values.peak_learning_rate, "betas": values.betas, "eps": values.eps}
        ds["optimizer"] = {"type": "AdamW", "params": {**parameters, "weight_decay": values.weight_decay}}
    return ds


def make_dataset(sequences: int, length: int, vocabulary: int) -> TokenDataset:
    """Return artificial packed text: a random walk over the vocabulary, so that there is something to learn."""
    steps = np.random.default_rng(SEED).integers(-2, 3, sequences * length + 1)
    tokens = (np.cumsum(steps) % vocabulary).astype(np.int32)
    return TokenDataset(tokens, 0, len(tokens), length, vocabulary, "random walk")


@torch.no_grad()
def loss_of_first_batch(work: Work, engine: Any) -> float:
    """Return the mean cross-entropy over all ranks of the first micro-batch of the first step. Collective."""
    first = collectives.rank() * work.run.batch.micro_batch
    rows = torch.from_numpy(work.dataset.batch(np.arange(first, first + work.run.batch.micro_batch))).to(work.device)
    engine.eval()
    logits = engine(input_ids=rows[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
    return mean_of_ranks(loss)


def mean_of_ranks(value: Tensor) -> float:
    """Return the mean of a number over the ranks. Collective."""
    return collectives.all_reduce_sum(value.double()).item() / collectives.size()


# --- the process -------------------------------------------------------------------------------------------------


def measure(spec: dict) -> dict[str, Any]:
    """Train as specified. spec: contender, run (a run file's content), folder. Collective; raises L2EError."""
    launch = find_launch()
    device = process_group.join(launch, TIMEOUT)
    run = resolve_config(checked(RunConfig, spec["run"], "bench"), launch.size)
    config, hf_config = run.config, run.hf_config
    check_device(config)
    dataset = make_dataset(
        config.training.steps * run.batch.global_batch, config.data.sequence_length, hf_config.vocab_size
    )
    work = Work(run, dataset, device, Path(spec["folder"]))
    matrices = matrix_parameters(unbuilt(hf_config))
    libraries = memory.peak_memory_bytes(device)
    CONTENDERS[spec["contender"]](work)
    marks = work.marks[WARMUP:]
    return {
        "seconds": marks[-1] - marks[0],
        "step_seconds": [after - before for before, after in pairwise(marks)],
        "first_loss": work.losses[0],
        "last_loss": work.losses[1],
        "peak_memory_bytes": work.peak_bytes,
        "before_building_bytes": libraries,
        "precision": config.training.precision,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "peak_tflops": gpus.peak_tflops(device, config.training.precision, config.logging.peak_tflops),
        "flops_per_token": counts.flops_per_token(
            matrices, hf_config.num_hidden_layers, counts.attention_width(hf_config), config.data.sequence_length
        ),
    }


def main() -> int:
    """Measure one contender on one rank, and return the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare_libraries()
    spec, result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    try:
        result.write_text(json.dumps(measure(spec)), encoding="utf-8")
    except L2EError as error:
        print(error)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        return LOST_CONTACT if is_lost_contact(error) else FAILED
    process_group.leave()
    return 0


def _end_with_parent() -> None:
    """End this process when the pipe of standard input closes, as it does when the process that measures is gone."""
    sys.stdin.buffer.read()
    os._exit(FAILED)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # other ranks, or threads of a library, could delay an ordinary exit
