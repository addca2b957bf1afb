"""PyTorch: a tied LSTM with a full softmax and plain SGD, after the word_language_model example of pytorch/examples."""

import torch
from torch import nn

from lmscale.benchmarks.peers.peer import QualityPeer


class TiedLstm(nn.Module):
    """Embedding, LSTM layers, and a decoder that shares the embedding's weight."""

    def __init__(self, shape):
        super().__init__()
        self.dropout = nn.Dropout(shape.dropout)
        self.embedding = nn.Embedding(shape.vocab_size, shape.embed_dim)
        self.lstm = nn.LSTM(shape.embed_dim, shape.hidden_dim, shape.num_layers, dropout=shape.dropout)
        self.decoder = nn.Linear(shape.hidden_dim, shape.vocab_size)
        self.decoder.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, inputs, state):
        """[time, batch] ids -> (logits [time, batch, vocab_size], new state)."""
        hidden, state = self.lstm(self.dropout(self.embedding(inputs)), state)
        return self.decoder(self.dropout(hidden)), state


class PytorchFullSoftmax(QualityPeer):
    """The example's recipe: learning rate 20, gradient clipped at 0.25, the rate a quarter when validation stalls."""

    learning_rate = 20.0
    clip_norm = 0.25

    def __init__(self, shape, *, autocast=False):
        torch.manual_seed(0)
        self.shape = shape
        self._autocast = autocast
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = TiedLstm(shape).to(self._device)
        self.loss = nn.CrossEntropyLoss()
        self._state = None
        self._best = float("inf")

    def start_epoch(self):
        self._state = None

    def train_step(self, window_ids):
        ids = torch.from_numpy(window_ids).to(self._device).long().T
        self.model.train()
        self.model.zero_grad()
        state = self._state and tuple(s.detach() for s in self._state)
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._autocast):
            logits, self._state = self.model(ids[:-1], state)
            loss = self.loss(logits.reshape(-1, self.shape.vocab_size), ids[1:].reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(parameter.grad, alpha=-self.learning_rate)
        return loss.item()

    def evaluate(self, batches):
        self.model.eval()
        total, count, state = 0.0, 0, None
        with torch.no_grad():
            for batch in batches:
                ids = torch.from_numpy(batch.features["ids"]).to(self._device).long().T
                logits, state = self.model(ids[:-1], state)
                losses = nn.functional.cross_entropy(
                    logits.reshape(-1, self.shape.vocab_size),
                    ids[1:].reshape(-1),
                    reduction="none",
                )
                weights = torch.from_numpy(batch.features["weights"]).to(self._device).T.reshape(-1)
                total += float((losses * weights).sum())
                count += float(weights.sum())
        return total / count

    def end_epoch(self, validation_loss):
        if validation_loss >= self._best:
            self.learning_rate /= 4
        self._best = min(self._best, validation_loss)

    def save(self, path):
        state = {"model": self.model.state_dict(), "learning_rate": self.learning_rate, "best": self._best}
        torch.save(state, path)

    def restore(self, path):
        state = torch.load(path, map_location=self._device)
        self.model.load_state_dict(state["model"])
        self.learning_rate, self._best = state["learning_rate"], state["best"]
