"""`l2e-ds export`: write a checkpoint as a folder that transformers loads, with a model card.

Reads complete checkpoints only, and needs no process group. DeepSpeed's shards are pickles: export only checkpoints
from a source you trust.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from l2e_ds.checkpoint.weights import PROVENANCE, find_checkpoint, load_network
from l2e_ds.console import say
from l2e_ds.data.tokenizer import load_tokenizer, name_end_of_text, take_special_tokens
from l2e_ds.errors import CheckpointError, ConfigError, DataError
from l2e_ds.export.card import Exported, model_card
from l2e_ds.export.push import check_push, open_repository, push, push_branch
from l2e_ds.run_directory.manifest import verify
from l2e_ds.run_directory.names import published_checkpoints, step_of
from l2e_ds.system.files import is_free, one_line, whole_folder, write_whole
from l2e_ds.system.process import prepare_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PADDING = ("<|padding|>", "<pad>", "[PAD]")  # names of padding tokens


def export(
    source: Path,
    output: Path,
    step: int | None = None,
    precision: str | None = None,
    license: str | None = None,
    repository: str | None = None,
) -> Exported:
    """Write model, tokenizer and model card of a run or checkpoint to `output`.

    precision: that of the written weights, by default the run's, with which logits equal the engine's. license,
    repository: for the card, which says how to load the model from there. Raises CheckpointError, ConfigError.
    """
    checkpoint = find_checkpoint(source, step)
    if not is_free(output):
        raise CheckpointError(f"--output: {output} exists and is not an empty folder")
    existing = next(path for path in output.absolute().parents if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise CheckpointError(f"--output: cannot write below {existing}")
    return _export(checkpoint, output, "--output", precision, license, repository)


def export_all(
    run_directory: Path, repository: str, private: bool, precision: str | None = None, license: str | None = None
) -> None:
    """Push every checkpoint of a run to a branch `stepN` of one repository, and the last also to the main branch.

    A branch that has the same content is passed over, so that the same command resumes.

    private: whether a new repository is private; precision, license: as for `export`. Raises CheckpointError, in the
    end also for damaged checkpoints, which are left out; ConfigError; L2EError if the hub fails.
    """
    if not (run_directory / "checkpoints").is_dir():
        raise CheckpointError(f"{run_directory}: is not a run directory (it has no folder checkpoints)")
    checkpoints = published_checkpoints(run_directory)
    if not checkpoints:
        raise CheckpointError(f"{run_directory}: has no checkpoint")
    pushed = 0
    damaged: list[str] = []
    exported: Exported | None = None
    with tempfile.TemporaryDirectory(prefix="l2e-ds-export-") as temporary:
        folder = Path(temporary) / "model"
        for number, checkpoint in enumerate(checkpoints, start=1):
            problem = verify(checkpoint)
            if problem is not None:
                say(f"l2e-ds: checkpoint {checkpoint}: {problem}; it is not pushed")
                damaged.append(checkpoint.name)
                continue
            if exported is None:  # only now: no empty repository is left where all are damaged
                name, address, branches = open_repository(repository, private)
            shutil.rmtree(folder, ignore_errors=True)
            branch = f"step{step_of(checkpoint)}"
            exported = _export(checkpoint, folder, "TMPDIR", precision, license, name, branch)
            if push_branch(folder, name, branch, exists=branch in branches):
                pushed += 1
                branches.append(branch)
                print(f"pushed {branch} ({number} of {len(checkpoints)})", flush=True)
        if exported is None:
            raise CheckpointError(f"{run_directory}: all checkpoints are damaged")
        steps = sorted(set(branches), key=lambda branch: int(branch.removeprefix("step")))
        card = model_card(replace(exported, branch=None, branches=tuple(steps)))
        (folder / "README.md").write_text(card, encoding="utf-8")
        if push_branch(folder, name, "main", exists=True, others_stay=True):
            print(f"pushed main, which is step {exported.step}", flush=True)
    passed = len(checkpoints) - len(damaged) - pushed
    print(f"{pushed} checkpoints pushed to {address}; {passed} passed over, which were there with the same content")
    if damaged:
        raise CheckpointError(f"{run_directory}: damaged and not pushed: {', '.join(damaged)}")


def _export(
    checkpoint: Path,
    output: Path,
    where: str,
    precision: str | None,
    license: str | None,
    repository: str | None,
    branch: str | None = None,
) -> Exported:
    """Write a verified checkpoint to a folder that is new or empty.

    where: the option or variable that decides the folder, for errors. Raises CheckpointError.
    """
    model, state = load_network(checkpoint, precision)
    run_directory = checkpoint.parent.parent
    try:
        with whole_folder(output) as temporary:
            _write(model, run_directory, state, temporary)
            exported = Exported(
                run=run_directory,
                state=state,
                hf_config=model.config,
                parameters=sum(p.numel() for p in model.parameters()),
                precision=precision or state["identity"]["precision"],
                tokenizer=(temporary / "tokenizer.json").exists(),
                license=license,
                repository=repository,
                branch=branch,
            )
            (temporary / "README.md").write_text(model_card(exported), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{where}: cannot write {output}: {one_line(error)}") from None
    return exported


def _write(model: Any, run_directory: Path, state: dict, folder: Path) -> None:
    if (run_directory / "tokenizer").is_dir():
        from transformers import GenerationConfig

        tokenizer = _plain_tokenizer(load_tokenizer(str(run_directory / "tokenizer")))
        tokenizer.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        del settings["backend"]
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # which transformers 4, llama.cpp and CTranslate2 know
        write_whole(path, json.dumps(settings, indent=2) + "\n")
        take_special_tokens(model.config, tokenizer)
        model.generation_config = GenerationConfig.from_model_config(model.config)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    _name_rotary_settings_twice(folder / "config.json")
    for path in folder.glob("*.safetensors"):  # safetensors makes them readable by the owner only, whatever the umask
        path.chmod((folder / "config.json").stat().st_mode)
    provenance = {"step": state["train"]["step"], "tokens": state["train"]["tokens"], "config": state["config"]}
    (folder / PROVENANCE).write_text(yaml.safe_dump(provenance, sort_keys=False), encoding="utf-8")


def _plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the same tokenizer with the special tokens that readers of exported models need.

    Its class is the one that uses a tokenizer.json as it is.
    """
    from transformers import PreTrainedTokenizerFast

    with contextlib.suppress(DataError):  # a run on token files may have a tokenizer without an end of text
        name_end_of_text(tokenizer)
    special = dict(tokenizer.special_tokens_map)
    if tokenizer.eos_token is not None:
        # CTranslate2 needs the first two. In training, too, a text begins after the end of another.
        padding = next((token for token in PADDING if token in tokenizer.get_vocab()), tokenizer.eos_token)
        special = {"bos_token": tokenizer.eos_token, "unk_token": tokenizer.eos_token, "pad_token": padding} | special
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        model_max_length=tokenizer.model_max_length,
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 would add token types, which no model takes
        padding_side="left",  # for generation
        **({"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}),
        **special,
    )


def _name_rotary_settings_twice(path: Path) -> None:
    """Write the rotary settings of a config.json also under the keys of transformers 4 and llama.cpp."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rotary = config.get("rope_parameters") or {}
    if "rope_theta" not in rotary:
        return
    keys = ("rope_theta", "partial_rotary_factor")
    names = dict(
        zip(keys, ("rotary_emb_base", "rotary_pct") if config["model_type"] == "gpt_neox" else keys, strict=True)
    )
    config |= {name: rotary[key] for key, name in names.items() if key in rotary}
    if rotary.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in rotary.items() if key not in names}
    write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="RUN|CHECKPOINT")
    add("--output", type=Path, metavar="DIR", help="a new or empty folder")
    add("--step", type=int, help="step of a run's checkpoint (default: the newest)")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="precision of the weights (default: the run's own)")
    add("--license", metavar="ID", help="for the model card, e.g. apache-2.0 (default: it names none)")
    add("--push", metavar="REPO", help="then upload the folder to the Hugging Face Hub")
    add(
        "--all-checkpoints",
        action="store_true",
        help="with --push, instead of --output: each to a branch stepN, the last also to main",
    )
    add("--private", action="store_true", help="with --push: make a new repository private")


def run(arguments: argparse.Namespace) -> int:
    repository = arguments.push
    for option in ("private", "all_checkpoints"):
        if getattr(arguments, option) and repository is None:
            raise ConfigError(f"--{option.replace('_', '-')}: goes with --push")
    for option in ("output", "step"):
        if arguments.all_checkpoints and getattr(arguments, option) is not None:
            raise ConfigError(f"--{option}: does not go with --all-checkpoints, which keeps no folder of any step")
    if arguments.output is None and not arguments.all_checkpoints:
        raise ConfigError("--output: is required, a new or empty folder")
    license = arguments.license
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ConfigError(f"--license: got {license!r}, give an id of the hub such as apache-2.0, mit or cc-by-4.0")
    prepare_libraries()
    if repository is not None:
        check_push(repository)  # so that an error comes before the work
    if arguments.all_checkpoints:
        export_all(arguments.source, repository, arguments.private, arguments.precision, license)
        return 0
    options = (arguments.step, arguments.precision, license, repository)
    done = export(arguments.source, arguments.output, *options)
    print(
        f"exported step {done.step} ({done.parameters:,} parameters, {done.precision},"
        f" {'with' if done.tokenizer else 'without a'} tokenizer) to {arguments.output}"
    )
    if repository is not None:
        print(f"pushed to {push(arguments.output, repository, arguments.private)}")
    return 0
