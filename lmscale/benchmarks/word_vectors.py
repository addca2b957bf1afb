"""Words per second and quality of word vectors, beside gensim's on the same text, in turns."""

import importlib.util
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np

from lmscale.benchmarks.task import run_task
from lmscale.data.token_files import PreparedData

SIDES = ("gensim", "lmscale")
_WORKERS, _EPOCHS, _WINDOW, _DIM, _NEGATIVES = 2, 5, 5, 100, 5


def gensim_is_installed():
    """Whether the peer is there."""
    return importlib.util.find_spec("gensim") is not None


def measure(*, data_dir, config, similarity, rounds, gensim_subsampling, log_dir, say):
    """Trains both sides, each in a process of its own, in turns.

    Args:
      data_dir: prepared text; its vocabulary is that of both.
      config: path of the configuration of lmscale's side.
      similarity: paths of files of word pairs.
      rounds: turns of each side.
      gensim_subsampling: threshold of gensim's side above which it leaves out some of a word's occurrences.
      log_dir: folder for their notices.
      say: function of a line.

    Returns:
      {"words": of the text, "epochs", "workers", "gensim_subsampling", "rounds": [{side: {"secs", "words_per_sec",
      "cpu_secs", "spearman": {file: value}}}], "ratio": median over the rounds of words per second, "cpu_ratio":
      likewise per second of the processor}.

    Raises:
      TaskFailedError: if a side fails.
    """
    measured = []
    for number in range(rounds):
        turn = {}
        for side in SIDES:
            say(f"word2vec, round {number + 1} of {rounds}, {side}")
            arguments = {"data_dir": str(data_dir), "similarity": [str(path) for path in similarity]}
            arguments |= {"config": str(config)} if side == "lmscale" else {"subsampling": gensim_subsampling}
            turn[side] = run_task(
                f"lmscale.benchmarks.word_vectors:train_{side}",
                arguments,
                log=Path(log_dir) / f"word2vec_{side}_{number}.log",
            )
        measured.append(turn)
        say(json.dumps(turn))
    return {
        "words": measured[0]["lmscale"].pop("words"),
        "epochs": _EPOCHS,
        "workers": _WORKERS,
        "gensim_subsampling": gensim_subsampling,
        "rounds": measured,
        "ratio": _median_ratio(measured, "secs"),
        "cpu_ratio": _median_ratio(measured, "cpu_secs"),
    }


def _median_ratio(rounds, name):
    return statistics.median(turn["gensim"][name] / turn["lmscale"][name] for turn in rounds)


def train_gensim(*, data_dir, similarity, subsampling):
    """Skip-gram by gensim, timed without its scan of the vocabulary. It cuts lines after 10,000 tokens."""
    from gensim.models import Word2Vec

    data = PreparedData.open(data_dir)
    lines = _lines(data)
    words = sum(map(len, lines))
    model = Word2Vec(
        vector_size=_DIM,
        window=_WINDOW,
        min_count=1,
        negative=_NEGATIVES,
        sg=1,
        sample=subsampling,
        workers=_WORKERS,
        epochs=_EPOCHS,
        seed=1,
    )
    model.build_vocab(lines)
    start, cpu = time.perf_counter(), time.process_time()
    model.train(lines, total_examples=len(lines), epochs=_EPOCHS)
    secs, cpu = time.perf_counter() - start, time.process_time() - cpu
    rows = [model.wv[word] for word in model.wv.index_to_key]
    return _result(words, secs, cpu, model.wv.index_to_key, np.stack(rows), similarity)


def train_lmscale(*, data_dir, similarity, config):
    """A configuration's run for as many epochs, timed from its second call on: the first compiles the step."""
    from lmscale import configuration
    from lmscale.distribution.strategies import make_strategy
    from lmscale.trainer import Trainer

    data = PreparedData.open(data_dir)
    strategy = make_strategy()
    experiment = configuration.load([config], [f"DATA_DIR = {str(data_dir)!r}"]).experiment
    trainer = Trainer(experiment, data=data, strategy=strategy)
    steps = _EPOCHS * trainer.batches.steps_per_epoch
    if experiment.train_steps != steps:
        raise ValueError(
            f"The configuration must train for {_EPOCHS} epochs, as gensim does: {steps} steps. Received: "
            f"train_steps={experiment.train_steps}. Set TRAIN_STEPS."
        )
    trainer.train_steps(1)
    start, cpu = time.perf_counter(), time.process_time()
    while trainer.step < steps:
        metrics = trainer.train_steps(min(experiment.steps_per_call, steps - trainer.step))
        assert math.isfinite(float(metrics["loss"][-1]))
    # As if the first had taken as long as the others.
    scale = steps / (steps - 1)
    secs, cpu = (time.perf_counter() - start) * scale, (time.process_time() - cpu) * scale
    vectors = trainer.model.tables["words"].read_rows("embedding", 0, data.vocab_size)
    words = trainer.batches.words_per_epoch
    result = _result(words, secs, cpu, data.vocabulary.tokens, vectors, similarity)
    return result | {"words": words}


def _lines(data):
    """The words of each line of the training text, without `<unk>` and `<eos>`."""
    ids, tokens = np.asarray(data.split("train")), data.vocabulary.tokens
    lines = np.split(ids, np.flatnonzero(ids == data.eos_id))
    return [[tokens[i] for i in line if i not in (data.eos_id, data.unk_id)] for line in lines]


def _result(words, secs, cpu_secs, tokens, rows, similarity):
    from lmscale.word_similarity import read_pairs, similarity_report

    ids = {token: i for i, token in enumerate(tokens)}

    def id_of(word):
        return ids.get(word, ids.get(word.lower()))

    vectors = dict(enumerate(rows))
    return {
        "secs": secs,
        "cpu_secs": cpu_secs,
        "words_per_sec": words * _EPOCHS / secs,
        "spearman": {
            Path(path).name: similarity_report(read_pairs(Path(path)), id_of, vectors)["spearman"]
            for path in similarity
        },
    }
