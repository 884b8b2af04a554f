"""Measure what the metrics of a run do not say, for the newest checkpoint of each run.

    python launch/studies/evidence/measure.py OUTPUT.csv RUN [RUN ...]

One line a run, on the first 64 held-out sequences of each source, as the run's own evaluations. The layers are those
that the main study inhibits (`mid-2`), in every run, whether it inhibits them or not:

`loss_all`: of the model as it is, on all held-out sequences; the sources weigh what they do in training, as in all
losses here. `loss`: the same on the first 64 of each. `worth`: what it loses where each neuron of these layers
gives its mean instead. `worth_selected`: where only those activations do whose score is among the highest 2 % of the
unchanged model's. `worth_random`: where 2 %, drawn at random, do. `active_share`: of activations above zero.
`dead_share`: of neurons that do not vary. Means, scores and shares are over all these sequences alike.

Lines that are there already are kept, so that the same command resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import LAYERS, SEQUENCES, SHARE, batches, load_run, parser_of, write_rows
from torch import Tensor
from torch.nn import functional

from l2e_ds.inhibition import NeuronSite
from l2e_ds.inhibition.losses import FrozenStatistics, score
from l2e_ds.models.sites import neuron_sites


@contextmanager
def replaced(sites: list[NeuronSite], change: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """While it lasts, neurons [B, T, N] of a site are what `change` makes of them and its index; None: as they are."""
    handles = [
        getattr(site.module, site.attribute).register_forward_hook(
            lambda module, inputs, output, index=index: change(index, output)
        )
        for index, site in enumerate(sites)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure(run: Path) -> dict[str, float]:
    model, sets = load_run(run)
    sites = neuron_sites(model, LAYERS)
    total = sum(part.weight for part in sets)

    def losses(change: Callable[[int, Tensor], Tensor | None], sequences: int = SEQUENCES) -> float:
        """The held-out loss, in nats, of so many sequences of each source, with the neurons changed."""
        result = 0.0
        with replaced(sites, change):
            for part in sets:
                of_part, tokens = 0.0, 0
                for batch in batches(part, sequences):
                    logits = model(input_ids=batch[:, :-1]).logits.flatten(0, 1)
                    of_part += float(functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
                    tokens += logits.shape[0]
                result += part.weight / total * of_part / tokens
        return result

    seen: list[list[Tensor]] = [[] for _ in sites]

    def keep(index: int, z: Tensor) -> None:
        seen[index].append(z.flatten(0, 1))

    longest = max(len(part.held_out) for part in sets)
    values: dict[str, Any] = {"loss_all": losses(lambda index, z: None, longest), "loss": losses(keep)}
    activations = [torch.cat(parts) for parts in seen]
    statistics = []
    for z in activations:
        exact = z.double()
        # tau and rate are of training; a score needs neither
        of_layer = (exact.mean(0).float(), exact.var(0).float(), torch.ones(()), torch.zeros(z.shape[1]))
        statistics.append(FrozenStatistics.of(*of_layer))
    means = [part.mean for part in statistics]
    limits = []
    for z, part in zip(activations, statistics, strict=True):
        scores = score(z, part).flatten()
        limits.append(scores.kthvalue(int((1 - SHARE) * len(scores))).values)

    def selected(index: int, z: Tensor) -> Tensor:
        return torch.where(score(z, statistics[index]) > limits[index], means[index], z)

    generator = torch.Generator().manual_seed(0)

    def random(index: int, z: Tensor) -> Tensor:
        return torch.where(torch.rand(z.shape, generator=generator) < SHARE, means[index], z)

    values["worth"] = losses(lambda index, z: means[index].expand_as(z)) - values["loss"]
    values["worth_selected"] = losses(selected) - values["loss"]
    values["worth_random"] = losses(random) - values["loss"]
    values["active_share"] = float(np.mean([float((z > 0).float().mean()) for z in activations]))
    values["dead_share"] = float(np.mean([float((~part.alive).float().mean()) for part in statistics]))
    return values


def main() -> None:
    write_rows(parser_of(__doc__).parse_args(), measure)


if __name__ == "__main__":
    main()
