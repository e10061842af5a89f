"""Re-ranking: block by block what the dense formula gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from o2cap import reranking
from o2cap.reranking import rerank


def dense(q: Tensor, g: Tensor, k1: int, k2: int, weight: float) -> np.ndarray:
    """Follow Zhong et al. line by line, over all pairs, in float64."""
    x = torch.cat([q, g]).double().numpy()
    n, queries = len(x), len(q)
    d = ((x[:, None] - x[None]) ** 2).sum(2)
    d /= d.max(1, keepdims=True)
    rank = np.argsort(d, axis=1, kind="stable")

    def reciprocal(i: int, k: int) -> list[int]:
        return [j for j in rank[i, : k + 1] if i in rank[j, : k + 1]]

    v = np.zeros((n, n))
    for i in range(n):
        full = set(reciprocal(i, k1))
        expanded = set(full)
        for j in full:
            half = set(reciprocal(j, int(np.around(k1 / 2))))
            if len(half & full) > 2 / 3 * len(half):
                expanded |= half
        members = sorted(expanded)
        v[i, members] = np.exp(-d[i, members])
        v[i] /= v[i].sum()
    v = np.stack([v[rank[i, :k2]].mean(0) for i in range(n)])
    shared = np.minimum(v[:queries, None], v[None, queries:]).sum(2)
    return (1 - weight) * (1 - shared / (2 - shared)) + weight * d[:queries, queries:]


def clustered(n: int, clusters: int, dim: int = 16) -> Tensor:
    centre = torch.randn(clusters, dim)
    return normalize(centre[torch.arange(n) % clusters] + 0.5 * torch.randn(n, dim))


@pytest.mark.parametrize(
    ("queries", "gallery", "k1", "k2", "weight"),
    [(20, 90, 20, 6, 0.3), (7, 60, 9, 1, 0.0), (5, 6, 20, 6, 0.3), (1, 1, 2, 2, 1.0)],
)
def test_blocks_are_the_dense_formula(
    queries: int,
    gallery: int,
    k1: int,
    k2: int,
    weight: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, g = clustered(queries, 5), clustered(gallery, 5)
    expected = dense(q, g, k1, k2, weight)
    monkeypatch.setattr(reranking, "_BLOCK_ELEMENTS", 3 * gallery)
    blocks = list(rerank(q, g, k1=k1, k2=k2, weight=weight))
    assert [len(b) for b in blocks[:-1]] == [3] * (len(blocks) - 1)
    assert np.abs(torch.cat(blocks).numpy() - expected).max() < 1e-5


def test_equal_pictures_stand_at_zero() -> None:
    x = torch.eye(8)[[0, 0, 0, 0]]
    assert torch.cat(list(rerank(x[:1], x[1:]))).abs().max() < 1e-5
