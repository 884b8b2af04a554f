"""Evaluate on held-out text: the LM loss, how monosemantic the neurons are, and how the model continues prompts. On
texts that are never trained on: the LM loss.

Which sequences are read depends neither on the number of ranks nor on the micro-batch, and every rank runs the same
number of forward passes, which ZeRO-3 requires.

Shapes: B sequences per micro-batch, T tokens per sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from l2e_ds.checkpoint.state import TrainState
from l2e_ds.config.sections import RunConfig
from l2e_ds.data import PreparedData, PreparedText, TokenDataset, tokenizer_of
from l2e_ds.data.tokenizer import find_end_of_text
from l2e_ds.distributed import collectives
from l2e_ds.evaluation.generate import decode_continuation, encode_samples
from l2e_ds.inhibition import NeuronSite
from l2e_ds.inhibition.measure import measure_scores
from l2e_ds.run_directory.json_lines import append_line
from l2e_ds.run_directory.metrics import comparison_key, layer_key
from l2e_ds.run_directory.names import SAMPLES
from l2e_ds.training import preemption
from l2e_ds.training.loss import LossHead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@torch.no_grad()
def evaluate_held_out(
    engine: Any,
    head: LossHead,
    config: RunConfig,
    sets: Sequence[PreparedData],
    sites: Sequence[NeuronSite],
    comparison: Sequence[NeuronSite],
) -> dict[str, float]:
    """Return the metrics of `kind: evaluation`, the same on every rank (docs/metrics.md). Collective. Raises
    Interrupted.

    sets: those with held-out text, which weigh what they weigh in training. sites, comparison: the layers to measure;
    metrics of the latter have the names of `comparison_key`.
    """
    datasets = [part.held_out for part in sets if part.held_out is not None]
    counts = np.array([min(config.training.evaluation_sequences, len(dataset)) for dataset in datasets])
    count = int(counts.sum())
    shares = np.array([part.weight for part in sets]) / sum(part.weight for part in sets)
    emphasis = shares * count / counts  # weight of one sequence of each set, 1 on average
    sums = torch.zeros(len(sets), 2, dtype=torch.float64, device=engine.device)  # summed loss and tokens of each set

    def of_tokens(values: np.ndarray) -> Tensor:
        """Return numbers of sequences, [B], as those of their tokens, [B * T, 1] float32."""
        length = datasets[0].sequence_length
        return torch.from_numpy(values).float().to(engine.device).repeat_interleave(length)[:, None]

    def one_pass(set_weight: Callable[[Tensor | None], None]) -> None:
        sums.zero_()
        for batch, _, owners, real in _micro_batches(datasets, counts, engine):
            set_weight(of_tokens(real * emphasis[owners]))
            losses = head.token_losses(engine, batch[:, :-1], batch[:, 1:])
            for owner in np.unique(owners):
                weight = of_tokens(real & (owners == owner))
                sums[owner] += torch.stack([(losses * weight[:, 0]).sum().double(), weight.double().sum()])

    with evaluating(engine):
        scores = measure_scores([*sites, *comparison], one_pass, config.inhibition.target_share, engine.device)
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


@torch.no_grad()
def evaluate_texts(engine: Any, head: LossHead, texts: Sequence[PreparedText]) -> dict[str, float]:
    """Return loss and bits a byte of each text, the same on every rank. Collective. Raises Interrupted."""
    datasets = [text.dataset for text in texts]
    counts = np.array([len(dataset) for dataset in datasets])
    # of every sequence, so that the order in which they are added does not depend on the number of ranks
    sums = torch.zeros(int(counts.sum()), dtype=torch.float64, device=engine.device)
    with evaluating(engine):
        for batch, rows, _, real in _micro_batches(datasets, counts, engine):
            losses = head.token_losses(engine, batch[:, :-1], batch[:, 1:]).view(len(batch), -1).double().sum(1)
            sums[rows[real]] = losses[: real.sum()]
    collectives.all_reduce_sum(sums)
    values: dict[str, float] = {}
    for text, of_sequences in zip(texts, sums.cpu().split(counts.tolist()), strict=True):
        loss = float(of_sequences.sum()) / text.evaluated_tokens
        values |= {f"text_loss/{text.name}": loss, f"text_bits_per_byte/{text.name}": text.bits_per_byte(loss)}
    return values


@contextlib.contextmanager
def evaluating(engine: Any) -> Iterator[None]:
    """Put the engine into evaluation mode, without compiled code, and back."""
    engine.eval()
    try:
        # Compiled layers would ignore the hooks that measure (docs/deepspeed.md, row 3).
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        engine.train()


def _micro_batches(
    datasets: Sequence[TokenDataset], counts: np.ndarray, engine: Any
) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield this rank's micro-batches of the first `counts[i]` sequences of each dataset; every rank gets equally many.

    Yields tokens, int64 [B, T+1]; the number of each sequence over all datasets, and the index of its dataset, int64
    [B]; and bool [B], false for the rows that only fill the last micro-batch.
    """
    begins, count = np.cumsum(counts) - counts, int(counts.sum())
    rank, ranks, micro_batch = collectives.rank(), collectives.size(), engine.train_micro_batch_size_per_gpu()
    for index in range(-(-count // (micro_batch * ranks))):
        preemption.stop_if_asked()
        rows = (index * ranks + rank) * micro_batch + np.arange(micro_batch)
        real = rows < count
        rows = np.minimum(rows, count - 1)
        owners = np.searchsorted(begins, rows, side="right") - 1
        tokens = [datasets[i].batch([row - begins[i]]) for i, row in zip(owners, rows, strict=True)]
        yield torch.from_numpy(np.concatenate(tokens)).to(engine.device), rows, owners, real


@dataclass(frozen=True)
class Samples:
    """Continues the prompts of `evaluation.samples`, with their tokens, into samples.jsonl in the run directory.

        {"step": 1000, "tokens": 2097152000, "prompt": "The old pilot", "text": " had not been on the"}

    `text` is null where the logits are not finite. Tokens are drawn at temperature 1, each prompt's by the run's seed.
    """

    config: RunConfig
    prompts: list[list[int]]
    tokenizer: PreTrainedTokenizerFast

    @torch.no_grad()
    def write(self, engine: Any, state: TrainState, warn: Callable[[str], None]) -> None:
        """Append a line for each prompt. Every rank computes every token, as ZeRO-3 needs that, with a generator of its
        own. Collective. Raises Interrupted."""
        end = find_end_of_text(self.tokenizer)
        lines = []
        with evaluating(engine):
            for prompt, ids in zip(self.config.evaluation.samples, self.prompts, strict=True):
                generator, is_finite = torch.Generator().manual_seed(self.config.training.seed), True
                new: list[int] = []
                for _ in range(self.config.evaluation.sample_tokens):
                    preemption.stop_if_asked()
                    batch = torch.tensor([ids + new], device=engine.device)
                    logits = engine(input_ids=batch, use_cache=False).logits[0, -1].float().cpu()
                    is_finite = is_finite and bool(logits.isfinite().all())
                    chances = logits.softmax(-1) if is_finite else torch.ones_like(logits)
                    new.append(int(torch.multinomial(chances, 1, generator=generator)))
                if end in new:
                    new = new[: new.index(end) + 1]
                text = decode_continuation(ids, new, self.tokenizer) if is_finite else None
                lines.append({"step": state.step, "tokens": state.tokens, "prompt": prompt, "text": text})
        path = Path(self.config.training.run_directory) / SAMPLES
        try:
            for line in lines if collectives.is_main() else ():
                append_line(path, line)
        except OSError as error:  # a full disk costs lines, not the run, as with metrics.jsonl
            warn(f"{path}: {error.strerror}; the samples are lost")


def load_samples(config: RunConfig, hf_config: Any, data: Sequence[PreparedData]) -> Samples | None:
    """Return the prompts of a run, or None if it has none. Raises ConfigError for a prompt that the network
    of hf_config cannot continue."""
    if not config.evaluation.samples:
        return None
    tokenizer = tokenizer_of(data)
    assert tokenizer is not None  # the run file's checks ask for one
    return Samples(config, encode_samples(config.evaluation, tokenizer, hf_config), tokenizer)
