"""README.md and the pages under docs/: commands, paths, links and tables agree with the code; the examples run."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lmscale import configuration

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [block for text in PAGES.values() for block in FENCED.findall(text)]
PROSE = {page: FENCED.sub("", text) for page, text in PAGES.items()}
TABLE = re.compile(r"^\|.*\|$", re.MULTILINE)
ALL_TEXT, ALL_PROSE = "\n".join(PAGES.values()), "\n".join(PROSE.values())
# Each command, and the page that has the table of its flags; or sections of a page.
COMMANDS = {
    "prepare": "docs/prepare.md",
    "train": "docs/train.md",
    "evaluate": "docs/evaluate.md",
    "bench": "docs/measure.md",
    "plot": "docs/tensorboard.md",
    "plan": "docs/plan.md",
    "score": "docs/use.md#score-a-text#flags-of-all-of-them",
    "generate": "docs/use.md#generate-text#flags-of-all-of-them",
    "neighbors": "docs/use.md#find-neighbours#flags-of-all-of-them",
    "recommend": "docs/use.md#recommend-items#flags-of-all-of-them",
    "export": "docs/serving.md",
    "word_vectors": "docs/word2vec.md",
    "benchmarks.planted_classes": "docs/classification.md#more-or-fewer-of-them",
    "benchmarks.planted_histories": "docs/recommendation.md#more-or-fewer-of-them",
}


def defined_flags(command):
    source = (ROOT / "lmscale" / f"{command.replace('.', '/')}.py").read_text(encoding="utf-8")
    adopted = re.findall(r"adopt_module_key_flags\((\w+)\)", source)
    return set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source)).union(*map(defined_flags, adopted))


def shell_commands():
    """Each `python -m lmscale...` of the pages on one line, from blocks and from the text; `lmscale-train` likewise."""
    texts = [block.replace("\\\n", " ") for _, block in BLOCKS] + re.findall(r"`([^`]+)`", ALL_PROSE)
    lines = [
        re.sub(r"^lmscale-(?=\w+ )", "python -m lmscale.", line)
        for text in texts
        for line in text.splitlines()
    ]
    return [line.strip() for line in lines if "python -m lmscale" in line]


def is_gin(block):
    """Whether a block refers to parts of a configuration."""
    return re.search(r"[=:] @", block) is not None


# --------------------------------------------------------------------------------------------------- The pages


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


def test_readme_leads_to_every_page():
    linked = {link.split("#")[0] for link in links_of(PROSE["README.md"])}
    pages = {page for page in PAGES if page != "README.md"}
    assert len(pages) >= 12
    assert pages <= linked


def test_every_block_is_closed_and_of_a_kind_that_is_checked():
    for page, text in PAGES.items():
        assert len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE)) == 2 * len(FENCED.findall(text)), page
    for language, text in BLOCKS:
        if language:
            assert language == "python", text  # Each is run: see below.
        elif not is_gin(text):  # Each block of gin is run too.
            for line in text.replace("\\\n", " ").splitlines():
                starts = (
                    "launch/",
                    "source .venv/bin/activate",
                    "source .venv-tpu/bin/activate",
                    "python -m lmscale.",
                    "lmscale-",
                )
                starts += "sbatch --", "kubectl apply -f launch/"
                assert line.startswith(starts), line


def test_nothing_is_said_twice():
    sentences = Counter()
    for text in PROSE.values():
        text = re.sub(r"\]\([^)]*\)", "]", text)
        for paragraph in re.split(r"\n\s*\n|^(?=- |\d+\. |\|)", text, flags=re.MULTILINE):
            sentences.update(re.split(r"(?<=[.:?]) ", " ".join(paragraph.split())))
    assert [text for text, number in sentences.items() if number > 1 and len(text) > 50] == []


def links_of(text):
    return [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http:", "https:"))]


def anchors_of(text):
    """What GitHub makes of the headings of a page."""
    anchors, seen = set(), Counter()
    for heading in re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        anchors.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return anchors


@pytest.mark.parametrize("page", [*PAGES, "BUILD_NOTES.md", "CHANGELOG.md"])
def test_links_lead_to_files_and_headings(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in links_of(FENCED.sub("", text)):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        assert target.resolve().is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), link


def test_readme_shows_its_pictures():
    assert {"docs/pull_compute_push.svg", "docs/step_time.png"} <= set(links_of(PROSE["README.md"]))


# ----------------------------------------------------------------------------------------- Commands and paths


def test_commands_use_flags_that_exist():
    commands = shell_commands()
    assert {re.search(r"-m lmscale\.([\w.]+)", command)[1] for command in commands} == set(COMMANDS)
    for command in commands:
        used = set(re.findall(r" --(\w+)", command))
        assert used <= defined_flags(re.search(r"-m lmscale\.([\w.]+)", command)[1]), command


def test_flags_of_the_text_exist():
    shared = [path.stem for path in (ROOT / "lmscale").glob("*_flags.py")]
    known = set().union(*map(defined_flags, [*COMMANDS, *shared])) | {"help", "logdir", "signal"}
    # Of TensorFlow Serving.
    known |= {"rest_api_port", "model_config_file"}
    for script in (ROOT / "launch").glob("*.s*"):
        known |= set(re.findall(r"--(\w+)", script.read_text(encoding="utf-8")))
    mentioned = {
        flag for span in re.findall(r"`([^`\n]*)`", ALL_PROSE) for flag in re.findall(r"--(\w+)", span)
    }
    assert mentioned
    assert mentioned <= known


def prose_of(place):
    """The text of a page, or of the sections that are named behind it."""
    page, *sections = place.split("#")
    parts = {
        name: part
        for part in re.split(r"^(?=## )", PROSE[page], flags=re.MULTILINE)
        for name in anchors_of(part)
    }
    return "\n".join(parts[name] for name in sections) if sections else PROSE[page]


@pytest.mark.parametrize(("command", "place"), COMMANDS.items())
def test_all_flags_are_in_the_table(command, place):
    rows = [line for line in prose_of(place).splitlines() if line.startswith("| `--")]
    assert set(re.findall(r"`--(\w+)`", "\n".join(rows))) >= defined_flags(command)
    assert set(re.findall(r"--(\w+)", "\n".join(row.split(" | ")[0] for row in rows))) <= defined_flags(
        command
    )


def test_paths_exist():
    folders = [path.name for path in ROOT.iterdir() if path.is_dir()]
    words = set(re.findall(r"`([\w./-]+)`", ALL_PROSE))
    words |= {
        word for _, block in BLOCKS for word in re.findall(r"(?:^|[\s=])((?:launch|configs)/[\w./-]+)", block)
    }
    of_a_run = (
        r"(runs|checkpoints|train|eval|eval_test|state|slots|layers|tables)/"
        r"|(config\.gin|(metrics(\.\d+)?|(set_aside_)?metadata|saved|finished|manifest)\.jsonl?)$"
    )
    paths = {
        word
        for word in words
        if (word.split("/")[0] in folders or re.search(r"\.(py|gin|sh|md|json|jsonl)$", word))
        and not re.match(of_a_run, word)
    }
    assert {"lmscale/trainer.py", "configs/shared/lstm.gin", "launch/quickstart.sh"} <= paths
    for path in paths:
        assert (ROOT / path).exists(), path


def test_new_files_of_examples_do_not_exist_yet():
    names = re.findall(r"^# (\S+) \(new\)$", ALL_TEXT, re.MULTILINE)
    assert len(names) == 4
    for name in names:
        assert (ROOT / name).parent.is_dir(), name
        assert not (ROOT / name).exists(), name


# ----------------------------------------------------------------------------------------- Tables and settings


def test_macro_table_is_that_of_the_quickstart():
    text = (ROOT / "configs" / "quickstart.gin").read_text(encoding="utf-8")
    macros = dict(re.findall(r"^([A-Z_]+) = (.*)$", text, re.MULTILINE))
    table = {}
    for names, values in re.findall(r"^\| ([A-Z_, ]+) \|[^|]*\| ([^|]*) \|$", ALL_TEXT, re.MULTILINE):
        for name, value in zip(names.split(", "), values.strip("`").split(", "), strict=True):
            table[name] = value
    assert table == macros


def settings_of(module, name):
    """The fields of a dataclass, or the arguments of a class after its first, as its file writes them."""
    tree = ast.parse((ROOT / "lmscale" / module).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return {argument.arg for argument in node.args.kwonlyargs}
    return {node.target.id for node in found.body if isinstance(node, ast.AnnAssign)}


SETTINGS = {
    "experiment.Experiment": "experiment.py",
    "next_token.NextToken": "tasks/next_token.py",
    "table_config.TableConfig": "tables/table_config.py",
    "groups.Group": "parameters/groups.py",
    "pretrained.PretrainedVectors": "parameters/pretrained.py",
    "warm_start.WarmStart": "parameters/warm_start.py",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_tables_of_settings_are_complete(name):
    fields = settings_of(SETTINGS[name], name.split(".")[1])
    assert len(fields) > 2
    (table,) = re.findall(
        rf"^\| setting of `{re.escape(name)}` \| meaning \|\n((?:\|.*\n)+)", ALL_PROSE, re.MULTILINE
    )
    listed = [name for row in table.splitlines()[1:] for name in re.findall(r"`(\w+)`", row.split(" | ")[0])]
    assert len(listed) == len(set(listed))
    if name == "experiment.Experiment":  # Those that have macros are in the line behind the table.
        (of_macros,) = re.findall(r"^The others, ([^.]*), have\s+macros\.$", ALL_PROSE, re.MULTILINE)
        listed += re.findall(r"`(\w+)`", of_macros)
    assert set(listed) == fields
    assert len(listed) == len(fields)


def test_settings_of_the_text_exist():
    for name, module in SETTINGS.items():
        short = name.split(".")[1]
        mentioned = set(re.findall(rf"\b{short}\.(\w+)", ALL_TEXT))
        assert mentioned, name
        assert mentioned <= settings_of(module, short), name


def test_nothing_is_called_by_a_name_of_before():
    before = (
        "row_optimizer|body_optimizer|softmax_bias|initial_bias|row_learning_rate|num_shared_rows|table/embedding",
        r"rows_touched/shard|Experiment\.(body|loss|window|embed_dim)\b|lmscale\.(losses|models|vocabulary)\b",
    )
    of_format_1 = r"\(`table/embedding`, `body/0/lstm_cell/kernel`\)"
    assert re.search(of_format_1, ALL_TEXT)
    assert re.search("|".join(before), re.sub(of_format_1, "", ALL_TEXT)) is None


def test_every_configuration_is_in_the_table():
    rows = re.findall(r"^\| `(configs/\w+\.gin)` \|", PROSE["README.md"], re.MULTILINE)
    assert sorted(rows) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.gin"))


def test_exit_codes():
    codes = dict(re.findall(r"^\| (\d+) \| (.*) \|$", ALL_TEXT, re.MULTILINE))
    assert set(codes) == {"0", "1", "2", "3", "69", "75", "130", "143"}
    modules = "train", "command_line", "distribution/process_group"
    source = "".join((ROOT / "lmscale" / f"{name}.py").read_text() for name in modules)
    constants = dict(re.findall(r"^(EXIT_\w+) = (\d+)$", source, re.MULTILINE))
    assert constants == {
        "EXIT_USAGE": "2",
        "EXIT_NON_FINITE": "3",
        "EXIT_LOST": "69",
        "EXIT_STOPPED": "75",
        "EXIT_INTERRUPTED": "130",
    }


# -------------------------------------------------------------------------------------------------- Examples

TWO_DEVICES = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
"""


def run_python(program, *, cwd):
    """Runs a program in a process of its own, since examples make strategies and devices as they like."""
    path = cwd / "program.py"
    path.write_text(program, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(path)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def python_block(containing):
    (block,) = [text for language, text in BLOCKS if language == "python" and containing in text]
    return block


def test_every_python_block_is_run():
    blocks = [text for language, text in BLOCKS if language == "python"]
    alone = [python_block("MirroredStrategy"), python_block("print(reader")]
    assert all(text in alone or re.match(r"# \S+ \(new\)\n", text) for text in blocks)


def test_training_loop_of_ones_own_learns(tmp_path):
    program = python_block("MirroredStrategy")
    for old, new in (
        ("= 1_000_000, 2048, 32, 35, 128", "= 1_003, 64, 6, 7, 16"),
        ("MirroredStrategy()", "MirroredStrategy(['CPU:0', 'CPU:1'])"),
    ):
        assert program.count(old) == 1
        program = program.replace(old, new)
    # In this text each word is followed by always the same one.
    program += """
import numpy as np
assert strategy.num_replicas_in_sync == 2
generator = np.random.default_rng(0)
losses = []
for step in range(200):
    first = generator.integers(0, 40, [BATCH_SIZE, 1])
    window_ids = tf.constant((first + np.arange(WINDOW + 1) * 3) % 40 * 25, tf.int32)
    losses.append(float(train_step(window_ids, tf.constant(step))))
assert table.read_rows("embedding", 0, VOCAB_SIZE).shape == (VOCAB_SIZE, DIM)
print(np.mean(losses[:5]), np.mean(losses[-5:]))
"""
    first, last = map(float, run_python(TWO_DEVICES + program, cwd=tmp_path).split())
    assert last < 0.5 * first


# Each gin block goes into a copy of the shared configuration, and replaces a part of it or adds to it: {text that only
# this block has: what the lines which it replaces begin with}.
GROUPS = "experiment.Experiment.groups "
REPLACED = {
    "samplers.UnigramSampler": ("samplers.", "sampled.SampledSoftmax.sampler"),
    "mixed_sampler": ("samplers.", "sampled.SampledSoftmax.sampler"),
    "contrastive": ("sampled.", "next_token.NextToken.head ", "words/table_config.TableConfig.bias "),
    "full.FullSoftmax": ("samplers.", "sampled.", "next_token.NextToken.head "),
    "RowWiseAdagrad": ("rows/update_rules", "rows/groups.Group.update "),
    "convolution": ("lstm.", "next_token.NextToken.body "),
    "keras_body": ("lstm.", "next_token.NextToken.body "),
    "skip_gram": ("lstm.", "next_token.", "layers/", "words/", "experiment.Experiment.task ", GROUPS),
    "words_in/": tuple(f"next_token.NextToken.{name} " for name in ("tables", "inputs", "outputs")),
    "averages.Averaged": ("layers/groups.Group.update ",),
    "warm_start.WarmStart": (),
    "activity.Every": (GROUPS,),
    "LstmGates": (GROUPS,),
    "PretrainedVectors": (GROUPS,),
    "bias/groups": (GROUPS,),
}
# Parts together, so that a few small runs try them all. The first leaves the checkpoint that the fourth starts from.
RUNS = (
    ("samplers.UnigramSampler", "RowWiseAdagrad"),
    ("full.FullSoftmax", "convolution", "bias/groups"),
    ("mixed_sampler", "keras_body", "averages.Averaged"),
    ("contrastive", "warm_start.WarmStart", "activity.Every"),
    ("skip_gram",),
    ("words_in/", "LstmGates"),
    ("PretrainedVectors",),
)
WITHOUT_MACROS = {
    "full.FullSoftmax": "NUM_SAMPLED",
    "convolution": "NUM_LAYERS",
    "keras_body": "NUM_LAYERS|DROPOUT",
    "skip_gram": "HIDDEN_DIM|NUM_LAYERS|DROPOUT|LEARNING_RATE",
}
SIZES = {"EMBED_DIM": 8, "HIDDEN_DIM": 12, "GLOBAL_BATCH_SIZE": 4, "WINDOW": 5, "NUM_SAMPLED": 300}


def test_every_gin_block_is_tried():
    blocks = [text for language, text in BLOCKS if not language and is_gin(text)]
    assert len(blocks) == len(REPLACED)
    assert sorted(REPLACED) == sorted(part for parts in RUNS for part in parts)


def shared_lines():
    """The lines of the shared files of an LSTM language model, as one file that includes none."""
    texts = [
        (ROOT / "configs" / "shared" / f"{name}.gin").read_text(encoding="utf-8")
        for name in ("training", "language_model", "lstm")
    ]
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    imports = [line for line in lines if line.startswith("from ")]
    settings = [line for line in lines if not line.startswith(("from ", "include "))]
    return [*dict.fromkeys(imports), *settings]


def gin_block(part):
    (block,) = [text for language, text in BLOCKS if not language and is_gin(text) and part in text]
    return block


def test_configurations_of_examples_fit_any_place(tmp_path):
    """Blocks that replace no line of the shared file but the list of groups can stand behind an include, too."""
    alone = [part for part, lines in REPLACED.items() if not lines or lines == (GROUPS,)]
    assert len(alone) == 5
    for part in alone:
        text = "from __gin__ import dynamic_registration\n"
        shared = "".join(shared_lines())
        text += "".join(re.findall(r"^from (?:lmscale|keras).*\n", shared, re.MULTILINE))
        text += "".join(re.findall(r"^from .*\n", gin_block(part), re.MULTILINE))
        text += "include 'quickstart.gin'\n"
        text += re.sub(r"^from .*\n", "", gin_block(part), flags=re.MULTILINE)
        path = tmp_path / "mine.gin"
        path.write_text(text, encoding="utf-8")
        configuration.load([str(path)])


def test_extensions_train_from_their_configurations(tmp_path):
    for name, text in re.findall(r"^# (\S+) \(new\)\n(.*?)^```", ALL_TEXT, re.MULTILINE | re.DOTALL):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    configs = []
    for number, parts in enumerate(RUNS):
        dropped = tuple(prefix for part in parts for prefix in REPLACED[part])
        shared = shared_lines()
        kept = [line for line in shared if not line.startswith(dropped)]
        assert all(any(line.startswith(prefix) for line in shared) for prefix in dropped)
        macros = (ROOT / "configs" / "quickstart.gin").read_text(encoding="utf-8")
        macros = re.sub(r"^include .*\n", "", macros, flags=re.MULTILINE)
        for name, size in SIZES.items():
            macros, count = re.subn(rf"^{name} = .*$", f"{name} = {size}", macros, flags=re.MULTILINE)
            assert count == 1, name
        for part in parts:
            if part in WITHOUT_MACROS:
                macros = re.sub(rf"^({WITHOUT_MACROS[part]}) = .*\n", "", macros, flags=re.MULTILINE)
        text = "".join(kept) + "".join(map(gin_block, parts)) + macros
        text = text.replace("'runs/quickstart'", repr(str(tmp_path / "saved/step_00000002")))
        text = text.replace("glove.6B.50d.txt", str(tmp_path / "vectors.txt"))
        configs.append(tmp_path / f"{number}.gin")
        configs[-1].write_text(text, encoding="utf-8")
    program = TWO_DEVICES + EXTENSIONS + f"\nmain({[str(path) for path in configs]!r}, {str(tmp_path)!r})\n"
    assert run_python(program, cwd=tmp_path).split() == ["trained"] * len(RUNS)
    # The page on checkpoints reads what the first run has saved, and names what is in it.
    reader = python_block("print(reader")
    assert reader.count("runs/quickstart/checkpoints/step_00001200") == 1
    reader = reader.replace(
        "runs/quickstart/checkpoints/step_00001200", str(tmp_path / "saved/step_00000002")
    )
    saved = run_python(reader + "\nassert embedding.shape == (701, 8)\n", cwd=tmp_path)
    names = re.findall(
        r"`((?:tables|slots|layers|state)/[\w/]+)`",
        "\n".join(TABLE.findall(PROSE["docs/checkpoints.md"])),
    )
    assert {"tables/words/bias", "layers/projection/kernel", "state/0"} <= set(names)
    adam_on_rows = {
        "slots/tables/words/embedding/second_moment",
        "slots/tables/words/embedding/last_step",
    }  # That run has another rule.
    assert [name for name in names if f"'{name}'" not in saved and name not in adam_on_rows] == []


EXTENSIONS = """
import math
import os

import numpy as np

import lmscale
import lmscale.bodies
import lmscale.softmax
import lmscale.tasks
from lmscale import configuration
from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.vocab import Vocabulary
from lmscale.evaluation import Evaluator
from lmscale.start import start_from_elsewhere
from lmscale.trainer import Trainer

V = 701


class Text:
    vocab_size, eos_id = V, 0
    ids = np.random.default_rng(0).integers(0, V, 2003)
    counts = np.bincount(ids, minlength=V)
    vocabulary = Vocabulary(tokens=("<eos>", "<unk>", *(f"w{i}" for i in range(2, V))), counts=counts)
    vocabularies = {"words": vocabulary}

    def split(self, name):
        return self.ids


def values(trainer):
    return {p.path: p.read(0, p.shape[0] if p.shape else 1) for p in trainer.parameters()}


def check_start(number, trainer, start, before, reports, saved):
    recurrent = "layers/lstm_1/recurrent_kernel"
    if number == 3:  # Starts from the layers of the first run, and from nothing else of it.
        assert list(reports) == ["warm_start"]
        for path in saved:
            if path.startswith("layers/") and "seed_generator" not in path:
                is_loaded = path.startswith("layers/lstm_")
                assert np.array_equal(before[path], saved[path]) == is_loaded, path
                assert np.array_equal(before[path], start[path]) != is_loaded, path
    elif number == 6:  # Vectors twice as long as those of a table that starts at random, brought to its length.
        assert list(reports) == ["pretrained_words"]
        assert "2 of 701 (0.3%) types" in reports["pretrained_words"]
        rows = before["tables/words/embedding"]
        vectors = np.array(VECTORS, np.float64)
        stddev = np.sqrt(np.mean(np.square(start["tables/words/embedding"].astype(np.float64))))
        expected = vectors * stddev / np.sqrt(np.mean(np.square(vectors)))
        np.testing.assert_allclose(rows[[2, 5]], expected, rtol=1e-5)
        others = np.setdiff1d(np.arange(V), [2, 5])
        np.testing.assert_array_equal(rows[others], start["tables/words/embedding"][others])
    else:
        assert reports == {}
    if number == 5:  # Each gate an orthogonal matrix of its own; forget gates of two.
        for gate in np.split(before[recurrent].astype(np.float64), 4, axis=1):
            np.testing.assert_allclose(gate.T @ gate, np.eye(12), atol=1e-5)
        np.testing.assert_array_equal(before["layers/lstm_1/bias"], np.repeat([0, 2, 0, 0], 12))
        assert before["tables/words_in/embedding"].shape == (V, 64)
        assert before["tables/words_out/embedding"].shape == (V, 8)
        assert "tables/words_in/bias" not in before


# What must not move in two steps.
STILL = {1: ["tables/words/bias"], 6: ["tables/words/embedding"]}


def check_moved(number, trainer, before):
    after = values(trainer)
    for path, treatment in trainer.model.treatments.items():
        assert np.any(after[path] != before[path]) == (path not in STILL.get(number, [])), path
    assert set(STILL.get(number, [])) <= set(trainer.model.treatments)
    if number == 4:  # The exact loss of a skip-gram, from its rows.
        rows, bias = after["tables/neighbours/embedding"].astype(np.float64), after["tables/neighbours/bias"]
        logits = after["tables/words/embedding"].astype(np.float64)[Text.ids[:-1]] @ rows.T + bias
        highest = logits.max(axis=1)
        logsumexp = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
        losses = logsumexp - logits[np.arange(len(logits)), Text.ids[1:]]
        evaluator = Evaluator.of_experiment(trainer.experiment, trainer.model, strategy=trainer.strategy)
        for limit in (None, 100):
            result = evaluator.evaluate(trainer.task.evaluation_batches("valid", limit=limit))
            np.testing.assert_allclose(result.loss_nats, losses[:limit].mean(), rtol=1e-5)
            assert result.tokens == len(losses[:limit])


VECTORS = np.random.default_rng(1).normal(size=(2, 8)).round(3).tolist()


def main(configs, folder):
    for package in (lmscale.softmax, lmscale.bodies, lmscale.tasks):
        package.__path__.append(os.path.join(folder, *package.__name__.split(".")))
    with open(os.path.join(folder, "vectors.txt"), "w") as file:
        for word, vector in zip(("W2", "w5"), VECTORS):
            print(word, *vector, file=file)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    saved = None
    for number, path in enumerate(configs):
        experiment = configuration.load([path]).experiment
        trainer = Trainer(experiment, data=Text(), strategy=strategy)
        start = values(trainer)
        reports = start_from_elsewhere(experiment, trainer)
        before = values(trainer)
        check_start(number, trainer, start, before, reports, saved)
        for _ in range(2):
            metrics = trainer.train_steps()
            assert math.isfinite(float(metrics["loss"][0]))
        check_moved(number, trainer, before)
        if number == 0:
            Checkpoints(os.path.join(folder, "saved")).save(2, trainer.parameters(), metadata={})
            saved = values(trainer)
        print("trained")
    # The answer about the projection: none behind a last layer as wide as the table.
    quickstart = os.path.join(os.path.dirname(os.path.dirname(lmscale.__file__)), "configs", "quickstart.gin")
    bindings = ["EMBED_DIM = 8", "HIDDEN_DIM = 12", "lstm.lstm_body.last_hidden_dim=%EMBED_DIM"]
    experiment = configuration.load([quickstart], bindings).experiment
    body = dict(experiment.task.arguments)["body"]()
    assert [layer.units for layer in body.layers.values()] == [12, 8]
"""
