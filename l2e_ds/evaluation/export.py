"""`l2e-ds export`: a checkpoint becomes a folder that transformers loads, with a model card.

Reads finished checkpoints only; needs no process group. DeepSpeed's shards are pickles: export only checkpoints
from a source you trust.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError

from l2e_ds.data.files import is_free, one_line, whole_folder, write_whole
from l2e_ds.data.tokenizer import load_tokenizer, name_end_of_text
from l2e_ds.errors import CheckpointError, ConfigError, DataError
from l2e_ds.evaluation.card import Exported, model_card
from l2e_ds.models import take_special_tokens
from l2e_ds.training.checkpoint import NAME, CheckpointManager, read_state
from l2e_ds.training.manifest import verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PROVENANCE = "l2e_run.yaml"  # in the exported folder: step, tokens, configuration
PADDING = ("<|padding|>", "<pad>", "[PAD]")  # in a vocabulary, fills up batches
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_checkpoint(path: Path, step: int | None) -> Path:
    """The checkpoint meant by a run directory (its newest, or the one of `step`) or a checkpoint's folder.

    Raises CheckpointError.
    """
    instead = ""
    if (path / "checkpoints").is_dir():
        complete = {int(checkpoint.name[4:]): checkpoint for checkpoint in CheckpointManager(path).complete()}
        wanted = max(complete, default=-1) if step is None else step
        if wanted not in complete:
            present = ", ".join(map(str, complete)) or "none"
            raise CheckpointError(
                f"{path}: has no {'complete checkpoint' if step is None else f'step {step}'}; complete steps: {present}"
            )
        path = complete.pop(wanted)
        instead = f"; other steps, to be given as --step: {', '.join(map(str, complete))}" if complete else ""
    elif not path.is_dir() or not NAME.fullmatch(path.name):
        raise CheckpointError(f"{path}: is neither a run directory nor one of its checkpoints")
    elif step is not None:
        raise CheckpointError(f"--step: goes with a run directory, {path} is a checkpoint")
    problem = verify(path)  # before anything of it is unpickled
    if problem:
        raise CheckpointError(f"{path}: {problem}{instead}")
    return path


def checkpoint_weights(checkpoint: Path, precision: str) -> dict[str, torch.Tensor]:
    """Full weights by name in `precision`, on the CPU, put together from the shards.

    In the run's own precision these are the very weights that the engine computed with; in float32 its master weights.
    """
    identity = read_state(checkpoint)["identity"]
    if identity["zero_stage"] <= 2 and precision == identity["precision"]:
        weights = _read(checkpoint / "mp_rank_00_model_states.pt")["module"]
    elif identity["zero_stage"] == 0:
        raise CheckpointError(
            f"--precision: {checkpoint} holds {identity['precision']} weights only (ZeRO stage 0 keeps one copy);"
            f" allowed: {identity['precision']}"
        )
    elif identity["zero_stage"] == 1 and _is_of_bf16_optimizer(checkpoint):
        weights = _master_weights_of_bf16_optimizer(checkpoint)
    else:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it narrates
            weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return {name: tensor.to(DTYPES[precision]) for name, tensor in weights.items()}


def _read(shard: Path) -> dict[str, Any]:
    """A shard of ours, listed in its manifest; DeepSpeed stores more than tensors in it."""
    return torch.load(shard, map_location="cpu", weights_only=False, mmap=True)


def _is_of_bf16_optimizer(checkpoint: Path) -> bool:
    shard = checkpoint / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    return shard.exists() and "zero_stage" not in _read(shard)["optimizer_state_dict"]


def _master_weights_of_bf16_optimizer(checkpoint: Path) -> dict[str, torch.Tensor]:
    """ZeRO-1 with bf16 and float32 accumulation, which DeepSpeed's own zero_to_fp32 does not read: each rank holds a
    flat float32 part of each parameter group, and says which slice of it belongs to which parameter."""
    shapes = {
        name: shape
        for group in _read(checkpoint / "mp_rank_00_model_states.pt")["param_shapes"]
        for name, shape in group.items()
    }
    pieces: dict[str, list[torch.Tensor]] = {name: [] for name in shapes}
    shards = checkpoint.glob("bf16_zero_pp_rank_*_optim_states.pt")
    for shard in sorted(shards, key=lambda path: int(path.name.split("_")[4])):  # by rank
        state = _read(shard)["optimizer_state_dict"]
        groups = zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True)
        for flat, slices in groups:
            for name, piece in slices.items():
                pieces[name].append(flat.narrow(0, piece.start, piece.numel))
    return {name: torch.cat(pieces[name]).view(shape) for name, shape in shapes.items()}


def load_network(checkpoint: Path, precision: str | None = None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The network of a verified checkpoint, on the CPU, and the checkpoint's state (`state.json`).

    precision: of the weights; default: the run's, with which logits equal the engine's. Raises CheckpointError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from l2e_ds.models import without_default_init

    state = read_state(checkpoint)
    precision = precision or state["identity"]["precision"]
    run_directory = checkpoint.parent.parent
    if not (run_directory / "model" / "config.json").is_file():
        raise CheckpointError(f"{run_directory / 'model'}: the network's config.json is missing")
    network = AutoConfig.from_pretrained(run_directory / "model")
    network.use_cache = True
    with without_default_init():
        model = AutoModelForCausalLM.from_config(network, dtype=DTYPES[precision])
    weights = checkpoint_weights(checkpoint, precision)
    expected = {name for name, _ in model.named_parameters()}
    if expected - weights.keys():
        raise CheckpointError(f"{checkpoint}: lacks the weights {', '.join(sorted(expected - weights.keys())[:3])}")
    wrong = [name for name, p in model.named_parameters() if p.shape != weights[name].shape]
    if wrong:
        raise CheckpointError(f"{checkpoint}: {wrong[0]} is of another shape than {run_directory / 'model'} says")
    model.load_state_dict(weights, strict=False, assign=True)  # but for buffers, made above
    model.tie_weights()  # assigning has parted an embedding from the output matrix that it is
    return model, state


def export(
    source: Path,
    output: Path,
    step: int | None = None,
    precision: str | None = None,
    licence: str | None = None,
    repository: str | None = None,
) -> dict[str, Any]:
    """Write model, tokenizer and model card of a run or checkpoint to `output`.

    precision: of the written weights; default: the run's, with which logits equal the engine's. licence, repository:
    for the card, which says how to load it from there. Returns step, precision, parameters, and whether there was a
    tokenizer. Raises CheckpointError, ConfigError.
    """
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise ConfigError(f"--license: got {licence!r}, give an id of the hub such as apache-2.0, mit or cc-by-4.0")
    checkpoint = find_checkpoint(source, step)
    if not is_free(output):
        raise CheckpointError(f"--output: {output} exists and is not an empty folder")
    beside = next(path for path in output.absolute().parents if path.exists())
    if not beside.is_dir() or not os.access(beside, os.W_OK):
        raise CheckpointError(f"--output: cannot write below {beside}")
    model, state = load_network(checkpoint, precision)
    precision = precision or state["identity"]["precision"]
    run_directory = checkpoint.parent.parent

    try:
        with whole_folder(output) as temporary:
            _write(model, run_directory, state, temporary)
            of = Exported(
                run=run_directory,
                state=state,
                network=model.config,
                parameters=sum(p.numel() for p in model.parameters()),
                precision=precision,
                tokenizer=(temporary / "tokenizer.json").exists(),
                licence=licence,
                repository=repository,
            )
            (temporary / "README.md").write_text(model_card(of), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"--output: cannot write {output}: {one_line(error)}") from None
    return {
        "step": state["train"]["step"],
        "precision": precision,
        "parameters": of.parameters,
        "tokenizer": of.tokenizer,
    }


def _write(model: Any, run_directory: Path, state: dict, folder: Path) -> None:
    if (run_directory / "tokenizer").is_dir():
        from transformers import GenerationConfig

        tokenizer = _plain_tokenizer(load_tokenizer(str(run_directory / "tokenizer")))
        _save_tokenizer(tokenizer, folder)
        take_special_tokens(model.config, tokenizer)
        model.generation_config = GenerationConfig.from_model_config(model.config)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    _name_rotary_settings_twice(folder / "config.json")
    for path in folder.glob("*.safetensors"):  # which safetensors lets nobody but the owner read, whatever the umask
        path.chmod((folder / "config.json").stat().st_mode)
    provenance = {"step": state["train"]["step"], "tokens": state["train"]["tokens"], "config": state["config"]}
    (folder / PROVENANCE).write_text(yaml.safe_dump(provenance, sort_keys=False), encoding="utf-8")


def _plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokens by the class that reads a tokenizer.json as it is; with special tokens that readers ask for."""
    from transformers import PreTrainedTokenizerFast

    with contextlib.suppress(DataError):  # token files need no end of text
        name_end_of_text(tokenizer)
    special = dict(tokenizer.special_tokens_map)
    if tokenizer.eos_token is not None:
        # CTranslate2 wants the first two; training, too, begins a text after the end of another
        padding = next((token for token in PADDING if token in tokenizer.get_vocab()), tokenizer.eos_token)
        special = {"bos_token": tokenizer.eos_token, "unk_token": tokenizer.eos_token, "pad_token": padding} | special
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        model_max_length=tokenizer.model_max_length,
        model_input_names=["input_ids", "attention_mask"],  # else transformers 4 adds token types, which no model takes
        padding_side="left",  # as generation needs it
        **({"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}),
        **special,
    )


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """By a name of its class that transformers 4, llama.cpp and CTranslate2 know too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["backend"]
    write_whole(path, json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def _name_rotary_settings_twice(path: Path) -> None:
    """In a config.json: transformers 4 and llama.cpp do not know `rope_parameters`, and may take other values."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rotary = config.get("rope_parameters") or {}
    if "rope_theta" not in rotary:
        return
    names = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
    if config["model_type"] == "gpt_neox":
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    config |= {name: rotary[key] for key, name in names.items() if key in rotary}
    if rotary.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in rotary.items() if key not in names}
    write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
