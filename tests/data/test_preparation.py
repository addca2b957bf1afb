"""Whole preparations of small texts, with ids worked out by hand."""

import gzip
import itertools
import json
import lzma
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lmscale.data import text_files
from lmscale.data.preparation import Corpus, LineBlockSplit, prepare
from lmscale.data.token_files import PreparedData
from lmscale.data.tokenizers import make_tokenizer
from lmscale.doing import what_was_done

ROOT = Path(__file__).parents[2]
CORPORA = ROOT.parent / "shared" / "data"

TEXTS = {"train": "the cat sat\n\n  the dog \nthe <unk>", "valid": "a cat\n", "test": "dog dog\n \n"}


def corpus_of(folder, texts=TEXTS, *, compress=bytes, suffix=".txt"):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}{suffix}").write_bytes(compress(text.encode()))
    return Corpus({name: [str(folder / f"{name}{suffix}")] for name in texts})


def run(corpus, output, *, tokenizer="whitespace", **options):
    data, made = prepare(corpus, output=output, tokenizer=make_tokenizer(tokenizer, options={}), **options)
    assert made
    assert PreparedData.open(output).fingerprint == data.fingerprint
    return data


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def tokens_of(data, split):
    return [data.vocabulary.tokens[i] for i in data.split(split)]


def test_by_hand(tmp_path):
    data = run(corpus_of(tmp_path / "in"), tmp_path / "out")
    # Each line has an <eos>, the blank and the unfinished one too; <unk> is spelled out in the text once.
    assert (
        tmp_path / "out" / "vocab.txt"
    ).read_text() == "<eos>\t4\nthe\t3\n<unk>\t1\ncat\t1\ndog\t1\nsat\t1\n"
    assert data.split("train").tolist() == [1, 3, 5, 0, 0, 1, 4, 0, 1, 2, 0]
    assert data.split("valid").tolist() == [2, 3, 0]
    assert data.split("test").tolist() == [4, 4, 0, 0]
    assert data.split("train").dtype == np.dtype("<u2")
    splits = data.manifest["splits"]
    kept = ("tokens", "lines", "types", "unk_tokens")
    assert {name: tuple(entry[key] for key in kept) for name, entry in splits.items()} == {
        "train": (11, 4, 6, 1),
        "valid": (3, 1, 3, 1),
        "test": (4, 2, 2, 0),
    }
    assert data.manifest["vocabulary"]["types_in_train_text"] == 5
    assert data.manifest["inputs"]["valid"][0]["file"] == "valid.txt"
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_limits(tmp_path):
    corpus = corpus_of(tmp_path / "in")
    assert tokens_of(run(corpus, tmp_path / "1", vocab_size=3), "train") == (
        ["the", "<unk>", "<unk>", "<eos>", "<eos>", "the", "<unk>", "<eos>", "the", "<unk>", "<eos>"]
    )
    data = run(corpus, tmp_path / "2", min_count=2)
    assert data.vocabulary.tokens == ("<eos>", "<unk>", "the")  # 4 of each of the first two.
    assert data.counts.tolist() == [4, 4, 3]


def test_tokenizers_and_their_files(tmp_path):
    corpus = corpus_of(tmp_path / "in", {"train": "It's on.\n", "valid": "on on\n", "test": "x\n"})
    assert tokens_of(run(corpus, tmp_path / "1", tokenizer="words"), "train") == ["It's", "on", ".", "<eos>"]
    characters = run(corpus, tmp_path / "2", tokenizer="characters")
    assert tokens_of(characters, "valid") == [*"on▁on", "<eos>"]


def test_invisible_characters_make_no_words(tmp_path):
    texts = {
        "train": "the cat\nthe\u00ad \ufeffcat \u200b\0\n",
        "valid": "c\u2060at\n",
        "test": "th\u200ee\n",
    }
    data = run(corpus_of(tmp_path / "in", texts), tmp_path / "out", tokenizer="words")
    assert data.vocabulary.tokens == ("<eos>", "cat", "the", "<unk>")
    assert [tokens_of(data, split) for split in ("train", "valid", "test")] == [
        ["the", "cat", "<eos>"] * 2,
        ["cat", "<eos>"],
        ["the", "<eos>"],
    ]


@pytest.mark.parametrize("name", ["words", "wordpiece"])
def test_a_directory_of_older_words_holds_other_data(tmp_path, name):
    """Those of 0.1.0 were cut by another rule; they say so by no version."""
    corpus, output = corpus_of(tmp_path / "in"), tmp_path / "out"
    data = run(corpus, output, tokenizer=name)
    assert data.manifest["options"]["tokenizer_version"] == 2
    manifest = json.loads((output / "manifest.json").read_text())
    del manifest["options"]["tokenizer_version"]
    (output / "manifest.json").write_text(json.dumps(manifest))
    assert PreparedData.open(output).fingerprint == data.fingerprint
    with pytest.raises(
        ValueError, match=r"holds other data: tokenizer_version is None, wanted 2\. Pass --overw"
    ):
        run(corpus, output, tokenizer=name)
    assert "tokenizer_version" not in run(corpus, tmp_path / "plain").manifest["options"]


def test_wordpiece_min_count_is_of_letters_and_pieces_all_get_a_row(tmp_path):
    texts = {"train": "abcab abc x\nabcc abab\n" + "q" * 70, "valid": "xab\n", "test": "zz\n"}
    corpus = corpus_of(tmp_path / "in", texts)
    data = run(corpus, tmp_path / "1", tokenizer="wordpiece", min_count=2)
    splits = data.manifest["splits"]
    assert [splits[name]["unk_tokens"] for name in ("train", "valid", "test")] == [1, 1, 2]
    assert "x" not in data.vocabulary.tokens
    assert tokens_of(data, "valid")[:2] == ["<unk>", "##ab"]
    data = run(corpus, tmp_path / "2", tokenizer="wordpiece")
    assert data.manifest["splits"]["train"]["unk_tokens"] == 0
    assert run(corpus, tmp_path / "3", tokenizer="wordpiece").manifest == data.manifest


def test_wordpiece_loses_no_letter_of_long_words_and_many_letters(tmp_path):
    text = "\n".join(["ab" * 51, "x" * 51 + "y", *map(chr, range(0x4E00, 0x4E00 + 1200)), "ภาษาไทย" * 20])
    corpus = corpus_of(tmp_path / "in", {"train": text, "valid": "ab\n", "test": "ภาษา\n"})
    data = run(corpus, tmp_path / "out", tokenizer="wordpiece")
    assert data.manifest["splits"]["train"]["unk_tokens"] == 0
    spelt = "".join(token.removeprefix("##") for token in tokens_of(data, "train"))
    assert spelt == text.replace("\n", "<eos>") + "<eos>"
    corpus = corpus_of(tmp_path / "in")
    with pytest.raises(
        ValueError, match=r"vocab_size must be at least \d+ for wordpiece.* and \d+ inside. Rec"
    ):
        run(corpus, tmp_path / "small", tokenizer="wordpiece", vocab_size=9)


@pytest.mark.parametrize("name", ["tiny-austen", "tiny-tang300"])
def test_wordpiece_of_whole_books_has_no_unk(tmp_path, name):
    folder = ROOT / "data" / name if name == "tiny-austen" else CORPORA / name
    if not folder.is_dir():
        pytest.skip(f"the corpus {name} is not at {folder}")
    texts = {split: (folder / f"{split}.txt").read_text(encoding="utf-8") for split in ("valid", "test")}
    texts["valid"] = texts["valid"].replace(" ", "") if name == "tiny-tang300" else texts["valid"]
    corpus = corpus_of(tmp_path / "in", {"train": texts["valid"], **texts})
    data = run(corpus, tmp_path / "out", tokenizer="wordpiece", vocab_size=6000)
    assert data.manifest["splits"]["train"]["unk_tokens"] == 0


def test_same_text_and_options_give_the_same_bytes(tmp_path):
    run(corpus_of(tmp_path / "in"), tmp_path / "1")
    run(corpus_of(tmp_path / "elsewhere"), tmp_path / "2")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize(("compress", "suffix"), [(gzip.compress, ".txt.gz"), (lzma.compress, ".txt.xz")])
def test_compressed_equals_plain(tmp_path, compress, suffix):
    plain = run(corpus_of(tmp_path / "in"), tmp_path / "1")
    compressed = run(corpus_of(tmp_path / "in", compress=compress, suffix=suffix), tmp_path / "2")
    assert plain.fingerprint == compressed.fingerprint
    assert compressed.manifest["inputs"]["train"][0]["file"] == f"train{suffix}"


@pytest.mark.parametrize("tokenizer", ["whitespace", "words", "characters", "wordpiece"])
def test_blocks_do_not_show_in_the_result(tmp_path, monkeypatch, tokenizer):
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice([*"abcdefg", "né"], rng.integers(0, 200))) for _ in range(30)]
    corpus = corpus_of(tmp_path / "in", dict.fromkeys(("train", "valid", "test"), "\n".join(lines)))
    whole = run(corpus, tmp_path / "1", tokenizer=tokenizer)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 37)
    cut = run(corpus, tmp_path / "2", tokenizer=tokenizer)
    assert whole.fingerprint == cut.fingerprint
    assert whole.manifest == cut.manifest


def test_many_files_are_one_text(tmp_path):
    names = []
    for number, text in enumerate(["x y\n", "y\nz", "x"]):
        (tmp_path / f"{number}.txt").write_text(text)
        names.append(str(tmp_path / f"{number}.txt"))
    (tmp_path / "v").write_text("x\n")
    (tmp_path / "t").write_text("x\n")
    corpus = Corpus({"train": names, "valid": [str(tmp_path / "v")], "test": [str(tmp_path / "t")]})
    assert tokens_of(run(corpus, tmp_path / "out"), "train") == [
        "x",
        "y",
        "<eos>",
        "y",
        "<eos>",
        "z",
        "<eos>",
        "x",
        "<eos>",
    ]


def test_line_block_split_by_hand():
    rule = LineBlockSplit(valid_fraction=0.25, test_fraction=0.25)
    # Behind, in quarters of a block: (2,1,1) train; (0,2,2) valid; (2,-1,3) test; (4,0,0) train; and again.
    assert list(itertools.islice(rule.split_of_blocks(), 8)) == ["train", "valid", "test", "train"] * 2
    for valid, test in [(0.05, 0.05), (0.1, 0.01), (0.3, 0.6), (1 / 3, 1 / 3)]:
        splits = list(
            itertools.islice(LineBlockSplit(valid_fraction=valid, test_fraction=test).split_of_blocks(), 1000)
        )
        for count in (100, 500, 1000):
            assert abs(splits[:count].count("valid") - valid * count) <= 1
            assert abs(splits[:count].count("test") - test * count) <= 1


@pytest.mark.parametrize("block_bytes", [16, 1 << 20])
def test_one_input_is_dealt_by_blocks_of_lines(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block_bytes)
    for name, numbers in (("1", range(11)), ("2", range(11, 24))):
        (tmp_path / name).write_text("".join(f"line {i} and more than a block\n" for i in numbers))
    rule = LineBlockSplit(valid_fraction=0.25, test_fraction=0.25, block_lines=3)
    corpus = Corpus({"input": [str(tmp_path / "1"), str(tmp_path / "2")]}, rule=rule)
    data = run(corpus, tmp_path / "out")
    expected = {"train": [0, 1, 2, 9, 10, 11, 12, 13, 14, 21, 22, 23], "valid": [3, 4, 5, 15, 16, 17]}
    expected["test"] = [6, 7, 8, 18, 19, 20]
    for split, lines in expected.items():
        words = tokens_of(data, split)
        assert len(words) == 8 * len(lines)
        known = [str(i) if i in expected["train"] else "<unk>" for i in lines]
        assert words[1::8] == known
        assert data.manifest["splits"][split]["lines"] == len(lines)


def test_too_few_lines_for_a_split(tmp_path):
    (tmp_path / "in").write_text("a\n" * 250)
    corpus = Corpus({"input": [str(tmp_path / "in")]}, rule=LineBlockSplit())
    with pytest.raises(ValueError, match=r"none of 250 lines for valid, .*Use a smaller block_lines"):
        run(corpus, tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_existing_output(tmp_path):
    corpus, output = corpus_of(tmp_path / "in"), tmp_path / "out"
    tokenizer = make_tokenizer("whitespace", options={})
    output.mkdir()  # An empty directory may be filled.
    first = run(corpus, output)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    again, made = prepare(corpus, output=output, tokenizer=tokenizer)
    assert not made
    assert again.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before

    with pytest.raises(ValueError, match=r"holds other data: min_count is 1, wanted 2. Pass --overwrite"):
        prepare(corpus, output=output, tokenizer=tokenizer, min_count=2)
    other = corpus_of(tmp_path / "in2", TEXTS | {"valid": "the\n"})
    with pytest.raises(ValueError, match=r"holds other data: other input files"):
        prepare(other, output=output, tokenizer=tokenizer)
    (output / "test.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is not whole: .*test.bin: must have 8 bytes.*Pass --overwrite"):
        prepare(corpus, output=output, tokenizer=tokenizer)
    assert run(corpus, output, overwrite=True, min_count=2).vocab_size == 3

    (output / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"holds other files"):
        prepare(corpus, output=output, tokenizer=tokenizer, overwrite=True)
    assert (output / "mine.txt").read_text() == "keep me"
    assert {path.name for path in tmp_path.iterdir()} == {"in", "in2", "out"}


def test_a_directory_half_replaced_is_prepared_again(tmp_path):
    """As a process leaves it that is killed while it moves the files: no manifest, and the folder."""
    corpus, output = corpus_of(tmp_path / "in"), tmp_path / "out"
    data = run(corpus, output)
    hidden = output / ".lmscale-partial-0123abcd"
    hidden.mkdir()
    (output / "manifest.json").rename(hidden / "manifest.json")
    moving = {path.name: [path.stat().st_ino] for path in output.iterdir() if path != hidden}
    (hidden / "moving.json").write_text(json.dumps(moving))
    assert run(corpus, output).fingerprint == data.fingerprint
    assert sorted(contents(output)) == ["manifest.json", "test.bin", "train.bin", "valid.bin", "vocab.txt"]
    hidden.mkdir()  # Killed before: the old data are whole.
    _, made = prepare(corpus, output=output, tokenizer=make_tokenizer("whitespace", options={}))
    assert not made
    assert not hidden.exists()


def test_failure_keeps_the_existing_output_and_leaves_nothing(tmp_path):
    corpus, output = corpus_of(tmp_path / "in"), tmp_path / "out"
    run(corpus, output)
    before = contents(output)
    (tmp_path / "in" / "test.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(ValueError, match=r"test.txt, line 2: must be UTF-8"):
        run(corpus, output, overwrite=True)
    assert contents(output) == before
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_text_that_changes_while_it_is_read_is_refused(tmp_path):
    corpus = corpus_of(tmp_path / "in")

    def change(phase, done, total):
        if phase == "writing":
            return
        if phase == "counting" and done == total:
            (tmp_path / "in" / "train.txt").write_text("the dog\n")

    with pytest.raises(ValueError, match="must not change while it is read"):
        run(corpus, tmp_path / "out", report=change)
    assert not (tmp_path / "out").exists()


def test_a_file_in_two_splits_is_refused(tmp_path):
    (tmp_path / "a").write_text("x\n")
    (tmp_path / "b").write_text("x\n")
    names = {"train": [f"{tmp_path}/*"], "valid": [str(tmp_path / "b")], "test": [str(tmp_path / "b")]}
    with pytest.raises(ValueError, match=r"one split only. Received: '.*b' in train and valid"):
        Corpus(names)


def test_report_adds_up(tmp_path):
    corpus = corpus_of(tmp_path / "in")
    last = {}
    run(corpus, tmp_path / "out", report=lambda phase, done, total: last.update({phase: (done, total)}))
    assert set(last) == {"checking", "counting", "writing"}
    assert all(done == total > 0 for done, total in last.values())


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1 << 14)
    peaks = []
    for copies in (2_000, 16_000):
        texts = {"train": "some words of a line again\n" * copies, "valid": "x\n", "test": "x\n"}
        corpus = corpus_of(tmp_path / f"in{copies}", texts)
        del texts
        tracemalloc.start()
        run(corpus, tmp_path / f"out{copies}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize(
    ("place", "doing"),
    [
        ("lmscale.data.preparation._count", "counting the tokens of the training text"),
        ("lmscale.data.preparation.build_vocabulary", "sorting the vocabulary, of 6 types"),
        ("lmscale.data.preparation._write_splits", "writing the ids of the splits"),
        ("lmscale.data.vocab.Vocabulary.to_text", "writing the vocabulary, of 6 rows"),
        ("lmscale.data.preparation.PreparedData.open", "reading what was written"),
    ],
)
def test_lack_of_memory_says_what_was_being_done(tmp_path, monkeypatch, place, doing):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(place, fail)
    with pytest.raises(MemoryError) as error:
        run(corpus_of(tmp_path / "in"), tmp_path / "out")
    assert what_was_done(error.value) == doing


def corpus_named(name, suffix):
    folder = CORPORA / name
    if not folder.is_dir():
        pytest.skip(f"the corpus {name} is not at {folder}")
    return Corpus({split: [str(folder / f"{split}{suffix}")] for split in ("train", "valid", "test")})


def test_wikitext_2_has_its_published_counts(tmp_path):
    data = run(corpus_named("wikitext-2", ".txt"), tmp_path / "out")
    assert data.vocab_size == 33_278
    assert [len(data.split(split)) for split in ("train", "valid", "test")] == [2_088_628, 217_646, 245_569]
    np.testing.assert_array_equal(data.counts, np.bincount(data.split("train"), minlength=33_278))


def test_a_large_natural_vocabulary_from_xz(tmp_path):
    """ELTeC-hun: its 472,706 types, <eos>, and <unk>, which only the other splits need."""
    data = run(corpus_named("eltec-hun", ".txt.xz"), tmp_path / "out")
    assert data.vocab_size == 472_708
    assert data.manifest["vocabulary"]["types_in_train_text"] == 472_706
    splits = data.manifest["splits"]
    without_eos = {name: entry["tokens"] - entry["lines"] for name, entry in splits.items()}
    assert without_eos == {"train": 7_370_122, "valid": 545_136, "test": 454_428}
    assert splits["train"]["unk_tokens"] == data.counts[data.unk_id] == 0
    assert round(100 * splits["valid"]["unk_tokens"] / without_eos["valid"], 2) == 6.44
    assert data.split("valid").dtype == np.dtype("<i4")


def test_the_book_that_ships(tmp_path):
    folder = ROOT / "data" / "tiny-austen"
    data = run(Corpus({s: [str(folder / f"{s}.txt")] for s in ("train", "valid", "test")}), tmp_path / "out")
    assert data.vocab_size == 6_396
    assert [len(data.split(split)) for split in ("train", "valid", "test")] == [121_918, 14_496, 9_975]
    for split in ("train", "valid", "test"):  # A plain reading of the same file.
        lines = (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        known = set(data.vocabulary.tokens)
        plain = [word if word in known else "<unk>" for line in lines for word in [*line.split(), "<eos>"]]
        assert tokens_of(data, split) == plain
