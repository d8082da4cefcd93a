"""The caller's torch modes end where the compiler begins: what it computes does not depend on where it is called.

exact              neither ``torch.inference_mode`` nor ``torch.autocast``: for everything but training
normal_tensors     no ``torch.inference_mode``: training takes gradients; autocast is the caller's choice there
in_float32         no ``torch.autocast``: for what is no training inside of it
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def in_float32() -> torch.autocast:
    """A decorator or context: products are computed with the weights as they are.

    >>> with torch.autocast("cpu", torch.bfloat16), in_float32():
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.float32
    """
    return torch.autocast("cpu", enabled=False)


def normal_tensors() -> torch.inference_mode:
    """A decorator or context: tensors have versions and take part in gradients."""
    return torch.inference_mode(False)


def exact(function: Callable) -> Callable:
    """``function`` under neither mode."""

    @functools.wraps(function)
    def called(*args, **kwargs):
        with normal_tensors(), in_float32():
            return function(*args, **kwargs)

    return called
