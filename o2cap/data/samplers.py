"""Which pictures stand together in a batch, and when."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def proxy_batches(
    label: Tensor,
    iterations: int,
    generator: Generator,
    *,
    proxies: int = 8,
    images: int = 4,
) -> Tensor:
    """Draw the batches of an epoch, balanced over proxies.

    A pass visits every proxy once, in shuffled order; a last partial batch of a
    pass is dropped; then the next pass. A proxy with fewer pictures than asked for
    gives some of them more than once. With fewer proxies than a batch wants, every
    batch holds them all. With more proxies than the epoch has draws, some are not
    visited in this epoch: kept as in the public code, and reported by the trainer.

    Parameters
    ----------
    label : LongTensor [N]
        Proxy of each picture, −1 for outliers; every number from 0 on is in use.
    iterations : int
        Number of batches.
    generator : Generator
        Decides everything random here.
    proxies, images : int
        Proxies in a batch, and pictures of each.

    Returns
    -------
    LongTensor [iterations, B]
        Pictures of each batch, those of a proxy together;
        B = min(proxies, P) × images.

    Raises
    ------
    ValueError
        When there is no proxy.

    Book: :eq:`proxy_batches`
    """
    count = label[label >= 0].bincount()
    if len(count) == 0:
        raise ValueError("there is no proxy to sample from")
    together = min(proxies, len(count))
    visits = _passes(len(count), together, iterations, generator).flatten()

    inside = (label >= 0).nonzero().flatten()
    members = inside[label[inside].argsort(stable=True)]
    n, begin = count[visits], (count.cumsum(0) - count)[visits]
    rand = torch.rand(len(visits), images, generator=generator)
    again = (rand * n[:, None]).long().minimum(n[:, None] - 1)
    pick = torch.where((n >= images)[:, None], _distinct(rand, n), again)
    return members[begin[:, None] + pick].reshape(iterations, -1)


def instance_batches(
    n_images: int, iterations: int, generator: Generator, *, images: int = 32
) -> Tensor:
    """Draw batches of different pictures, LongTensor [iterations, min(images, N)].

    Passes over all N pictures in shuffled order, a last partial batch dropped.
    """
    return _passes(n_images, min(images, n_images), iterations, generator)


def _passes(n: int, together: int, iterations: int, generator: Generator) -> Tensor:
    """Cut shuffled passes over range(n) into batches [iterations, together]."""
    in_pass = n // together
    order = torch.rand(-(-iterations // in_pass), n, generator=generator).argsort(1)
    return order[:, : in_pass * together].reshape(-1, together)[:iterations]


def _distinct(rand: Tensor, n: Tensor) -> Tensor:
    """Turn uniform draws [T, k] into k distinct numbers below n, [T] (n ≥ k).

    The j-th picks among the n − j numbers left: it steps over those already taken,
    in rising order. A Python loop over k² pairs of picks, not over the T visits.
    """
    k = rand.shape[1]
    taken = torch.empty_like(rand, dtype=torch.int64)
    for j in range(k):
        left = n - j
        pick = (rand[:, j] * left).long().clamp(min=0).minimum((left - 1).clamp(min=0))
        for earlier in taken[:, :j].sort(dim=1).values.unbind(dim=1):
            pick = pick + (pick >= earlier).long()
        taken[:, j] = pick
    return taken
