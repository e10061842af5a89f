"""Exact nearest neighbours by cosine similarity.

Nearly all the time of a search goes into one N x N x D product, so the product is
done coarsely: in 8-bit integers on processors that multiply them fast, elsewhere in
the precision that torch is set to. Its error is measured on a sample of pairs, and all
that it could have moved into or out of the first k are computed again in float32. The
coarse product decides how long a search takes, not what it finds.
"""

import warnings
from collections.abc import Callable

import numba
import torch
from torch import Tensor

Rows = slice | Tensor
_TILE = {"cpu": 2048}  # rows and columns of a product, where a compiled loop reads it
_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}  # similarities held at once
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


def nearest_neighbours(
    features: Tensor, k: int, queries: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k rows of `features` most similar to each query, exactly.

    Similarity is the inner product, for L2-normalised features the cosine.
    Neighbours come in descending similarity, equal ones in ascending index.
    Without `queries` each row of `features` is searched among all of them, and is
    its own first neighbour even where other rows are identical.
    On the CPU the similarity of a pair is the same number in both directions and
    in any order of the rows; on a GPU its last bits may depend on the block.

    Parameters
    ----------
    features : FloatTensor [N, D]
        L2-normalised, on any device.
    k : int
        Number of neighbours, from 1 to N.
    queries : FloatTensor [Q, D], optional
        On the same device.

    Returns
    -------
    similarity : FloatTensor [Q, k]
    index : LongTensor [Q, k]
        Both on the device of `features`.

    Raises
    ------
    ValueError
        For k outside 1..N, or values that are not finite.

    Book: :eq:`nearest_neighbours`
    """
    features = features.detach().float().contiguous()
    n, device = len(features), features.device
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to the {n} rows of features, got {k}")
    asked = features if queries is None else queries.detach().float().contiguous()
    own = torch.arange(len(asked), device=device)
    if queries is not None:
        own.fill_(-1)  # no row of features is the query itself
    if not (features.sum() + asked.sum()).isfinite():
        raise ValueError("features or queries hold values that are not finite")

    product, m = _coarse_product(asked, features), min(n, 2 * k + 8)
    coarse, candidates = _candidates(product, asked, features, m)

    def exact(some: Rows, columns: Tensor, among: Tensor) -> Tensor:
        start = torch.nn.functional.pad(among.sum(1).cumsum(0), (1, 0))
        found = torch.full(columns.shape, -torch.inf, device=device)
        found[among] = pair_similarity(asked[some], features, start, columns[among])
        return found

    def first(some: Rows, columns: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
        """The k first of some rows: itself, then the most similar, ties by column."""
        itself = columns == own[some, None]
        true = exact(some, columns, among | itself)
        key = true.masked_fill(itself, torch.inf)
        order = key.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return true.gather(1, order), columns.gather(1, order)

    # How far is the coarse product off? The largest error of a sample is about 4 times
    # the standard deviation of rounding; no pair is to be expected beyond 8 times.
    sample = slice(None, None, len(asked) // 256 + 1)
    off = exact(sample, candidates[sample], candidates[sample] >= 0) - coarse[sample]
    error = 2 * float(off.abs().max())
    # One of the true k best is no more than one error worse than the coarse k-th, and
    # its coarse similarity may lie one more error lower.
    bar = coarse.topk(k).values[:, -1:] - 2 * error
    similarity, index = first(slice(None), candidates, coarse >= bar)

    # In a crowd of near ties the last candidate, too, may be one of the k best, and so
    # may others; and a row of another length than 1 may be no candidate of its own:
    # there, all rows are looked at.
    crowded = coarse.amin(1) >= similarity[:, -1] - error
    crowded = (crowded | ((own >= 0) & (index[:, 0] != own))).nonzero()[:, 0]
    for some in crowded.split(_ELEMENTS[device.type] // n + 1) if m < n else ():
        whole = product(some, slice(None))
        columns = torch.arange(n, device=device).expand_as(whole)
        similarity[some], index[some] = first(some, columns, whole >= bar[some])
    return similarity, index


def pair_similarity(a: Tensor, b: Tensor, start: Tensor, column: Tensor) -> Tensor:
    """Inner products of some pairs of rows, in float32.

    On the CPU every pair is summed in one fixed order, so that equal vectors give
    equal numbers and ``(i, j)`` and ``(j, i)`` the same one, wherever they stand.

    Parameters
    ----------
    a, b : FloatTensor [N, D] and [M, D]
        On one device.
    start : LongTensor [N + 1]
        Row i of `a` is multiplied by the rows ``column[start[i]:start[i + 1]]`` of `b`.
    column : LongTensor [P]
        Ascending for each row of `a`.

    Returns
    -------
    FloatTensor [P]
    """
    zeros = torch.zeros(len(column), device=a.device)
    size = len(a), len(b)
    pairs = torch.sparse_csr_tensor(start, column, zeros, size, check_invariants=False)
    return torch.sparse.sampled_addmm(pairs, a, b.T, beta=0).values()


def _coarse_product(asked: Tensor, features: Tensor) -> Callable[..., Tensor]:
    """Return the function that multiplies some queries by some features, coarsely.

    x . y = (x - mean) . (y - mean) + shift_x + shift_y: only the first term has errors,
    small beside the spread of the features, however narrow the cone they lie in.
    """
    mean = features.mean(0)
    # Without these instructions int8 products are slower than float32 ones.
    in_int8 = features.device.type == "cpu" and torch.cpu._is_vnni_supported()

    def code(x: Tensor) -> tuple[Tensor, Tensor, float]:
        shift, x, step = x @ mean - mean @ mean / 2, x - mean, 1.0
        if in_int8:
            low, high = x.aminmax()
            step = max(-float(low), float(high), 1e-12) / 127
            x = x.div_(step).round_().to(torch.int8)
        return x, shift, step

    b, shift_b, step_b = gallery = code(features)
    a, shift_a, step_a = gallery if asked is features else code(asked)
    multiply = torch._int_mm if in_int8 else torch.mm

    def product(rows: Rows, columns: slice) -> Tensor:
        found = multiply(a[rows], b[columns].T).float().mul_(step_a * step_b)
        return found.add_(shift_b[columns]).add_(shift_a[rows, None])

    return product


def _candidates(
    product: Callable[..., Tensor], asked: Tensor, features: Tensor, m: int
) -> tuple[Tensor, Tensor]:
    """The m best of each query by the coarse product, by column: value, column."""
    total, n, device = len(asked), len(features), asked.device
    value = torch.full((total, m), -torch.inf, device=device)
    column = torch.full((total, m), -1, device=device)
    if size := _TILE.get(device.type):
        # Every row against every row: the upper half of the product says it all.
        both = asked is features
        for r in range(0, total, size):
            for c in range(r if both else 0, n, size):
                tile = product(slice(r, r + size), slice(c, c + size)).numpy()
                _keep_best(tile, r, c, both, value.numpy(), column.numpy())
    else:
        rows = torch.arange(total, device=device)
        for some in rows.split(_ELEMENTS["cuda"] // n + 1):
            value[some], column[some] = product(some, slice(None)).topk(m)
    column, order = column.sort(dim=1)
    return value.gather(1, order), column


@numba.njit(cache=True)
def _keep_best(tile, row0, column0, both, value, column):  # type: ignore[no-untyped-def]
    """Offer a tile of similarities to the best of its rows (and of its columns)."""
    for r in range(len(tile)):
        i = row0 + r
        for c in range(max(0, i - column0) if both else 0, tile.shape[1]):
            j = column0 + c
            if tile[r, c] > value[i, -1]:
                _insert(value[i], column[i], tile[r, c], j)
            if both and i != j and tile[r, c] > value[j, -1]:
                _insert(value[j], column[j], tile[r, c], i)


@numba.njit(cache=True)
def _insert(value, column, v, j):  # type: ignore[no-untyped-def]
    """Put one in its place in a descending list, in exchange for the last."""
    p = len(value) - 1
    while p > 0 and value[p - 1] < v:
        value[p], column[p] = value[p - 1], column[p - 1]
        p -= 1
    value[p], column[p] = v, j
