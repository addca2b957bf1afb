"""What a warm start has loaded, skipped and left as it was, as data and as text."""

import collections
import dataclasses
from collections.abc import Mapping

from lmscale.parameters.tree import RUN_STATE_PATH, SLOT_PATH


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """One tensor that was loaded.

    Attributes:
      path: in the new run.
      from_path: in the checkpoint.
      rows_kept: rows that have the values of the checkpoint; 1 for a scalar.
      new_rows: rows of words that the old vocabulary lacks.
      removed_rows: rows of words that the new vocabulary lacks.
    """

    path: str
    from_path: str
    rows_kept: int
    new_rows: int = 0
    removed_rows: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """One tensor of the checkpoint that was not used, and why."""

    from_path: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStartReport:
    """What a warm start did.

    Attributes:
      checkpoint: folder of the checkpoint.
      step: updates that its run had done.
      loaded: tensors with values of the checkpoint, in the order of the new run.
      skipped: tensors of the checkpoint that were not used.
      fresh: paths of the new run that were left as they were initialised.
      removed_words: the most frequent of the words whose rows were left behind.
      updates: {path: updates} that the update rule of a parameter whose slots were loaded had counted.
    """

    checkpoint: str
    step: int
    loaded: tuple[Loaded, ...]
    skipped: tuple[Skipped, ...]
    fresh: tuple[str, ...]
    removed_words: tuple[str, ...] = ()
    updates: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        """Aligned tables. Each line is indented by four spaces: to Markdown, a block to be shown as it stands."""
        lines = [
            f"warm start from {self.checkpoint}, step {self.step:,}",
            f"{len(self.loaded):,} loaded, {len(self.skipped):,} skipped, {len(self.fresh):,} left as initialised",
        ]
        if self.loaded:
            header = ("loaded", "from", "rows kept", "new rows", "removed rows")
            rows = [
                (t.path, t.from_path, f"{t.rows_kept:,}", f"{t.new_rows:,}", f"{t.removed_rows:,}")
                for t in self.loaded
            ]
            lines += ["", *_aligned([header, *rows], num_text_columns=2)]
        if self.removed_words:
            removed = max(t.removed_rows for t in self.loaded)
            # As literals: a word may hold characters that a terminal obeys.
            words = ", ".join(map(repr, self.removed_words))
            rest = removed - len(self.removed_words)
            lines += ["", f"removed words: {words}" + (f" and {rest:,} more" if rest else "")]
        if self.skipped:
            reasons = _in_brief((t.from_path, t.reason) for t in self.skipped)
            lines += ["", *_aligned([("skipped", "why"), *reasons], num_text_columns=2)]
        if self.fresh:
            lines += [
                "",
                "left as initialised",
                *(what for what, _ in _in_brief((p, "") for p in self.fresh)),
            ]
        return "".join(f"    {line}\n" if line else "\n" for line in lines)


def _in_brief(paths_and_reasons):
    """[(what, reason)]: parameters by their paths, then slots and what a run carries along as counts by reason."""
    parameters, counts = [], collections.Counter()
    for path, reason in paths_and_reasons:
        if SLOT_PATH.fullmatch(path):
            counts["optimizer slots", reason] += 1
        elif RUN_STATE_PATH.fullmatch(path):
            counts["states and seeds", reason] += 1
        else:
            parameters.append((path, reason))
    return [*parameters, *((f"{what}: {count:,}", reason) for (what, reason), count in counts.items())]


def _aligned(rows, *, num_text_columns):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if i < num_text_columns else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
