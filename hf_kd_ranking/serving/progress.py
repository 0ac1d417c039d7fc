"""How far the start of the server is, for `/health` and the page."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..data.texts import TextStore


@dataclass
class Progress:
    """The stage of the start in words, and how many of its units are done; `total` is 0 if they cannot be counted."""

    stage: str = "Starting"
    done: int = 0
    total: int = 0

    def begin(self, stage: str, total: int = 0) -> None:
        """Begin a stage."""
        self.stage, self.done, self.total = stage, 0, total


class CountedTexts(TextStore):
    """The texts of a store, which report to a stage of the progress as they are read."""

    def __init__(self, documents: TextStore, progress: Progress) -> None:
        vars(self).update(vars(documents))
        self.progress = progress

    def take(self, rows: np.ndarray) -> list[str]:
        """Return the texts of some rows."""
        return _CountedList(super().take(rows), self.progress)


class _CountedList(list):
    def __init__(self, texts: list[str], progress: Progress) -> None:
        super().__init__(texts)
        self.progress = progress

    def __iter__(self) -> Iterator[str]:
        for text in super().__iter__():
            self.progress.done = min(self.progress.done + 1, self.progress.total)
            yield text
