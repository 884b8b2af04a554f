import json

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import GPTNeoXTokenizerFast

from l2e_ds.data.tokenizer import (
    END_OF_TEXT,
    end_of_text_id,
    load_tokenizer,
    tokenizer_digest,
    train_tokenizer,
    vocabulary_size,
)
from l2e_ds.errors import DataError

TEXTS = ["the cat sat on the mat, the cat sat\n" * 5, "  def f(x):\n\treturn x + 1\n", "déjà vu 你好 🙂"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), 265)


@pytest.mark.parametrize("text", [*TEXTS, "bytes never seen: ñ \u2603 \x00\r\n", " leading and trailing "])
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_vocabulary(tokenizer):
    assert vocabulary_size(tokenizer) == 265
    assert tokenizer.convert_tokens_to_ids(END_OF_TEXT) == 0
    assert end_of_text_id(tokenizer) == 0
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.unk_token == END_OF_TEXT
    assert len(tokenizer.encode("the cat")) < len("the cat")


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer(iter(TEXTS), 265)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_tiny_corpus_gives_a_smaller_vocabulary():
    assert vocabulary_size(train_tokenizer(iter(["ab"]), 1000)) == 257
    with pytest.raises(DataError, match="at least 257"):
        train_tokenizer(iter(["ab"]), 256)


def test_an_error_of_the_texts_is_passed_on():
    def texts():
        yield "one"
        raise DataError("file:2: broken")

    with pytest.raises(DataError, match="file:2: broken"):
        train_tokenizer(texts(), 300)


def test_load_from_file_and_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "folder")
    for name in (tmp_path / "folder", tmp_path / "folder" / "tokenizer.json"):
        loaded = load_tokenizer(str(name))
        assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
        assert end_of_text_id(loaded) == 0


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "GPTNeoXTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer", None])
def test_a_folder_gives_the_tokens_of_its_file(tokenizer, tmp_path, named):
    """Whatever class its configuration names, which may have a normalizer and a pre-tokenizer of its own."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    digits = {"type": "Digits", "individual_digits": True}
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, described["pre_tokenizer"]]}
    described["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named} if named else {}))
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    loaded.save_pretrained(tmp_path / "saved")
    for text in [*TEXTS, "The CAT sat 1234 TIMES", f"é{END_OF_TEXT}  the 12 cats"]:
        wanted = reference.encode(text, add_special_tokens=False).ids
        assert loaded.encode(text, add_special_tokens=False) == wanted
        assert loaded.backend_tokenizer.encode(text, add_special_tokens=False).ids == wanted
        assert load_tokenizer(str(tmp_path / "saved")).encode(text, add_special_tokens=False) == wanted
    assert (loaded.eos_token, end_of_text_id(loaded)) == (END_OF_TEXT, 0)  # named by no file


# what is changed in a tokenizer.json, and whether texts get other ids by it
CHANGES = {
    "decoder": (lambda d: d.update(decoder=None), False),
    "post-processor": (
        lambda d: d.update(post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}),
        False,
    ),
    "offsets": (lambda d: d["pre_tokenizer"].update(trim_offsets=False), False),
    "empty prefix": (lambda d: d["model"].update(continuing_subword_prefix=""), False),
    "what decoding skips": (lambda d: d["added_tokens"][0].update(special=False), False),
    "truncation": (
        lambda d: d.update(truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}),
        False,
    ),
    "normalizer": (lambda d: d.update(normalizer={"type": "Lowercase"}), True),
    "pre-tokenizer": (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), True),
    "merges": (lambda d: d["model"]["merges"].pop(0), True),
    "vocabulary": (lambda d: d["model"]["vocab"].update(t=d["model"]["vocab"]["h"], h=d["model"]["vocab"]["t"]), True),
    "blanks of an added token": (lambda d: d["added_tokens"][0].update(rstrip=True), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_is_of_what_decides_token_ids(tokenizer, tmp_path, change):
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    alter, ids_change = CHANGES[change]
    alter(described)
    (tmp_path / "t.json").write_text(json.dumps(described))
    altered = load_tokenizer(str(tmp_path / "t.json"))
    text = f"The cat{END_OF_TEXT} the hat"
    assert (altered.encode(text, add_special_tokens=False) != tokenizer.encode(text, add_special_tokens=False)) == (
        ids_change
    )
    assert (tokenizer_digest(altered) != tokenizer_digest(tokenizer)) == ids_change


def test_file_and_folder_of_one_tokenizer_have_one_digest(tokenizer, tmp_path):
    """Such are 20B_tokenizer.json and the folder that a class of transformers made of it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(["<|padding|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    GPTNeoXTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path / "folder")
    assert (tmp_path / "folder/tokenizer.json").read_text() != (tmp_path / "tokenizer.json").read_text()
    file, folder = (load_tokenizer(str(tmp_path / name)) for name in ("tokenizer.json", "folder"))
    assert tokenizer_digest(file) == tokenizer_digest(folder)


def test_truncation_and_padding_of_the_file_are_ignored(tokenizer, tmp_path):
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "t.json").write_text(json.dumps(described))
    loaded = load_tokenizer(str(tmp_path / "t.json"))
    assert len(loaded.backend_tokenizer.encode("a b c d e f").ids) > 2


def test_end_of_text_must_exist(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a")).save(str(tmp_path / "t.json"))
    loaded = load_tokenizer(str(tmp_path / "t.json"))
    assert vocabulary_size(loaded) == 8
    with pytest.raises(DataError, match=r"^data\.tokenizer: (.+: )?has neither an eos_token nor one of "):
        end_of_text_id(loaded)


@pytest.mark.parametrize("name", ["gone.json", "./gone", "broken.json", "folder"])
def test_bad_names_give_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=rf"^data\.tokenizer: .*{name.strip('./')}") as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)
