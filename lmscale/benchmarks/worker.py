"""One side of a comparison, for `SideProcess`: python -m lmscale.benchmarks.worker SIDE SHAPE

Does a step (or a call of several) at once and one for each line on stdin, and answers each with the seconds of the call
and of a step of it, as a JSON line.
"""

import json
import math
import sys
import time

from lmscale.benchmarks.peers.peer import ModelShape
from lmscale.benchmarks.sides import SIDES
from lmscale.benchmarks.synthetic import ZipfText
from lmscale.benchmarks.task import answers_pipe
from lmscale.data.batches import ContiguousBatches


def main(side, shape):
    """Steps until stdin ends."""
    answers = answers_pipe()
    shape = ModelShape(**json.loads(shape))
    if SIDES[side].needs == "tensorflow":
        from lmscale.distribution.strategies import limit_gpu_memory

        limit_gpu_memory()
    peer = SIDES[side].build(shape)
    batches = ContiguousBatches(
        ZipfText(shape.vocab_size).split("train"),
        global_batch_size=shape.batch_size,
        window=shape.window,
        seed=0,
    )
    step = 0
    while True:
        window_ids = batches.at(step).features["ids"]
        start = time.perf_counter()
        loss = peer.train_step(window_ids)
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            sys.exit(f"the loss of step {step} is {loss}: such steps are not worth timing")
        step += 1
        answers.write(json.dumps({"call_secs": seconds, "step_secs": seconds / peer.steps_per_call}) + "\n")
        answers.flush()
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
