"""Gates on a bilinear algorithm: on its products (lambda), and on the terms of its sums (gamma). 1 is open, 0 closed.

    T_r = sum_kj gamma b[r, k, j] x_kj         y_ij = sum_r gamma c[i, j, r] lambda_r S_r T_r

Terms that have a gate are those that cost an addition while the network runs: in sums of two and more, of blocks of x and of products. A
product that only one result reads has no second gate there, and sums of blocks of a constant weight cost nothing: of the 32 gates of
equation 4.7 on Winograd's algorithm the 21 without those of W remain, and one more, since A11 B11 may here leave C12 and stay in C21.

Source: Yvinec 2023, equations 4.6 and 4.7, corrected: the variant that drops what is closed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..bilinear import BilinearAlgorithm
from .layers import BlockLayer


def encode_terms(b: Tensor) -> list[tuple[int, ...]]:
    """The (r, k, j) of terms of sums of blocks of x that have a gate."""
    several = b.flatten(1).count_nonzero(1) > 1
    return [tuple(index) for index in b.nonzero().tolist() if several[index[0]]]


def decode_terms(c: Tensor) -> list[tuple[int, ...]]:
    """The (i, j, r) of terms of sums of products that have a gate."""
    several, readers = c.count_nonzero(2) > 1, c.flatten(0, 1).count_nonzero(0)
    return [(i, j, r) for i, j, r in c.nonzero().tolist() if several[i, j] and readers[r] > 1]


class Gates(nn.Module):
    """Of one layer, or of several that share them.

    Attributes:
        products: (R,) parameters. terms: (T,) parameters, those of sums of x first, then those of results.
    """

    def __init__(self, algorithm: BilinearAlgorithm):
        super().__init__()
        self.algorithm = algorithm
        self.encode, self.decode = encode_terms(algorithm.b), decode_terms(algorithm.c)
        self.products = nn.Parameter(torch.ones(algorithm.products))
        self.terms = nn.Parameter(torch.ones(len(self.encode) + len(self.decode)))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """b and c with their gates, real numbers that can be differentiated by them."""
        b, c = (values.to(self.products.dtype) for values in (self.algorithm.b, self.algorithm.c))
        encode, decode = self.terms.split([len(self.encode), len(self.decode)])
        b, c = b * _placed(b, self.encode, encode), c * _placed(c, self.decode, decode)
        return b, c * self.products

    def remaining(self, products: Iterable[int], terms: Iterable[int] = ()) -> tuple[BilinearAlgorithm, list[int]]:
        """The algorithm with these gates closed, and the products that it still has: one without an operand or a reader is gone, too."""
        a, b, c = self.algorithm.a, self.algorithm.b.clone(), self.algorithm.c.clone()
        c[..., list(products)] = 0
        for t in terms:
            if t < len(self.encode):
                b[self.encode[t]] = 0
            else:
                c[self.decode[t - len(self.encode)]] = 0
        needed = b.flatten(1).any(1) & c.flatten(0, 1).any(0)
        kept = needed.nonzero().flatten().tolist()
        return BilinearAlgorithm(self.algorithm.name, a[kept], b[kept], c[..., kept]), kept


def _placed(like: Tensor, indices: list[tuple[int, ...]], values: Tensor) -> Tensor:
    """1, and ``values`` at ``indices``."""
    if not indices:
        return torch.ones_like(like)
    return torch.ones_like(like).index_put(tuple(torch.tensor(indices).T), values)


class GatedLayer(nn.Module):
    """A layer in blocks with gates, to train.

    Attributes:
        sums, bias: its weights.
        level: (O,) None, or the means of the results that training mode keeps: those of the batch are taken off, as batch norm would,
            and the bias is not used (mean-only batch normalization, Salimans and Kingma 2016). The scale of a channel stays: it could
            not be folded into products that several channels share.
    """

    def __init__(self, block: BlockLayer, gates: Gates):
        super().__init__()
        self.block, self.gates = block, gates
        self.sums, self.bias = nn.Parameter(block.sums.clone()), nn.Parameter(block.bias.clone())
        self.level: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.level is None or not self.training:
            return self.block.apply(x, self.sums, self.bias, *self.gates.coefficients())
        y = self.block.apply(x, self.sums, torch.zeros_like(self.bias), *self.gates.coefficients())
        return y + self.along_channels(self.level - self.means(y), y).to(y.dtype)

    def means(self, y: Tensor) -> Tensor:
        """(O,) of a result."""
        return y.mean(
            [d for d in range(y.ndim) if d != (y.ndim - 1 if self.block.is_linear else 1)], dtype=self.bias.dtype
        )

    def along_channels(self, vector: Tensor, y: Tensor) -> Tensor:
        """(O,) shaped to be added to a result."""
        return vector if self.block.is_linear else vector.reshape(-1, *[1] * (y.ndim - 2))
