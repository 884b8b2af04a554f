"""Samples while training: the continuations of `evaluation.samples`, written to samples.jsonl in the run directory.

    {"step": 1000, "tokens": 2097152000, "prompt": "The old pilot", "text": " had not been on the"}

`text` is null where the logits are not finite. Tokens are drawn at temperature 1, each prompt's by the run's seed (on
CPUs as by `l2e-ds generate` in the run's precision), and end at the tokenizer's end of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from l2e_ds.checkpoint.state import TrainState
from l2e_ds.config.sections import RunConfig
from l2e_ds.data import PreparedData
from l2e_ds.data.tokenizer import find_end_of_text
from l2e_ds.distributed import collectives
from l2e_ds.errors import ConfigError
from l2e_ds.evaluation.generate import decode_continuation, encode_prompt
from l2e_ds.run_directory.names import SAMPLES
from l2e_ds.run_directory.results import append_result
from l2e_ds.training import preemption
from l2e_ds.training.held_out import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Samples:
    """The prompts of a run, with their tokens."""

    config: RunConfig
    prompts: list[list[int]]
    tokenizer: PreTrainedTokenizerFast

    @torch.no_grad()
    def write(self, engine: Any, state: TrainState, say: Callable[[str], None]) -> None:
        """Append a line for each prompt. Collective.

        Every rank computes every token, as ZeRO-3 needs that, and rank 0 writes. Draws from a generator of its own, so
        that training's random states stay as they are. say: prints a warning. Raises Interrupted.
        """
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
                append_result(path, line)
        except OSError as error:  # a full disk costs lines, not the run, as with metrics.jsonl
            say(f"l2e-ds: warning: {path}: {error.strerror}; the samples are lost")


def load_samples(config: RunConfig, network: Any, data: Sequence[PreparedData]) -> Samples | None:
    """Return the prompts of a run, or None if it has none.

    network: the model's configuration. Raises ConfigError for a prompt that the model cannot continue.
    """
    if not config.evaluation.samples:
        return None
    tokenizer = next(part.tokenizer for part in data if part.tokenizer is not None)
    tokens = config.evaluation.sample_tokens
    try:
        prompts = [encode_prompt(one, tokenizer, network, tokens, "the model") for one in config.evaluation.samples]
    except ConfigError as error:
        error.rename({"--prompt": "evaluation.samples", "--tokens": "evaluation.sample_tokens"})
        raise
    return Samples(config, prompts, tokenizer)
