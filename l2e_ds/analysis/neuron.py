"""`l2e-ds neuron MODEL --layer L --index J --features FILE`: what one neuron responds to, as a page.

Everything is computed from the neuron's own activations, in float64.

Shapes: T tokens of a text, F features; activations z [texts, T], tokens [texts, T] ids, labels [texts] index into the
F features.
"""

from __future__ import annotations

import argparse
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from markupsafe import Markup
from torch import Tensor

from l2e_ds.analysis import PACKAGES, options
from l2e_ds.analysis.collect import Texts, run_over
from l2e_ds.analysis.load import LoadedModel, check_model, load_model
from l2e_ds.console import at_least
from l2e_ds.distributed import launch
from l2e_ds.errors import AnalysisError, ConfigError
from l2e_ds.evaluation.model_source import MODEL, find_model, load_tokenizer_of
from l2e_ds.inhibition.losses import is_alive
from l2e_ds.models.families import neurons_of
from l2e_ds.system.files import write_whole
from l2e_ds.system.installed import check_extra
from l2e_ds.system.process import prepare_libraries
from l2e_ds.system.templates import template

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerFast

_STRONGEST, _LOWEST = 20, 10  # tokens shown
_OF_ONE_TEXT = 2  # tokens that are shown of one text, at most
_CONTEXT = 20  # tokens that are shown on either side
_BINS = 80
_LONGEST_CHARACTER = 4  # bytes of a character in UTF-8, and so tokens, at most
_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--layer", type=int, required=True, metavar="L", help="layer, counted from 0")
    parser.add_argument("--index", type=int, required=True, metavar="J", help="neuron of the layer, counted from 0")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="a new file (default: MODEL-L-J.html)")
    options.add_feature_arguments(parser)
    options.add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Return the exit code. Under a launcher only rank 0 works. Raises what `analyze` raises."""
    if launch.find_launch().rank != 0:
        return 0
    check_extra("neuron", "analysis", PACKAGES)
    source = find_model(arguments.model)
    output = arguments.output or Path(f"{source.label}-{arguments.layer}-{arguments.index}.html")
    if output.exists() or not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: {output} exists, or its folder does not; allowed: a new file")
    at_least("--batch", arguments.batch, 1)
    prepare_libraries()
    hf_config = check_model(source, [arguments.layer], "--layer")
    tokenizer = load_tokenizer_of(source, arguments.tokenizer)
    neurons = neurons_of(hf_config)
    if not 0 <= arguments.index < neurons:
        raise ConfigError(f"--index: got {arguments.index}, allowed: 0 to {neurons - 1}")
    texts = options.load_features(arguments, tokenizer)
    options.check_fits(hf_config, texts, source.given)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = load_model(source, [arguments.layer], arguments.precision, device)
    values = activations_of(model, texts.tokens, arguments.index, arguments.batch)
    about = {
        "model": source.given,
        "layer": arguments.layer,
        "neuron": arguments.index,
        "name": options.name_of_set(arguments.features),
    }
    found = write_neuron_page(output, values, texts.tokens, texts.labels, texts.features, tokenizer, about)
    best = found.features.iloc[0]
    name = "".join(c if c.isprintable() else _mark(c) for c in best["feature"])
    own = f"{name} (MS {best['score_inside']:.4g} inside, {best['score_outside']:.4g} outside)"
    print(f"own feature: {own if found.alive else 'none, the neuron is dead'}")
    print(f"page: {output}")
    return 0


def activations_of(model: LoadedModel, tokens: np.ndarray, index: int, batch: int) -> np.ndarray:
    """Return a neuron's activations at the model's only site, float32 [texts, T]. Raises AnalysisError."""
    values = np.empty(tokens.shape, dtype=np.float32)

    def see(_: int, rows: slice, z: Tensor) -> None:
        values[rows] = z[:, index].float().view(rows.stop - rows.start, -1).cpu().numpy()

    run_over(model, Texts(tokens, batch), see, model.source.label)
    if not np.isfinite(values).all():
        text = int(np.argwhere(~np.isfinite(values))[0][0])
        raise AnalysisError(f"{model.source.given}: the activations of this neuron in text {text} are not finite")
    return values


@dataclass(frozen=True)
class Neuron:
    """The measures of one neuron.

    mean, s: over all tokens, s from the sample variance; kurtosis: E[phi^2]; own_feature: eq. 3, "" if dead. scores:
    phi of eq. 1, float64 [texts, T], 0 if dead. features: a row for each feature, by descending score_inside, with
    feature, texts, tokens, score_inside, score_outside (eq. 2), mean, s (over the feature's tokens).
    """

    mean: float
    s: float
    kurtosis: float
    alive: bool
    own_feature: str
    scores: np.ndarray
    features: pd.DataFrame


def measure_neuron(activations: np.ndarray, labels: np.ndarray, features: Sequence[str]) -> Neuron:
    """Compute eq. 1 to 3 of one neuron, with the global mean and sample variance."""
    z = np.asarray(activations, dtype=np.float64)
    mean, variance = float(z.mean()), float(z.var(ddof=1))
    alive = bool(is_alive(np.array(mean), np.array(variance)))
    scores = (z - mean) ** 2 / variance if alive else np.zeros_like(z)
    rows = []
    for index, feature in enumerate(features):
        inside = labels == index
        rows.append(
            {
                "feature": feature,
                "texts": int(inside.sum()),
                "tokens": z[inside].size,
                "score_inside": scores[inside].mean(),
                "score_outside": scores[~inside].mean(),
                "mean": z[inside].mean(),
                "s": z[inside].std(ddof=1),
            }
        )
    table = pd.DataFrame(rows).sort_values("score_inside", ascending=False, kind="stable", ignore_index=True)
    own = str(table["feature"].iloc[0]) if alive else ""
    return Neuron(mean, variance**0.5, float((scores**2).mean()), alive, own, scores, table)


def strongest_tokens(activations: np.ndarray, count: int, lowest: bool = False) -> list[tuple[int, int]]:
    """Return (text, position) of the tokens with the largest (or lowest) activation, at most two of one text."""
    flat = activations.reshape(-1)
    by_text: Counter[int] = Counter()
    tokens: list[tuple[int, int]] = []
    for index in np.argsort(flat if lowest else -flat, kind="stable"):
        text, position = divmod(int(index), activations.shape[1])
        if by_text[text] < _OF_ONE_TEXT:
            by_text[text] += 1
            tokens.append((text, position))
            if len(tokens) == count:
                break
    return tokens


@dataclass(frozen=True)
class Piece:
    """Tokens `begin` to `end - 1` of a text, usually one, which together decode to whole characters."""

    begin: int
    end: int
    text: str


def pieces_around(
    ids: np.ndarray, position: int, tokenizer: PreTrainedTokenizerFast, context: int = _CONTEXT
) -> list[Piece]:
    """Return the text around a token: `context` tokens on either side, and those that complete a character there.

    ids: [T]. Byte-level tokens that are parts of one character make one piece. Bytes that are no character become
    U+FFFD.
    """
    last = min(len(ids), position + context + 1 + _LONGEST_CHARACTER)

    def decode(begin: int, end: int) -> str:
        return tokenizer.backend_tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)

    pieces: list[Piece] = []
    before = begin = 0  # where the previous piece begins, and this one
    for end in range(1, last + 1):
        # Decoded together with the previous piece, as many tokenizers drop a space at the beginning.
        head, text = decode(before, begin), decode(before, end)
        if text.endswith("\ufffd") and end < last and end - begin < _LONGEST_CHARACTER:
            continue  # the character is not complete
        # Bytes that are no character may be decoded differently when more of them follow.
        pieces.append(Piece(begin, end, text[len(head) :] if text.startswith(head) else decode(begin, end)))
        before, begin = begin, end
    return [piece for piece in pieces if piece.end > position - context and piece.begin <= position + context]


def write_neuron_page(
    path: Path,
    activations: np.ndarray,
    tokens: np.ndarray,
    labels: np.ndarray,
    features: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    about: Mapping[str, Any],
) -> Neuron:
    """Write one HTML file that needs no other, and return the neuron's measures. The same input gives the same bytes.

    activations: float32 [texts, T]; tokens: ids, [texts, T]; labels: index into `features`, [texts]; about: model
    (label), layer, neuron, name (of the feature set). Raises OSError.
    """
    from l2e_ds.analysis.drawing import svg_of  # imports matplotlib, an optional dependency
    from l2e_ds.analysis.figures import neuron_distribution

    found = measure_neuron(activations, labels, features)
    edges = np.histogram_bin_edges(activations.astype(np.float64), _BINS)
    bins = pd.DataFrame({"left": edges[:-1], "right": edges[1:]})
    counts = [np.histogram(activations[labels == index], edges)[0] for index in range(len(features))]
    distribution = pd.concat([bins.assign(feature=name, count=n) for name, n in zip(features, counts, strict=True)])
    scores = dict(zip(found.features["feature"], found.features["score_inside"], strict=True))
    figure = neuron_distribution(distribution, found.own_feature, scores)
    distances = activations - np.float64(found.mean)
    tints = distances / (np.abs(distances).max() or 1)  # 1 or -1: the token furthest from the mean

    def in_context(text: int, position: int) -> dict[str, Any]:
        pieces = pieces_around(tokens[text], position, tokenizer)
        return {
            "text": text,
            "position": position,
            "feature": features[labels[text]],
            "spans": [(piece, max(tints[text, piece.begin : piece.end], key=abs)) for piece in pieces],
        }

    page = template(Path(__file__).with_name("neuron_page.html"), visible=_visible).render(
        about=about,
        found=found,
        activations=activations,
        svg=Markup(svg_of(figure).partition("<svg ")[2]),
        marks=_MARKS.values(),
        strongest=[in_context(*place) for place in strongest_tokens(activations, _STRONGEST)],
        lowest=[in_context(*place) for place in strongest_tokens(activations, _LOWEST, lowest=True)],
        of_one_text=_OF_ONE_TEXT,
        context=_CONTEXT,
    )
    write_whole(path, page)
    return found


def _visible(text: str) -> Markup:
    """Return a text for HTML: escaped, and with a mark or number for each character that would not be visible."""
    return Markup(
        "".join(
            html.escape(c) if c.isprintable() and c != "\ufffd" else f'<i class="mark">{_mark(c)}</i>' for c in text
        )
    )


def _mark(character: str) -> str:
    if character == "\ufffd":
        return "\ufffd"  # stands for bytes that are no character
    return _MARKS.get(character, f"U+{ord(character):04X}")
