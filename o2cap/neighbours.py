"""Exact nearest neighbours by cosine similarity.

Nearly all the time of a search goes into one N x N x D product, so the product
is done coarsely: 8-bit integers where the processor multiplies them fast, floats
at reduced matmul precision elsewhere. Its error is measured on a sample of pairs, and
every candidate that the error could have moved into or out of the first k is
computed again in float32. The coarse step decides how long a search takes, not
what it finds.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_TILE_ROWS, _TILE_COLUMNS = 1024, 2048  # a tile of the product on the CPU
_BLOCK_ELEMENTS = 2**24  # similarities held at once elsewhere on the CPU (64 MiB)
_BLOCK_ELEMENTS_GPU = 2**28  # the same on a GPU (1 GiB)
_SAMPLE_ROWS = 256  # rows whose candidates measure the error of the coarse product
# The sampled maximum is about 4 standard deviations of the rounding error, so
# twice that is 8: no pair of any data set is expected beyond it.
_ERROR_MARGIN = 2.0


def nearest_neighbours(
    features: Tensor,
    k: int,
    queries: Tensor | None = None,
    *,
    rows: slice | None = None,
    backend: Literal["torch", "faiss"] = "torch",
) -> tuple[Tensor, Tensor]:
    """Find the k rows of ``features`` most similar to each query, exactly.

    Similarity is the inner product, which is the cosine for L2-normalised
    features. Neighbours come in descending similarity, equal ones in ascending
    index. Without ``queries`` each row of ``features`` is searched among all of
    them, and is its own first neighbour even where other rows are identical.
    On the CPU the similarity of a pair is the same number in both directions and
    in any order of the rows; on a GPU its last bits may depend on the block.

    Parameters
    ----------
    features : float32 [N, D], on any device
    k : number of neighbours, ``1 <= k <= N``
    queries : float32 [Q, D], optional, on the same device
    rows : search only for ``features[rows]``, each its own first neighbour: one
        share of a search divided over processes. Excludes ``queries``; step 1.
    backend : "torch", or "faiss" for an independent coarse step by a flat
        faiss-cpu index (features must be on the CPU)

    Returns
    -------
    similarity : float32 [Q, k], on the device of ``features``
    index : int64 [Q, k], on the device of ``features``

    Raises
    ------
    ValueError
        For wrong shapes, values that are not finite, or k outside 1..N.

    Book: :eq:`nearest_neighbours`
    """
    features = _checked("features", features)
    n = len(features)
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to the {n} rows of features, got {k}")
    if queries is None:
        start, stop, step = (rows or slice(None)).indices(n)
        if step != 1:
            raise ValueError(f"rows must have step 1, got {step}")
        queries = features[start:stop]
        own = torch.arange(start, start + len(queries), device=features.device)
        wanted = k - 1  # the row itself needs no search
    else:
        if rows is not None:
            raise ValueError("give queries or rows, not both")
        queries = _checked("queries", queries)
        if queries.shape[1] != features.shape[1]:
            raise ValueError(
                f"queries have {queries.shape[1]} columns, features {features.shape[1]}"
            )
        own, wanted = None, k
    if backend not in ("torch", "faiss"):
        raise ValueError(f"backend must be 'torch' or 'faiss', got {backend!r}")

    similarity = features.new_empty(len(queries), k)
    index = torch.empty(len(queries), k, dtype=torch.int64, device=features.device)
    if own is not None and len(own):
        similarity[:, 0] = pair_similarity(features, features, own, own)
        index[:, 0] = own
    if len(queries) and wanted:
        search = _Faiss if backend == "faiss" else _Torch
        found = _search(search(features, queries, own), wanted)
        similarity[:, k - wanted :], index[:, k - wanted :] = found
    return similarity, index


def pair_similarity(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Inner products of single pairs, ``a[rows[p]] . b[columns[p]]``, in float32.

    On the CPU every pair is summed in one fixed order, so that equal vectors give
    equal numbers and ``(i, j)`` and ``(j, i)`` the same one, wherever they stand.

    Parameters
    ----------
    a, b : float32 [N, D] and [M, D], on one device
    rows, columns : int64 [P]

    Returns
    -------
    float32 [P]
    """
    out = a.new_empty(len(rows))
    if a.device.type == "cpu":
        _pair_dot(*(t.numpy() for t in (a, b, rows, columns, out)))
        return out
    chunk = max(1, _block_elements(a.device) // a.shape[1])
    for part in torch.arange(len(rows), device=a.device).split(chunk):
        out[part] = (a[rows[part]] * b[columns[part]]).sum(1)
    return out


def _block_elements(device: torch.device) -> int:
    return _BLOCK_ELEMENTS if device.type == "cpu" else _BLOCK_ELEMENTS_GPU


def _checked(name: str, x: Tensor) -> Tensor:
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape [N, D], got {list(x.shape)}")
    x = x.detach().float().contiguous()
    if not x.sum().isfinite():  # no temporary of the size of x
        raise ValueError(f"{name} hold values that are not finite")
    return x


# ---------------------------------------------------------------- coarse searches


@dataclass(frozen=True)
class _Operand:
    """``x``, centred, in codes whose products give those of ``x`` and another y.

    x_i . y_j = (codes_i . codes_j) * scale_i * scale_j + shift_i + shift_j.
    Centring on the features' mean keeps the coarse error proportional to the spread
    of the features, however narrow the cone they lie in.
    """

    codes: Tensor  # [N, D] int8 or float32
    scale: Tensor  # [N] float32
    shift: Tensor  # [N] float32

    @classmethod
    def of(cls, x: Tensor, mean: Tensor, as_int8: bool) -> "_Operand":
        shift = x @ mean - mean @ mean / 2
        if not as_int8:
            return cls(x - mean, torch.ones_like(shift), shift)
        codes = torch.empty_like(x, dtype=torch.int8)
        scale = torch.empty_like(shift)
        for i in range(0, len(x), 1024):  # no second copy of x in float32
            part = x[i : i + 1024] - mean
            largest = part.abs().amax(1).clamp_(min=1e-12)
            scale[i : i + 1024] = largest / 127
            codes[i : i + 1024] = part.mul_((127 / largest)[:, None]).round_()
        return cls(codes, scale, shift)

    def __getitem__(self, rows: slice | Tensor) -> "_Operand":
        return _Operand(self.codes[rows], self.scale[rows], self.shift[rows])


def _product(a: _Operand, b: _Operand) -> Tensor:
    """Products of the codes, [A, B] int32 or float32."""
    if a.codes.dtype == torch.int8:
        return torch._int_mm(a.codes, b.codes.T)
    with _reduced_precision():
        return a.codes @ b.codes.T


@contextmanager
def _reduced_precision() -> Iterator[None]:
    # TF32 on NVIDIA GPUs, whatever oneDNN finds fastest on a CPU.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _multiplies_int8_fast(device: torch.device) -> bool:
    # Without these instructions int8 products are slower than float32 ones.
    supported = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return device.type == "cpu" and hasattr(torch, "_int_mm") and supported()


def _searches_in_tiles(device: torch.device) -> bool:
    return device.type == "cpu"  # where the compiled heaps run


class _Torch:
    """Coarse search by blocked torch products."""

    def __init__(self, features: Tensor, queries: Tensor, own: Tensor | None) -> None:
        self.features, self.queries, self.own = features, queries, own
        as_int8 = _multiplies_int8_fast(features.device)
        mean = features.mean(0)
        self.gallery = _Operand.of(features, mean, as_int8)
        if own is None:
            self.coded = _Operand.of(queries, mean, as_int8)
        else:
            self.coded = self.gallery[int(own[0]) : int(own[-1]) + 1]

    def unit(self) -> tuple[Tensor, Tensor]:
        """Scale of the error of each query [Q], and of the worst gallery row."""
        return self.coded.scale, self.gallery.scale.max()

    def candidates(self, m: int) -> tuple[Tensor, Tensor]:
        """The m best of each query: coarse similarity [Q, m], index int64 [Q, m]."""
        device = self.features.device
        if not _searches_in_tiles(device):
            size = max(1, _block_elements(device) // len(self.features))
            every = torch.arange(len(self.queries), device=device)
            best = [self.all(part).topk(m) for part in every.split(size)]
            return torch.cat([b[0] for b in best]), torch.cat([b[1] for b in best])
        a, b = self.coded, self.gallery
        value = np.full((len(self.queries), m), -np.inf, np.float32)
        index = np.full((len(self.queries), m), -1, np.int32)
        root = np.full(len(self.queries), -np.inf, np.float32)
        # Every row against every row: the upper half of the product says it all.
        both = self.own is not None and len(self.queries) == len(self.features)
        first_own = -len(b.codes) if self.own is None else int(self.own[0])
        for r in range(0, len(a.codes), _TILE_ROWS):
            tile_rows = slice(r, min(r + _TILE_ROWS, len(a.codes)))
            left = a[tile_rows]
            for c in range(r if both else 0, len(b.codes), _TILE_COLUMNS):
                tile_columns = slice(c, min(c + _TILE_COLUMNS, len(b.codes)))
                right = b[tile_columns]
                _keep_best(
                    _product(left, right).numpy(),
                    left.scale.numpy(),
                    left.shift.numpy(),
                    right.scale.numpy(),
                    right.shift.numpy(),
                    r,
                    c,
                    first_own,
                    both,
                    value,
                    index,
                    root,
                )
        return torch.from_numpy(value), torch.from_numpy(index).long()

    def all(self, some: Tensor) -> Tensor:
        """Coarse similarities of some queries to every row, [S, N]; itself -inf."""
        a, b = self.coded[some], self.gallery
        coarse = _product(a, b) * a.scale[:, None] * b.scale
        coarse += a.shift[:, None] + b.shift
        if self.own is not None:
            coarse.scatter_(1, self.own[some, None], -torch.inf)
        return coarse


class _Faiss:
    """Coarse search by a flat faiss index."""

    def __init__(self, features: Tensor, queries: Tensor, own: Tensor | None) -> None:
        if features.device.type != "cpu":
            raise ValueError("backend 'faiss' searches on the CPU only")
        # Here, because on macOS it brings an OpenMP runtime of its own: two of them at
        # work in one process crash it, so there it also gets one thread.
        import faiss

        if sys.platform == "darwin":
            faiss.omp_set_num_threads(1)
        self.features, self.queries, self.own = features, queries, own
        self.index = faiss.IndexFlatIP(features.shape[1])
        self.index.add(features.numpy())

    def unit(self) -> tuple[Tensor, Tensor]:
        one = torch.ones(len(self.queries))
        return one, one[0]

    def candidates(self, m: int) -> tuple[Tensor, Tensor]:
        if self.own is None:
            value, index = map(
                torch.from_numpy, self.index.search(self.queries.numpy(), m)
            )
            return value, index
        value, index = map(
            torch.from_numpy, self.index.search(self.queries.numpy(), m + 1)
        )
        # Drop the row itself, or the last where duplicates crowded it out.
        itself = index == self.own[:, None]
        itself[~itself.any(1), -1] = True
        shape = (len(index), m)
        return value[~itself].view(shape), index[~itself].view(shape)

    def all(self, some: Tensor) -> Tensor:
        value, index = map(
            torch.from_numpy,
            self.index.search(self.queries[some].numpy(), len(self.features)),
        )
        coarse = torch.empty_like(value).scatter_(1, index, value)
        if self.own is not None:
            coarse.scatter_(1, self.own[some, None], -torch.inf)
        return coarse


# ------------------------------------------------------------------ exact ranking


def _search(search: _Torch | _Faiss, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each query, itself left out: similarity and index [Q, k]."""
    n = len(search.features) - (search.own is not None)
    m = min(n, 2 * k + 8)
    coarse, candidates = search.candidates(m)
    every = torch.arange(len(candidates), device=candidates.device)

    # How far can a coarse similarity be from the true one?
    sample = every[:: max(1, len(every) // _SAMPLE_ROWS)]
    exact = _exact(search, sample, candidates[sample])
    query_unit, worst_unit = search.unit()
    units = query_unit + worst_unit
    observed = ((exact - coarse[sample]).abs().amax(1) / units[sample]).max()
    error = units * (_ERROR_MARGIN * observed) + 1e-6

    # One of the true k best is at least as good as the coarse k-th less one error,
    # and its coarse similarity may lie one more error lower.
    bar = coarse.topk(k).values[:, -1] - 2 * error
    similarity = coarse.new_empty(len(every), k)
    index = torch.empty_like(similarity, dtype=torch.int64)

    def rank(some: Tensor, coarse: Tensor, candidates: Tensor) -> None:
        # By index, then by similarity in a stable sort: ties to the smaller index.
        candidates, order = candidates.sort(1)
        exact = _exact(
            search, some, candidates, coarse.gather(1, order) >= bar[some, None]
        )
        exact, order = exact.sort(dim=1, descending=True, stable=True)
        similarity[some] = exact[:, :k]
        index[some] = candidates.gather(1, order[:, :k])

    covered = coarse.amin(1) < bar if m < n else torch.ones_like(bar, dtype=torch.bool)
    elements = _block_elements(coarse.device)
    for some in every[covered].split(max(1, elements // (4 * m))):
        rank(some, coarse[some], candidates[some])
    # The rest is a crowd of near ties: look at all that reach the bar.
    columns = torch.arange(len(search.features), device=coarse.device)
    crowded = every[~covered]
    if len(crowded):
        logger.debug("%d of %d rows have near ties", len(crowded), len(every))
    for some in crowded.split(max(1, elements // (4 * len(columns)))):
        rank(some, search.all(some), columns.expand(len(some), -1))
    return similarity, index


def _exact(
    search: _Torch | _Faiss,
    some: Tensor,
    candidates: Tensor,
    among: Tensor | None = None,
) -> Tensor:
    """Exact similarities of candidates [S, m]; -inf outside ``among``."""
    if among is None:
        among = torch.ones_like(candidates, dtype=torch.bool)
    exact = torch.full(candidates.shape, -torch.inf, device=candidates.device)
    row, column = among.nonzero(as_tuple=True)
    exact[row, column] = pair_similarity(
        search.queries, search.features, some[row], candidates[row, column]
    )
    return exact


# ------------------------------------------------------------------------ kernels


@numba.njit(cache=True, fastmath={"reassoc", "contract"})
def _pair_dot(a, b, rows, columns, out):  # type: ignore[no-untyped-def]
    for p in range(len(rows)):
        x, y = a[rows[p]], b[columns[p]]
        total = np.float32(0)
        for d in range(len(x)):
            total += x[d] * y[d]
        out[p] = total


@numba.njit(cache=True)
def _push(value, index, v, j):  # type: ignore[no-untyped-def]
    """Replace the root of a min-heap and return the new root."""
    m = len(value)
    hole = 0
    while True:
        child = 2 * hole + 1
        if child >= m:
            break
        if child + 1 < m and value[child + 1] < value[child]:
            child += 1
        if value[child] >= v:
            break
        value[hole], index[hole] = value[child], index[child]
        hole = child
    value[hole], index[hole] = v, j
    return value[0]


@numba.njit(cache=True)
def _keep_best(  # type: ignore[no-untyped-def]
    product,
    row_scale,
    row_shift,
    column_scale,
    column_shift,
    row0,
    column0,
    first_own,
    both,
    value,
    index,
    root,
):
    """Offer a tile of similarities to the heaps of its rows (and of its columns)."""
    height, width = product.shape
    offered = np.empty(width, np.float32)
    roots = root[column0 : column0 + width]
    for r in range(height):
        i = row0 + r
        own = first_own + i - column0  # the column of the row itself, in this tile
        scale, shift, line = row_scale[r], row_shift[r], product[r]
        for c in range(width):
            v = np.float32(line[c]) * column_scale[c] * scale
            offered[c] = v + (shift + column_shift[c])
        lowest = root[i]
        # Few are taken: look at 64 at a time in loops the compiler vectorises.
        for first in range(max(0, own + 1) if both else 0, width, 64):
            part, bars = offered[first : first + 64], roots[first : first + 64]
            taken = np.int32(0)
            if both:
                for c in range(len(part)):
                    taken |= np.int32(part[c] > min(lowest, bars[c]))
            else:
                for c in range(len(part)):
                    taken |= np.int32(part[c] > lowest)
            if taken == 0:
                continue
            for c in range(len(part)):
                v, j = part[c], column0 + first + c
                if v > lowest and first + c != own:
                    lowest = _push(value[i], index[i], v, j)
                if both and v > bars[c]:
                    bars[c] = _push(value[j], index[j], v, i)
        root[i] = lowest
