"""Text cut again as a preparation has cut it, by every tokenizer, and back."""

import io
import types
from pathlib import Path

import numpy as np
import pytest

from lmscale.data.preparation import Corpus, prepare
from lmscale.data.raw_text import RawText
from lmscale.data.tokenizers import make_tokenizer, prepared_tokenizer
from lmscale.data.vocab import EOS, UNK, Vocabulary

TEXT = "The cat sat , and the cats sat too .\n\nUnthinkable thinking , the thinkers think .\n" * 3


@pytest.fixture
def prepared(tmp_path):
    """prepared(name): data of a text, cut by the tokenizer of that name."""
    files = {}
    for split in ("train", "valid", "test"):
        files[split] = [str(tmp_path / f"{split}.txt")]
        Path(files[split][0]).write_text(TEXT)

    def of(name):
        data, _ = prepare(
            Corpus(files), output=tmp_path / name, tokenizer=make_tokenizer(name, options={}), vocab_size=60
        )
        return data

    return of


@pytest.mark.parametrize("name", ["whitespace", "words", "characters", "wordpiece"])
def test_the_same_ids_as_the_split(prepared, name, tmp_path):
    data = prepared(name)
    text = RawText(data)
    lines = list(text.lines(tmp_path / "test.txt"))
    assert len(lines) == 9
    np.testing.assert_array_equal(np.concatenate(lines), data.split("test"))
    assert all(line[-1] == data.eos_id for line in lines)
    assert (text.num_tokens, text.num_unknown) == (len(data.split("test")), 0)
    written = text.text(np.concatenate(lines))
    assert written.replace(" ", "") == TEXT.replace(" ", "")
    # What is read again is the same text, though perhaps with other blanks.
    again = [text.ids(line) for line in written.split("\n")]
    for line, expected in zip(again, [line[:-1] for line in lines], strict=False):
        np.testing.assert_array_equal(line, expected)


def test_words_that_the_vocabulary_lacks_are_counted(prepared):
    data = prepared("words")
    text = RawText(data)
    np.testing.assert_array_equal(text.ids("the dog"), [data.vocabulary.ids["the"], data.unk_id])
    assert text.tokens(text.ids("dog <unk>"))[0] == UNK
    assert text.num_unknown >= 2


def test_stdin(prepared, monkeypatch):
    text = RawText(prepared("words"))
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"the cat\nthe")))
    assert [text.tokens(line) for line in text.lines(None)] == [["the", "cat", EOS], ["the", EOS]]
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO()))
    with pytest.raises(ValueError, match=r"text on stdin\. Received: 0 bytes"):
        list(text.lines(None))
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"the cat\n\xff")))
    with pytest.raises(ValueError, match="UTF-8") as told:
        list(text.lines(None))
    assert "stdin" in str(told.value)
    assert "stdin_" not in str(told.value)


def test_a_line_longer_than_a_block_is_one(prepared, tmp_path):
    text = RawText(prepared("whitespace"))
    path = tmp_path / "long.txt"
    path.write_text("the cat " * 200_000 + "\nsat\n")
    assert [len(line) for line in text.lines(path)] == [400_001, 2]


def test_another_version_of_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"version 2 of the tokenizer words, where the data have version 1"):
        prepared_tokenizer({"tokenizer": "words", "tokenizer_version": 1}, tmp_path)
    with pytest.raises(ValueError, match=r"must tell its tokenizer.*Received: None"):
        prepared_tokenizer({}, tmp_path)


def test_closest_words():
    words = (EOS, UNK, "Elizabeth", "happy", "happily", "Darcy", "a", "IBM", *(f"w{i}" for i in range(10)))
    vocabulary = Vocabulary(tokens=words, counts=np.arange(len(words), 0, -1))
    assert vocabulary.closest("elizabeth")[0] == "Elizabeth"
    assert vocabulary.closest("Hapily") == ["happily"]
    assert vocabulary.closest("ibm")[0] == "IBM"
    assert vocabulary.closest("zzzzzzz") == []
