"""Texts that a model writes: each token drawn from the exact softmax over all rows, and read in turn."""

import dataclasses
import itertools

import numpy as np
import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.distribution.strategies import first_local_replica
from lmscale.softmax.gumbel import gumbel
from lmscale.tasks.left_to_right import check_left_to_right

# Tokens of a prompt that are read at once, where there are so many.
_PROMPT_WINDOW = 32
# How many of the most probable tokens are looked at for a nucleus: at first, and how many times as many then.
_FIRST_NUCLEUS, _NUCLEUS_GROWTH = 64, 8


@dataclasses.dataclass(frozen=True)
class GeneratedText:
    """What was written behind a prompt.

    Attributes:
      prompt, sample: numbers of the prompt and of the text among those behind it.
      ids: [n] int, the tokens behind the prompt; `<eos>` the last unless it was cut off.
      log_probs: [n] float64 nats under the model, whatever the rule by which they were chosen.
      is_finished: whether as many lines were written as were asked for.
    """

    prompt: int
    sample: int
    ids: np.ndarray
    log_probs: np.ndarray
    is_finished: bool


class Generator:
    """Writes texts with a restored model, on its devices.

    The choices are the same on any number of devices, but where the rounding of float32 products tips a balance.
    """

    def __init__(self, restored, *, sampling, batch_size):
        """Args:
          restored: `RestoredModel`, filled.
          sampling: `Sampling`.
          batch_size: texts side by side, over all devices.

        Raises:
          ValueError: for a task that does not predict text from left to right.
        """
        check_left_to_right(restored.task)
        self._model, self._task = restored.model, restored.task
        self._strategy = strategy = restored.strategy
        self._compute_dtype = tf.as_dtype(restored.experiment.compute_dtype)
        self._sampling = sampling
        self._eos_id, self._unk_id = restored.data.eos_id, restored.data.unk_id
        self._num_rows = restored.task.num_rows(restored.task.heads[restored.task.token_head].table)
        self._batch_size = batch_size
        self._num_replicas = strategy.num_replicas_in_sync
        self._per_replica = -(-batch_size // self._num_replicas)
        num_local = len(strategy.extended.worker_devices)
        first = first_local_replica(strategy, num_local=num_local) * self._per_replica
        self._local = slice(first, first + num_local * self._per_replica)

    def generate(self, prompts, *, num_samples, max_tokens, max_lines, on_tokens=None):
        """Writes `num_samples` texts behind each prompt.

        Args:
          prompts: list of [tokens] arrays of ids, which may be empty; `<eos>` is put before each.
          num_samples: texts behind each.
          max_tokens: tokens of a text at most.
          max_lines: a text ends with so many `<eos>`.
          on_tokens: called with the number of tokens written so far, now and then.

        Yields:
          `GeneratedText` of each prompt and sample, in order, batch by batch.

        Raises:
          ValueError: if the model's logits are not finite.
        """
        length = 1 + max(map(len, prompts)) + max_tokens
        texts = ((prompt, sample) for prompt in range(len(prompts)) for sample in range(num_samples))
        num_before = written = 0
        while batch := list(itertools.islice(texts, self._batch_size)):
            starts = [
                np.concatenate([[self._eos_id], prompts[prompt]]).astype(np.int32) for prompt, _ in batch
            ]
            writing = [
                _Text(start, max_tokens=max_tokens, max_lines=max_lines, eos_id=self._eos_id)
                for start in starts
            ]
            for num_new in self._write(writing, first_text=num_before, length=length):
                written += num_new
                if on_tokens:
                    on_tokens(written)
            for (prompt, sample), text in zip(batch, writing, strict=True):
                yield GeneratedText(
                    prompt,
                    sample,
                    np.array(text.written, np.int32),
                    np.array(text.log_probs),
                    text.has_all_lines,
                )
            num_before += len(batch)

    def _write(self, texts, *, first_text, length):
        """Writes a batch of `_Text`s to their ends, side by side; yields how many tokens each step has written."""
        state = self._initial_state(length=length)
        position = 0
        while any(not text.is_over for text in texts):
            known = min(len(text.ids) for text in texts if not text.is_over) - position
            time = _PROMPT_WINDOW if known >= _PROMPT_WINDOW else 1
            ids = np.zeros([self._num_replicas * self._per_replica, time], np.int32)
            for row, text in zip(ids, texts, strict=False):
                there = text.ids[position : position + time]
                row[: len(there)] = there
            hidden, state = self._advance(tf.constant(ids[self._local]), state)
            position += time
            waiting = [i for i, text in enumerate(texts) if not text.is_over and len(text.ids) == position]
            if waiting:
                chosen, log_probs = self._choose(hidden, texts, waiting, first_text=first_text)
                for i in waiting:
                    texts[i].write(int(chosen[i]), float(log_probs[i]))
            yield len(waiting)

    def _choose(self, hidden, texts, waiting, *, first_text):
        """(ids, log-probabilities), [texts] each, of which those of `waiting` have a meaning."""
        keys = np.zeros([self._num_replicas * self._per_replica, 3], np.int32)
        for i, text in enumerate(texts):
            keys[i] = self._sampling.seed, first_text + i, len(text.written)
        keys = tf.constant(keys[self._local])
        k = min(self._sampling.top_k or _FIRST_NUCLEUS, self._num_rows)
        while True:
            results = self._select(hidden, keys, k=k)
            ids, log_probs, is_enough = (
                self._strategy.experimental_local_results(x)[0].numpy() for x in results
            )
            if k == self._num_rows or (is_enough[waiting] == 1).all():
                break
            k = min(k * _NUCLEUS_GROWTH, self._num_rows)
        if (ids[waiting] < 0).any() or not np.isfinite(log_probs[waiting]).all():
            raise ValueError(
                "The logits of a model must be finite to choose a token by. Received: NaN or infinity. Restore another "
                "checkpoint: --checkpoint."
            )
        return ids, log_probs

    # -- on the devices -------------------------------------------------------------------------------------------

    @tf.function(autograph=False)
    def _initial_state(self, *, length):
        return self._strategy.run(lambda: self._task.decoding_state(self._per_replica, length))

    @tf.function(autograph=False)
    def _advance(self, ids, state):
        """Reads ids [texts of this process, time]; (hidden [texts of a replica, dim] behind the last, new state)."""

        def replica_step(state):
            first = collectives.replica_id() * self._per_replica
            own = collectives.block(ids, first - self._local.start, self._per_replica)
            reading = self._model.read(self._task.decoding_features(own), first)
            hidden, state = self._model.decode(reading.rows.roles, state)
            return hidden[:, -1], state

        return self._strategy.run(replica_step, args=(state,))

    @tf.function(autograph=False)
    def _select(self, hidden, keys, *, k):
        """Chooses a token for each text: (ids, log-probabilities, whether k was enough), [all texts], at each replica.

        Args:
          hidden: [texts of a replica, dim] at each.
          keys: [texts of this process, 3], of `gumbel`.
          k: int, how many of the most probable tokens are looked at, where not all are.
        """

        def replica_step(hidden):
            first = collectives.replica_id() * self._per_replica
            own_keys = collectives.block(keys, first - self._local.start, self._per_replica)
            chosen = self._choice(hidden, own_keys, k=k)
            return [collectives.all_gather(x) for x in chosen]

        return self._strategy.run(replica_step, args=(hidden,))

    def _choice(self, hidden, keys, *, k):
        sampling = self._sampling
        options = {
            "head": self._task.token_head,
            "excluded": None if sampling.with_unk else tf.fill([self._per_replica, 1], self._unk_id),
            "with_logsumexp": True,
            "compute_dtype": self._compute_dtype,
        }
        is_enough = tf.fill([self._per_replica], True)
        if sampling.is_greedy:
            best = self._model.top_k(hidden, k=1, **options)
            place = tf.zeros([self._per_replica, 1], tf.int32)
        elif sampling.is_of_all_tokens:
            all_keys = collectives.all_gather(keys)
            best = self._model.top_k(
                hidden,
                k=1,
                temperature=sampling.temperature,
                noise=lambda ids: gumbel(all_keys, ids),
                **options,
            )
            place = tf.zeros([self._per_replica, 1], tf.int32)
        else:
            best = self._model.top_k(
                hidden,
                k=k,
                temperature=sampling.temperature,
                with_allowed_logsumexp=sampling.top_k is None,
                **options,
            )
            logits = best.scores / sampling.temperature
            total = best.allowed_logsumexp if sampling.top_k is None else tf.reduce_logsumexp(logits, axis=1)
            probabilities = tf.exp(logits - total[:, tf.newaxis])
            # The probability of the more probable tokens: the nucleus ends with the token that makes it enough.
            before = tf.cumsum(probabilities, axis=1, exclusive=True)
            is_in = (before < sampling.top_p) & (best.ids >= 0)
            if sampling.top_k is None:
                is_enough = tf.reduce_sum(probabilities, axis=1) >= sampling.top_p
            ranks = tf.where(is_in, logits + gumbel(keys, best.ids), -float("inf"))
            place = tf.argmax(ranks, axis=1, output_type=tf.int32)[:, tf.newaxis]
        ids, logits = (tf.gather(x, place, batch_dims=1)[:, 0] for x in (best.ids, best.scores))
        return ids, logits - best.logsumexp, tf.cast(is_enough, tf.int32)  # Booleans cannot be gathered.


class _Text:
    """A text that is being written."""

    def __init__(self, ids, *, max_tokens, max_lines, eos_id):
        self.ids = list(ids)
        self.written: list[int] = []
        self.log_probs: list[float] = []
        self._max_tokens, self._max_lines, self._eos_id = max_tokens, max_lines, eos_id

    def write(self, token_id, log_prob):
        self.ids.append(token_id)
        self.written.append(token_id)
        self.log_probs.append(log_prob)

    @property
    def has_all_lines(self):
        return self.written.count(self._eos_id) >= self._max_lines

    @property
    def is_over(self):
        return len(self.written) >= self._max_tokens or self.has_all_lines
