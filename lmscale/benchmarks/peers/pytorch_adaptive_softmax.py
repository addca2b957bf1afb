"""PyTorch: an LSTM with `torch.nn.AdaptiveLogSoftmaxWithLoss`, which approximates the full softmax by clusters."""

import torch
from torch import nn

from lmscale.benchmarks.peers.peer import Peer


class PytorchAdaptiveSoftmax(Peer):
    """Embedding and softmax are not tied: the adaptive softmax has projections of its own. Plain SGD."""

    learning_rate = 1.0
    clip_norm = 0.25

    def __init__(self, shape):
        torch.manual_seed(0)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._embedding = nn.Embedding(shape.vocab_size, shape.embed_dim)
        self._lstm = nn.LSTM(shape.embed_dim, shape.hidden_dim, shape.num_layers)
        # A tenth and a half of the vocabulary, at most the 20,000 and 100,000 of the paper's large corpora.
        cutoffs = [min(20_000, shape.vocab_size // 10), min(100_000, shape.vocab_size // 2)]
        self._softmax = nn.AdaptiveLogSoftmaxWithLoss(shape.hidden_dim, shape.vocab_size, cutoffs)
        self._model = nn.ModuleList([self._embedding, self._lstm, self._softmax]).to(self._device)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=self.learning_rate)
        self._state = None

    def train_step(self, window_ids):
        ids = torch.from_numpy(window_ids).to(self._device).long().T
        self._optimizer.zero_grad()
        state = self._state and tuple(s.detach() for s in self._state)
        hidden, self._state = self._lstm(self._embedding(ids[:-1]), state)
        loss = self._softmax(hidden.reshape(-1, hidden.shape[-1]), ids[1:].reshape(-1)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self.clip_norm)
        self._optimizer.step()
        return loss.item()
