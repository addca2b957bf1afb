"""The shipped configurations, and the macros that all of a family have, so that a rerun changes one line."""

from pathlib import Path

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.gin"))

_RUN = {"DATA_DIR", "TRAIN_STEPS", "GLOBAL_BATCH_SIZE", "SEED", "LOG_EVERY", "EVAL_EVERY", "SAVE_EVERY"}
_OF_ALL = _RUN | {"NUM_SAMPLED", "ROW_LEARNING_RATE"}
_WITH_BODY = _OF_ALL | {"WINDOW", "EMBED_DIM", "HIDDEN_DIM", "NUM_LAYERS", "DROPOUT", "LEARNING_RATE"}
_FAMILIES = {
    # There is no body.
    "shared/word2vec.gin": _OF_ALL | {"WINDOW", "EMBED_DIM", "SUBSAMPLING", "INITIAL_ACCUMULATOR"},
    # Widths and windows are of the task.
    "shared/examples.gin": _OF_ALL | {"LEARNING_RATE"},
}


def macros_of(path):
    """The macros that all configurations of the family of the one at `path` have."""
    text = path.read_text(encoding="utf-8")
    return next((macros for shared, macros in _FAMILIES.items() if shared in text), _WITH_BODY)
