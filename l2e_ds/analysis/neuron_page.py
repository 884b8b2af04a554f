"""Describe one neuron, as an HTML page or a few lines: what it responds to, and its strongest tokens in context.

Everything is computed from the neuron's own activations, in float64.

Shapes: T tokens of a text, F features; activations z [texts, T], tokens [texts, T] ids, labels [texts] index into the
F features.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from l2e_ds.analysis.measures import is_alive
from l2e_ds.console import aligned
from l2e_ds.errors import ConfigError
from l2e_ds.system.files import write_whole
from l2e_ds.system.templates import template

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerFast

_STRONGEST, _LOWEST = 20, 10  # tokens shown
_OF_ONE_TEXT = 2  # tokens that are shown of one text, at most
_CONTEXT = 20  # tokens that are shown on either side
_BINS = 80
_LONGEST_CHARACTER = 4  # bytes of a character in UTF-8, and so tokens, at most
_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}


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
    """Compute eq. 1 to 3 of one neuron, with the global mean and sample variance.

    Raises ConfigError for activations that are NaN or infinite.
    """
    z = np.asarray(activations, dtype=np.float64)
    bad = int(np.count_nonzero(~np.isfinite(z)))
    if bad:
        raise ConfigError(f"neuron: {bad:,} of {z.size:,} activations are NaN or infinite; allowed: finite numbers")
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
                "score_inside": scores[inside].mean() if inside.any() else np.nan,
                "score_outside": scores[~inside].mean() if not inside.all() else np.nan,
                "mean": z[inside].mean() if inside.any() else np.nan,
                "s": z[inside].std(ddof=1) if z[inside].size > 1 else np.nan,
            }
        )
    table = pd.DataFrame(rows).sort_values("score_inside", ascending=False, kind="stable", ignore_index=True)
    own = str(table["feature"].iloc[0]) if alive else ""
    return Neuron(mean, variance**0.5, float((scores**2).mean()), alive, own, scores, table)


def strongest_tokens(activations: np.ndarray, count: int, lowest: bool = False) -> list[tuple[int, int]]:
    """Return (text, position) of the tokens with the largest (or lowest) activation, at most two of one text.

    Of equal ones the first come first.
    """
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
) -> None:
    """Write one HTML file that needs no other. The same input gives the same bytes.

    activations: float32 [texts, T]; tokens: ids, [texts, T]; labels: index into `features`, [texts]; about: model
    (label), layer, neuron, name (of the feature set). Raises ConfigError for activations that are not finite, and
    OSError.
    """
    from l2e_ds.analysis.drawing import svg_of  # imports matplotlib, an optional dependency
    from l2e_ds.analysis.figures import neuron_distribution

    found = measure_neuron(activations, labels, features)
    figure = neuron_distribution(
        _histogram(activations, labels, features),
        found.own_feature,
        dict(zip(found.features["feature"], found.features["score_inside"], strict=True)),
    )
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

    page = template(Path(__file__).with_suffix(".html"), visible=_visible).render(
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


def describe_neuron(
    activations: np.ndarray,
    tokens: np.ndarray,
    labels: np.ndarray,
    features: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    about: Mapping[str, Any],
    count: int = 5,
) -> str:
    """Return a description for a terminal: a few aligned lines, with the `count` strongest tokens.

    Arguments and errors are those of `write_neuron_page`.
    """
    found = measure_neuron(activations, labels, features)
    names = [_plain(feature) for feature in found.features["feature"]]
    rows = [("neuron", f"{_plain(str(about['model']))}, layer {about['layer']}, neuron {about['neuron']}")]
    rows.append(("feature set", f"{_plain(str(about['name']))}: {len(tokens):,} texts, {tokens.size:,} tokens"))
    if found.alive:
        best = found.features.iloc[0]
        score = f"MS {best['score_inside']:.4g} inside, {best['score_outside']:.4g} outside"
        rows.append(("own feature", f"{names[0]} ({score})"))
        others = zip(names[1:4], found.features["score_inside"][1:4], strict=True)
        rows.append(("next", ", ".join(f"{name} {score:.4g}" for name, score in others) or "-"))
    else:
        rows.append(("own feature", "none: the neuron is dead, it does not vary"))
    rows.append(("mean, S", f"{found.mean:.4g}, {found.s:.4g}"))
    rows.append(("kurtosis", f"{found.kurtosis:.4g}" if found.alive else "-"))
    for rank, (text, position) in enumerate(strongest_tokens(activations, count), 1):
        pieces = pieces_around(tokens[text], position, tokenizer, 6)
        words = "".join(
            f"[{_plain(piece.text)}]" if piece.begin <= position < piece.end else _plain(piece.text) for piece in pieces
        )
        value = f"{activations[text, position]:.4g}"
        rows.append(("strongest" if rank == 1 else "", f"{value:>9}  {_plain(features[labels[text]])}: {words}"))
    return aligned(rows)


def _histogram(activations: np.ndarray, labels: np.ndarray, features: Sequence[str]) -> pd.DataFrame:
    """Return the columns feature, left, right, count: bins of equal width from the lowest to the highest activation."""
    edges = np.histogram_bin_edges(activations.astype(np.float64), _BINS)
    parts = []
    for index, feature in enumerate(features):
        count, _ = np.histogram(activations[labels == index], edges)
        parts.append(pd.DataFrame({"feature": feature, "left": edges[:-1], "right": edges[1:], "count": count}))
    return pd.concat(parts, ignore_index=True)


def _visible(text: str) -> Markup:
    """Return a text for HTML: escaped, and with a mark or number for each character that would not be visible."""
    return Markup(
        "".join(
            html.escape(c) if c.isprintable() and c != "\ufffd" else f'<i class="mark">{_mark(c)}</i>' for c in text
        )
    )


def _plain(text: str) -> str:
    """Return a text for a terminal, with a mark or number for each character that would not be visible."""
    return "".join(c if c.isprintable() else _mark(c) for c in text)


def _mark(character: str) -> str:
    if character == "\ufffd":
        return "\ufffd"  # stands for bytes that are no character
    return _MARKS.get(character, f"U+{ord(character):04X}")
