"""Retrieval metrics (CMC, mAP, mINP) and the quality of pseudo labels."""

import logging
from dataclasses import dataclass

import numba
import numpy as np
from torch import Tensor

from o2cap.errors import InputError

logger = logging.getLogger(__name__)

_BLOCK_ELEMENTS = 2**24  # similarities held at once (64 MiB)
_CMC_RANKS = 50


@dataclass(frozen=True)
class RetrievalMetrics:
    """Means over the queries that have a match; fractions in 0..1."""

    mAP: float
    cmc: np.ndarray  # float64 [R]; cmc[r - 1]: a match among the first r
    mINP: float
    queries: int  # queries that were scored
    left_out: int  # queries without a match in the gallery


@dataclass(frozen=True)
class ClusteringQuality:
    """Pseudo labels against true identities.

    Scores and purity are over clustered images of known identity: outliers are left
    out, as the training leaves them out, so read them beside ``outlier_share``. They
    are NaN where there is no such image.
    """

    ari: float  # adjusted Rand index
    nmi: float  # normalised mutual information, arithmetic mean of the entropies
    v_measure: float  # harmonic mean of the next two; the same number as nmi
    homogeneity: float  # 1: no cluster mixes identities
    completeness: float  # 1: no identity is split over clusters
    purity: float  # share of images whose identity is their cluster's commonest
    outlier_share: float  # of all images
    clusters: int
    cameras_per_cluster: float  # mean; NaN without camids or clusters


def evaluate_retrieval(
    query_features: Tensor,
    gallery_features: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_camids: Tensor,
    gallery_camids: Tensor,
) -> RetrievalMetrics:
    """Rank the gallery for each query by inner product and score the ranking.

    The standard protocol (Zheng et al., ICCV 2015): for each query, gallery images of
    its identity taken by its own camera are removed; AP is the mean, over the
    matches, of the precision at the match's rank, not interpolated. INP is the number
    of matches over the rank of the last (Ye et al., TPAMI 2022). Images of negative
    pid (junk, unknown) are ignored: neither right nor wrong. Queries without a match
    are left out and reported. A wrong image exactly as similar as a match counts as
    ranked before it, so results do not depend on the order of the gallery and a
    network that maps all images to one point scores badly.

    Parameters
    ----------
    query_features, gallery_features : float32 [Q, D] and [G, D], L2-normalised, on
        one device
    query_pids, query_camids : int64 [Q]
    gallery_pids, gallery_camids : int64 [G]

    Raises
    ------
    InputError
        If there is no query, or none has a match.
    ValueError
        For lengths that do not fit, or features that are not finite.

    Book: :eq:`evaluate_retrieval`
    """
    _check_side("query", query_features, query_pids, query_camids)
    _check_side("gallery", gallery_features, gallery_pids, gallery_camids)
    total, width = len(query_pids), len(gallery_pids)
    if total == 0:
        raise InputError("There is no query image to evaluate: check the query split.")
    columns = gallery_pids, gallery_camids, query_pids, query_camids
    pid, camid, own_pid, own_camid = (c.cpu().numpy() for c in columns)
    known = np.flatnonzero(pid >= 0)
    pid, camid = pid[known], camid[known]
    by_pid = np.argsort(pid, kind="stable")
    first = np.searchsorted(pid[by_pid], own_pid, side="left")
    last = np.searchsorted(pid[by_pid], own_pid, side="right")

    ap, inp = np.full(total, np.nan), np.full(total, np.nan)
    best = np.zeros(total, np.int64)
    size = max(1, _BLOCK_ELEMENTS // max(1, width))
    for start in range(0, total, size):
        block = slice(start, start + size)
        product = query_features[block].float() @ gallery_features.float().T
        similarity = product.cpu().numpy()
        if len(known) < width:
            similarity = similarity[:, known]
        _score_block(
            *(similarity, camid, own_pid[block], own_camid[block], by_pid),
            *(first[block], last[block], ap[block], inp[block], best[block]),
        )

    scored = best > 0
    left_out = int(total - scored.sum())
    if left_out == total:
        raise InputError(
            "No query has a match from another camera in the gallery: check the pid "
            "and camid columns of both splits."
        )
    if left_out:
        logger.warning(
            "%d of %d queries have no match in the gallery and are left out",
            left_out,
            total,
        )
    ranks = np.arange(1, min(_CMC_RANKS, width) + 1)
    return RetrievalMetrics(
        mAP=float(ap[scored].mean()),
        cmc=(best[scored] <= ranks[:, None]).mean(1),
        mINP=float(inp[scored].mean()),
        queries=total - left_out,
        left_out=left_out,
    )


def clustering_quality(
    clusters: Tensor, pids: Tensor, camids: Tensor | None = None
) -> ClusteringQuality:
    """Compare pseudo labels with true identities.

    Parameters
    ----------
    clusters : int64 [N], -1 for outliers
    pids : int64 [N], negative where unknown (such images do not count in the scores)
    camids : int64 [N], optional

    Book: :eq:`clustering_quality`
    """
    # Here, because it takes a second to import, and most commands need none of it.
    from sklearn.metrics import adjusted_rand_score, homogeneity_completeness_v_measure

    if len(pids) != len(clusters) or (
        camids is not None and len(camids) != len(clusters)
    ):
        raise ValueError("clusters, pids and camids must have one length")
    label, pid = clusters.cpu().numpy(), pids.cpu().numpy()
    inlier = label >= 0
    names, label_rank = np.unique(label[inlier], return_inverse=True)
    cameras = np.nan
    if camids is not None and len(names):
        seen = np.stack([label_rank, camids.cpu().numpy()[inlier]])
        cameras = np.unique(seen, axis=1).shape[1] / len(names)

    known = inlier & (pid >= 0)
    label, pid = label[known], pid[known]
    ari = homogeneity = completeness = v_measure = purity = np.nan
    if len(label):
        ari = adjusted_rand_score(pid, label)
        homogeneity, completeness, v_measure = homogeneity_completeness_v_measure(
            pid, label
        )
        pairs, count = np.unique(np.stack([label, pid]), axis=1, return_counts=True)
        commonest = np.zeros(pairs[0].max() + 1, np.int64)
        np.maximum.at(commonest, pairs[0], count)
        purity = commonest.sum() / len(label)
    return ClusteringQuality(
        ari=float(ari),
        nmi=float(v_measure),
        v_measure=float(v_measure),
        homogeneity=float(homogeneity),
        completeness=float(completeness),
        purity=float(purity),
        outlier_share=float((~inlier).mean()) if len(inlier) else np.nan,
        clusters=len(names),
        cameras_per_cluster=float(cameras),
    )


def _check_side(side: str, features: Tensor, pids: Tensor, camids: Tensor) -> None:
    if features.ndim != 2 or not len(features) == len(pids) == len(camids):
        raise ValueError(
            f"{side}: features {list(features.shape)}, {len(pids)} pids and "
            f"{len(camids)} camids do not describe the same images"
        )
    if len(features) and not features.sum().isfinite():
        raise ValueError(f"{side} features hold values that are not finite")


@numba.njit(cache=True)
def _score_block(  # type: ignore[no-untyped-def]
    similarity, camid, own_pid, own_camid, by_pid, first, last, ap, inp, best
):
    """Fill AP, INP and the rank of the best match of each query that has one.

    Only the ranks of the matches are needed, and the rank of a match is a count, in
    a loop that the compiler vectorises; sorting pays where matches are many.
    """
    for q in range(len(own_pid)):
        if own_pid[q] < 0:
            continue
        row = similarity[q]
        own = row[by_pid[first[q] : last[q]]]  # of this identity, own camera too
        matches = own[camid[by_pid[first[q] : last[q]]] != own_camid[q]]
        if len(matches) == 0:
            continue
        matches = -np.sort(-matches)
        many = len(matches) > 64
        if many:
            row = np.sort(row)
        total, rank = 0.0, 0
        for m, match in enumerate(matches):
            reach = (
                len(row) - np.searchsorted(row, match) if many else _count(row, match)
            )
            rank = m + 1 + reach - _count(own, match)
            total += (m + 1) / rank
            if m == 0:
                best[q] = rank
        ap[q] = total / len(matches)
        inp[q] = len(matches) / rank


@numba.njit(cache=True, fastmath={"reassoc"})
def _count(values, bar):  # type: ignore[no-untyped-def]
    # In float32, exact up to 2**24: the compiler packs it, as it does no int count.
    count = np.float32(0)
    for i in range(len(values)):
        count += np.float32(1) if values[i] >= bar else np.float32(0)
    return int(count)
