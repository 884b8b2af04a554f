"""Measure how peaked every layer is, for the newest checkpoint of each run: does inhibition move MS to other layers?

    python launch/studies/evidence/layers.py OUTPUT.csv RUN [RUN ...]

One line a run: MS of the top share and mean S of each layer, measured as by the run's own evaluations, on the first 64
held-out sequences of each source, but in float32. The sources weigh what they do in training. Lines that are there
already are kept, so that the same command resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from shared import SEQUENCES, SHARE, batches, load_run, parser_of, write_rows
from torch import Tensor

from l2e_ds.inhibition.measure import measure_scores
from l2e_ds.models.sites import neuron_sites


@torch.no_grad()
def measure(run: Path) -> dict[str, float]:
    model, sets = load_run(run)
    counts = [min(SEQUENCES, len(part.held_out)) for part in sets]
    total = sum(part.weight for part in sets)

    def passes(set_weight: Callable[[Tensor | None], None]) -> None:
        for part, count in zip(sets, counts, strict=True):
            weight = part.weight / total * sum(counts) / count  # of one sequence, 1 on average
            for batch in batches(part, count):
                tokens = batch[:, :-1]
                set_weight(torch.full((tokens.numel(), 1), weight))
                model(input_ids=tokens)

    layers = measure_scores(neuron_sites(model, "all"), passes, SHARE, "cpu")
    return {
        f"layer{layer.layer}/{name}": getattr(layer, name) for name in ("top_share_score", "mean_s") for layer in layers
    }


def main() -> None:
    write_rows(parser_of(__doc__).parse_args(), measure)


if __name__ == "__main__":
    main()
