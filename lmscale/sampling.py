"""How the next token of a generated text is chosen."""

import dataclasses
import math

_LEAST_TEMPERATURE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """A rule to choose a token by the probabilities of all.

    Attributes:
      temperature: logits are divided by it before they become probabilities; 0 takes the most probable token.
      top_k: choose among so many of the most probable tokens; None for all.
      top_p: choose among the fewest of the most probable tokens that have this probability together (of those that
        top_k leaves): the nucleus of Holtzman et al. 2020, arXiv:1904.09751, section 3.1. 1 for all.
      seed: of the choices. Each is a function of it, the number of the text, and the number of the token in it.
      with_unk: whether `<unk>` may be chosen.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    with_unk: bool = False

    def __post_init__(self):
        # Of logits divided by less, float32 would have infinities.
        if not (
            math.isfinite(self.temperature)
            and (self.temperature == 0 or self.temperature >= _LEAST_TEMPERATURE)
        ):
            raise ValueError(
                f"temperature must be 0 or a number from {_LEAST_TEMPERATURE} on. Received: {self.temperature}. Give 0 "
                "for the most probable token, 1 for the model's own probabilities."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"top_k must be at least 1. Received: {self.top_k}. Leave it out for all tokens."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p must be above 0 and at most 1. Received: {self.top_p}. Leave it out for all tokens."
            )
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in [0, 2**31). Received: {self.seed}. Give another one.")

    @property
    def is_greedy(self):
        """Whether nothing is left to chance."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def is_of_all_tokens(self):
        """Whether any token may be chosen."""
        return not self.is_greedy and self.top_k is None and self.top_p == 1
