"""Every tensor of a run under a path that says what it is.

tables/words/embedding                       a table's rows, sharded
layers/lstm_0/kernel                         a layer's weights, a copy on each device
slots/tables/words/embedding/second_moment   what an update rule keeps beside a parameter
state/0                                      what a body carries from window to window
state/loss_scale, state/good_steps           of float16 products, whose loss is scaled
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

SLOT_PATH = re.compile(r"slots/(?P<parameter>.+)/(?P<slot>[^/]+)")
# What belongs to the batches and the dice of one run, whatever its parameters are used for.
RUN_STATE_PATH = re.compile(r"state/.*|.*/seed_generator_state")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One logical tensor, which does not show how many devices hold it, and how to get and set its rows.

    `read` and `write` are called in the order of the paths, and for one parameter by rising rows, each row once:
    collectives inside them run in the same order in every process that makes the same call. Of a sharded parameter,
    each of several processes reads or writes other rows, perhaps none, whoever holds them: all call at once.

    Attributes:
      path: its name in checkpoints, patterns and reports.
      shape: the logical shape, for example (vocab_size, embed_dim).
      dtype: numpy dtype, `ml_dtypes.bfloat16` included; not strings.
      sharded: whether each device holds a part of the rows, rather than a copy of all.
      trainable: whether an update rule may move it.
      read: `read(start, stop)` returns rows [start:stop) along axis 0, [stop - start, ...].
        For a scalar, `read(0, 1)` returns the 0-d array.
      write: `write(start, rows)` sets rows [start:start + len(rows)).
        For a scalar, `write(0, value)`, value 0-d.
      scatter: `scatter(ids, rows)` sets the rows `ids` [n], distinct and in any order, to rows [n, ...]. Not for a
        scalar. Each of several processes passes the same.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    sharded: bool
    trainable: bool
    read: Callable[[int, int], np.ndarray]
    write: Callable[[int, np.ndarray], None]
    scatter: Callable[[np.ndarray, np.ndarray], None]

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        if not self.path or self.dtype.kind in "OSU":
            raise ValueError(
                "A parameter needs a path and a dtype of numbers or bools. Received: "
                f"path={self.path!r}, dtype={self.dtype}."
            )
