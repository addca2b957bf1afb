"""A run that starts from the parameters of another: tensors by patterns over their paths, rows by their words."""

import dataclasses
import difflib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from lmscale.checkpoints.saved import SavedCheckpoint, open_checkpoint
from lmscale.data.vocab import Vocabulary
from lmscale.parameters.pieces import spell
from lmscale.parameters.tree import RUN_STATE_PATH, SLOT_PATH, Parameter
from lmscale.parameters.warm_start_report import Loaded, Skipped, WarmStartReport
from lmscale.paths import expand

_TABLE = re.compile(r"(slots/)?tables/(?P<name>[^/]+)/.+")
# Rows are written in parts of this size: what a write copies is small beside the block that was read.
_PART_BYTES = 2**23
# Sums of pieces that are held at a time: the checkpoint's rows are read once for each so many.
_SUM_BYTES = 2**24
_NAMED_WORDS = 10
_SAME = r"\g<0>"


@dataclasses.dataclass(frozen=True)
class _RowsByWord:
    """Where the rows of one vocabulary go in another: row i of the old to `new_ids[i]`, or nowhere where that is -1."""

    new_ids: np.ndarray  # [old rows] int64
    without_old: np.ndarray  # ids of the words that only the new vocabulary has
    removed_words: tuple[str, ...]
    # The old rows that spell the words of `without_old`, word after word, and how many are of each.
    pieces: np.ndarray
    num_pieces: np.ndarray

    @property
    def num_kept(self):
        return int(np.count_nonzero(self.new_ids >= 0))


@dataclasses.dataclass(frozen=True)
class _Move:
    """One tensor to load."""

    from_path: str
    by_word: bool  # Else whole.


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Which parameters of a checkpoint a new run starts from.

    Patterns are regular expressions over the whole paths of the checkpoint's parameters (`layers/lstm_0/kernel`), not
    of their slots, which go where their parameters go, nor of what a run carries from step to step (`state/...`,
    seeds), which is never loaded.

    Attributes:
      checkpoint: a working directory, for its newest checkpoint, or one `step_XXXXXXXX` of its checkpoints.
      best: take the checkpoint of the lowest validation loss of the working directory instead.
      rename: (pattern, replacement) pairs in order: the first that matches a path decides. The replacement is the
        path in the new run, in which `\\1` stands for the pattern's first group and `\\g<0>` for the path itself; None
        for what is not to be loaded. A path that no pattern matches is not loaded either.
      slots: load optimizer slots too, of the parameters that are loaded, where the new run has a slot of the same name
        and shape. The clocks of their update rules go on from what they had counted in the old run, so that they are
        updated as its next steps would have: moments decay by the steps that really passed, and Adam's correction of
        moments that started from zero does not begin again; rows of new words are as rows that the old run never
        touched. Schedules follow the new run's steps.
      rows_by_word: bring the rows of `tables/...` to the ids that their words have in the new run's vocabulary.
        Otherwise both runs must have the same.
      vocabulary: the vocab.txt of the old run, if its working directory holds none.
      new_rows: what the rows of words without an old row start from: the new run's "initializer"; the "mean" of the
        rows that were kept; or the mean of the "pieces", the old tokens that spell the word, the longest that fits
        first, and of all kept rows for a word that they cannot spell. Their slots start anew.
    """

    checkpoint: str
    best: bool = False
    rename: Sequence[tuple[str, str | None]] = ((".*", _SAME),)
    slots: bool = False
    rows_by_word: bool = False
    vocabulary: str | None = None
    new_rows: Literal["initializer", "mean", "pieces"] = "initializer"

    def __post_init__(self):
        for pair in self.rename:
            _check_pair(pair)
        if self.new_rows not in ("initializer", "mean", "pieces"):
            raise ValueError(
                f"new_rows must be 'initializer', 'mean' or 'pieces'. Received: new_rows={self.new_rows!r}."
            )
        if not self.rows_by_word and (self.new_rows != "initializer" or self.vocabulary is not None):
            raise ValueError(
                "new_rows and vocabulary are of rows that are matched by their words. Received: "
                f"new_rows={self.new_rows!r}, vocabulary={self.vocabulary!r}, rows_by_word=False. Set "
                "rows_by_word = True, or leave them out."
            )

    def apply(
        self, parameters: Sequence[Parameter], *, vocabularies: Mapping[str, Vocabulary] | None = None
    ) -> WarmStartReport:
        """Writes values of the checkpoint into a new run's parameters.

        Everything is compared before anything is written. Tensors pass through host memory in the blocks that were
        saved; of a table, the words and ids of both vocabularies are held besides.

        Args:
          parameters: all of the new run's, slots and state included, with their initial values.
          vocabularies: {table of the new run: its words}; tables may be missing where they do not matter.

        Raises:
          ValueError: if there is no whole checkpoint; if a pattern decides nothing, or all together load nothing; if
            two paths get one new name, or one that the new run lacks; if shapes or dtypes disagree; if a table's rows
            are of another vocabulary and rows_by_word is False; if the old vocabulary is not to be found, or another
            one.
        """
        saved = open_checkpoint(self.checkpoint, best=self.best)
        new = {parameter.path: parameter for parameter in parameters}
        tensors = {path: (parameter.shape, parameter.dtype) for path, parameter in new.items()}
        targets, skipped = self._targets(saved)
        vocabularies = vocabularies or {}
        moves = self._moves(saved, tensors, targets, vocabularies)
        skipped += self._add_slots(saved, tensors, targets, moves)
        matches = self._matches(saved, moves, vocabularies)
        loaded = [
            self._load(saved, moves[path], parameter, matches.get(_table_name(path)))
            for path, parameter in new.items()
            if path in moves
        ]
        removed_words = dict.fromkeys(word for rows in matches.values() for word in rows.removed_words)
        return WarmStartReport(
            checkpoint=str(saved.directory),
            step=saved.step,
            loaded=tuple(loaded),
            skipped=tuple(sorted(skipped, key=lambda entry: entry.from_path)),
            fresh=tuple(path for path in new if path not in moves),
            removed_words=tuple(removed_words)[:_NAMED_WORDS],
            updates=_updates(saved, moves),
        )

    def check(
        self,
        tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        *,
        vocabularies: Mapping[str, Vocabulary],
    ):
        """Raises ValueError as `apply` does, but for what is read later: the old vocabulary.

        Args:
          tensors: {path: (shape, dtype)} of the new run's parameters; slots need not be there.
          vocabularies: as of `apply`.

        Returns:
          The paths of the new run that it would load.
        """
        saved = open_checkpoint(self.checkpoint, best=self.best)
        return set(self._moves(saved, tensors, self._targets(saved)[0], vocabularies))

    # What goes where.

    def _targets(self, saved):
        """{path of the checkpoint: path of the new run}, and what is `Skipped`."""
        paths = [
            path
            for path in saved.tensors
            if not (SLOT_PATH.fullmatch(path) or RUN_STATE_PATH.fullmatch(path))
        ]
        targets, skipped, decided = {}, [], set()
        for path in paths:
            for number, (pattern, replacement) in enumerate(self.rename):
                if match := re.fullmatch(pattern, path):
                    decided.add(number)
                    if replacement is None:
                        skipped.append(Skipped(from_path=path, reason=f"rename says None for {pattern!r}"))
                    else:
                        targets[path] = match.expand(replacement)
                    break
            else:
                skipped.append(Skipped(from_path=path, reason="no pattern of rename matches it"))
        for number, (pattern, _) in enumerate(self.rename):
            matched = [path for path in paths if re.fullmatch(pattern, path)]
            if not matched:
                raise ValueError(
                    f"Each pattern of rename must match a parameter of {saved.directory}. Received: {pattern!r}, "
                    f"which matches none. {_near(pattern, paths)} Correct the pattern, or take it out."
                )
            if number not in decided:
                raise ValueError(
                    "Each pattern of rename must decide about a parameter. Received: "
                    f"{pattern!r}, all of whose matches, {_some(matched)}, an earlier pattern takes. Move it before "
                    "that one, or take it out."
                )
        if not targets:
            raise ValueError(
                f"rename must load a parameter of {saved.directory}. Received: {self.rename!r}, which loads none of "
                f"{_some(paths)}. Add a pair with a replacement, or set Experiment.warm_start = None."
            )
        skipped += [
            Skipped(from_path=path, reason="state of the old run")
            for path in saved.tensors
            if RUN_STATE_PATH.fullmatch(path)
        ]
        return targets, skipped

    def _moves(self, saved, new, targets, vocabularies):
        """{path of the new run: `_Move`} of the parameters; ValueError that names each that cannot be."""
        moves: dict[str, _Move] = {}
        problems = []
        loadable = [path for path in new if not (SLOT_PATH.fullmatch(path) or RUN_STATE_PATH.fullmatch(path))]
        for from_path, path in targets.items():
            what = from_path if path == from_path else f"{from_path}, renamed to {path},"
            if path in moves:
                problems.append(
                    f"{what} and {moves[path].from_path} cannot both be loaded into {path}. Rename one of them to "
                    "another path, or to None."
                )
                continue
            if path not in loadable:
                problems.append(
                    f"{what} is no parameter of the new run. {_near(path, loadable)} Rename it to one of them, or "
                    "to None."
                )
                continue
            old_table = _table_name(from_path)
            is_table = bool(old_table and _table_name(path))
            vocabulary = vocabularies.get(_table_name(path))
            new_sha256 = None if vocabulary is None else vocabulary.sha256
            old_sha256 = saved.vocabulary_sha256(old_table) if old_table else None
            same_words = old_sha256 == new_sha256 if old_sha256 and new_sha256 else None
            by_word = self.rows_by_word and is_table and not same_words
            mismatch = _mismatch(
                saved.tensors[from_path],
                new[path],
                is_table=is_table,
                by_word=by_word,
                same_words=same_words,
                num_words=None if vocabulary is None else len(vocabulary),
            )
            if mismatch:
                problems.append(f"{what} {mismatch}")
            moves[path] = _Move(from_path, by_word)
        if problems:
            raise ValueError(
                f"The checkpoint {saved.directory} does not fit the new run:\n  " + "\n  ".join(problems)
            )
        return moves

    def _add_slots(self, saved, new, targets, moves):
        """Adds the slots that can be loaded to `moves`; returns the others, as `Skipped`."""
        skipped = []
        for from_path, (old_shape, old_dtype) in saved.tensors.items():
            match = SLOT_PATH.fullmatch(from_path)
            if not match:
                continue
            owner = targets.get(match["parameter"])
            path = f"slots/{owner}/{match['slot']}"
            reason = None
            if not self.slots:
                reason = "slots = False"
            elif owner is None:
                reason = "its parameter is not loaded"
            elif path not in new:
                reason = f"the new run has no {path}"
            else:
                by_word = moves[owner].by_word
                # Rows that are matched by their words may be of any number.
                first = 1 if by_word else 0
                new_shape, new_dtype = new[path]
                if (old_shape[first:], old_dtype) == (new_shape[first:], new_dtype):
                    moves[path] = _Move(from_path, by_word)
                else:
                    reason = f"{old_dtype.name} {old_shape}, in the new run {new_dtype.name} {new_shape}"
            if reason:
                skipped.append(Skipped(from_path=from_path, reason=reason))
        return skipped

    def _matches(self, saved, moves, vocabularies) -> dict[str, _RowsByWord]:
        """{table of the new run: where its rows come from}, of those whose rows are brought by word."""
        by_tables: dict = {}  # Those of one vocabulary on both sides are matched once.
        matches = {}
        for path, move in moves.items():
            table = _table_name(path)
            if move.by_word and table not in matches:
                new = vocabularies[table]  # `_moves` has asked for it.
                old_path = self._old_vocabulary_path(saved, move)
                if (id(new), old_path) not in by_tables:
                    by_tables[id(new), old_path] = self._match_rows(saved, old_path, moves, new)
                matches[table] = by_tables[id(new), old_path]
        return matches

    def _old_vocabulary_path(self, saved, move) -> Path:
        if self.vocabulary:
            return Path(expand(self.vocabulary))
        return saved.vocabulary_path(_table_name(move.from_path))

    def _match_rows(self, saved, path, moves, vocabulary) -> _RowsByWord:
        try:
            content = path.read_bytes()
            old = Vocabulary.from_text(content.decode(), required=())
        except OSError as error:
            raise ValueError(
                "The words of the old run's rows must be known to match them. Received: "
                f"{path}, which cannot be read ({error.strerror}). Set WarmStart.vocabulary to the vocab.txt of the "
                "data that the old run was trained on."
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{path} must be the vocab.txt of the old run: {error} Set WarmStart.vocabulary to the vocab.txt of "
                "the data that the old run was trained on."
            ) from error
        digest = hashlib.sha256(content).hexdigest()
        for move in moves.values():
            if not move.by_word or self._old_vocabulary_path(saved, move) != path:
                continue
            num_rows = saved.tensors[move.from_path][0][0]
            known = saved.vocabulary_sha256(_table_name(move.from_path))
            if num_rows != len(old) or (known and known != digest):
                raise ValueError(
                    f"The vocabulary of the old run must be that of {move.from_path} in {saved.directory}, "
                    f"{num_rows:,} rows{f', SHA-256 {known[:12]}' if known else ''}. Received: {path}, "
                    f"{len(old):,} words, SHA-256 {digest[:12]}. Set WarmStart.vocabulary to the vocab.txt of the "
                    "data that the old run was trained on."
                )
        ids = vocabulary.ids
        new_ids = np.fromiter((ids.get(token, -1) for token in old.tokens), np.int64, count=len(old))
        has_old = np.zeros([len(vocabulary)], bool)
        has_old[new_ids[new_ids >= 0]] = True
        removed, without_old = np.flatnonzero(new_ids < 0), np.flatnonzero(~has_old)
        spelled = without_old if self.new_rows == "pieces" else ()
        pieces, num_pieces = spell((vocabulary.tokens[i] for i in spelled), old.tokens)
        return _RowsByWord(
            new_ids=new_ids,
            without_old=without_old,
            removed_words=tuple(old.tokens[i] for i in removed[:_NAMED_WORDS]),
            pieces=pieces,
            num_pieces=num_pieces,
        )

    # Moving it.

    def _load(self, saved: SavedCheckpoint, move: _Move, parameter: Parameter, rows: _RowsByWord | None):
        parts = self._rows(saved, move.from_path)
        if not move.by_word:
            for start, values in parts:
                if values.ndim:  # Every process has read them.
                    parameter.scatter(np.arange(start, start + len(values)), values)
                else:
                    parameter.write(start, values)
            rows_kept = parameter.shape[0] if parameter.shape else 1
            return Loaded(path=parameter.path, from_path=move.from_path, rows_kept=rows_kept)
        assert rows is not None
        has_mean = self.new_rows != "initializer" and not SLOT_PATH.fullmatch(parameter.path)
        total = np.zeros(parameter.shape[1:], np.float64)
        for start, values in parts:
            new_ids = rows.new_ids[start : start + len(values)]
            kept = np.flatnonzero(new_ids >= 0)
            values = values[kept]
            parameter.scatter(new_ids[kept], values)
            if has_mean:
                total += values.sum(axis=0, dtype=np.float64)
        if has_mean:
            # <unk> is in every vocabulary: one row at least was kept.
            mean = total / rows.num_kept
            unspelled = rows.without_old
            if self.new_rows == "pieces":
                unspelled = rows.without_old[rows.num_pieces == 0]
                self._fill_spelled(saved, move.from_path, parameter, rows)
            for ids in _parts(unspelled, row_bytes=mean.nbytes):
                parameter.scatter(ids, np.broadcast_to(mean.astype(parameter.dtype), (len(ids), *mean.shape)))
        return Loaded(
            path=parameter.path,
            from_path=move.from_path,
            rows_kept=rows.num_kept,
            new_rows=len(rows.without_old),
            removed_rows=len(rows.new_ids) - rows.num_kept,
        )

    def _fill_spelled(self, saved, from_path, parameter, rows):
        """Sets the row of each new word that old tokens spell to the mean of their rows."""
        row_bytes = math.prod(parameter.shape[1:]) * np.dtype(np.float64).itemsize
        word_of_piece = np.repeat(np.arange(len(rows.without_old)), rows.num_pieces)
        spelled = np.flatnonzero(rows.num_pieces)
        for words in _parts(spelled, row_bytes=row_bytes, part_bytes=_SUM_BYTES):
            first, last = np.searchsorted(word_of_piece, [words[0], words[-1] + 1])
            pieces = rows.pieces[first:last]
            position = np.searchsorted(words, word_of_piece[first:last])  # Of each piece's word; rising.
            sums = np.zeros((len(words), *parameter.shape[1:]), np.float64)
            for start, values in self._rows(saved, from_path):
                here = np.flatnonzero((pieces >= start) & (pieces < start + len(values)))
                if len(here):
                    # One addition a word, of all its pieces that are here.
                    starts = np.flatnonzero(np.diff(position[here], prepend=-1))
                    found = values[pieces[here] - start].astype(np.float64)
                    sums[position[here][starts]] += np.add.reduceat(found, starts, axis=0)
            num_pieces = rows.num_pieces[words].reshape([-1] + [1] * (sums.ndim - 1))
            parameter.scatter(rows.without_old[words], (sums / num_pieces).astype(parameter.dtype))

    def _rows(self, saved, path) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of a tensor of the checkpoint, part by part."""
        for start, stop in saved.blocks(path):
            block = saved.read(path, start, stop)
            if not block.ndim:
                yield start, block
                continue
            for part in _parts(block, row_bytes=math.prod(block.shape[1:]) * block.itemsize):
                yield start, part
                start += len(part)
            block = part = None  # Not kept while the next one is read.


def _updates(saved, moves):
    """{path of the new run: what the clock of its rule had counted}, of the parameters whose slots are loaded."""
    with_slots = (match["parameter"] for match in map(SLOT_PATH.fullmatch, moves) if match)
    return {path: saved.updates(moves[path].from_path) for path in with_slots}


def _table_name(path):
    """NAME of `tables/NAME/...` and of its slots; None for other paths."""
    match = _TABLE.fullmatch(path)
    return match["name"] if match else None


def _mismatch(saved, new, *, is_table, by_word, same_words, num_words):
    """Why a saved tensor cannot be loaded into one of the new run, each (shape, dtype); None if it can be."""
    (old_shape, old_dtype), (new_shape, new_dtype) = saved, new
    received = f"Received: {old_dtype.name} {old_shape} in the checkpoint, {new_dtype.name} {new_shape} in the new run."
    if old_dtype != new_dtype:
        return f"must have one dtype. {received} Rename it to None to leave it out."
    if by_word and old_shape[1:] != new_shape[1:]:
        return f"must have rows of one shape. {received} Rename it to None to leave it out."
    if by_word and num_words != new_shape[0]:
        words = "no vocabulary" if num_words is None else f"a vocabulary of {num_words:,} words"
        return (
            f"needs the word of each of the {new_shape[0]:,} rows of the new run. Received: {words}. Rename it "
            "to None, or set rows_by_word = False."
        )
    if is_table and not by_word and same_words is False:
        return (
            f"must have rows of the same words: the vocabularies differ. {received} Set rows_by_word = True, or "
            "rename it to None."
        )
    if not by_word and old_shape != new_shape:
        by_words = ", or set rows_by_word = True" if is_table and old_shape[1:] == new_shape[1:] else ""
        return f"must have one shape. {received} Rename it to None to leave it out{by_words}."
    return None


def _parts(rows, *, row_bytes, part_bytes=_PART_BYTES):
    """The rows in parts of about so many bytes."""
    num_rows = max(part_bytes // max(row_bytes, 1), 1)
    for start in range(0, len(rows), num_rows):
        yield rows[start : start + num_rows]


def _check_pair(pair):
    try:
        pattern, replacement = pair
        if not isinstance(pattern, str) or not isinstance(replacement, str | None):
            raise TypeError
        # Substituting in no text at all still checks the replacement's groups.
        re.compile(pattern).sub(replacement or "", "")
    except (TypeError, ValueError) as error:
        raise ValueError(
            "rename must hold pairs of a pattern and a replacement, both strings, or None for the replacement. "
            f"Received: {pair!r}. Write, for example, ('layers/(.*)', 'layers/encoder/\\\\1')."
        ) from error
    except (re.error, IndexError) as error:
        raise ValueError(
            f"rename must hold regular expressions and replacements of them. Received: {pair!r} ({error}). Correct "
            "it: `.` and brackets have a meaning in a pattern, and `\\1` is its first group."
        ) from error


def _near(name, paths):
    near = difflib.get_close_matches(name, paths, n=3, cutoff=0.5)
    return f"Near misses: {', '.join(near)}." if near else f"There are: {_some(paths)}."


def _some(paths):
    return ", ".join(paths[:_NAMED_WORDS]) + (
        f" and {len(paths) - _NAMED_WORDS} more" if len(paths) > _NAMED_WORDS else ""
    )
