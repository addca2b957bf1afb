"""What a table is, apart from who reads it."""

import dataclasses
from typing import Literal

from lmscale.parameters.pretrained import PretrainedVectors

BIASES = ("none", "zeros", "log_frequency")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """A table of a task.

    Attributes:
      embed_dim: width of a row.
      vocabulary: name of the vocabulary whose words its rows are, among those of the prepared data; a text has "words".
      bias: "none"; or each row has a softmax bias, which starts from "zeros", or from the row's "log_frequency" in the
        training data, so that the first thing that training has to find out, how frequent each row is, is known to
        begin with. One that stays fixed is a matter of groups: freeze `tables/NAME/bias`.
      pretrained: word vectors that rows start from where a run starts; None for none. Of another width than embed_dim
        they are refused: give the table theirs, and let a learned layer map it to what reads it
        (`NextToken.input_dim`).
    """

    embed_dim: int
    vocabulary: str = "words"
    bias: Literal["none", "zeros", "log_frequency"] = "zeros"
    pretrained: PretrainedVectors | None = None

    def __post_init__(self):
        if self.embed_dim < 1:
            raise ValueError(
                f"embed_dim must be at least 1. Received: embed_dim={self.embed_dim}. Set EMBED_DIM, say."
            )
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {BIASES}. Received: bias={self.bias!r}.")


def table_paths(tables):
    """Paths of the parameters of tables, in order; `tables` {name: `TableConfig`}."""
    return [
        f"tables/{name}/{parameter}"
        for name, config in tables.items()
        for parameter in (["embedding"] if config.bias == "none" else ["embedding", "bias"])
    ]
