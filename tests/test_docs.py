"""README.md and the pages under docs/: commands, paths, links and tables agree with the code; the examples run."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

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
# Each command, and the page that has the table of its flags.
COMMANDS = {
    "prepare": "docs/prepare.md",
    "train": "docs/train.md",
    "evaluate": "docs/evaluate.md",
    "bench": "docs/measure.md",
    "plot": "docs/tensorboard.md",
}


def defined_flags(command):
    source = (ROOT / "lmscale" / f"{command}.py").read_text(encoding="utf-8")
    return set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source))


def shell_commands():
    """Each `python -m lmscale...` of the pages on one line, from blocks and from the text."""
    texts = [block.replace("\\\n", " ") for _, block in BLOCKS] + re.findall(r"`([^`]+)`", ALL_PROSE)
    return [line.strip() for text in texts for line in text.splitlines() if "python -m lmscale" in line]


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
        elif " = @" not in text:  # Not gin, of which each is run too.
            for line in text.replace("\\\n", " ").splitlines():
                assert line.startswith(("launch/", "source .venv/bin/activate", "python -m lmscale.")), line


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
    assert {re.search(r"-m lmscale\.(\w+)", command)[1] for command in commands} == set(COMMANDS)
    for command in commands:
        used = set(re.findall(r" --(\w+)", command))
        assert used <= defined_flags(re.search(r"-m lmscale\.(\w+)", command)[1]), command


def test_flags_of_the_text_exist():
    known = set().union(*map(defined_flags, COMMANDS)) | {"help", "logdir", "signal"}
    mentioned = {
        flag for span in re.findall(r"`([^`\n]*)`", ALL_PROSE) for flag in re.findall(r"--(\w+)", span)
    }
    assert mentioned
    assert mentioned <= known


@pytest.mark.parametrize(("command", "page"), COMMANDS.items())
def test_all_flags_are_in_the_table(command, page):
    rows = [line for line in PROSE[page].splitlines() if line.startswith("| `--")]
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
        r"(runs|checkpoints|train|eval)/|(config\.gin|(metrics|metadata|saved|finished|manifest)\.jsonl?)$"
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


def test_settings_of_the_experiment_exist():
    tree = ast.parse((ROOT / "lmscale" / "experiment.py").read_text(encoding="utf-8"))
    experiment = next(
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Experiment"
    )
    fields = {node.target.id for node in experiment.body if isinstance(node, ast.AnnAssign)}
    mentioned = set(re.findall(r"\bExperiment\.(\w+)", ALL_TEXT))
    assert mentioned
    (table,) = re.findall(r"^\| setting \| meaning \|\n((?:\|.*\n)+)", ALL_PROSE, re.MULTILINE)
    listed = {name for row in table.splitlines()[1:] for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}
    assert "clip_norm" in listed
    assert mentioned | listed <= fields


def test_every_configuration_is_in_the_table():
    rows = re.findall(r"^\| `(configs/\w+\.gin)` \|", PROSE["README.md"], re.MULTILINE)
    assert sorted(rows) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.gin"))


def test_exit_codes():
    codes = dict(re.findall(r"^\| (\d+) \| (.*) \|$", ALL_TEXT, re.MULTILINE))
    assert set(codes) == {"0", "1", "2", "3", "75", "130", "143"}
    source = "".join((ROOT / "lmscale" / f"{name}.py").read_text() for name in ("train", "command_line"))
    constants = dict(re.findall(r"^(EXIT_\w+) = (\d+)$", source, re.MULTILINE))
    assert constants == {
        "EXIT_USAGE": "2",
        "EXIT_NON_FINITE": "3",
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


# Each example of an extension replaces a part of the shared configuration: {file or class named in the gin block:
# what the lines which it replaces begin with}.
REPLACED = {
    "samplers.UnigramSampler": ("samplers.", "sampled.SampledSoftmax.sampler"),
    "mixed_sampler": ("samplers.", "sampled.SampledSoftmax.sampler"),
    "contrastive": ("sampled.", "experiment.Experiment.loss "),
    "full.FullSoftmax": ("samplers.", "sampled.", "experiment.Experiment.loss "),
    "RowWiseAdagrad": ("rows/update_rules", "experiment.Experiment.row_optimizer "),
    "convolution": ("lstm.", "experiment.Experiment.body "),
    "keras_body": ("lstm.", "experiment.Experiment.body "),
    "transplanted_lstm": ("lstm.", "experiment.Experiment.body "),
}
# Pairs of parts in turn, so that four small runs try them all. The first leaves the checkpoint that the last reads.
RUNS = (
    ("samplers.UnigramSampler", "RowWiseAdagrad"),
    ("full.FullSoftmax", "convolution"),
    ("mixed_sampler", "keras_body"),
    ("contrastive", "transplanted_lstm"),
)
WITHOUT_MACROS = {
    "full.FullSoftmax": "NUM_SAMPLED",
    "convolution": "NUM_LAYERS",
    "keras_body": "NUM_LAYERS|DROPOUT",
}


def test_every_gin_block_is_tried():
    blocks = [text for language, text in BLOCKS if not language and " = @" in text]
    assert len(blocks) == len(REPLACED)
    assert sorted(REPLACED) == sorted(part for parts in RUNS for part in parts)


def gin_block(part):
    (block,) = [text for language, text in BLOCKS if not language and part in text and " = @" in text]
    return block


def test_extensions_train_from_their_configurations(tmp_path):
    for name, text in re.findall(r"^# (\S+) \(new\)\n(.*?)^```", ALL_TEXT, re.MULTILINE | re.DOTALL):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    configs = []
    for number, parts in enumerate(RUNS):
        dropped = tuple(prefix for part in parts for prefix in REPLACED[part])
        shared = (
            (ROOT / "configs" / "shared" / "lstm.gin").read_text(encoding="utf-8").splitlines(keepends=True)
        )
        kept = [line for line in shared if not line.startswith(dropped)]
        assert len(kept) < len(shared)
        macros = (ROOT / "configs" / "quickstart.gin").read_text(encoding="utf-8")
        macros = re.sub(r"^include .*\n", "", macros, flags=re.MULTILINE)
        for part in parts:
            if part in WITHOUT_MACROS:
                macros = re.sub(rf"^({WITHOUT_MACROS[part]}) = .*\n", "", macros, flags=re.MULTILINE)
        text = "".join(kept) + "".join(map(gin_block, parts)) + macros
        text = text.replace(
            "runs/quickstart/checkpoints/step_00001200", str(tmp_path / "saved/step_00000002")
        )
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
        r"`((?:table|body|body_slots|carried_state)/[\w/]+)`",
        "\n".join(TABLE.findall(PROSE["docs/checkpoints.md"])),
    )
    assert {"table/bias", "body/2/kernel", "carried_state/0"} <= set(names)
    adam_on_rows = {
        "table/embedding/second_moment",
        "table/embedding/last_step",
    }  # That run has another rule.
    assert [name for name in names if f"'{name}'" not in saved and name not in adam_on_rows] == []


EXTENSIONS = """
import math
import os

import numpy as np

import lmscale
import lmscale.softmax
import lmscale.bodies
import lmscale.softmax
from lmscale import configuration
from lmscale.checkpoints.directory import Checkpoints
from lmscale.trainer import Trainer


class Text:
    vocab_size, eos_id = 701, 0
    ids = np.random.default_rng(0).integers(0, 701, 2003)
    counts = np.bincount(ids, minlength=701)

    def split(self, name):
        return self.ids


SIZES = ("EMBED_DIM = 8", "HIDDEN_DIM = 12", "GLOBAL_BATCH_SIZE = 4", "WINDOW = 5")


def main(configs, folder):
    for package in (lmscale.softmax, lmscale.bodies, lmscale.softmax):
        package.__path__.append(os.path.join(folder, *package.__name__.split(".")))
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    recurrent = None
    for number, path in enumerate(configs):
        sampled = [] if number == 1 else ["NUM_SAMPLED = 300"]
        experiment = configuration.load([path], [*SIZES, *sampled]).experiment
        trainer = Trainer(experiment, data=Text(), strategy=strategy)
        variables = trainer.model.encoder.variables
        if recurrent is not None and "1/lstm_cell/recurrent_kernel" in variables and number == 3:
            np.testing.assert_array_equal(variables["1/lstm_cell/recurrent_kernel"].numpy(), recurrent)
        before = {name: variable.numpy() for name, variable in trainer.model.encoder.trainable_variables.items()}
        for _ in range(2):
            metrics = trainer.train_steps()
            assert math.isfinite(float(metrics["loss"][0]))
        for name, value in before.items():
            assert np.any(value != variables[name].numpy()), name
        if number == 0:
            Checkpoints(os.path.join(folder, "saved")).save(2, trainer.checkpoint_items(), metadata={})
            recurrent = variables["1/lstm_cell/recurrent_kernel"].numpy()
        print("trained")
    # The answer about hidden sizes: no projection behind a last layer as wide as the embedding.
    quickstart = os.path.join(os.path.dirname(os.path.dirname(lmscale.__file__)), "configs", "quickstart.gin")
    bindings = [*SIZES, "lstm.lstm_body.last_hidden_dim=%EMBED_DIM"]
    body = configuration.load([quickstart], bindings).experiment.body()
    assert [layer.units for layer in body.layers] == [12, 8]
"""
