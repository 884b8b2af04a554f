"""The page of one neuron, on real tokens of awkward texts, parsed back and held against plain NumPy."""

import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest

from l2e_ds.analysis.neuron import measure_neuron, pieces_around, strongest_tokens, write_neuron_page
from l2e_ds.data.tokenizer import train_tokenizer

FEATURES = ["Ελληνικά", "code <b>", "emoji & co"]
ABOUT = {"model": "pythia-70m", "layer": 3, "neuron": 17, "name": "Awkward <texts>"}
LENGTH = 64
AWKWARD = [
    "Το γρήγορο καφέ αλεπουδάκι πηδάει πάνω από το τεμπέλικο σκυλί, ξανά και ξανά.",
    '<script>alert("x")</script>\n\tif a < b && c > d: return "&amp;"\r\n</p></ol></body> and so on, for a while yet',
    "\x1b[31mOne\x07 👩\u200d🚀, two 🎉, \u202edesrever\u202c, no-break\u00a0space, 漢字 and some more text to fill it",
]


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, with few merges: most characters past ASCII are two to four tokens."""
    return train_tokenizer(iter(["the cat sat on the mat and so on\n" * 5]), 270)


@pytest.fixture(scope="module")
def neuron(tokenizer):
    """activations [9, T], tokens [9, T], labels [9]; some ties among the activations."""
    encoded = [tokenizer.backend_tokenizer.encode(text).ids[:LENGTH] for text in AWKWARD]
    assert {len(ids) for ids in encoded} == {LENGTH}
    tokens = np.array(encoded * 3)
    labels = np.array([0, 1, 2] * 3)
    random = np.random.default_rng(5)
    activations = random.normal(0, 0.3, tokens.shape) + (labels[:, None] == 1) * random.gamma(1, 1, tokens.shape)
    return activations.round(2).astype(np.float32), tokens, labels


class Page(HTMLParser):
    """tags: all of them with attributes; items: of each <li> its head, its pieces and the piece of the peak."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.items, self.rows, self.facts, self.heads, self.open = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in ("meta", "path", "use"):
            self.open.append((tag, attributes.get("class", "")))
        if tag == "li":
            self.items.append({"head": "", "spans": [], "notes": [], "peak": None, "tints": []})
        elif tag == "span" and "t" in attributes.get("class", "").split():
            item = self.items[-1]
            item["spans"].append("")
            item["notes"].append(attributes["title"])
            item["tints"].append((attributes["class"].split()[1], float(attributes["style"].removeprefix("--a:"))))
            if "peak" in attributes["class"].split():
                assert item["peak"] is None
                item["peak"] = len(item["spans"]) - 1
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        elif tag in ("dt", "dd"):
            self.facts.append("")
        elif tag in ("h1", "h2"):
            self.heads.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in ("meta", "path", "use"):
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        names = [tag for tag, _ in self.open]
        if any(kind == "head" for _, kind in self.open):
            self.items[-1]["head"] += data
        elif any(tag == "span" and "t" in kind.split() for tag, kind in self.open):
            self.items[-1]["spans"][-1] += data
        elif "th" in names or "td" in names:
            self.rows[-1][-1] += data
        elif "dt" in names or "dd" in names:
            self.facts[-1] += data
        elif "h1" in names or "h2" in names:
            self.heads[-1] += data


@pytest.fixture(scope="module")
def written(neuron, tokenizer, tmp_path_factory):
    activations, tokens, labels = neuron
    path = tmp_path_factory.mktemp("page") / "neuron.html"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_neuron_page(path, activations, tokens, labels, FEATURES, tokenizer, ABOUT)
    assert [one.name for one in path.parent.iterdir()] == ["neuron.html"]
    return path.read_text(encoding="utf-8")


def plainly(activations, labels):
    """mean, variance, phi of eq. 1 and per feature (inside, outside) of eq. 2, one token at a time."""
    values = [float(one) for one in activations.ravel()]
    mean = sum(values) / len(values)
    variance = sum((one - mean) ** 2 for one in values) / (len(values) - 1)
    phi = [[(float(one) - mean) ** 2 / variance for one in row] for row in activations]
    scores = []
    for feature in range(len(FEATURES)):
        inside = [one for row, label in zip(phi, labels, strict=True) for one in row if label == feature]
        outside = [one for row, label in zip(phi, labels, strict=True) for one in row if label != feature]
        scores.append((sum(inside) / len(inside), sum(outside) / len(outside)))
    return mean, variance, np.array(phi), scores


# --- numbers ----------------------------------------------------------------------------------------------------


def test_measures_are_those_of_the_equations(neuron):
    activations, _, labels = neuron
    mean, variance, phi, scores = plainly(activations, labels)
    found = measure_neuron(activations, labels, FEATURES)
    assert (found.mean, found.s) == pytest.approx((mean, variance**0.5))
    assert found.alive and found.own_feature == FEATURES[max(range(3), key=lambda one: scores[one][0])] == "code <b>"
    assert found.kurtosis == pytest.approx((phi**2).mean())
    np.testing.assert_allclose(found.scores, phi)
    assert list(found.features["score_inside"]) == sorted(found.features["score_inside"], reverse=True)
    for row in found.features.itertuples():
        which = FEATURES.index(row.feature)
        own = activations[labels == which].astype(np.float64)
        assert (row.score_inside, row.score_outside) == pytest.approx(scores[which])
        assert (row.texts, row.tokens) == (3, 3 * LENGTH)
        assert (row.mean, row.s) == pytest.approx((own.mean(), own.std(ddof=1)))


def test_strongest_tokens_are_at_most_two_of_a_text():
    activations = np.array([[5, 9, 9, 8], [1, 7, 1, 1], [9, 0, -3, -3]], dtype=np.float32)
    assert strongest_tokens(activations, 5) == [(0, 1), (0, 2), (2, 0), (1, 1), (1, 0)]
    assert strongest_tokens(activations, 3, lowest=True) == [(2, 2), (2, 3), (1, 0)]
    assert len(strongest_tokens(activations, 20)) == 6


# --- text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", range(3))
def test_pieces_are_whole_characters_and_leave_nothing_out(neuron, tokenizer, text):
    ids = neuron[1][text]
    whole = pieces_around(ids, 0, tokenizer, context=LENGTH)
    assert "".join(one.text for one in whole) == tokenizer.backend_tokenizer.decode(ids.tolist())
    assert [one.begin for one in whole] == [0, *[one.end for one in whole[:-1]]] and whole[-1].end == LENGTH
    assert all("\ufffd" not in one.text for one in whole[:-1])  # the last character may be cut by the text's end
    assert any(one.end - one.begin > 1 for one in whole) or text == 1
    for position in range(LENGTH):
        around = pieces_around(ids, position, tokenizer, context=5)
        assert {one for one in around if one.begin >= 5 and one.end <= LENGTH - 5} <= set(whole)
        assert around[0].begin <= max(0, position - 5) and around[-1].end >= min(LENGTH, position + 6)
        assert around[-1].end - around[0].begin <= 11 + 6
        assert sum(one.begin <= position < one.end for one in around) == 1


def test_bytes_that_are_no_character(tokenizer):
    """A cut character in the middle, and U+FFFD itself, which looks like one."""
    vocabulary = tokenizer.get_vocab()
    greek = tokenizer.backend_tokenizer.encode("ά").ids
    literal = tokenizer.backend_tokenizer.encode("\ufffd").ids
    assert len(greek) == 2 and len(literal) == 3
    a = vocabulary["a"]
    for ids in ([a, greek[0], a, a], [greek[1], a], [a, *literal, *literal, a], [greek[1]] * 9, [a, *greek, greek[0]]):
        pieces = pieces_around(np.array(ids), 0, tokenizer, context=20)
        assert [one.begin for one in pieces] == [0, *[one.end for one in pieces[:-1]]] and pieces[-1].end == len(ids)
        text = "".join(one.text for one in pieces)
        assert text.replace("\ufffd", "") == tokenizer.backend_tokenizer.decode(ids).replace("\ufffd", "")
        assert "\ufffd" in text


def test_pieces_of_a_tokenizer_that_falls_back_to_bytes():
    """Llama and Mistral have these: a mark for a space, <0xE2> for a byte, and no space before the first word."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "<unk>"]
    backend = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "the 漢字 and é"
    ids = np.array(backend.encode(text).ids)
    assert len(ids) == 1 + len(text) + 2 + 2 + 1
    pieces = pieces_around(ids, 0, tokenizer, context=50)
    assert [one.text for one in pieces] == ["", *text]
    assert [(one.begin, one.end) for one in pieces if one.text == "漢"] == [(5, 8)]
    assert "".join(one.text for one in pieces_around(ids, 9, tokenizer, context=3)) == "漢字 a"


# --- the page ---------------------------------------------------------------------------------------------------


def test_page_is_one_file_for_phone_and_laptop(written):
    page = Page(written)
    assert written.startswith("<!DOCTYPE html>") and [tag for tag, _ in page.tags].count("svg") == 1
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "@media (prefers-color-scheme: dark)" in written
    assert not {"script", "link", "img", "iframe", "object", "b>"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert "src" not in attributes and not any(key.startswith("on") for key in attributes)
        for key in ("href", "xlink:href"):
            assert attributes.get(key, "#").startswith("#")
    assert not re.search(r"@import|url\((?!#)", written)
    assert "<title>Layer 3, neuron 17, pythia-70m</title>" in written
    assert '<p class="model">pythia-70m</p>' in written
    assert page.heads == [
        "Layer 3, neuron 17",  # short: a model's path, which may be long, is below it
        "Activations on the texts of each feature",
        "MS inside and outside each feature",
        "The 18 strongest tokens",  # two of each of nine texts
        "The 10 lowest tokens",
    ]
    assert "Awkward &lt;texts&gt;, 3 features, n = 9 texts" in written


def test_numbers_of_the_page(written, neuron):
    activations, _, labels = neuron
    page = Page(written)
    mean, variance, phi, scores = plainly(activations, labels)
    facts = dict(zip(page.facts[::2], page.facts[1::2], strict=True))
    assert facts == {
        "own feature": "code <b>",
        "MS inside it": f"{scores[1][0]:.4g}",
        "MS outside it": f"{scores[1][1]:.4g}",
        "mean": f"{mean:.4g}",
        "S (standard deviation)": f"{variance**0.5:.4g}",
        "kurtosis (normal: 3)": f"{(phi**2).mean():.4g}",
        "state": "alive",
    }
    assert page.rows[0] == ["feature", "texts", "tokens", "MS inside", "MS outside", "mean", "S"]
    order = sorted(range(3), key=lambda one: -scores[one][0])
    for row, which in zip(page.rows[1:], order, strict=True):
        own = activations[labels == which].astype(np.float64)
        numbers = [*scores[which], own.mean(), own.std(ddof=1)]
        assert row == [FEATURES[which], "3", "192", *(f"{number:.4g}" for number in numbers)]


def test_every_token_is_there_in_order_and_in_its_context(written, neuron, tokenizer):
    activations, tokens, labels = neuron
    _, _, phi, _ = plainly(activations, labels)
    mean = activations.astype(np.float64).mean()
    furthest = np.abs(activations - mean).max()
    page = Page(written)
    assert len(page.items) == 18 + 10
    values = []
    for item, lowest in zip(page.items, [False] * 18 + [True] * 10, strict=True):
        head = re.fullmatch(r"(.+) (\S+) MS (\S+) · text (\d+), token (\d+)", item["head"])
        text, position = int(head[4]), int(head[5])
        value = activations[text, position]
        values.append((lowest, -value if not lowest else value, text, position))
        assert head[1] == FEATURES[labels[text]]
        assert (head[2], head[3]) == (f"{value:.4g}", f"{phi[text, position]:.4g}")
        pieces = pieces_around(tokens[text], position, tokenizer)
        assert len(item["spans"]) == len(pieces)
        peak = pieces[item["peak"]]
        assert peak.begin <= position < peak.end
        assert f"token {position}: {value:.4g}, MS {phi[text, position]:.4g}" in item["notes"][item["peak"]].split("; ")
        for piece, (kind, tint) in zip(pieces, item["tints"], strict=True):
            distances = activations[text, piece.begin : piece.end] - mean
            distance = max(distances, key=abs)
            assert kind == ("hot" if distance > 0 else "cold")
            assert tint == pytest.approx(abs(distance) / furthest, rel=0.06)
        # the words as they are, but for what cannot be seen
        shown = "".join(item["spans"])
        for hidden, mark in {"\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}.items():
            shown = shown.replace(mark, hidden)
        shown = re.sub(r"U\+([0-9A-F]{4,5})", lambda found: chr(int(found[1], 16)), shown)
        assert shown == "".join(piece.text for piece in pieces)
    assert values == sorted(values)
    expected = [(False, *one) for one in strongest_tokens(activations, 20)]
    expected += [(True, *one) for one in strongest_tokens(activations, 10, lowest=True)]
    assert [(lowest, text, position) for lowest, _, text, position in values] == expected


def test_text_can_do_nothing_to_the_page(written):
    body = written.partition("<body>")[2]
    assert "<script" not in written.lower() and "&lt;" in body and "&amp;" in body
    hidden = [c for c in written if not c.isprintable() and c != "\n"]
    assert hidden == []
    assert "U+202E" in body and "U+001B" in body and "U+200D" in body and "↵" in body
    assert "👩" in body and "🚀" in body


def test_the_same_neuron_gives_the_same_page(written, neuron, tokenizer, tmp_path):
    activations, tokens, labels = neuron
    write_neuron_page(tmp_path / "page.html", activations, tokens, labels, FEATURES, tokenizer, ABOUT)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == written


def test_a_dead_neuron(neuron, tokenizer, tmp_path):
    activations, tokens, labels = neuron
    dead = np.full_like(activations, 0.125)
    path = tmp_path / "page.html"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_neuron_page(path, dead, tokens, labels, FEATURES, tokenizer, ABOUT)
    page = Page(path.read_text(encoding="utf-8"))
    facts = dict(zip(page.facts[::2], page.facts[1::2], strict=True))
    assert facts["state"] == "dead: it does not vary" and facts["own feature"] == "none" and facts["mean"] == "0.125"
    assert len(page.items) == 28 and {tint for item in page.items for _, tint in item["tints"]} == {0}
