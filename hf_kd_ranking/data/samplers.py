"""The order in which training reads its rows."""

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler


class ShuffledSampler(Sampler[int]):
    """A seeded permutation of the rows, another one each epoch, the same after a resume.

    The permutation is one int32 tensor (160 MB for 40 million rows), turned into Python integers a chunk at a time;
    `RandomSampler` makes a list of them all, 1.6 GB.

    Args:
        data: what is sampled; fewer than 2^31 rows.
        seed: of the order; the epoch is added to it.
        chunk_size: rows turned into integers at once.
    """

    def __init__(self, data: Sized, seed: int, chunk_size: int = 65_536) -> None:
        self.data = data
        self.seed = seed
        self.chunk_size = chunk_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives; Trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.data), generator=generator, dtype=torch.int32)
        for chunk in order.split(self.chunk_size):
            yield from chunk.tolist()

    def __len__(self) -> int:
        return len(self.data)
