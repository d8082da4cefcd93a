"""Examples to train on, by the number of the step: every epoch in an order of its own, by the seed."""

from __future__ import annotations

import functools
import zlib

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from ..errors import InputError

STAGE = "fine_tune"


class Examples:
    """Random access to examples in batches.

    Args:
        data: a tensor (N, ...) of inputs; a tuple of tensors (N, ...), the model's inputs and, last, the labels; or a
            ``torch.utils.data.Dataset`` with a length, of such samples.
    """

    def __init__(self, data: object, batch_size: int, seed: int):
        self._data = _as_dataset(data)
        self.count = len(self._data)
        if self.count < 2:
            raise InputError(f"{self.count} examples", stage=STAGE, expected="2 or more to train on",
                             remedy="Pass all of them; batch_size says how many a step sees.")  # fmt: skip
        self.batch_size, self._seed = min(batch_size, self.count), seed
        self._order = functools.lru_cache(maxsize=1)(self._order_of_epoch)

    def batch(self, step: int) -> tuple:
        """What step ``step`` sees. Of an epoch's last, incomplete batch nothing is used; the next order is another one."""
        epoch, number = divmod(step, self.count // self.batch_size)
        start = number * self.batch_size
        return self.at(self._order(epoch)[start : start + self.batch_size])

    def at(self, indices: Tensor) -> tuple:
        if type(self._data) is TensorDataset:
            return self._data[indices]
        samples = default_collate([self._data[i] for i in indices.tolist()])
        return tuple(samples) if isinstance(samples, list | tuple) else (samples,)

    def first(self, count: int) -> tuple:
        """The first ``count`` examples, as one batch; all where there are fewer."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self._seed, -1))
            return self.at(torch.arange(min(count, self.count)))

    def _order_of_epoch(self, epoch: int) -> Tensor:
        return torch.randperm(self.count, generator=torch.Generator().manual_seed(seed_of(self._seed, epoch)))


def seed_of(seed: int, count: int) -> int:
    """Another seed for every pair; 32 bits, of more torch's generator would not look at the upper ones."""
    return zlib.crc32(f"{seed} {count}".encode())


def _as_dataset(data: object) -> Dataset:
    tensors = (data,) if isinstance(data, Tensor) else data
    if isinstance(tensors, tuple | list) and tensors and all(isinstance(t, Tensor) and t.ndim for t in tensors):
        if len({len(t) for t in tensors}) > 1:
            raise InputError(f"tensors of {', '.join(str(len(t)) for t in tensors)} examples", stage=STAGE,
                             expected="(inputs, labels) of one length", remedy="Every example needs its label.")  # fmt: skip
        return TensorDataset(*tensors)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__"):
        return data
    remedy = "Pass its data set, loader.dataset, and batch_size=." if hasattr(data, "dataset") else ""
    raise InputError(f"data is {type(data).__name__}", stage=STAGE, remedy=remedy,
                     expected="a tensor, tensors (inputs, labels), or a torch Dataset with a length")  # fmt: skip
