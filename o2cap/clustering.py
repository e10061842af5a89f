"""Pseudo labels: sparse k-reciprocal Jaccard distance and DBSCAN.

Two images share a column of V only if their neighbourhoods meet, so almost all
Jaccard distances are exactly 1. Only the others are computed and kept; time and
memory grow with N times the size of a neighbourhood, not with N squared.

Ties. With k2 = 6, two images that share 4 of their 6 neighbourhoods stand at
exactly 0.5, the usual eps, and float rounding would decide whether they are
neighbours. Sums here are exact whatever their order (float32 terms in float64),
and distances are rounded to multiples of 2**-21, a grid coarser than the rounding
error that is left (1e-7) and finer than the 1e-6 asked of the formula. So equal
neighbour lists give equal distances, and equal labels, in any order of the rows.
"""

import numba
import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from o2cap.neighbours import nearest_neighbours, pair_similarity

_GRID = 2.0**21  # distances are multiples of its inverse


def jaccard_distance(
    features: Tensor,
    k1: int = 20,
    k2: int = 6,
    *,
    neighbours: tuple[Tensor, Tensor] | None = None,
    max_distance: float = 1.0,
) -> csr_array:
    """Jaccard distance of k-reciprocal neighbourhoods (Zhong et al., CVPR 2017).

    As in the public code of O2CAP: k1 columns for the full neighbour sets and
    round-half-even(k1 / 2) + 1 for the half sets, weights by a softmax of the
    negative squared distance, local query expansion over the first k2 neighbours.
    With fewer than k1 images every image is a neighbour of every other.

    Parameters
    ----------
    features : float32 [N, D], L2-normalised, on any device
    k1 : size of the neighbour sets, the image itself included
    k2 : neighbours averaged by the local query expansion, ``1 <= k2 <= k1``
    neighbours : similarity and index, each [N, >= min(k1, N)], as found by
        `nearest_neighbours` (which is called without it)
    max_distance : leave larger distances out, in [0, 1]. DBSCAN asks for none above
        its eps, and where neighbourhoods are loose (features of an untrained
        network) most of the thousands of entries of a row lie between eps and 1.

    Returns
    -------
    csr_array, float32 [N, N], symmetric, on the CPU
        A missing entry means distance 1 (or anything above ``max_distance``). Zeros
        (the diagonal, identical images) are stored.

    Raises
    ------
    ValueError
        For no features, a setting out of range, or neighbours that do not fit.

    Book: :eq:`jaccard_distance`
    """
    n = len(features)
    if n == 0:
        raise ValueError("features must have at least one row")
    if not 1 <= k2 <= k1:
        raise ValueError(f"k2 must be from 1 to k1, got k1={k1} and k2={k2}")
    if not 0 <= max_distance <= 1:
        raise ValueError(f"max_distance must be from 0 to 1, got {max_distance}")
    half = min(round(k1 / 2) + 1, n)  # Python rounds half to even, as numpy does
    k1, k2 = min(k1, n), min(k2, n)
    if neighbours is None:
        neighbours = nearest_neighbours(features, k1)
    similarity, index = _checked(neighbours, n, k1)

    weights = _expand_queries(_weights(features, similarity, index, half), index, k2)
    columns = weights.tocsc()
    v = (weights.indptr, weights.indices, weights.data)
    c = (columns.indptr, columns.indices, columns.data)
    start = np.zeros(n + 1, np.int64)
    none = np.empty(0, np.int32), np.empty(0, np.float32)
    limit = round(max_distance * _GRID) / _GRID
    _overlap(*v, *c, limit, start, *none)  # counts, to allocate once
    np.cumsum(start, out=start)
    indices, data = np.empty(start[-1], np.int32), np.empty(start[-1], np.float32)
    _overlap(*v, *c, limit, start, indices, data)
    return csr_array((data, indices, start), shape=(n, n))


def dbscan(distance: csr_array, eps: float = 0.5, min_samples: int = 4) -> Tensor:
    """Cluster by density (DBSCAN, Ester et al., KDD 1996) on a sparse distance.

    A point with at least ``min_samples`` points within ``eps`` (at most ``eps``
    away, itself counted) is a core point; core points within ``eps`` of each other
    share a cluster. Any other point within ``eps`` of a core point joins the
    cluster of the nearest one, of equally near ones the cluster with the smallest
    label; that last tie alone depends on the order of rows. Clusters are numbered
    by their first core point.

    Parameters
    ----------
    distance : csr_array [N, N], symmetric; a missing entry is beyond ``eps``, and a
        missing diagonal is 0
    eps : ``0 <= eps < 1``, at most the ``max_distance`` of `jaccard_distance`; it is
        compared with the distances after rounding both to multiples of 2**-21
    min_samples : at least 1

    Returns
    -------
    int64 [N], labels 0, 1, …; -1 for outliers

    Book: :eq:`dbscan`
    """
    if distance.ndim != 2 or distance.shape[0] != distance.shape[1]:
        raise ValueError(f"distance must be square, got {distance.shape}")
    if not 0 <= eps < 1:
        raise ValueError(f"eps must be at least 0 and below 1, got {eps}")
    if min_samples < 1:
        raise ValueError(f"min_samples must be at least 1, got {min_samples}")
    n = distance.shape[0]
    entry = np.flatnonzero(np.rint(distance.data * _GRID) <= round(eps * _GRID))
    row = np.searchsorted(distance.indptr, entry, side="right") - 1
    column = distance.indices[entry]
    other = row != column
    row, column, near = row[other], column[other], distance.data[entry[other]]

    core = np.bincount(row, minlength=n) + 1 >= min_samples
    joined = core[row] & core[column]
    graph = csr_array(
        (np.ones(joined.sum(), bool), (row[joined], column[joined])), shape=(n, n)
    )
    component = connected_components(graph, directed=False)[1]
    label = np.full(n, -1, np.int64)
    _, first, label[core] = np.unique(
        component[core], return_index=True, return_inverse=True
    )
    label[core] = np.argsort(np.argsort(first))[label[core]]

    claim = ~core[row] & core[column]
    row, owner, near = row[claim], label[column[claim]], near[claim]
    order = np.lexsort((owner, near, row))
    border, best = np.unique(row[order], return_index=True)
    label[border] = owner[order][best]
    return torch.from_numpy(label)


def _checked(
    neighbours: tuple[Tensor, Tensor], n: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """First k columns, as arrays; the compiled loops trust what they are given."""
    similarity, index = neighbours
    if index.shape != similarity.shape or index.ndim != 2:
        raise ValueError("neighbours must be two tensors of one shape [N, k]")
    if len(index) != n or index.shape[1] < k:
        raise ValueError(
            f"neighbours have shape {list(index.shape)}, need [{n}, at least {k}]"
        )
    index = index[:, :k].cpu()
    if index.amin() < 0 or index.amax() >= n:
        raise ValueError(f"neighbours must be row numbers from 0 to {n - 1}")
    if not torch.equal(index[:, 0], torch.arange(n)):
        raise ValueError("the first neighbour of every row must be the row itself")
    return (
        similarity[:, :k].float().cpu().contiguous().numpy(),
        index.int().contiguous().numpy(),
    )


def _weights(
    features: Tensor, similarity: np.ndarray, index: np.ndarray, half: int
) -> csr_array:
    """V before query expansion: float64 [N, N] that holds float32 values."""
    n = len(index)
    reciprocal = np.empty((n, half), np.int32)
    size = np.empty(n, np.int32)
    _half_sets(index, reciprocal, size)
    start = np.zeros(n + 1, np.int64)
    none = np.empty(0, np.int32), np.empty(0, np.float32)
    _expanded_sets(index, similarity, reciprocal, size, start, *none)  # counts
    np.cumsum(start, out=start)
    column, s = np.empty(start[-1], np.int32), np.empty(start[-1], np.float32)
    _expanded_sets(index, similarity, reciprocal, size, start, column, s)

    unknown = np.flatnonzero(np.isnan(s))  # members outside the neighbour list
    row = np.searchsorted(start, unknown, side="right") - 1
    pairs = torch.from_numpy(row), torch.from_numpy(column[unknown]).long()
    device = features.device
    features = features.detach().float().contiguous()
    s[unknown] = pair_similarity(
        features, features, *(p.to(device) for p in pairs)
    ).cpu()

    weight = np.exp(2 * s.astype(np.float64) - 2).astype(np.float32)
    total = np.add.reduceat(weight, start[:-1], dtype=np.float64)
    weight = (weight / np.repeat(total, np.diff(start))).astype(np.float32)
    return csr_array((weight.astype(np.float64), column, start), shape=(n, n))


def _expand_queries(weights: csr_array, index: np.ndarray, k2: int) -> csr_array:
    """Mean of V over the first k2 neighbours: float32 [N, N]."""
    n = len(index)
    chosen = csr_array(
        (
            np.ones(n * k2),
            np.ascontiguousarray(index[:, :k2]).ravel(),
            np.arange(0, n * k2 + 1, k2),
        ),
        shape=(n, n),
    )
    mean = chosen @ weights
    return csr_array(
        ((mean.data / k2).astype(np.float32), mean.indices, mean.indptr), shape=(n, n)
    )


# ------------------------------------------------------------------------ kernels


@numba.njit(cache=True)
def _half_sets(index, members, size):  # type: ignore[no-untyped-def]
    """R*(i, half) of every row: members [N, half], of which size [N] are set."""
    n, half = members.shape
    for i in range(n):
        size[i] = 0
        for j in index[i, :half]:
            for back in index[j, :half]:
                if back == i:
                    members[i, size[i]] = j
                    size[i] += 1
                    break


@numba.njit(cache=True)
def _expanded_sets(  # type: ignore[no-untyped-def]
    index, similarity, half, half_size, start, column, value
):
    """E(i) of every row; value is NaN where the similarity is not in the list.

    Without room in ``column`` it counts: the size of E(i) goes to ``start[i + 1]``.
    """
    n, k1 = index.shape
    fill = len(column) > 0
    full = np.empty(k1, np.int32)
    in_full = np.full(n, -1, np.int32)  # the last row that had this member
    in_set = np.full(n, -1, np.int32)
    for i in range(n):
        end = start[i] if fill else 0
        count = 0
        for a in range(k1):
            j = index[i, a]
            for back in index[j]:
                if back == i:
                    full[count] = j
                    count += 1
                    in_full[j] = in_set[j] = i
                    if fill:
                        column[end], value[end] = j, similarity[i, a]
                    end += 1
                    break
        for j in full[:count]:
            shared = 0
            for member in half[j, : half_size[j]]:
                shared += in_full[member] == i
            if 3 * shared > 2 * half_size[j]:
                for member in half[j, : half_size[j]]:
                    if in_set[member] != i:
                        in_set[member] = i
                        if fill:
                            column[end], value[end] = member, np.nan
                        end += 1
        if not fill:
            start[i + 1] = end


@numba.njit(cache=True)
def _overlap(  # type: ignore[no-untyped-def]
    v_start, v_column, v, c_start, c_row, c, limit, start, indices, data
):
    """Jaccard distances, up to a limit, of all rows of V that share a column.

    V comes by rows (v) and by columns (c, rows ascending). Each pair is met once,
    from its smaller row, and written to both rows. Without room in ``indices`` it
    counts: the size of row i goes to ``start[i + 1]``.
    """
    n = len(v_start) - 1
    fill = len(indices) > 0
    free = start[:-1].copy()  # where the next entry of each row goes
    head = c_start[:-1].copy()  # the current row's place in each column
    shared = np.zeros(n, np.float64)
    met = np.empty(n, np.int32)
    for i in range(n):
        count = 0
        for p in range(v_start[i], v_start[i + 1]):
            column, weight = v_column[p], v[p]
            for q in range(head[column], c_start[column + 1]):
                j = c_row[q]
                if shared[j] == 0:  # weights are positive
                    met[count] = j
                    count += 1
                shared[j] += min(weight, c[q])
            head[column] += 1
        for j in met[:count]:
            distance = 1 - shared[j] / (2 - shared[j])
            shared[j] = 0
            distance = max(0.0, np.round(distance * _GRID) / _GRID)
            if distance > limit:
                continue
            if not fill:
                start[i + 1] += 1
                start[j + 1] += j != i
                continue
            indices[free[i]], data[free[i]] = j, distance
            free[i] += 1
            if j != i:
                indices[free[j]], data[free[j]] = i, distance
                free[j] += 1
