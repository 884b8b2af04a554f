"""`l2e-ds generate` against a loop that computes every token from the whole text before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from l2e_ds.checkpoint.weights import find_checkpoint, load_network
from l2e_ds.cli import main
from l2e_ds.run_directory import manifest
from tests.unit.evaluation.test_exported import END, run_with, tokenizer_json

PROMPTS = ("The old", "1 2 3")
TOKENS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "run"
    run_with(folder, END, eos_token=END)
    return folder


def tokenizer_of(run: Path) -> Tokenizer:
    return Tokenizer.from_file(str(run / "tokenizer/tokenizer.json"))


def slowly(model: PreTrainedModel, ids: list[int], tokens: int, end: int, temperature: float, top_p: float, seed: int):
    """Return the tokens after `ids`, each drawn from those that have a probability of `top_p` together."""
    torch.manual_seed(seed)
    new: list[int] = []
    while len(new) < tokens and end not in new:
        with torch.no_grad():
            logits = model(torch.tensor([ids + new]), use_cache=False).logits[0, -1]
        if temperature == 0:
            new.append(int(logits.argmax()))
            continue
        likeliest, order = torch.softmax(logits / temperature, -1).sort(descending=True)
        kept = likeliest.cumsum(0) - likeliest < top_p
        chances = torch.zeros_like(likeliest).scatter(0, order[kept], likeliest[kept])
        new.append(int(torch.multinomial(chances / chances.sum(), 1)))
    return new


def continuations(said: str) -> list[str]:
    """Return what was printed below each prompt. None of the texts of these tests holds an empty line."""
    return [block.split("\n", 2)[2] for block in said.removesuffix("\n").split("\n\n")]


@pytest.mark.parametrize(("temperature", "top_p", "seed"), [(0, 1, 1234), (1, 1, 1234), (1, 1, 5), (0.7, 0.5, 1234)])
def test_a_slow_loop_gives_the_same(run, capsys, temperature, top_p, seed):
    options = ["--tokens", str(TOKENS), "--temperature", str(temperature), "--top-p", str(top_p), "--seed", str(seed)]
    assert main(["generate", str(run), "--prompt", *PROMPTS, *options]) == 0
    said = capsys.readouterr().out
    tokenizer, model = tokenizer_of(run), load_network(find_checkpoint(run, None))[0].eval()
    for prompt, found in zip(PROMPTS, said.split(", prompt: ")[1:], strict=True):
        ids = tokenizer.encode(prompt).ids
        new = slowly(model, ids, TOKENS, tokenizer.token_to_id(END), temperature, top_p, seed)
        whole = tokenizer.decode(ids + new, skip_special_tokens=False)
        how = f"temperature {temperature}, top-p {top_p}, seed {seed}" if temperature else "the likeliest"
        head = f"{prompt!r}\ncontinuation of {len(new)} tokens ({how}):\n"
        assert found.startswith(head + whole.removeprefix(prompt))


def test_a_continuation_depends_on_its_prompt_and_the_seed_only(run, capsys):
    def of(*words: str) -> list[str]:
        assert main(["generate", str(run), "--tokens", "8", *words]) == 0
        return continuations(capsys.readouterr().out)

    first, second = of("--prompt", *PROMPTS)
    assert of("--prompt", *PROMPTS[::-1]) == [second, first]
    assert of("--prompt", PROMPTS[1]) == of("--prompt", PROMPTS[1], "--step", "20") == [second]
    assert of("--prompt", PROMPTS[1], "--seed", "1") != [second]
    # nothing: after an end of text
    assert of("--prompt", "", "--temperature", "0") == of("--prompt", END, "--temperature", "0")


def test_it_ends_at_the_end_of_text_and_the_models_own_settings_are_not_used(run, tmp_path, capsys):
    folder = tmp_path / "model"
    assert main(["export", str(run), "--output", str(folder)]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # every token's likeliest successor is the end of text
        model.gpt_neox.final_layer_norm.weight.zero_()
        model.gpt_neox.final_layer_norm.bias.fill_(1.0)
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().weight[tokenizer_of(run).token_to_id(END)] = 1.0
    model.generation_config.update(min_new_tokens=5, do_sample=True, repetition_penalty=9.0)
    model.save_pretrained(folder)
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", "The", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == f"model, prompt: 'The'\ncontinuation of 1 tokens (the likeliest):\n{END}\n"


BAD = {
    "--tokens": (["--tokens", "0"], "got 0, allowed: an integer >= 1"),
    "--seed": (["--seed", "-1"], "got -1, allowed: an integer >= 0"),
    "--temperature": (["--temperature", "-1"], "got -1, allowed: 0, or a number >= 1e-6"),
    "--temperature near 0": (["--temperature", "1e-42"], "got 1e-42, allowed: 0, or a number >= 1e-6"),
    "--temperature nan": (["--temperature", "nan"], "--temperature: got nan"),
    "--top-p": (["--top-p", "0"], "got 0, allowed: a number > 0 and <= 1"),
    "--step": (["--step", "7"], "has no step 7; complete steps: 20"),
    "too long": (["--tokens", "9999"], "--tokens: got 9999 after a prompt of 7, "),
    "--tokenizer": (["--tokenizer", "nowhere.json"], "--tokenizer: no such file or folder: nowhere.json"),
    "surrogate": (["--prompt", "\udcff"], "--prompt: '\\udcff' is not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(run, capsys, name):
    words, message = BAD[name]
    assert main(["generate", str(run), "--prompt", "The old", *words]) == 2
    out, error = capsys.readouterr()
    assert message in error and len(error.splitlines()) == 1 and out == ""


def test_other_tokenizers_and_models_are_refused_in_one_line(run, tmp_path, capsys):
    without_end = tokenizer_json(tmp_path / "without", "<other>")
    more = Tokenizer.from_file(str(without_end))
    more.add_special_tokens([f"<{i}>" for i in range(200)])
    more.save(str(tmp_path / "more.json"))
    for words, message in [
        ([run, "--prompt", "", "--tokenizer", without_end], "the tokenizer no end of text to begin after"),
        ([run, "--prompt", "<199>", "--tokenizer", tmp_path / "more.json"], "its vocabulary has 300 rows"),
        ([tmp_path, "--prompt", "a"], "is neither a run directory nor a folder with a model's config.json"),
    ]:
        assert main(["generate", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


def test_a_model_that_is_not_finite_is_refused(run, tmp_path, capsys):
    bad = tmp_path / "bad"
    run_with(bad, END, eos_token=END)
    checkpoint = next((bad / "checkpoints").iterdir())
    files = [checkpoint / "mp_rank_00_model_states.pt", checkpoint / "state.json"]
    weights = torch.load(files[0])
    weights["module"]["gpt_neox.final_layer_norm.bias"][0] = float("nan")
    torch.save(weights, files[0])
    manifest.write_manifest(checkpoint, manifest.flush_and_describe(checkpoint, files))
    for temperature in ("0", "1"):
        assert main(["generate", str(bad), "--prompt", "a", "--temperature", temperature]) == 2
        assert "its logits are not finite" in capsys.readouterr().err
