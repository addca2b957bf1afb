"""Measures and exports word vectors: python -m lmscale.word_vectors --workdir=runs/vectors --similarity=men.tsv

--similarity: files of word pairs with scores (WordSim-353, SimLex-999, MEN and their like): Spearman's rank correlation
with the cosines. --analogies: files of questions such as questions-words.txt, by 3CosAdd. --export: a file that
word2vec's readers load, of text, or binary where its name ends in .bin. --projector: a folder with the most frequent
words, for TensorBoard's projector. --vectors measures a file of vectors in place
of a run. Rows are read in blocks from the checkpoint, without a model. Each file gives a JSON object on stdout.
"""

import itertools
import json
from pathlib import Path

from absl import flags

from lmscale.command_line import DEFINE_path, DEFINE_paths, run_main

_WORKDIR = DEFINE_path("workdir", None, "Work directory of the run, or one of its checkpoints.", remote=True)
_BEST = flags.DEFINE_bool("best", False, "The checkpoint of the lowest validation loss, not the newest.")
_TABLE = flags.DEFINE_string("table", "words", "Table that holds the word vectors.")
_VECTORS = DEFINE_path("vectors", None, "File of vectors to measure, in place of a run.")
_SIMILARITY = DEFINE_paths("similarity", [], "Files of word pairs with scores.")
_ANALOGIES = DEFINE_paths("analogies", [], "Files of questions of four words.")
_EXPORT = DEFINE_path("export", None, "File of vectors to write: binary if its name ends in .bin, else text.")
_PROJECTOR = DEFINE_path("projector", None, "Folder to write for TensorBoard's projector.")
_WORDS = flags.DEFINE_integer(
    "words", 10_000, "Words for the projector, the most frequent ones.", lower_bound=1
)


def main(argv):
    """Flags to rows, reports and files."""
    del argv
    if (_WORKDIR.value is None) == (_VECTORS.value is None):
        received = "both" if _WORKDIR.value else "neither"
        raise ValueError(f"Pass either --workdir or --vectors. Received: {received}.")
    for name in ("table", "best", "export", "projector"):
        if _VECTORS.value is not None and flags.FLAGS[name].present:
            raise ValueError(
                f"--{name} goes with --workdir. Received: --{name} with --vectors. Leave it out."
            )
    if not (_SIMILARITY.value or _ANALOGIES.value or _EXPORT.value or _PROJECTOR.value):
        raise ValueError(
            "There must be something to do. Received: none of --similarity, --analogies, --export and --projector. "
            "Pass one."
        )
    if flags.FLAGS["words"].present and not _PROJECTOR.value:
        raise ValueError(
            "--words goes with --projector. Received: --words alone. Pass --projector=FOLDER too."
        )
    # What the user wrote comes before what takes long.
    from lmscale.analogies import analogy_report, read_questions
    from lmscale.word_similarity import read_pairs, similarity_report

    similarity = {path: read_pairs(Path(path)) for path in _SIMILARITY.value}
    analogies = {path: read_questions(Path(path)) for path in _ANALOGIES.value}
    rows = _rows()
    words = {word for pairs in similarity.values() for pair in pairs.words for word in pair}
    words |= {
        word
        for questions in analogies.values()
        for section in questions.sections.values()
        for question in section
        for word in question
    }
    vectors = rows.vectors_of(words) if words else {}
    for path, pairs in similarity.items():
        _print(path, similarity_report(pairs, rows.id_of, vectors))
    for path, questions in analogies.items():
        _print(path, analogy_report(questions, rows.id_of, vectors, rows.blocks()))
    if _EXPORT.value:
        _export(rows, Path(_EXPORT.value))
    if _PROJECTOR.value:
        _project(rows, Path(_PROJECTOR.value))
    return 0


def _rows():
    from lmscale.word_rows import FileRows, TableRows

    if _VECTORS.value is not None:
        return FileRows(_VECTORS.value)
    return TableRows(_WORKDIR.value, table=_TABLE.value, best=_BEST.value)


def _export(rows, path):
    from lmscale.parameters.vector_writing import write_vectors

    form = "word2vec_binary" if path.suffix == ".bin" else "word2vec_text"
    pairs = (
        (rows.words[i], row)
        for ids, block in rows.blocks()
        for i, row in zip(ids.tolist(), block, strict=True)
    )
    write_vectors(path, pairs, num_rows=len(rows.words), dim=rows.dim, format=form)
    _print(str(path), {"words": len(rows.words), "dim": rows.dim, "format": form, "source": rows.source})


def _project(rows, folder):
    from lmscale.projector import write_projector

    most_frequent = (
        (rows.words[i], int(rows.counts[i]), row)
        for ids, block in rows.blocks()
        for i, row in zip(ids.tolist(), block, strict=True)
    )
    number = write_projector(
        folder, itertools.islice(most_frequent, _WORDS.value), name=_TABLE.value, dim=rows.dim
    )
    _print(str(folder), {"words": number, "dim": rows.dim, "table": _TABLE.value, "source": rows.source})


def _print(path, report):
    print(json.dumps({"file": path} | report, allow_nan=False), flush=True)


def run():
    """Console script lmscale-word-vectors."""
    run_main(main)


if __name__ == "__main__":
    run()
