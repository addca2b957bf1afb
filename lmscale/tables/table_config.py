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


def check_inputs_and_outputs(tables, *, inputs, outputs):
    """Raises ValueError unless exactly the tables named are there, with a bias only where one has an effect."""
    wanted, given = {inputs, outputs}, set(tables)
    if wanted != given:
        missing, unused = sorted(wanted - given), sorted(given - wanted)
        raise ValueError(
            "The tables must be those that inputs and outputs name. Received: "
            f"inputs={inputs!r}, outputs={outputs!r}, tables {sorted(given)}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; not used: {', '.join(unused)}" if unused else "")
            + ". Name one table twice for a tied model, two for an untied one."
        )
    if inputs != outputs and tables[inputs].bias != "none":
        raise ValueError(
            "A table whose rows are only read must have no bias, which belongs to the softmax. Received: "
            f"bias={tables[inputs].bias!r} of the table {inputs!r}. Set its TableConfig.bias = 'none'."
        )
