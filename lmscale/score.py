"""Exact log-probabilities of a text: python -m lmscale.score --workdir=runs/quickstart --input=mine.txt

Without --input, of what comes on stdin. The text is cut into tokens as the run's data were; `<eos>` ends each line,
and words that the vocabulary lacks are `<unk>`. Each line of the text gives a JSON object on stdout, with its tokens
and their natural logarithms of probability under the full softmax; the last one is of the whole text.
"""

import json
import math
import time
from pathlib import Path

from absl import flags, logging

from lmscale import machine_flags, run_flags, workdir_flags
from lmscale.command_line import DEFINE_path, run_main

flags.adopt_module_key_flags(run_flags)

_INPUT = DEFINE_path("input", None, "Text to score, UTF-8, plain or compressed. Without it: stdin.")
_CONTEXT = flags.DEFINE_enum(
    "context",
    "line",
    ["line", "stream"],
    "What a token is predicted from: its line, or also all lines before it.",
)
_TOKENIZED = flags.DEFINE_bool(
    "tokenized", False, "The text is tokenised already, with blanks between tokens."
)
_TOKENS = flags.DEFINE_bool(
    "tokens", True, "Print tokens and their log-probabilities, not only those of lines."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Lines side by side, over all devices.", lower_bound=1)


def main(argv):
    """Flags to scored lines, printed."""
    del argv
    workdir_flags.check()
    with machine_flags.processes() as group:
        if group.size > 1 and _INPUT.value is None:
            raise ValueError(
                "Several processes must read the text from a file. Received: no --input. Pass --input."
            )
        _score(group)
    return 0


def _score(group):
    # TensorFlow takes seconds to import: mistakes in flags come before.
    from lmscale.data.raw_text import RawText
    from lmscale.metrics import progress
    from lmscale.scoring import Scorer, Total
    from lmscale.tasks.left_to_right import check_left_to_right
    from lmscale.workdir import Workdir

    with Workdir(workdir_flags.workdir_path(), readonly=True) as workdir:
        restored = run_flags.restored_model(workdir, group)
        check_left_to_right(restored.task)
        text = RawText(restored.data, tokenized=_TOKENIZED.value)
        lines = list(text.lines(None if _INPUT.value is None else Path(_INPUT.value)))
        group.check_same("The number of tokens of the text", sum(map(len, lines)))
        metadata = restored.restore(restored.step_of(workdir_flags.checkpoint()))
        scorer = Scorer(restored, batch_size=_BATCH_SIZE.value)
        score = scorer.score_stream if _CONTEXT.value == "stream" else scorer.score_lines
        total, start = Total(), time.perf_counter()
        with (
            restored.weights(metadata),
            progress(total=len(lines), initial=0, description="scoring", is_shown=group.is_chief) as show,
        ):
            for line in score(lines):
                total.add(line)
                show(total.lines)
                if group.is_chief:
                    of_tokens = {"tokens": text.tokens(line.ids), "log_probs": line.log_probs.tolist()}
                    _print(
                        {
                            "line": total.lines,
                            "log_prob": float(line.log_probs.sum()),
                            "num_tokens": len(line.ids),
                            **(of_tokens if _TOKENS.value else {}),
                        }
                    )
        seconds = time.perf_counter() - start
    if text.num_unknown and group.is_chief:
        logging.warning("%d of %d tokens are not in the vocabulary: <unk>", text.num_unknown, text.num_tokens)
    if group.is_chief:
        _print(
            {
                **total.report(),
                "unknown_tokens": text.num_unknown,
                "step": metadata["step"],
                "num_devices": restored.strategy.num_replicas_in_sync,
                "seconds": seconds,
                "tokens_per_sec": total.tokens / seconds,
            }
        )


def _print(values):
    # JSON has neither NaN nor infinity.
    def finite(x):
        if isinstance(x, list):
            return [finite(y) for y in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    print(
        json.dumps({k: finite(v) for k, v in values.items()}, allow_nan=False, ensure_ascii=False), flush=True
    )


def run():
    """Console script lmscale-score."""
    run_main(main)


if __name__ == "__main__":
    run()
