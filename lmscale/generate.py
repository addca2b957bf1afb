"""Writes text: python -m lmscale.generate --workdir=runs/quickstart --prompt="It is a truth" --temperature=0.8

Each text is a JSON object on stdout: its prompt, what was written behind it, and the natural logarithm of its
probability under the model; the last one counts tokens and seconds. A prompt is cut into tokens as the run's data were,
and words that the vocabulary lacks are `<unk>`. Tokens are chosen by the exact softmax over every row, and chance is a
function of --seed: the texts are the same on any number of devices.
"""

import json
import time
from pathlib import Path

from absl import flags, logging

from lmscale import machine_flags, run_flags, workdir_flags
from lmscale.command_line import DEFINE_path, run_main
from lmscale.sampling import Sampling

flags.adopt_module_key_flags(run_flags)

_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "What the text begins with; may be repeated. Without: nothing."
)
_INPUT = DEFINE_path("input", None, "File with a prompt in each line, in place of --prompt; `-` for stdin.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Texts for each prompt.", lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 100, "Tokens of a text at most, without the prompt.", lower_bound=1
)
_MAX_LINES = flags.DEFINE_integer(
    "max_lines", 1, "Lines of a text at most: it ends with so many <eos>.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "Divides the logits: below 1 for likelier tokens, 0 for the likeliest."
)
_TOP_K = flags.DEFINE_integer("top_k", None, "Choose among so many of the likeliest tokens. Without: all.")
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Choose among the likeliest tokens that have this probability together; above 0, at most 1."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the choices.")
_WITH_UNK = flags.DEFINE_bool("with_unk", False, "Let <unk> be chosen.")
_TOKENIZED = flags.DEFINE_bool(
    "tokenized", False, "The prompt is tokenised already, with blanks between tokens."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Texts side by side, over all devices.", lower_bound=1)


def main(argv):
    """Flags to texts, printed."""
    del argv
    workdir_flags.check()
    sampling = Sampling(
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        with_unk=_WITH_UNK.value,
    )
    if _PROMPT.value and _INPUT.value:
        raise ValueError(
            f"Prompts must come from one place. Received: --prompt and --input={_INPUT.value}. Leave one of them out."
        )
    with machine_flags.processes() as group:
        if group.size > 1 and _INPUT.value == "-":
            raise ValueError(
                "Several processes must read prompts from a file. Received: --input=-. Name a file."
            )
        _generate(sampling, group)
    return 0


def _prompts(text):
    """[(as it is shown, ids)]."""
    if _INPUT.value is None:
        return [(prompt, text.ids(prompt)) for prompt in _PROMPT.value or [""]]
    lines = text.lines(None if _INPUT.value == "-" else Path(_INPUT.value))
    return [(text.text(ids[:-1]), ids[:-1]) for ids in lines]


def _generate(sampling, group):
    # TensorFlow takes seconds to import: mistakes in flags come before.
    from lmscale.data.raw_text import RawText
    from lmscale.generation import Generator
    from lmscale.metrics import progress
    from lmscale.tasks.left_to_right import check_left_to_right
    from lmscale.workdir import Workdir

    with Workdir(workdir_flags.workdir_path(), readonly=True) as workdir:
        restored = run_flags.restored_model(workdir, group)
        check_left_to_right(restored.task)
        text = RawText(restored.data, tokenized=_TOKENIZED.value)
        prompts = _prompts(text)
        group.check_same("The prompts", [ids.tolist() for _, ids in prompts])
        if text.num_unknown and group.is_chief:
            logging.warning("%d tokens of the prompts are not in the vocabulary: <unk>", text.num_unknown)
        metadata = restored.restore(restored.step_of(workdir_flags.checkpoint()))
        generator = Generator(restored, sampling=sampling, batch_size=_BATCH_SIZE.value)
        num_texts = num_tokens = 0
        start = time.perf_counter()
        with (
            restored.weights(metadata),
            progress(
                total=len(prompts) * _NUM_SAMPLES.value * _MAX_TOKENS.value,
                initial=0,
                description="writing",
                is_shown=group.is_chief,
            ) as show_tokens,
        ):
            texts = generator.generate(
                [ids for _, ids in prompts],
                num_samples=_NUM_SAMPLES.value,
                max_tokens=_MAX_TOKENS.value,
                max_lines=_MAX_LINES.value,
                on_tokens=show_tokens,
            )
            for each in texts:
                num_texts += 1
                num_tokens += len(each.ids)
                written = each.ids[:-1] if each.is_finished else each.ids
                if group.is_chief:
                    _print(
                        {
                            "prompt": prompts[each.prompt][0],
                            "sample": each.sample,
                            "text": text.text(written),
                            "log_prob": float(each.log_probs.sum()),
                            "is_finished": each.is_finished,
                            "tokens": text.tokens(each.ids),
                            "log_probs": each.log_probs.tolist(),
                        }
                    )
        seconds = time.perf_counter() - start
        if group.is_chief:
            _print(
                {
                    "texts": num_texts,
                    "tokens": num_tokens,
                    "step": metadata["step"],
                    "num_devices": restored.strategy.num_replicas_in_sync,
                    "seconds": seconds,
                    "tokens_per_sec": num_tokens / seconds,
                }
            )


def _print(values):
    print(json.dumps(values, allow_nan=False, ensure_ascii=False), flush=True)


def run():
    """Console script lmscale-generate."""
    run_main(main)


if __name__ == "__main__":
    run()
