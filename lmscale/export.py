"""Writes a run as a SavedModel: python -m lmscale.export --workdir=runs/quickstart --output=served/quickstart/1

TensorFlow loads and serves it without lmscale. Its signatures take and give words: next_words and score of a language
model, recommend of a next-item model, embed of any. The last line on stdout is a JSON object.
"""

import json

from absl import flags

from lmscale import workdir_flags
from lmscale.command_line import DEFINE_path, run_main

flags.adopt_module_key_flags(workdir_flags)

_OUTPUT = DEFINE_path("output", None, "Folder to make.")
_SIGNATURES = flags.DEFINE_list(
    "signatures", None, "Names, separated by commas; by default all that the task has."
)
_TABLE = flags.DEFINE_string("table", None, "Table of the signature embed; by default that of the softmax.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Examples that are computed at a time.", lower_bound=1)
_LENGTH = flags.DEFINE_integer(
    "length",
    None,
    "Words or items of an example at most; by default the window of evaluations.",
    lower_bound=1,
)
_K = flags.DEFINE_integer("k", 10, "Words or items that are returned for an example.", lower_bound=1)
_INT8 = flags.DEFINE_bool("int8", False, "Rows in a byte a number and a scale a row.")


def main(argv):
    """Flags to `serving.export`."""
    del argv
    workdir_flags.check()
    if not _OUTPUT.value:
        raise ValueError("--output must name the folder to make. Received none.")
    from lmscale.serving.export import ExportSettings, export, open_run
    from lmscale.workdir import Workdir

    settings = ExportSettings(
        signatures=None if _SIGNATURES.value is None else tuple(_SIGNATURES.value),
        table=_TABLE.value,
        batch_size=_BATCH_SIZE.value,
        length=_LENGTH.value,
        k=_K.value,
        int8=_INT8.value,
    )
    with Workdir(workdir_flags.workdir_path(), readonly=True) as workdir:
        report = export(
            workdir_flags.config(workdir).experiment,
            saved=open_run(workdir, workdir_flags.checkpoint()),
            output=_OUTPUT.value,
            settings=settings,
        )
    print(json.dumps({"output": _OUTPUT.value, **report}), flush=True)
    return 0


def run():
    """Console script lmscale-export."""
    run_main(main)


if __name__ == "__main__":
    run()
