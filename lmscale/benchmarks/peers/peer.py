"""What the benchmarks ask of one side of a comparison."""

import abc
import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes on which both sides of a comparison agree."""

    vocab_size: int
    embed_dim: int
    hidden_dim: int
    num_layers: int
    batch_size: int
    window: int
    num_sampled: int
    dropout: float = 0.0

    @property
    def tokens(self):
        """Tokens of a step."""
        return self.batch_size * self.window


class Peer(abc.ABC):
    """One side: a model, its optimizer, and a training step. Lives in a process of its own.

    Attributes:
      steps_per_call: steps that a call of `train_step` does.
    """

    steps_per_call = 1

    @abc.abstractmethod
    def __init__(self, shape: ModelShape):
        """Builds model and optimizer."""

    @abc.abstractmethod
    def train_step(self, window_ids):
        """Trains on [batch_size, window + 1] int32 ids (labels are the inputs shifted by one), to the end.

        Returns:
          The loss in nats, a float; it has waited for everything the step does.
        """


class QualityPeer(Peer):
    """A side that also takes part in the comparison of time to quality."""

    @abc.abstractmethod
    def start_epoch(self):
        """Forgets the carried state."""

    @abc.abstractmethod
    def evaluate(self, batches):
        """Exact mean loss in nats over the `Batch`es of an evaluation, state carried from one to the next."""

    @abc.abstractmethod
    def end_epoch(self, validation_loss):
        """Adapts what depends on it, such as the learning rate."""

    @abc.abstractmethod
    def save(self, path):
        """Writes the state at the end of an epoch."""

    @abc.abstractmethod
    def restore(self, path):
        """Reads it."""
