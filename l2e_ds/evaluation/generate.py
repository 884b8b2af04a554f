"""`l2e-ds generate MODEL --prompt TEXT ...`: how a model continues texts.

    l2e-ds generate RUN_DIRECTORY --prompt "def main(" "The old pilot"      a sample of each, of the newest checkpoint
    l2e-ds generate RUN_DIRECTORY --step 1000 --temperature 0 --prompt ""   the likeliest token each time, from nothing

Prints each prompt and its continuation, which ends after --tokens tokens or at the tokenizer's end of text. The same
seed gives the same continuation of a prompt, whatever the other prompts are (docs/evaluation.md).
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch

from l2e_ds.checkpoint.weights import DTYPES
from l2e_ds.console import at_least
from l2e_ds.data.tokenizer import find_end_of_text, take_special_tokens
from l2e_ds.distributed.launch import find_launch
from l2e_ds.errors import AnalysisError, ConfigError, renaming
from l2e_ds.evaluation.model_source import MODEL, find_model, load_causal_model, load_tokenizer_of, network_config
from l2e_ds.system.process import prepare_libraries

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from l2e_ds.config.sections import EvaluationConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL)
    prompts = 'texts to continue; "" begins after an end of text'
    add("--prompt", nargs="+", required=True, metavar="TEXT", help=prompts)
    add("--tokens", type=int, default=64, metavar="N", help="largest number of new tokens (default: %(default)s)")
    likeliest = "0: always the likeliest token (default: 1)"
    add("--temperature", type=float, default=1.0, metavar="X", help=likeliest)
    top = "sample among the likeliest tokens that have this probability together (default: 1, all)"
    add("--top-p", type=float, default=1.0, metavar="P", help=top)
    add("--seed", type=int, default=1234, metavar="S", help="seed of each continuation (default: %(default)s)")
    add("--step", type=int, metavar="K", help="step of a run's checkpoint (default: the newest)")
    add("--precision", choices=tuple(DTYPES), default="fp32", help="precision of the model (default: %(default)s)")
    add("--tokenizer", metavar="NAME|FILE", help="tokenizer (default: the model's own)")


def run(arguments: argparse.Namespace) -> int:
    """Return the exit code. Under a launcher only rank 0 works. Raises any error of this project."""
    if find_launch().rank != 0:
        return 0
    at_least("--tokens", arguments.tokens, 1)
    at_least("--seed", arguments.seed, 0, at_most=2**63 - 1)
    if arguments.temperature != 0 and not 1e-6 <= arguments.temperature < float("inf"):  # logits are divided by it
        raise ConfigError(f"--temperature: got {arguments.temperature:g}, allowed: 0, or a number >= 1e-6")
    if not 0 < arguments.top_p <= 1:
        raise ConfigError(f"--top-p: got {arguments.top_p:g}, allowed: a number > 0 and <= 1")
    source = find_model(arguments.model, arguments.step)
    prepare_libraries()
    hf_config = network_config(source)
    tokenizer = load_tokenizer_of(source, arguments.tokenizer)
    prompts = [encode_prompt(text, tokenizer, hf_config, arguments.tokens, source.given) for text in arguments.prompt]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load_causal_model(source, arguments.precision)[0].eval().to(device)
    settings = _settings(arguments, model, tokenizer)
    choice = f"temperature {arguments.temperature:g}, top-p {arguments.top_p:g}, seed {arguments.seed}"
    for number, (prompt, ids) in enumerate(zip(arguments.prompt, prompts, strict=True)):
        new = _continue(model, ids, settings, arguments.seed, source.given)
        print("\n" * (number > 0) + f"{source.label}, prompt: {prompt!r}")
        print(f"continuation of {len(new)} tokens ({choice if settings.do_sample else 'the likeliest'}):")
        print(decode_continuation(ids, new, tokenizer), flush=True)
    return 0


def encode_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerFast, hf_config: PretrainedConfig, tokens: int, model: str
) -> list[int]:
    """Return a prompt's tokens, at least one. tokens: how many will follow; model: what errors call it. Raises
    ConfigError, about `--prompt` or `--tokens`, if the model cannot continue them."""
    try:
        ids = list(tokenizer(prompt)["input_ids"])
    except TypeError:  # what the shell passes on without being text
        raise ConfigError(f"{prompt!r} is not UTF-8 text", where="--prompt") from None
    if not ids:
        end = find_end_of_text(tokenizer)
        if end is None:
            problem = f"{prompt!r} has no tokens, and the tokenizer no end of text to begin after"
            raise ConfigError(problem, where="--prompt")
        ids = [end]
    if max(ids) >= hf_config.vocab_size:
        raise ConfigError(
            f"its tokenizer gives token {max(ids)}, its vocabulary has {hf_config.vocab_size} rows", where=model
        )
    longest = getattr(hf_config, "max_position_embeddings", None)
    if longest is not None and len(ids) + tokens > longest:
        problem = f"got {tokens} after a prompt of {len(ids)}, {model} takes at most {longest} tokens"
        raise ConfigError(problem, where="--tokens")
    return ids


def encode_samples(
    section: EvaluationConfig, tokenizer: PreTrainedTokenizerFast, hf_config: PretrainedConfig
) -> list[list[int]]:
    """Return the tokens of each prompt of `evaluation.samples`. Raises ConfigError for one that the model of a run
    cannot continue."""
    tokens = section.sample_tokens
    with renaming({"--prompt": "evaluation.samples", "--tokens": "evaluation.sample_tokens"}):
        return [encode_prompt(prompt, tokenizer, hf_config, tokens, "the model") for prompt in section.samples]


def decode_continuation(ids: list[int], new: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the text of the tokens `new` after those of a prompt, with blanks between the two."""
    before, whole = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (ids, ids + new))
    return whole.removeprefix(before)


def _settings(
    arguments: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> GenerationConfig:
    """Return what is asked for, and nothing of what the model's own generation_config.json says but its end of text."""
    from transformers import GenerationConfig

    has_end = find_end_of_text(tokenizer) is not None
    assert model.generation_config is not None
    take_special_tokens(model.generation_config, tokenizer)
    is_sampled = arguments.temperature > 0
    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0} if is_sampled else {}
    settings = GenerationConfig(
        max_new_tokens=arguments.tokens,
        do_sample=is_sampled,
        eos_token_id=model.generation_config.eos_token_id if has_end else None,
        pad_token_id=0,  # never used, as there is one prompt at a time; without one, transformers warns
        **sampling,
    )
    model.generation_config = settings  # `generate` takes from it what is None in its own
    return settings


def _continue(model: Any, ids: list[int], settings: GenerationConfig, seed: int, given: str) -> list[int]:
    """Return the new tokens after a prompt's. Raises AnalysisError if the model's logits are not finite."""

    def check(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if not logits.isfinite().all():
            raise AnalysisError(f"{given}: its logits are not finite, so that nothing can be generated")
        return logits

    torch.manual_seed(seed)
    prompt = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, logits_processor=[check]
        )
    return tokens[0, len(ids) :].tolist()
