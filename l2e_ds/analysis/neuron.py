"""`l2e-ds neuron MODEL --layer L --index J --features FILE`: what one neuron responds to, as a page and a few lines."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from l2e_ds.analysis import PACKAGES, options
from l2e_ds.analysis.collect import Texts, run_over
from l2e_ds.analysis.load import LoadedModel, check_model, load_model
from l2e_ds.analysis.neuron_page import describe_neuron, write_neuron_page
from l2e_ds.console import at_least
from l2e_ds.distributed import launch
from l2e_ds.errors import AnalysisError, ConfigError
from l2e_ds.evaluation.model_source import MODEL, find_model, load_tokenizer_of
from l2e_ds.models.families import neurons_of
from l2e_ds.system.installed import check_extra
from l2e_ds.system.process import quiet_libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--layer", type=int, required=True, metavar="L", help="layer, counted from 0")
    parser.add_argument("--index", type=int, required=True, metavar="J", help="neuron of the layer, counted from 0")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="a new file (default: MODEL-L-J.html)")
    options.add_feature_arguments(parser)
    options.add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Return the exit code. Under a launcher only rank 0 works.

    Raises ConfigError, CheckpointError, DataError, AnalysisError.
    """
    if launch.find_launch().rank != 0:
        return 0
    check_extra("analysis", PACKAGES)
    source = find_model(arguments.model)
    output = arguments.output or Path(f"{source.label}-{arguments.layer}-{arguments.index}.html")
    if output.exists() or not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: {output} exists, or its folder does not; allowed: a new file")
    at_least("--batch", arguments.batch, 1)
    quiet_libraries()
    network = check_model(source, [arguments.layer])
    tokenizer = load_tokenizer_of(source, arguments.tokenizer)
    neurons = neurons_of(network)
    if not 0 <= arguments.index < neurons:
        raise ConfigError(f"--index: got {arguments.index}, allowed: 0 to {neurons - 1}")
    texts = options.load_features(arguments, tokenizer)
    options.check_fits(network, texts, source.given)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = load_model(source, [arguments.layer], arguments.precision, device)
    values = activations_of(model, texts.tokens, arguments.index, arguments.batch)
    about = {
        "model": source.given,
        "layer": arguments.layer,
        "neuron": arguments.index,
        "name": options.name_of_set(arguments.features),
    }
    described = (values, texts.tokens, texts.labels, texts.features, tokenizer, about)
    write_neuron_page(output, *described)
    print(describe_neuron(*described))
    print(f"page: {output}")
    return 0


def activations_of(model: LoadedModel, tokens: np.ndarray, index: int, batch: int) -> np.ndarray:
    """Return the activations of neuron `index` of the model's only site, float32 [texts, T].

    Raises AnalysisError if they are not finite.
    """
    values = np.empty(tokens.shape, dtype=np.float32)

    def see(_: int, rows: slice, z: Tensor) -> None:
        values[rows] = z[:, index].float().view(rows.stop - rows.start, -1).cpu().numpy()

    run_over(model, Texts(tokens, batch), see, model.source.label)
    if not np.isfinite(values).all():
        text = int(np.argwhere(~np.isfinite(values))[0][0])
        raise AnalysisError(f"{model.source.given}: the activations of this neuron in text {text} are not finite")
    return values
