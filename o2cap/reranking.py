"""K-reciprocal re-ranking of a gallery, block by block."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
import torch
from torch import Tensor

from o2cap.clustering import _expand_queries, _weights
from o2cap.neighbours import nearest_neighbours

_BLOCK_ELEMENTS = 2**24  # distances held at once (64 MiB)


def rerank(
    query_features: Tensor,
    gallery_features: Tensor,
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
) -> Iterator[Tensor]:
    """Distances of queries to the gallery by k-reciprocal re-ranking.

    As the public code of Zhong et al. (CVPR 2017), which needs several matrices of
    (Q + G)² entries: the Jaccard distance of the k-reciprocal neighbourhoods that
    queries and gallery have among all of them, mixed with the squared Euclidean
    distance, which is divided by its largest value in each row. The neighbourhoods are
    sparse here, and distances exist a block of queries at a time.

    Parameters
    ----------
    query_features, gallery_features : FloatTensor [Q, D] and [G, D]
        L2-normalised, on one device.
    k1 : int
        Neighbours of a picture, itself not counted.
    k2 : int
        Neighbours averaged by the local query expansion, itself counted.
    weight : float
        Of the original distance, 0 to 1 (λ of the paper).

    Returns
    -------
    iterator of FloatTensor [B, G]
        On the CPU; the blocks' B add up to Q, in the order of the queries.
    """
    features = torch.cat([query_features, gallery_features])
    n, queries = len(features), len(query_features)
    half = min(round(k1 / 2) + 1, n)
    neighbours = nearest_neighbours(features, min(k1 + 1, n))
    similarity, index = (part.cpu().numpy() for part in neighbours)
    index = index.astype(np.int32)
    # The picture most unlike each is the nearest of its opposite.
    opposite, _ = nearest_neighbours(features, 1, queries=-features)
    largest = (2 + 2 * opposite[:, 0]).clamp(min=1e-6).cpu().numpy()

    # Weights fall as exp(-d), and here as exp(-d / largest): a power, summed to 1.
    v = _weights(features, similarity, index, half)
    each = np.diff(v.indptr)
    v.data /= np.repeat(np.maximum.reduceat(v.data, v.indptr[:-1]), each)
    v.data **= np.repeat(1 / largest, each)
    v.data /= np.repeat(np.add.reduceat(v.data, v.indptr[:-1]), each)
    v = _expand_queries(v, index[:, : min(k2, n)])
    columns = v[queries:].tocsc()
    gallery = (columns.indptr, columns.indices, columns.data)

    size = max(1, _BLOCK_ELEMENTS // max(1, n - queries))
    for start in range(0, queries, size):
        rows = slice(start, min(start + size, queries))
        own = v[rows]
        shared = np.zeros((own.shape[0], n - queries), np.float32)
        _overlap(own.indptr, own.indices, own.data, *gallery, shared)
        jaccard = torch.from_numpy(1 - shared / (2 - shared))
        original = 2 - 2 * (query_features[rows] @ gallery_features.T).float().cpu()
        original /= torch.from_numpy(largest[rows])[:, None]
        yield jaccard.mul_(1 - weight).add_(original, alpha=weight)


@numba.njit(cache=True)
def _overlap(  # type: ignore[no-untyped-def]
    start, column, weight, c_start, c_row, c_weight, shared
):
    """Add the smaller weights of each row of V and each row of the gallery's V."""
    for i in range(len(shared)):
        for p in range(start[i], start[i + 1]):
            for q in range(c_start[column[p]], c_start[column[p] + 1]):
                shared[i, c_row[q]] += min(weight[p], c_weight[q])
