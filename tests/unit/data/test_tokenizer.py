import json

import pytest

from l2e_ds.data.tokenizer import END_OF_TEXT, end_of_text_id, load_tokenizer, train_tokenizer, vocabulary_size
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
    with pytest.raises(DataError, match=r"data\.tokenizer: has neither"):
        end_of_text_id(loaded)


@pytest.mark.parametrize("name", ["gone.json", "./gone", "broken.json", "folder"])
def test_bad_names_give_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=rf"^data\.tokenizer: .*{name.strip('./')}") as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)
