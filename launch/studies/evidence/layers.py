"""Measure how peaked every layer is, for the newest checkpoint of each run: does inhibition move MS to other layers?

    python launch/studies/evidence/layers.py OUTPUT.csv RUN [RUN ...]

One line a run: MS of the top share and mean S of each layer, measured as by the run's own evaluations, on the first 64
held-out sequences of each source, but in float32. The sources weigh what they do in training. Lines that are there
already are kept, so that the same command resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from shared import BATCH, SEQUENCES, SHARE, add_arguments, write_rows
from torch import Tensor

from l2e_ds.config.reading import load_run_config
from l2e_ds.data import prepare_sets
from l2e_ds.evaluation.model_source import find_model, load_causal_model
from l2e_ds.inhibition.measure import measure_scores
from l2e_ds.models.sites import neuron_sites


@torch.no_grad()
def measure(run: Path) -> dict[str, float]:
    config = load_run_config(run / "config.yaml", [])
    model = load_causal_model(find_model(str(run)), "fp32", None)[0].eval()
    sets = prepare_sets(config.data, Path(config.data.cache or run / "data"), model.config.vocab_size, SEQUENCES)

    counts = [min(SEQUENCES, len(part.held_out)) for part in sets]
    total = sum(part.weight for part in sets)

    def passes(set_weight: Callable[[Tensor | None], None]) -> None:
        for part, count in zip(sets, counts, strict=True):
            weight = part.weight / total * sum(counts) / count  # of one sequence, 1 on average
            for rows in np.array_split(np.arange(count), -(-count // BATCH)):
                batch = torch.from_numpy(part.held_out.batch(rows)).long()[:, :-1]
                set_weight(torch.full((batch.numel(), 1), weight))
                model(input_ids=batch)

    layers = measure_scores(neuron_sites(model, "all"), passes, SHARE, "cpu")
    return {
        f"layer{layer.layer}/{name}": getattr(layer, name) for name in ("top_share_score", "mean_s") for layer in layers
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    write_rows(parser.parse_args(), measure)


if __name__ == "__main__":
    main()
