"""The order in which training reads its rows."""

from collections.abc import Iterator, Sized

import numpy as np
import torch
from torch.utils.data import Sampler

from ..errors import InputError


class ShuffledSampler(Sampler[int]):
    """Yield a permutation of fewer than 2^31 rows, seeded by `seed` and the epoch, the same after a resume.

    The permutation is one int32 tensor (160 MB for 40 million rows), of which `chunk_size` rows at a time become
    Python integers; `RandomSampler` makes a list of all, 1.6 GB.
    """

    def __init__(self, data: Sized, seed: int, chunk_size: int = 65_536) -> None:
        self.data = data
        self.seed = seed
        self.chunk_size = chunk_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration yields; Trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # Mixed, not added: the second epoch of one seed would have the order of the first epoch of the next.
        mixed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        order = torch.randperm(len(self.data), generator=generator, dtype=torch.int32)
        for chunk in order.split(self.chunk_size):
            yield from chunk.tolist()

    def __len__(self) -> int:
        return len(self.data)


class TopicBalancedSampler(Sampler[int]):
    """Yield batches of queries on one topic, their pairs balanced over the teacher's margins (TAS-Balanced).

    Hofstätter et al. 2021, https://arxiv.org/abs/2104.06967, equations 8 and 9: for each batch a cluster of queries is
    drawn, then queries of it, each at most once; a cluster with too few queries is followed by another. For a query
    one row is drawn: first one of the bins of its margins that are not empty, then a row of the bin. Rows are drawn
    independently, so an epoch has as many batches as the rows fill, but not every row once.

    Consecutive `batch_size` indices are the batch of all processes. Memory is 4 bytes per row (8 while it is built,
    beside the arguments), and 16 per bin of each query.

    Args:
        queries: (N,) each row's query, an index into `clusters`.
        margins: (N,) each row's teacher margin.
        clusters: (Q,) cluster of each query; not read for queries without rows.
        batch_size: rows of a step on all processes.
        seed: seed of the order, together with the epoch.
        bins: number of bins of equal width, from a query's lowest margin to its highest.

    Raises:
        InputError: if there are fewer queries than a batch has rows, or a query of a row has no cluster.
    """

    def __init__(
        self,
        queries: np.ndarray,
        margins: np.ndarray,
        clusters: np.ndarray,
        batch_size: int,
        seed: int,
        bins: int = 10,
    ) -> None:
        used = np.flatnonzero(np.bincount(queries, minlength=len(clusters)))
        if len(used) < batch_size or bins < 1:
            raise InputError(
                f"A batch of {batch_size} rows on one topic takes each query once, and the rows have {len(used)} "
                f"queries, {bins} bins for their margins; make the batches smaller, with at least one bin."
            )
        if used[-1] >= len(clusters) or clusters[used].min() < 0:
            raise InputError(
                f"Each query of the rows needs a cluster, a number from 0 on, got {len(clusters):,} clusters for the "
                f"queries {used[0]} to {used[-1]}; do they belong to other queries?"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        code = np.empty(len(clusters), dtype=np.int32)
        code[used] = np.arange(len(used))
        cells = code[queries]  # each row's query, then its bin among those of all queries
        lowest = np.full(len(used), np.inf, np.float32)
        highest = np.full(len(used), -np.inf, np.float32)
        np.minimum.at(lowest, cells, margins)
        np.maximum.at(highest, cells, margins)
        width = np.where(highest > lowest, highest - lowest, 1)  # a query with one margin has one bin
        counts = np.zeros(len(used) * bins, dtype=np.int64)
        for part in _parts(len(cells)):
            own = cells[part]
            place = (margins[part] - lowest[own]) / width[own] * bins
            cells[part] = own * bins + np.minimum(place.astype(np.int32), bins - 1)
            counts += np.bincount(cells[part], minlength=len(counts))
        starts = np.cumsum(counts) - counts
        self._rows = _rows_by_cell(cells, starts)
        self._starts, self._counts = starts.reshape(-1, bins), counts.reshape(-1, bins)
        by_cluster = np.argsort(clusters[used], kind="stable")
        self._members = np.split(by_cluster, np.flatnonzero(np.diff(clusters[used][by_cluster])) + 1)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration yields; Trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        for _ in range(len(self) // self.batch_size):
            yield from self._draw_rows(rng, self._draw_queries(rng)).tolist()

    def __len__(self) -> int:
        return len(self._rows) // self.batch_size * self.batch_size

    def _draw_queries(self, rng: np.random.Generator) -> np.ndarray:
        chosen = []
        missing = self.batch_size
        for cluster in rng.permutation(len(self._members)):
            chosen.append(rng.permutation(self._members[cluster])[:missing])
            missing -= len(chosen[-1])
            if missing == 0:
                break
        return np.concatenate(chosen)

    def _draw_rows(self, rng: np.random.Generator, queries: np.ndarray) -> np.ndarray:
        counts = self._counts[queries]  # (B, bins)
        drawn = (rng.random(counts.shape) * (counts > 0)).argmax(1)
        places = rng.integers(counts[np.arange(len(queries)), drawn])
        return self._rows[self._starts[queries, drawn] + places]


def _rows_by_cell(cells: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the rows in the order of their cells; a stable argsort would need 16 bytes per row."""
    rows = np.empty(len(cells), dtype=np.int32)
    free = starts.copy()
    for part in _parts(len(cells)):
        order = np.argsort(cells[part], kind="stable")
        ordered = cells[part][order]
        rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)  # among the part's rows of one cell
        rows[free[ordered] + rank] = part.start + order
        free += np.bincount(ordered, minlength=len(free))
    return rows


def _parts(length: int, size: int = 1_000_000) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
