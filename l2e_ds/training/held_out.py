"""Evaluate on held-out text: the LM loss, and how monosemantic the neurons of the hooked layers are.

Which sequences are read depends neither on the number of ranks nor on the micro-batch, and every rank runs the same
number of forward passes, which ZeRO-3 requires.

Shapes: B sequences per micro-batch, T tokens per sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2e_ds.data import PreparedData
from l2e_ds.distributed import collectives
from l2e_ds.inhibition import NeuronSite
from l2e_ds.inhibition.measure import measure_scores
from l2e_ds.run_directory.metrics import comparison_key, layer_key
from l2e_ds.training.loss import LossHead


@torch.no_grad()
def evaluate(
    engine: Any,
    head: LossHead,
    sets: Sequence[PreparedData],
    sites: Sequence[NeuronSite],
    comparison: Sequence[NeuronSite],
    share: float,
    sequences: int,
    micro_batch: int,
    tick: Callable[[], None],
) -> dict[str, float]:
    """Return the metrics of `kind: evaluation`, the same on every rank (docs/metrics.md). Collective.

    sets: those with held-out text; up to `sequences` of each are read, and together they weigh what the set weighs in
    training. sites, comparison: the layers to measure; metrics of the latter have the names of `comparison_key`. share:
    of the (token, neuron) pairs, for `top_share_score`. micro_batch: B. tick: called before each round on every rank;
    it may raise, on all ranks alike, which abandons the evaluation.
    """
    datasets = [part.held_out for part in sets if part.held_out is not None]
    counts = np.array([min(sequences, len(dataset)) for dataset in datasets])
    begins, count = np.cumsum(counts) - counts, int(counts.sum())
    shares = np.array([part.weight for part in sets]) / sum(part.weight for part in sets)
    emphasis = shares * count / counts  # weight of one sequence of each set, 1 on average
    rank, ranks = collectives.rank(), collectives.size()
    rounds = -(-count // (micro_batch * ranks))
    sums = torch.zeros(len(sets), 2, dtype=torch.float64, device=engine.device)  # summed loss and tokens of each set

    def of_tokens(values: np.ndarray) -> Tensor:
        """Return numbers of sequences, [B], as those of their tokens, [B * T, 1] float32."""
        length = datasets[0].sequence_length
        return torch.from_numpy(values).float().to(engine.device).repeat_interleave(length)[:, None]

    def one_pass(set_weight: Callable[[Tensor | None], None]) -> None:
        sums.zero_()
        for index in range(rounds):
            tick()
            rows = (index * ranks + rank) * micro_batch + np.arange(micro_batch)
            real = rows < count  # the last round is filled up with repeated sequences that do not count
            rows = np.minimum(rows, count - 1)
            owners = np.searchsorted(begins, rows, side="right") - 1
            tokens = [datasets[i].batch([row - begins[i]]) for i, row in zip(owners, rows, strict=True)]
            batch = torch.from_numpy(np.concatenate(tokens)).to(engine.device)
            inputs, targets = batch[:, :-1], batch[:, 1:]
            set_weight(of_tokens(real * emphasis[owners]))
            losses = head.token_losses(engine, inputs, targets)
            for owner in np.unique(owners):
                weight = of_tokens(real & (owners == owner))
                sums[owner] += torch.stack([(losses * weight[:, 0]).sum().double(), weight.double().sum()])

    engine.eval()
    try:
        # Compiled layers would ignore the hooks that measure (docs/deepspeed.md, row 3).
        with torch.compiler.set_stance("force_eager"):
            scores = measure_scores([*sites, *comparison], one_pass, share, engine.device)
    finally:
        engine.train()
    collectives.all_reduce_sum(sums)
    losses = (sums[:, 0] / sums[:, 1]).tolist()
    values = {"held_out_loss": sum(share * loss for share, loss in zip(shares.tolist(), losses, strict=True))}
    values |= {f"held_out_loss/{part.name}": loss for part, loss in zip(sets, losses, strict=True) if part.name}
    for index, layer in enumerate(scores):
        key = layer_key if index < len(sites) else comparison_key
        values |= {
            key(layer.layer, name): getattr(layer, name)
            for name in ("top_share_score", "mean_s", "kurtosis", "dead_share")
        }
    return values
