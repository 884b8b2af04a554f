"""Runs on two ranks: building networks under ZeRO-3, statistics of unequal batches, and errors of one rank.

Writes OUTPUT/rankN.json.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig

from l2e_ds.config.sections import ModelConfig
from l2e_ds.distributed import collectives, launch, process_group
from l2e_ds.errors import DataError, L2EError
from l2e_ds.inhibition import Inhibitor, NeuronSite, Settings
from l2e_ds.models.network import build_network
from l2e_ds.models.pythia import network_config
from l2e_ds.system.process import leave_process, prepare_libraries

ZERO3 = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


GIVEN = {
    "llama": LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    ),
    "tied gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2),
}
"""Networks that are built from a config.json."""


def sharded_and_whole(config: ModelConfig, sequence_length: int) -> dict:
    """A network built under ZeRO-3 beside the same one built whole: what this rank holds, and whether they agree."""
    import deepspeed

    hf_config = network_config(config, sequence_length)
    whole = dict(build_network(config, hf_config, 7, None).named_parameters())
    sharded = dict(build_network(config, hf_config, 7, ZERO3).named_parameters())
    same = sharded.keys() == whole.keys()
    for name, parameter in sharded.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            same = same and torch.equal(parameter.detach(), whole[name].detach())
    kept = True
    if config.config is None:
        inv_freq, in_bf16 = (
            build_network(config, hf_config, 7, zero3).base_model.rotary_emb.inv_freq
            for zero3 in (None, {**ZERO3, "bf16": {"enabled": True}})
        )
        kept = in_bf16.dtype == torch.float32 and torch.equal(inv_freq, in_bf16)
    return {
        "rotary_kept": kept,
        "whole": sum(p.numel() for p in whole.values()),
        "held_outside_forward": sum(p.numel() for p in sharded.values()),
        "shards": sum(p.ds_tensor.numel() for p in sharded.values()),
        "same": same,
    }


def unequal_batches() -> dict:
    """Moments over three steps in which the ranks see different numbers of tokens, some of them padding."""
    neurons = 6
    layer = nn.Sequential(nn.Identity())
    settings = Settings(statistics_window=None, coefficient=0.0)
    inhibitor = Inhibitor([NeuronSite(0, layer, "0", "activation", neurons)], settings)
    random = np.random.default_rng(3)
    seen = []
    with inhibitor:
        for _ in range(3):
            for rank, (sequences, real) in enumerate([(2, 5), (3, 4)]):
                z = random.normal(2.0, 3.0, (sequences, 5, neurons)).astype(np.float32)
                seen.append(z[:, :real].reshape(-1, neurons))
                if rank == collectives.rank():
                    mask = torch.zeros(sequences, 5)
                    mask[:, :real] = 1
                    inhibitor.set_token_mask(mask)
                    inhibitor.attach_loss(layer(torch.from_numpy(z).requires_grad_()).sum()).backward()
            inhibitor.step()
    samples = np.concatenate(seen).astype(np.float64)
    moments = inhibitor.hooks[0].running.moments
    return {
        "count": float(moments.count) - len(samples),
        "mean": float(np.abs(moments.mean.numpy() - samples.mean(0)).max()),
        "variance": float(np.abs(moments.variance.numpy() / samples.var(0, ddof=1) - 1).max()),
    }


def projection_of_unequal_batches(counted_together: bool) -> float:
    """How far the projected loss's gradient of a step is from leaving every neuron's mean and scale as they are: the
    largest inner product over all ranks' tokens with 1 and with z, relative to the sum of its terms' sizes.

    counted_together: each rank's loss is its tokens' share of all ranks' mean, as the Hugging Face Trainer has it,
    instead of the rank's own mean.
    """
    neurons, tokens = 6, [170, 40][collectives.rank()]
    layer = nn.Sequential(nn.Identity())
    settings = Settings(target_share=0.1, coefficient=10.0)
    random = torch.Generator().manual_seed(collectives.rank())
    with Inhibitor([NeuronSite(0, layer, "0", "activation", neurons)], settings) as inhibitor:
        for _ in range(2):
            z = (2.0 + 3.0 * torch.randn(1, tokens, neurons, generator=random)).requires_grad_()
            mask = torch.rand(1, tokens, generator=random) < 0.8
            inhibitor.set_token_mask(mask)
            loss = 0.0 * layer(z)[mask].mean()
            weight = mask.sum() / collectives.all_reduce_sum(mask.sum()) if counted_together else 1.0
            inhibitor.attach_loss(loss * weight, weight=weight).backward()
            inhibitor.step()
    assert z.grad is not None
    found = []
    for direction in (torch.ones_like(z), z.detach()):
        terms = (z.grad * direction).double()[0]
        inner, size = collectives.all_reduce_sum(torch.stack([terms.sum(0), terms.abs().sum(0)]))
        assert bool((size > 0).all())
        found.append(float((inner.abs() / size).max()))
    return max(found)


def long_work() -> list:
    """Rank 0 works while the others wait; its mistake is everybody's."""
    done = collectives.run_on_main(lambda: time.sleep(2.5) or "done", tick=lambda: None)

    def fail() -> None:
        raise DataError("empty")

    try:
        collectives.run_on_main(fail, tick=lambda: None)
    except L2EError as error:
        return [done, str(error)]
    return [done, "none"]


def error_of_one_rank() -> str:
    try:
        collectives.raise_on_all(DataError("broken here") if collectives.rank() == 1 else None)
    except L2EError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main() -> None:
    prepare_libraries()
    output = Path(sys.argv[1])
    process_group.join(launch.find_launch(), timeout_minutes=5)
    small = ModelConfig(name="pythia-14m", vocab_size=64, num_layers=2, hidden_size=32, num_heads=2)
    result = {
        "unequal": unequal_batches(),
        "projection": [projection_of_unequal_batches(together) for together in (False, True)],
        "error": error_of_one_rank(),
        "work": long_work(),
        "random": sharded_and_whole(small, 16),
    }
    if collectives.is_main():
        build_network(small, network_config(small, 16), 8, None).save_pretrained(output / "weights")
        for name, hf_config in GIVEN.items():
            hf_config.save_pretrained(output / name)
    collectives.raise_on_all(None)
    for name in GIVEN:
        result[name] = sharded_and_whole(ModelConfig(config=str(output / name)), 16)
    result["pretrained"] = sharded_and_whole(ModelConfig(pretrained=str(output / "weights")), 16)
    (output / f"rank{collectives.rank()}.json").write_text(json.dumps(result))
    process_group.leave()


if __name__ == "__main__":
    main()
    leave_process(0)
