"""Gates on products: which ones a bilinear algorithm can miss together, learned by gradient without labels.

    loss(gates) = |C - sum_r gates_r c_r P_r|^2 / |C|^2  +  penalty sum_r gates_r          0 <= gates_r <= 1

A layer is its own teacher: C is its result with every gate open. The loss needs the products of the examples only through their Gram matrix
G_rs = <c_r P_r, c_s P_s>, which is what tells products that make up for each other from products that matter: a sum of squares alone
(``criterion="output"``) cannot. It is convex, so that projected gradient descent finds its minimum; the penalty is the smallest that closes
enough gates. Gates between 0 and 1 are then rounded: the lowest close, and pairs of an open and a closed one change places while that helps.

Source: Yvinec 2023, section 4.2, whose gates are learned with the network; here layer by layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 150  # of descent, per penalty
HALVINGS = 12  # of the interval of penalties


def gram(products: Tensor, decode: Tensor) -> Tensor:
    """(R, R) float64: inner products of what the products add to the result.

    products: (R, ...). decode: (sums, R) integers, what each block of the result takes from them.
    """
    values, taken = products.double().flatten(1), decode.double()
    return (taken.T @ taken) * (values @ values.T)


def missing(gram: Tensor, closed: Tensor) -> float:
    """|sum closed_r c_r P_r|^2: what the result lacks, closed = 1 - gates."""
    return float(closed.double() @ gram.double() @ closed.double())


def learn_gates(gram: Tensor, count: int) -> Tensor:
    """(R,) in 0..1: the gates under the smallest penalty that brings ``count`` of them below 1/2 (all, if count is R or more).

    gram: (R, R), of one layer or the sum of several; its scale does not matter.

    >>> learn_gates(torch.tensor([[9.0, -9, 0], [-9, 9, 0], [0, 0, 1]]), 2) < 0.5      # products 1 and 2 cancel
    tensor([ True,  True, False])
    """
    gram = gram.double() / gram.double().trace().clamp(min=1e-300)
    low, high = 0.0, float(2 * gram.abs().sum(1).max()) + 1e-9  # above: every gate closes
    gates = _descend(gram, high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = _descend(gram, middle)
        if int((found < 0.5).sum()) >= count:
            high, gates = middle, found
        else:
            low = middle
    return gates


def close_gates(gram: Tensor, count: int) -> list[int]:
    """The ``count`` products to leave out, in order: learned or the smallest ones, whichever misses less after exchanges of pairs."""
    starts = (learn_gates(gram, count), gram.diag())
    found = [_exchange(gram.double(), start.argsort(stable=True)[:count]) for start in starts]
    return sorted(min(found, key=lambda closed: missing(gram, closed)).nonzero().flatten().tolist())


def _exchange(gram: Tensor, gone: Tensor) -> Tensor:
    """(R,) 1 for products left out: the best exchange of one of ``gone`` for another, as long as there is one."""
    closed = torch.zeros(len(gram), dtype=torch.float64)
    closed[gone] = 1
    while True:
        slope, curvature = 2 * gram @ closed, gram.diag()
        change = (slope + curvature)[:, None] + (curvature - slope)[None] - 2 * gram  # row closes, column opens
        change[closed == 1] = torch.inf
        change[:, closed == 0] = torch.inf
        best = int(change.argmin())
        if not float(change.flatten()[best]) < -1e-9 * float(gram.trace()):
            return closed
        closed[best // len(gram)], closed[best % len(gram)] = 1, 0


def _descend(gram: Tensor, penalty: float) -> Tensor:
    """The gates that minimize the loss, from all open, with Nesterov's momentum."""
    step = 1 / (2 * float(gram.abs().sum(1).max()) + 1e-12)  # at most 1 / Lipschitz constant
    gates = ahead = torch.ones(len(gram), dtype=torch.float64)
    for k in range(STEPS):
        gradient = penalty - 2 * gram @ (1 - ahead)
        moved = (ahead - step * gradient).clamp(0, 1)
        ahead = moved + k / (k + 3) * (moved - gates)
        gates = moved
    return gates
