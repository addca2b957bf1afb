import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from array_parameters import array_parameters
from warm_start_peak_memory import table_parameters

from lmscale import configuration
from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.vocab import EOS, UNK, Vocabulary
from lmscale.parameters import warm_start
from lmscale.parameters.update_rules import Adam
from lmscale.parameters.warm_start import WarmStart
from lmscale.parameters.warm_start_report import Loaded, Skipped
from lmscale.tables.table import ShardedTable

OLD_ROWS, NEW_ROWS, DIM, STEP = 103, 151, 5, 70
BLOCK_MIB = 5e-4  # 26 rows of the table.


def make_vocabulary(*, num_words, first, seed):
    """`num_words` tokens in an order of their own: <unk>, <eos>, and the words from number `first` on."""
    words = [UNK, EOS, *(f"word_{first + i}" for i in range(num_words - 2))]
    np.random.default_rng(seed).shuffle(words)
    return Vocabulary(tokens=tuple(words), counts=np.arange(num_words, 0, -1))


OLD = make_vocabulary(num_words=OLD_ROWS, first=0, seed=1)
NEW = make_vocabulary(num_words=NEW_ROWS, first=40, seed=2)


def sha256(vocabulary):
    return hashlib.sha256(vocabulary.to_text().encode()).hexdigest()


def model_arrays(num_rows, seed, **more):
    """A language model with the slots of Adam without first moment, random."""
    rng = np.random.default_rng(seed)
    parameters = {
        "tables/words/embedding": [num_rows, DIM],
        "tables/words/bias": [num_rows],
        "layers/lstm_0/kernel": [DIM, 12],
        "layers/lstm_0/bias": [12],
        **more,
    }
    arrays = {path: rng.normal(size=shape).astype(np.float32) for path, shape in parameters.items()}
    for path, shape in parameters.items():
        rows = shape[0] if path.startswith("tables/") else 1
        shape = shape if path.startswith("tables/") else [1, *shape]
        arrays[f"slots/{path}/second_moment"] = rng.uniform(size=shape).astype(np.float32)
        arrays[f"slots/{path}/last_step"] = rng.integers(0, STEP + 1, rows).astype(np.float32)
    arrays["state/0"] = rng.normal(size=[4, 3]).astype(np.float32)
    return arrays


def save_run(workdir, arrays, *, vocabulary=OLD, told=True, copied=True, **metadata):
    """A working directory; `told` and `copied`: the checkpoint names its vocabulary, the directory holds it."""
    if told:
        metadata["vocabularies"] = {"words": sha256(vocabulary)}
    Checkpoints(workdir / "checkpoints", block_mib=BLOCK_MIB).save(
        STEP, array_parameters(arrays), metadata=metadata
    )
    if copied:
        (workdir / "vocab.txt").write_text(vocabulary.to_text())
    return str(workdir)


def copies(arrays):
    return {path: array.copy() for path, array in arrays.items()}


def by_table(arrays, words):
    tables = {path.split("/")[1] for path in arrays if path.startswith("tables/")}
    return {} if words is None else dict.fromkeys(tables, words)


def apply(arrays, *, words=OLD, **settings):
    """What arrays become, and the report."""
    after = copies(arrays)
    report = WarmStart(**settings).apply(array_parameters(after), vocabularies=by_table(after, words))
    return after, report


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        assert actual[path].dtype == array.dtype, path
        np.testing.assert_array_equal(actual[path], array, err_msg=path)


def by_word(old, new, path, *, mean=False):
    """What the tensor of a table becomes, word by word."""
    expected = new[path].copy()
    kept = []
    for new_id, word in enumerate(NEW.tokens):
        if word in OLD.tokens:
            kept.append(old[path][OLD.tokens.index(word)])
            expected[new_id] = kept[-1]
    if mean:
        average = np.mean(np.array(kept, np.float64), axis=0)
        for new_id, word in enumerate(NEW.tokens):
            if word not in OLD.tokens:
                expected[new_id] = average
    return expected


@pytest.mark.parametrize("slots", [False, True])
def test_everything_is_loaded_by_default(tmp_path, slots):
    old, new = model_arrays(OLD_ROWS, 1), model_arrays(OLD_ROWS, 2)
    after, report = apply(new, checkpoint=save_run(tmp_path, old), slots=slots)
    expected = {
        path: new[path] if path.startswith("state/") or (path.startswith("slots/") and not slots) else array
        for path, array in old.items()
    }
    assert_equal(after, expected)
    assert report.step == STEP
    assert report.loaded[0] == Loaded(
        path="tables/words/embedding", from_path="tables/words/embedding", rows_kept=OLD_ROWS
    )
    assert len(report.loaded) == (12 if slots else 4)
    assert Skipped(from_path="state/0", reason="state of the old run") in report.skipped
    assert len(report.skipped) == (1 if slots else 9)
    assert set(report.fresh) == {path for path in new if path not in {entry.path for entry in report.loaded}}


def test_rows_of_items(tmp_path):
    """A catalogue has neither `<unk>` nor `<eos>`."""
    items = [Vocabulary(tokens=tuple(order), counts=np.arange(5, 0, -1)) for order in ("abcde", "fdabg")]
    rows = np.arange(10, dtype=np.float32).reshape(5, 2)
    checkpoint = save_run(tmp_path, {"tables/words/embedding": rows}, vocabulary=items[0])
    new = {"tables/words/embedding": -np.ones([5, 2], np.float32)}
    after, _ = apply(new, words=items[1], checkpoint=checkpoint, rows_by_word=True)
    expected = [[-1, -1], rows[3], rows[0], rows[1], [-1, -1]]
    np.testing.assert_array_equal(after["tables/words/embedding"], expected)


@pytest.mark.parametrize("num_devices", [0, 1, 2, 3])
@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("new_rows", ["initializer", "mean"])
def test_rows_go_where_their_words_are(tmp_path, mirrored, num_devices, slots, new_rows):
    """Into arrays (0 devices) and into tables; kept rows keep every bit."""
    old, new = model_arrays(OLD_ROWS, 1), model_arrays(NEW_ROWS, 2)
    after, parameters = copies(new), array_parameters(new)
    if num_devices:
        strategy = mirrored(num_devices)
        with strategy.scope():
            rule = Adam(learning_rate=0.1, beta_1=0.0)
            table = ShardedTable(vocab_size=NEW_ROWS, embed_dim=DIM, update_rule=rule)
        for parameter in (sharded := table_parameters(table)):
            parameter.write(0, new[parameter.path])
        parameters = sharded + [p for p in array_parameters(after) if "tables/" not in p.path]
    else:
        parameters = array_parameters(after)
    warm_start = WarmStart(
        checkpoint=save_run(tmp_path, old), rows_by_word=True, slots=slots, new_rows=new_rows
    )
    report = warm_start.apply(parameters, vocabularies={"words": NEW})
    if num_devices:
        after |= {parameter.path: parameter.read(0, NEW_ROWS) for parameter in sharded}
    expected = {}
    for path in new:
        if path.startswith("state/") or (path.startswith("slots/") and not slots):
            expected[path] = new[path]
        elif "tables/" in path:
            mean = new_rows == "mean" and not path.startswith("slots/")
            expected[path] = by_word(old, new, path, mean=mean)
        else:
            expected[path] = old[path]
    is_new = np.array([word not in OLD.tokens for word in NEW.tokens])
    for path, array in expected.items():
        if "tables/" in path:
            np.testing.assert_array_equal(after[path][~is_new], array[~is_new], err_msg=path)
            np.testing.assert_allclose(after[path][is_new], array[is_new], rtol=1e-6, err_msg=path)
        else:
            np.testing.assert_array_equal(after[path], array, err_msg=path)
    (embedding,) = (entry for entry in report.loaded if entry.path == "tables/words/embedding")
    assert (embedding.rows_kept, embedding.new_rows, embedding.removed_rows) == (63, 88, 40)
    removed = [word for word in OLD.tokens if word not in NEW.tokens]
    assert list(report.removed_words) == removed[:10]
    assert f"removed words: '{removed[0]}', " in report.text()
    assert " and 30 more\n" in report.text()


@pytest.mark.parametrize("sum_bytes", [1, 200, 2**24])
def test_new_rows_of_the_pieces_that_spell_the_word(tmp_path, monkeypatch, sum_bytes):
    """In one pass over the old rows, in one a word, and in some between."""
    monkeypatch.setattr(warm_start, "_SUM_BYTES", sum_bytes)
    words = [word for word in OLD.tokens if word not in (UNK, EOS)]
    tokens = (UNK, EOS, "word_", *"0123456789", *words)[:OLD_ROWS]
    old_words = Vocabulary(tokens=tokens, counts=np.arange(OLD_ROWS, 0, -1))
    new_words = Vocabulary(tokens=(*NEW.tokens[: NEW_ROWS - 1], "odd_one"), counts=np.arange(NEW_ROWS, 0, -1))
    old, new = model_arrays(OLD_ROWS, 1), model_arrays(NEW_ROWS, 2)
    checkpoint = save_run(tmp_path, old, vocabulary=old_words)
    after, _ = apply(new, words=new_words, checkpoint=checkpoint, rows_by_word=True, new_rows="pieces")
    row_of = {word: i for i, word in enumerate(old_words.tokens)}
    kept = [row_of[word] for word in new_words.tokens if word in row_of]
    num_spelled = 0
    for path in ("tables/words/embedding", "tables/words/bias"):
        for word, row in zip(new_words.tokens, after[path], strict=True):
            if word in row_of:
                np.testing.assert_array_equal(row, old[path][row_of[word]])
                continue
            # No old word goes on as the new ones do: `word_1` is old, `word_100` is `word_1`, `0`, `0`.
            prefix = max((w for w in row_of if word.startswith(w)), key=len, default=None)
            rows = kept if prefix is None else [row_of[prefix], *(row_of[d] for d in word[len(prefix) :])]
            num_spelled += prefix is not None
            np.testing.assert_allclose(row, np.mean(old[path][rows].astype(np.float64), axis=0), rtol=1e-6)
    assert num_spelled > 2 * 80


def test_the_same_vocabulary_needs_no_words(tmp_path):
    """Rows by word from a checkpoint that tells the new run's vocabulary: nothing to look up, nothing to miss."""
    old, new = model_arrays(OLD_ROWS, 1), model_arrays(OLD_ROWS, 2)
    checkpoint = save_run(tmp_path, old, copied=False)
    after, report = apply(new, checkpoint=checkpoint, rows_by_word=True)
    np.testing.assert_array_equal(after["tables/words/embedding"], old["tables/words/embedding"])
    assert {entry.new_rows for entry in report.loaded} == {0}


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("metadata", [{}, {"updates": {"layers/lstm_0/kernel": 2}}])
def test_what_the_clocks_had_counted(tmp_path, metadata, slots):
    """Of parameters whose slots are loaded, by their new paths; the steps of a checkpoint that does not tell."""
    old, new = model_arrays(OLD_ROWS, 1), model_arrays(OLD_ROWS, 2)
    for array_path in [path for path in new if "lstm_0" in path]:
        new[array_path.replace("lstm_0", "encoder")] = new.pop(array_path)
    _, report = apply(
        new,
        checkpoint=save_run(tmp_path, old, **metadata),
        slots=slots,
        rename=[("layers/lstm_0/(kernel)", r"layers/encoder/\1"), (".*/words/bias", r"\g<0>")],
    )
    kernel = metadata["updates"]["layers/lstm_0/kernel"] if metadata else STEP
    assert report.updates == ({"layers/encoder/kernel": kernel, "tables/words/bias": STEP} if slots else {})


def test_the_first_pattern_that_matches_decides(tmp_path):
    old = model_arrays(
        OLD_ROWS, 1, **{"layers/lstm_1/kernel": [DIM, 12], "layers/projection/kernel": [3, DIM]}
    )
    new = model_arrays(
        OLD_ROWS, 2, **{"layers/encoder/lstm_0/kernel": [DIM, 12], "layers/encoder/lstm_1/kernel": [DIM, 12]}
    )
    after, report = apply(
        new,
        checkpoint=save_run(tmp_path, old),
        slots=True,
        rename=[
            (r"layers/lstm_0/bias", None),
            (r"layers/(lstm_\d)/(.*)", r"layers/encoder/\1/\2"),
            (r"tables/words/bias", r"\g<0>"),
            (r"tables/.*", None),
        ],
    )
    expected = copies(new)
    for path, from_path in {
        "layers/encoder/lstm_0/kernel": "layers/lstm_0/kernel",
        "layers/encoder/lstm_1/kernel": "layers/lstm_1/kernel",
        "tables/words/bias": "tables/words/bias",
    }.items():
        expected[path] = old[from_path]
        for slot in ("second_moment", "last_step"):
            expected[f"slots/{path}/{slot}"] = old[f"slots/{from_path}/{slot}"]
    assert_equal(after, expected)
    reasons = {entry.from_path: entry.reason for entry in report.skipped}
    assert reasons["layers/lstm_0/bias"] == "rename says None for 'layers/lstm_0/bias'"
    assert reasons["tables/words/embedding"] == "rename says None for 'tables/.*'"
    assert reasons["layers/projection/kernel"] == "no pattern of rename matches it"
    assert reasons["slots/layers/projection/kernel/last_step"] == "its parameter is not loaded"
    assert "layers/lstm_0/kernel" in report.fresh


def test_one_table_to_another_name(tmp_path):
    old = model_arrays(OLD_ROWS, 1)
    new = {path.replace("words", "outputs"): array for path, array in model_arrays(NEW_ROWS, 2).items()}
    after, _ = apply(
        new,
        words=NEW,
        checkpoint=save_run(tmp_path, old),
        rows_by_word=True,
        rename=[("tables/words/(.*)", r"tables/outputs/\1")],
    )
    expected = by_word(
        old, {"tables/words/embedding": new["tables/outputs/embedding"]}, "tables/words/embedding"
    )
    np.testing.assert_array_equal(after["tables/outputs/embedding"], expected)


def test_slots_that_do_not_fit_are_left_with_their_reason(tmp_path):
    old, new = model_arrays(OLD_ROWS, 1), model_arrays(OLD_ROWS, 2)
    second, last = (f"slots/layers/lstm_0/kernel/{slot}" for slot in ("second_moment", "last_step"))
    new[second] = np.ones([1], np.float32)
    del new[last]
    after, report = apply(new, checkpoint=save_run(tmp_path, old), slots=True)
    np.testing.assert_array_equal(after[second], [1])
    reasons = {entry.from_path: entry.reason for entry in report.skipped}
    assert reasons[second] == "float32 (1, 5, 12), in the new run float32 (1,)"
    assert reasons[last] == f"the new run has no {last}"
    assert second in report.fresh


def test_from_a_checkpoint_of_format_1():
    folder = Path(__file__).parents[1] / "runs" / "format_1"
    kernel = np.zeros([7, 28], np.float32)
    report = WarmStart(
        checkpoint=str(folder), rename=[("layers/lstm_1/kernel", r"\g<0>"), ("layers/projection/.*", None)]
    ).apply(array_parameters({"layers/lstm_1/kernel": kernel}))
    assert kernel.any()
    assert [entry.path for entry in report.loaded] == ["layers/lstm_1/kernel"]


def refused(match, arrays, *, words=OLD, **settings):
    """Checks the error, and that nothing is written."""
    after = copies(arrays)
    with pytest.raises(ValueError, match=match) as error:
        WarmStart(**settings).apply(array_parameters(after), vocabularies=by_table(after, words))
    assert_equal(after, arrays)
    return str(error.value)


def test_patterns_that_decide_nothing_are_refused(tmp_path):
    checkpoint, new = save_run(tmp_path, model_arrays(OLD_ROWS, 1)), model_arrays(OLD_ROWS, 2)
    refused(
        r"'layer/lstm_0/kernel', which matches none\. Near misses: layers/lstm_0/kernel",
        new,
        checkpoint=checkpoint,
        rename=[("layer/lstm_0/kernel", None), (".*", r"\g<0>")],
    )
    refused(
        r"'slots/\.\*', which matches none\. There are: .*layers/lstm_0/bias\.",
        new,
        checkpoint=checkpoint,
        rename=[("slots/.*", None)],
    )
    refused(
        r"'layers/\.\*', all of whose matches, layers/lstm_0/kernel, layers/lstm_0/bias, an earlier pattern takes",
        new,
        checkpoint=checkpoint,
        rename=[(".*", r"\g<0>"), ("layers/.*", None)],
    )


@pytest.mark.parametrize("rename", [[], [(".*", None)]])
def test_patterns_that_load_nothing_are_refused(tmp_path, rename):
    checkpoint, new = save_run(tmp_path, model_arrays(OLD_ROWS, 1)), model_arrays(OLD_ROWS, 2)
    refused(
        r"loads none of tables/words/embedding.* or set Experiment\.warm_start = None",
        new,
        checkpoint=checkpoint,
        rename=rename,
    )


def test_what_a_run_carries_is_no_target(tmp_path):
    refused(
        r"layers/lstm_0/bias, renamed to state/0, is no parameter of the new run\..*layers/lstm_0/kernel",
        model_arrays(OLD_ROWS, 2),
        checkpoint=save_run(tmp_path, model_arrays(OLD_ROWS, 1, **{"layers/lstm_0/bias": [4, 3]})),
        rename=[("layers/lstm_0/bias", "state/0")],
    )


def test_what_does_not_fit_is_named_all_at_once(tmp_path):
    old = model_arrays(
        OLD_ROWS, 1, **{"layers/lstm_1/kernel": [DIM, 12], "layers/projection/kernel": [3, DIM]}
    )
    new = model_arrays(NEW_ROWS, 2, **{"layers/lstm_1/kernel": [DIM, 16]})
    new["layers/lstm_0/bias"] = new["layers/lstm_0/bias"].astype(np.float64)
    message = refused(
        r"layers/lstm_1/kernel must have one shape\. Received: float32 \(5, 12\) in the checkpoint, "
        r"float32 \(5, 16\) in the new run\. Rename it to None",
        new,
        words=None,
        checkpoint=save_run(tmp_path, old),
    )
    assert re.search(r"tables/words/embedding must have one shape.*, or set rows_by_word = True", message)
    assert re.search(r"layers/projection/kernel is no parameter of the new run\. Near misses: ", message)
    assert re.search(r"lstm_0/bias must have one dtype.*float32 \(12,\) in the .*float64 \(12,\)", message)


def test_words_are_not_advised_where_rows_are_of_another_width(tmp_path):
    new = model_arrays(NEW_ROWS, 2)
    new["tables/words/embedding"] = np.zeros([NEW_ROWS, DIM + 2], np.float32)
    message = refused(
        "must have one shape", new, words=None, checkpoint=save_run(tmp_path, model_arrays(OLD_ROWS, 1))
    )
    of_rows = next(line for line in message.splitlines() if "tables/words/embedding" in line)
    assert of_rows.endswith("Rename it to None to leave it out.")


def test_two_paths_of_one_new_name_are_refused(tmp_path):
    old = model_arrays(OLD_ROWS, 1, **{"layers/lstm_1/kernel": [DIM, 12]})
    refused(
        r"layers/lstm_1/kernel, renamed to layers/lstm_0/kernel, and layers/lstm_0/kernel cannot both",
        model_arrays(OLD_ROWS, 2),
        checkpoint=save_run(tmp_path, old),
        rename=[(r"layers/lstm_\d/kernel", "layers/lstm_0/kernel")],
    )


def test_another_vocabulary_of_as_many_words_is_refused(tmp_path):
    old, new = model_arrays(OLD_ROWS, 1), model_arrays(OLD_ROWS, 2)
    other = make_vocabulary(num_words=OLD_ROWS, first=0, seed=9)
    refused(
        r"words/embedding must have rows of the same words: the vocabularies differ\..*Set rows_by_word = True",
        new,
        words=other,
        checkpoint=save_run(tmp_path / "told", old),
    )
    # Of a run that does not tell, or one that is not known, the sizes are all there is to compare.
    for vocabulary, told in ((other, False), (None, True)):
        checkpoint = save_run(tmp_path / f"{told}", old, told=told)
        after, _ = apply(new, words=vocabulary, checkpoint=checkpoint)
        np.testing.assert_array_equal(after["tables/words/bias"], old["tables/words/bias"])


def test_the_words_of_the_old_run_must_be_known_and_its_own(tmp_path):
    old, new = model_arrays(OLD_ROWS, 1), model_arrays(NEW_ROWS, 2)
    settings = {"checkpoint": save_run(tmp_path / "run", old, copied=False), "rows_by_word": True}
    refused(r"run/vocab\.txt, which cannot be read.*Set WarmStart\.vocabulary", new, words=NEW, **settings)
    path = tmp_path / "given.txt"
    path.write_text(OLD.to_text())
    after, _ = apply(new, words=NEW, vocabulary=str(path), **settings)
    expected = by_word(old, new, "tables/words/embedding")
    np.testing.assert_array_equal(after["tables/words/embedding"], expected)
    for wrong in (NEW, make_vocabulary(num_words=OLD_ROWS, first=0, seed=9)):
        path.write_text(wrong.to_text())
        refused(
            rf"that of tables/words/embedding in .*, 103 rows, SHA-256 {sha256(OLD)[:12]}\. Received: .*given\.txt, "
            rf"{len(wrong)} words, SHA-256 {sha256(wrong)[:12]}",
            new,
            words=NEW,
            vocabulary=str(path),
            **settings,
        )
    path.write_text("cut off")
    refused(
        r"given\.txt must be the vocab\.txt of the old run: .*cut off\. Set WarmStart",
        new,
        words=NEW,
        vocabulary=str(path),
        **settings,
    )


def test_the_words_of_the_new_run_must_be_known(tmp_path):
    checkpoint, new = save_run(tmp_path, model_arrays(OLD_ROWS, 1)), model_arrays(NEW_ROWS, 2)
    settings = {"checkpoint": checkpoint, "rows_by_word": True}
    refused(r"each of the 151 rows of the new run\. Received: no vocabulary", new, words=None, **settings)
    more = make_vocabulary(num_words=NEW_ROWS + 1, first=0, seed=1)
    refused(r"each of the 151 rows .* Received: a vocabulary of 152 words", new, words=more, **settings)
    wide = new | {"tables/words/embedding": np.zeros([NEW_ROWS, DIM + 1], np.float32)}
    refused(r"rows of one shape\. Received: float32 \(103, 5\) .*\(151, 6\)", wide, words=NEW, **settings)


def test_a_missing_or_damaged_checkpoint_is_refused(tmp_path):
    new = model_arrays(OLD_ROWS, 2)
    refused("no such directory", new, checkpoint=str(tmp_path / "absent"))
    checkpoint = save_run(tmp_path / "run", model_arrays(OLD_ROWS, 1))
    refused("with a validation loss", new, checkpoint=checkpoint, best=True)
    data = max(Path(checkpoint).rglob("*.data-*"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    refused("step_00000070 is damaged: the checksum of tensors.data", new, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rename": ["layers/.*"]}, r"pairs of a pattern and a replacement.*Received: 'layers/\.\*'"),
        ({"rename": [("layers/.*", 3)]}, r"pairs .*Received: \('layers/\.\*', 3\)"),
        ({"rename": [("layers/(.*", None)]}, r"regular expressions.*Received: \('layers/\(\.\*', None\)"),
        ({"rename": [("layers/.*", r"x/\1")]}, "regular expressions.*invalid group reference"),
        ({"rename": [("layers/.*", r"x/\g<name>")]}, "regular expressions.*unknown group name"),
        ({"new_rows": "zeros", "rows_by_word": True}, "new_rows='zeros'"),
        ({"new_rows": "mean"}, "rows_by_word=False"),
        ({"vocabulary": "vocab.txt"}, "rows_by_word=False"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        WarmStart(checkpoint="run", **settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root:
    """What a configuration builds."""

    warm_start: WarmStart


def test_from_a_configuration(tmp_path):
    path = tmp_path / "warm.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\n"
        "import test_warm_start\n"
        "from lmscale.parameters import warm_start\n"
        "test_warm_start.Root.warm_start = @warm_start.WarmStart()\n"
        "warm_start.WarmStart.checkpoint = 'runs/old'\n"
        "warm_start.WarmStart.rename = [('layers/(.*)', 'body/\\\\1'), ('.*', None)]\n"
        "warm_start.WarmStart.rows_by_word = True\n"
        "warm_start.WarmStart.new_rows = 'mean'\n"
    )
    assert configuration.load([str(path)], root=Root).experiment.warm_start == WarmStart(
        checkpoint="runs/old",
        rename=[("layers/(.*)", r"body/\1"), (".*", None)],
        rows_by_word=True,
        new_rows="mean",
    )
    with pytest.raises(ValueError, match="new_rows must be of type"):
        configuration.load([str(path)], ["warm_start.WarmStart.new_rows = 'zeros'"], root=Root)


def test_the_report_is_aligned_and_a_block_to_markdown(tmp_path):
    old = model_arrays(OLD_ROWS, 1)
    _, report = apply(
        model_arrays(NEW_ROWS, 2), words=NEW, checkpoint=save_run(tmp_path, old), rows_by_word=True
    )
    lines = report.text().splitlines()
    assert all(line.startswith("    ") or not line for line in lines)
    assert f"    warm start from {tmp_path}/checkpoints/step_00000070, step 70" == lines[0]
    assert lines[1] == "    4 loaded, 9 skipped, 9 left as initialised"
    header = next(line for line in lines if line.startswith("    loaded "))
    row = lines[lines.index(header) + 1]
    assert row.split() == ["tables/words/embedding", "tables/words/embedding", "63", "88", "40"]
    assert header.index("from") == row.index("tables", 10)
    assert len(row) == len(header)
    assert re.search(r"(?m)^    states and seeds: 1 +state of the old run$", report.text())
    assert re.search(r"(?m)^    optimizer slots: 8 +slots = False$", report.text())
    assert lines[-3:] == ["    left as initialised", "    optimizer slots: 8", "    states and seeds: 1"]


def test_memory_is_bounded_by_blocks(tmp_path):
    """250,013 rows of 200 to 300,007, and their slots, on 3 devices: each old matrix is 191 MiB."""
    script = Path(__file__).with_name("warm_start_peak_memory.py")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    completed = subprocess.run(
        [sys.executable, str(script), "250013", "300007", "200", "3", "slots", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    measured = json.loads(completed.stdout)
    assert measured["worst_error"] == 0
    assert measured["rows"] == [225012, 74995, 25001]
    assert measured["peak_above_start_mib"] < 160
