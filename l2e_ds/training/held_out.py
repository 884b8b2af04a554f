"""Evaluation on held-out text: LM loss and, for the hooked layers, how monosemantic their neurons are.

Shapes: B sequences of a micro-batch, T tokens a sequence. Which sequences are read depends neither on the number
of ranks nor on the micro-batch, and every rank runs the same number of forward passes (ZeRO-3 needs that).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2e_ds import distributed
from l2e_ds.data import TokenDataset
from l2e_ds.inhibition import NeuronSite
from l2e_ds.inhibition.measure import measure_scores
from l2e_ds.training.loss import token_losses


@torch.no_grad()
def evaluate(
    engine: Any,
    dataset: TokenDataset,
    sites: Sequence[NeuronSite],
    share: float,
    sequences: int,
    micro_batch: int,
    tick: Callable[[], None],
) -> dict[str, float]:
    """The metrics of `kind: evaluation`, the same on every rank. Collective.

    tick: called before each round on every rank; may raise, on all ranks alike, which gives the evaluation up.
    """
    count = min(sequences, len(dataset))
    rank, ranks = distributed.rank(), distributed.size()
    rounds = -(-count // (micro_batch * ranks))
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)

    def one_pass(set_weight: Callable[[Tensor | None], None]) -> None:
        sums.zero_()
        for index in range(rounds):
            tick()
            rows = (index * ranks + rank) * micro_batch + np.arange(micro_batch)
            batch = torch.from_numpy(dataset.batch(np.minimum(rows, count - 1))).to(engine.device)
            inputs, targets = batch[:, :-1], batch[:, 1:]
            real = torch.from_numpy(rows < count).to(engine.device)  # the last round is filled up; that counts nothing
            weight = real[:, None].expand(inputs.shape).reshape(-1, 1).float()
            set_weight(weight)
            losses = token_losses(engine(input_ids=inputs, use_cache=False).logits, targets)
            sums.add_(torch.stack([(losses * weight[:, 0]).sum().double(), weight.double().sum()]))

    engine.eval()
    try:
        scores = measure_scores(sites, one_pass, share, engine.device)
    finally:
        engine.train()
    distributed.all_reduce_sum(sums)
    values = {"held_out_loss": float(sums[0] / sums[1])}
    for layer in scores:
        values |= {
            f"layer{layer.layer}/{name}": getattr(layer, name)
            for name in ("top_share_score", "mean_s", "kurtosis", "dead_share")
        }
    return values
