"""Text to the ids of a prepared directory and back: cut as the text there was cut."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lmscale.data.text_files import expand_patterns, read_blocks
from lmscale.data.token_files import PreparedData
from lmscale.data.tokenizers import make_tokenizer, prepared_tokenizer
from lmscale.data.vocab import EOS


class RawText:
    """Reads and writes text for a model of prepared data.

    Attributes:
      num_tokens, num_unknown: tokens read so far, and those among them that became `<unk>`.
    """

    def __init__(self, data: PreparedData, *, tokenized: bool = False):
        """Args:
          data: the prepared data.
          tokenized: the text is cut already, and its tokens stand between blanks.
        Raises:
          ValueError: as `prepared_tokenizer`, unless `tokenized`.
        """
        self._vocabulary = data.vocabulary
        self._tokenizer = (
            make_tokenizer("whitespace", options={})
            if tokenized
            else prepared_tokenizer(data.manifest.get("options") or {}, data.directory)
        )
        self.num_tokens = self.num_unknown = 0

    def ids(self, line: str) -> np.ndarray:
        """[tokens] int32 of a line, without `<eos>`."""
        return self._ids(self._tokenizer.tokenize([line])[0])

    def lines(self, path: Path | None) -> Iterator[np.ndarray]:
        """Those of each line of a UTF-8 file, plain or compressed, or of stdin (None), each with `<eos>` behind it.

        Raises:
          ValueError: as `expand_patterns` and `read_blocks`: for a file that is missing, empty, damaged or not UTF-8.
        """
        if path is None:
            with tempfile.NamedTemporaryFile(prefix="stdin_") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
                file.flush()
                if not file.tell():
                    raise ValueError(
                        "There must be text on stdin. Received: 0 bytes. Name a file, or pipe one in."
                    )
                try:
                    yield from self._lines_of(Path(file.name))
                except ValueError as error:
                    raise ValueError(str(error).replace(file.name, "stdin")) from error
        else:
            for each in expand_patterns([str(path)], flag="input"):
                yield from self._lines_of(each)

    def _lines_of(self, path):
        started: list[str] = []
        for block in read_blocks(path):
            tokens_of_lines = self._tokenizer.tokenize(block.lines)
            for number, tokens in enumerate(tokens_of_lines, start=1):
                started += tokens
                if number < len(tokens_of_lines) or block.ends_line:
                    yield self._ids([*started, EOS])
                    started = []

    def _ids(self, tokens):
        known = self._vocabulary.ids
        self.num_tokens += len(tokens)
        self.num_unknown += sum(token not in known for token in tokens)
        return np.fromiter(map(known.__getitem__, tokens), np.int32, len(tokens))

    def tokens(self, ids) -> list[str]:
        """The tokens of ids."""
        return [self._vocabulary.tokens[token_id] for token_id in ids]

    def text(self, ids) -> str:
        """Ids as one reads them, `<eos>` as the end of a line."""
        lines: list[list[str]] = [[]]
        for token in self.tokens(ids):
            if token == EOS:
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(map(self._tokenizer.join, lines))
