"""Pseudo labels: sparse k-reciprocal Jaccard distances and DBSCAN.

Two images share a column of V only if their neighbourhoods meet, so almost all
Jaccard distances are exactly 1. Only the others are computed and kept; time and
memory grow with N times the size of a neighbourhood, not with N squared.

Ties. With k2 = 6, two images that share 4 of their 6 neighbourhoods stand at
exactly 0.5, the usual eps, and float rounding would decide whether they are
neighbours. Sums here are exact whatever their order (float32 terms in float64),
and distances are rounded to multiples of 2**-21, a grid coarser than the rounding
error that is left (1e-7) and finer than the 1e-6 asked of the formula. So equal
neighbour lists give equal distances, in any order of the rows and by any number of
threads.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numba
import numpy as np
import torch
from numba import prange
from scipy.sparse import coo_array, csr_array, eye_array
from torch import Tensor

from o2cap.neighbours import nearest_neighbours, pair_similarity
from o2cap.proxies import check_cameras

_GRID = 2.0**21  # distances are multiples of its inverse
_BLOCKS = 64  # of rows, each with scratch of its own, for the threads to share


@contextmanager
def _threads_of_torch() -> Iterator[None]:
    """As many threads as torch was given; the result is the same."""
    threads: int = torch.get_num_threads()
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(threads, most))
    try:
        yield
    finally:  # both compute by one OpenMP, and numba tells it its own number
        torch.set_num_threads(threads)


@_threads_of_torch()
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
    features : FloatTensor [N, D]
        L2-normalised, on any device.
    k1 : int
        Size of the neighbour sets, the image itself included.
    k2 : int
        Neighbours averaged by the local query expansion, from 1 to `k1`.
    neighbours : tuple of Tensor, optional
        Similarity and index, each [N, >= min(k1, N)], as found by
        :func:`~o2cap.neighbours.nearest_neighbours` (which is called without).
    max_distance : float
        Leave larger distances out. DBSCAN asks for none above its eps, and where
        neighbourhoods are loose (features of an untrained network) most of the
        thousands of entries of a row lie between eps and 1.

    Returns
    -------
    csr_array
        float32 [N, N], symmetric, on the CPU. A missing entry means distance 1 (or
        anything above `max_distance`). Zeros (the diagonal, identical images) are
        stored.

    Raises
    ------
    ValueError
        For no features, a setting out of range, or neighbours that do not fit.

    Book: :eq:`jaccard_distance`
    """
    n = len(features)
    if not 1 <= k2 <= k1:
        raise ValueError(f"k2 must be from 1 to k1, got k1={k1} and k2={k2}")
    half = min(round(k1 / 2) + 1, n)  # Python rounds half to even, as numpy does
    k1, k2 = min(k1, n), min(k2, n)
    if neighbours is None:
        neighbours = nearest_neighbours(features, k1)
    similarity, index = _checked(neighbours, n, k1)
    weights = _weights(features, similarity, index, half)
    return _jaccard(_expand_queries(weights, index[:, :k2]), max_distance)


@_threads_of_torch()
def camera_aware_jaccard(
    features: Tensor,
    camids: Tensor,
    *,
    k1_intra: int = 5,
    k1_inter: int = 20,
    k2_intra: int = 2,
    k2_inter: int = 4,
    neighbours: tuple[Tensor, Tensor] | None = None,
    max_distance: float = 1.0,
) -> csr_array:
    """Jaccard distance of neighbourhoods within and across cameras (CA-Jaccard).

    Chen et al., CVPR 2024: one list of neighbours from an image's own camera, so that
    its own track cannot fill it, and one from all the others. With i first in its
    intra list,

    ``E(i) = {i} ∪ {j ∈ intra(i): i ∈ intra(j)} ∪ {j ∈ inter(i): i ∈ inter(j)}``;

    V as in :func:`jaccard_distance` over E(i), without half sets; local query
    expansion over the first `k2_intra` of intra(i) and the first `k2_inter` of
    inter(i); J as before. Where a camera, or all others together, hold fewer images
    than a list wants, the list is shorter: with one camera inter lists are empty.

    Parameters
    ----------
    features : FloatTensor [N, D]
        L2-normalised, on any device.
    camids : LongTensor [N]
        Camera of each image, 0 or more.
    k1_intra, k1_inter : int
        The intra list holds ``k1_intra + 1`` images, itself first; the inter list
        ``k1_inter + 1``. At least 1.
    k2_intra, k2_inter : int
        How many of each list are averaged; at least 1, and no longer than the list.
    neighbours : tuple of Tensor, optional
        Both lists, as found by :func:`camera_neighbours` (which is called without).
    max_distance : float
        As in :func:`jaccard_distance`.

    Returns
    -------
    csr_array
        As of :func:`jaccard_distance`.

    Raises
    ------
    ValueError
        For no features, camids that do not fit, or a setting out of range.

    Book: :eq:`camera_aware_jaccard`
    """
    n, intra, inter = len(features), k1_intra + 1, k1_inter + 1
    check_cameras(camids, n)
    for k1, k2 in ((k1_intra, k2_intra), (k1_inter, k2_inter)):
        if not (k1 >= 1 and 1 <= k2 <= k1 + 1):
            said = "every k1 and k2 must be at least 1, and k2 at most k1 + 1"
            raise ValueError(f"{said}; got k1={k1} and k2={k2}")
    if neighbours is None:
        neighbours = camera_neighbours(features, camids, k1_intra, k1_inter)
    similarity, index = _checked(neighbours, n, intra + inter, nobody=True)
    lists = index[:, :intra].copy(), index[:, intra:].copy()
    mutual = np.concatenate([_mutual(x) for x in lists], axis=1)
    weights = _softmax(_members(index, mutual, _weight(similarity)))
    nearest = np.concatenate([lists[0][:, :k2_intra], lists[1][:, :k2_inter]], axis=1)
    return _jaccard(_expand_queries(weights, nearest), max_distance)


def camera_neighbours(
    features: Tensor, camids: Tensor, k1_intra: int = 5, k1_inter: int = 20
) -> tuple[Tensor, Tensor]:
    """Find the lists of :func:`camera_aware_jaccard`, side by side.

    Parameters
    ----------
    features : FloatTensor [N, D]
        L2-normalised, on any device.
    camids : LongTensor [N]
        Camera of each image.
    k1_intra, k1_inter : int
        How many: ``k1_intra + 1`` of the own camera, the image itself first, then
        ``k1_inter + 1`` of all other cameras.

    Returns
    -------
    similarity : FloatTensor [N, k1_intra + k1_inter + 2]
    index : LongTensor [N, k1_intra + k1_inter + 2]
        Both on the device of `features`; index −1 where a list ends early.
    """
    n, width = len(features), k1_intra + k1_inter + 2
    camids = camids.to(features.device)
    similarity = features.new_zeros(n, width)
    index = torch.full((n, width), -1, device=features.device)
    for camera in camids.unique():
        same, other = (torch.where(x)[0] for x in (camids == camera, camids != camera))
        k = min(k1_intra + 1, len(same))
        near, place = nearest_neighbours(features[same], k)
        similarity[same, :k], index[same, :k] = near, same[place]
        k = min(k1_inter + 1, len(other))
        if k:
            near, place = nearest_neighbours(features[other], k, features[same])
            columns = slice(k1_intra + 1, k1_intra + 1 + k)
            similarity[same, columns], index[same, columns] = near, other[place]
    return similarity, index


def dbscan(distance: csr_array, eps: float = 0.5, min_samples: int = 4) -> Tensor:
    """Cluster by density (DBSCAN, Ester et al., KDD 1996) on a sparse distance.

    A point with at least ``min_samples`` points within ``eps`` (at most ``eps``
    away, itself counted) is a core point; core points within ``eps`` of each other
    share a cluster. Any other point within ``eps`` of a core point joins a cluster of
    such a one. It is scikit-learn's DBSCAN, which sees only which pairs are near.

    Parameters
    ----------
    distance : csr_array [N, N]
        Symmetric; a missing entry is beyond `eps`, and a missing diagonal is 0.
    eps : float
        From 0 to below 1, and at most the `max_distance` of the distance; compared
        with the distances after rounding both to multiples of 2**-21.
    min_samples : int
        At least 1.

    Returns
    -------
    LongTensor [N]
        Labels 0, 1, ... in the order of their first core points; −1 for outliers.

    Raises
    ------
    ValueError
        For a setting out of range.

    Book: :eq:`dbscan`
    """
    # Here, because it takes a second to import, and most commands need none of it.
    from sklearn.cluster import DBSCAN

    if not 0 <= eps < 1:
        raise ValueError(f"eps must be at least 0 and below 1, got {eps}")
    near = np.rint(distance.data * _GRID) <= round(eps * _GRID)
    start = np.concatenate([[0], np.cumsum(near)])[distance.indptr]
    zeros = np.zeros(start[-1], np.float32)
    graph = csr_array((zeros, distance.indices[near], start), shape=distance.shape)
    found = DBSCAN(eps=0.5, min_samples=min_samples, metric="precomputed").fit(graph)
    return torch.from_numpy(found.labels_.astype(np.int64))


def eps_of_most_clusters(
    distance: csr_array, min_samples: int = 4
) -> tuple[float, int, int]:
    """Try eps = 0.05, 0.1, ..., 0.8, and return the one with most clusters.

    With a small eps most images are outliers, with a large one clusters run together;
    the number of clusters has its peak between the two. That peak is advice for who has
    no labels and too few clusters, no optimum: an eps a little above it is often
    better, one far above it never. (Single images, which are clusters where
    `min_samples` is 1, do not count.)

    Parameters
    ----------
    distance : csr_array [N, N]
        As for :func:`dbscan`, up to a distance of 0.8.
    min_samples : int
        As for :func:`dbscan`.

    Returns
    -------
    eps : float
        Of several with most clusters the one nearest to 0.5.
    clusters, outliers : int
        What it makes.
    """
    found = []
    for eps in (step / 20 for step in range(1, 17)):
        labels = dbscan(distance, eps, min_samples)
        several = labels[labels >= 0].bincount() > 1
        number, outliers = int(several.sum()), int((labels < 0).sum())
        found.append((number, -abs(eps - 0.5), eps, outliers))
    clusters, _, eps, outliers = max(found)
    return eps, clusters, outliers


def _checked(
    neighbours: tuple[Tensor, Tensor], n: int, k: int, nobody: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """First k columns, as arrays; the compiled loops trust what they are given."""
    similarity, index = (part[:, :k].cpu() for part in neighbours)
    right = similarity.shape == index.shape == (n, k)
    right = right and torch.equal(index[:, 0], torch.arange(n))
    if not right or index.amin() < -nobody or index.amax() >= n:
        raise ValueError(
            f"neighbours must be two tensors of shape [{n}, at least {k}], similarity "
            f"and row numbers from 0 to {n - 1}, each row's own first"
        )
    return similarity.float().numpy(), index.int().numpy()


# ----------------------------------------------------------------- neighbourhoods V


def _members(index: np.ndarray, mask: np.ndarray, data: np.ndarray) -> csr_array:
    """Matrix [N, N] with the data of the neighbours that the mask chooses."""
    start = np.concatenate([[0], np.cumsum(mask.sum(1))])
    return csr_array((data[mask], index[mask], start), shape=(len(index), len(index)))


@_threads_of_torch()
def _weights(
    features: Tensor, similarity: np.ndarray, index: np.ndarray, half: int
) -> csr_array:
    """V before query expansion: float64 [N, N] that holds float32 values."""
    nearer = index[:, :half].copy()  # a view would be compiled for once more
    full, halves = _mutual(index), _mutual(nearer)
    trusted = _trusted(index, full, halves)
    own = _members(index, full, _weight(similarity))
    brought = _members(index, trusted, trusted) @ _members(nearer, halves, halves)
    new = brought > own.astype(bool)  # what is not there already
    new.sort_indices()
    features = features.detach().float().contiguous()
    place = (torch.from_numpy(x).long() for x in (new.indptr, new.indices))
    place = (x.to(features.device) for x in place)
    data = _weight(pair_similarity(features, features, *place).cpu().numpy())
    return _softmax(own + csr_array((data, new.indices, new.indptr), shape=new.shape))


def _weight(similarity: np.ndarray) -> np.ndarray:
    """Exponential of the negative squared distance of unit vectors."""
    return np.exp(2 * similarity.astype(np.float64) - 2).astype(np.float32)


def _softmax(weights: csr_array) -> csr_array:
    """Rows of sum 1: float64 [N, N] that holds float32 values, for exact sums."""
    total = np.add.reduceat(weights.data, weights.indptr[:-1], dtype=np.float64)
    data = weights.data / np.repeat(total, np.diff(weights.indptr))
    data = data.astype(np.float32).astype(np.float64)
    return csr_array((data, weights.indices, weights.indptr), shape=weights.shape)


def _expand_queries(weights: csr_array, index: np.ndarray) -> csr_array:
    """Mean of V over some neighbours [N, k2], none where −1: float32 [N, N]."""
    there = index >= 0
    mean = _members(index, there, there.astype(np.float64)) @ weights
    mean.data /= np.repeat(there.sum(1), np.diff(mean.indptr))
    return mean.astype(np.float32)


def _jaccard(weights: csr_array, max_distance: float) -> csr_array:
    """Jaccard distances, up to a limit, of all rows of V that share a column."""
    n, columns = weights.shape[0], weights.tocsc()
    v = weights.indptr, weights.indices, weights.data
    c = columns.indptr, columns.indices, columns.data
    limit, room = round(max_distance * _GRID) / _GRID, 32 * (n // _BLOCKS + 1)
    while True:  # once more with enough room, where it was too little
        pairs = np.empty((2, _BLOCKS, room), np.int32)
        data = np.empty((_BLOCKS, room), np.float32)
        size = _overlap(*v, *c, limit, pairs, data)
        if size.max() <= room:
            break
        room = size.max()
    # Plus 1 (which is exact), so that adding matrices keeps the zeros.
    there = np.arange(room) < size[:, None]
    upper = coo_array((data[there] + 1, (*pairs[:, there],)), shape=(n, n)).tocsr()
    both = upper + upper.T + eye_array(n, dtype=np.float32, format="csr")
    both.data -= 1
    return both


# ------------------------------------------------------------------------ kernels


@numba.njit(cache=True, parallel=True)
def _mutual(index):  # type: ignore[no-untyped-def]
    """Which neighbours [N, k] have the row among theirs; none where −1."""
    found = np.zeros(index.shape, np.bool_)
    for i in prange(len(index)):
        for a, j in enumerate(index[i]):
            found[i, a] = j >= 0 and i in index[j]
    return found


@numba.njit(cache=True, parallel=True)
def _trusted(index, full, halves):  # type: ignore[no-untyped-def]
    """Which members of R*(i, k1) have more than 2/3 of their half set in it."""
    found = np.zeros(full.shape, np.bool_)
    half = halves.shape[1]
    for i in prange(len(index)):
        members = index[i][full[i]]
        for a, j in enumerate(index[i]):
            if full[i, a]:
                shared = 0
                for b in range(half):
                    shared += halves[j, b] and index[j, b] in members
                found[i, a] = 3 * shared > 2 * halves[j].sum()
    return found


@numba.njit(cache=True, parallel=True)
def _overlap(  # type: ignore[no-untyped-def]
    v_start, v_column, v, c_start, c_row, c, limit, pairs, data
):
    """Find the distances up to a limit of all rows i < j, and how many each block has.

    V comes by rows (v) and by columns (c, their rows ascending). What a block has no
    room for is only counted.
    """
    n = len(v_start) - 1
    blocks, room = data.shape
    size = np.zeros(blocks, np.int64)
    for block in prange(blocks):
        shared, met, found = np.zeros(n), np.empty(n, np.int32), 0
        for i in range(block, n, blocks):
            count = 0
            for p in range(v_start[i], v_start[i + 1]):
                for q in range(c_start[v_column[p] + 1] - 1, -1, -1):
                    j = c_row[q]
                    if j <= i:  # i is in the column, which ends here at the latest
                        break
                    if shared[j] == 0:  # weights are positive
                        met[count] = j
                        count += 1
                    shared[j] += min(v[p], c[q])
            for j in met[:count]:
                distance = 1 - shared[j] / (2 - shared[j])
                shared[j] = 0
                distance = max(0.0, np.round(distance * _GRID) / _GRID)
                if distance <= limit:
                    if found < room:
                        pairs[0, block, found], pairs[1, block, found] = i, j
                        data[block, found] = distance
                    found += 1
        size[block] = found
    return size
