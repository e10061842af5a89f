"""Retrieval metrics (CMC, mAP, mINP) and the quality of pseudo labels."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numba
import numpy as np
import torch
from torch import Tensor

from o2cap import distributed, reranking
from o2cap.backbone import ReIDModel
from o2cap.config import Config
from o2cap.data.images import ImageSet, ReIDDataset
from o2cap.data.loading import decode
from o2cap.device import Hardware
from o2cap.errors import InputError
from o2cap.features import extract_all, standardise_by_camera
from o2cap.proxies import split_by_camera
from o2cap.verification import verify_pairs

logger = logging.getLogger(__name__)

_BLOCK_ELEMENTS = 2**24  # similarities held at once (64 MiB)
_CMC_RANKS = 50


@dataclass(frozen=True)
class RetrievalMetrics:
    """Means over the queries that have a match; fractions in 0..1."""

    mAP: float
    cmc: np.ndarray  # float64 [R]; cmc[r - 1]: a match among the first r
    mINP: float
    average_precision: np.ndarray  # float64 [Q]; NaN where a query was left out
    left_out: int  # queries without a match in the gallery

    def record(self) -> dict[str, float]:
        """Return mAP, rank1, rank5, rank10 and mINP, as records have them."""
        # Beyond the end of a gallery of fewer pictures nothing more is found.
        ranks = {f"rank{k}": float(self.cmc[:k][-1]) for k in (1, 5, 10)}
        return {"mAP": self.mAP, **ranks, "mINP": self.mINP}


@dataclass(frozen=True)
class ClusteringQuality:
    """Pseudo labels against true identities.

    Scores and purity are over clustered images of known identity: outliers are left
    out, as the training leaves them out, so read them beside ``outlier_share``. They
    are NaN where there is no such image.
    """

    ari: float  # adjusted Rand index
    nmi: float  # normalised mutual information; also known as the V-measure
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
    *,
    distances: Iterable[Tensor] | None = None,
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
    query_features, gallery_features : FloatTensor [Q, D] and [G, D]
        L2-normalised, on one device.
    query_pids, query_camids : LongTensor [Q]
        Identity and camera of each query; a negative identity is unknown.
    gallery_pids, gallery_camids : LongTensor [G]
        The same of the gallery.
    distances : iterable of FloatTensor [B, G], optional
        Rank by these instead, blocks in the order of the queries: see
        :func:`o2cap.reranking.rerank`.

    Raises
    ------
    InputError
        If no query has a match.
    ValueError
        For lengths that do not fit, or features that are not finite.

    Book: :eq:`evaluate_retrieval`
    """
    total, width = len(query_features), len(gallery_features)
    columns = gallery_pids, gallery_camids, query_pids, query_camids
    if [len(column) for column in columns] != [width, width, total, total]:
        raise ValueError("query or gallery: features, pids, camids differ in length")
    if not (query_features.sum() + gallery_features.sum()).isfinite():
        raise ValueError("query or gallery features are not finite")
    pid, camid, own_pid, own_camid = (c.cpu().numpy() for c in columns)
    known = np.flatnonzero(pid >= 0)
    pid, camid = pid[known], camid[known]
    by_pid = np.argsort(pid, kind="stable")
    first = np.searchsorted(pid[by_pid], own_pid, side="left")
    last = np.searchsorted(pid[by_pid], own_pid, side="right")

    ap, inp = np.full(total, np.nan), np.full(total, np.nan)
    best = np.zeros(total, np.int64)
    size = max(1, _BLOCK_ELEMENTS // max(1, width))
    if distances is None:
        gallery = gallery_features.float().T
        products = (part.float() @ gallery for part in query_features.split(size))
    else:
        products = (-distance for distance in distances)
    start = 0
    for product in products:
        block = slice(start, start := start + len(product))
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
            "and camid of both (or o2cap evaluate RUN --same-camera keep)."
        )
    if left_out:
        logger.warning(f"{left_out} of {total} queries have no match and are left out")
    ranks = np.arange(1, min(_CMC_RANKS, width) + 1)
    cmc = (best[scored] <= ranks[:, None]).mean(1)
    means = float(ap[scored].mean()), cmc, float(inp[scored].mean())
    return RetrievalMetrics(*means, ap, left_out)


def clustering_quality(
    clusters: Tensor, pids: Tensor, camids: Tensor | None = None
) -> ClusteringQuality:
    """Compare pseudo labels with true identities.

    Parameters
    ----------
    clusters : LongTensor [N]
        Pseudo labels, −1 for outliers.
    pids : LongTensor [N]
        Identities, negative where unknown: such images do not count in the scores.
    camids : LongTensor [N], optional
        Cameras, of which the mean number per cluster is then told.

    Book: :eq:`clustering_quality`
    """
    # Here, because it takes a second to import, and most commands need none of it.
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    number = len(clusters[clusters >= 0].unique())
    cameras = ari = nmi = purity = np.nan
    if camids is not None and number:
        cameras = len(split_by_camera(clusters, camids)) / number
    known = (clusters >= 0) & (pids >= 0)
    if known.any():
        label, pid = clusters[known].cpu().numpy(), pids[known].cpu().numpy()
        ari = adjusted_rand_score(pid, label)
        nmi = normalized_mutual_info_score(pid, label)
        table = contingency_matrix(pid, label, sparse=True)
        purity = table.max(axis=0).sum() / len(label)
    outliers = float((clusters < 0).double().mean())
    scores = float(ari), float(nmi), float(purity)
    return ClusteringQuality(*scores, outliers, number, cameras)


@numba.njit(cache=True)
def _score_block(  # type: ignore[no-untyped-def]
    similarity, camid, own_pid, own_camid, by_pid, first, last, ap, inp, best
):
    """Fill AP, INP and the rank of the best match of each query that has one.

    Only the ranks of the matches are needed, and the rank of a match is a count, in
    a loop that the compiler vectorises: faster than sorting, with 1,000 matches, too.
    """
    for q in range(len(own_pid)):
        if own_pid[q] < 0:
            continue
        row = similarity[q]
        own = row[by_pid[first[q] : last[q]]]  # of this identity, own camera too
        matches = own[camid[by_pid[first[q] : last[q]]] != own_camid[q]]
        if len(matches) == 0:
            continue
        total, rank = 0.0, 0
        for m, match in enumerate(-np.sort(-matches)):
            rank = m + 1 + _count(row, match) - _count(own, match)
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


class Evaluator:
    """Query and gallery of a data set, decoded once.

    Parameters
    ----------
    config : Config
        Input size and reading options.
    data : ReIDDataset
        Its query and gallery; with neither, there is nothing to evaluate.
    hardware : Hardware
        Where features are extracted.

    Raises
    ------
    InputError
        At the first unreadable pictures, unless they are to be skipped.
    """

    def __init__(self, config: Config, data: ReIDDataset, hardware: Hardware) -> None:
        self.config, self.hardware = config, hardware
        parts = data.query, data.gallery
        self.decoded = [decode(part, **config.reading) for part in parts]

    def features(self, model: ReIDModel) -> list[Tensor]:
        """Return the features of query and gallery."""
        how = self.config, self.hardware
        return [extract_all(model, pixels, *how) for pixels, _ in self.decoded]

    def record(self, model: ReIDModel) -> dict[str, float]:
        """Return the metrics as a record's entries; none without query and gallery."""
        (_, query), (_, gallery) = self.decoded
        if not len(query):
            return {}
        assert query.pids is not None and gallery.pids is not None
        labels = query.pids, gallery.pids, query.camids, gallery.camids
        known = *self.features(model), *labels
        return distributed.on_first(evaluate_retrieval, *known).record()


def assess(
    query: ImageSet,
    gallery: ImageSet,
    query_features: Tensor,
    gallery_features: Tensor,
    *,
    same_camera: Literal["drop", "keep"] = "drop",
    rerank: bool = False,
    standardise: bool = False,
) -> dict[str, Any]:
    """Return all that is said of a model on a query and a gallery.

    Parameters
    ----------
    query, gallery : ImageSet
        Q and G pictures, with their identities.
    query_features, gallery_features : FloatTensor [Q, D] and [G, D]
        L2-normalised, on one device.
    same_camera : "drop" or "keep"
        Whether pictures of the query's identity and camera are left out, as the
        standard protocol does, or only the query's own picture.
    rerank : bool
        Also score the ranking by :func:`o2cap.reranking.rerank`.
    standardise : bool
        Also score features that :func:`o2cap.features.standardise_by_camera` changed.
        They know the whole test set and its cameras (they are transductive), so their
        metrics are no rivals of the plain ones.

    Returns
    -------
    dict
        Ranking metrics; under ``verification`` the figures of
        :func:`o2cap.verification.verify_pairs`; with `rerank`, under ``reranked``, and
        with `standardise`, under ``standardised_transductive``, the same ranking
        metrics again; and ``same_camera``.

    Raises
    ------
    InputError
        When no query has a match in the gallery.
    """
    assert query.pids is not None and gallery.pids is not None
    cameras = (query.camids, gallery.camids)
    if same_camera == "keep":
        # As if each picture of the gallery had a camera of its own.
        place = {path: i for i, path in enumerate(gallery.paths)}
        own = torch.tensor([place.get(path, -1) for path in query.paths])
        cameras = (own, torch.arange(len(gallery)))
    features = (query_features, gallery_features)
    labels = (query.pids, gallery.pids, *cameras)
    record: dict[str, Any] = {"same_camera": same_camera}
    record |= evaluate_retrieval(*features, *labels).record()
    if rerank:
        how: Any = {"distances": reranking.rerank(*features)}
        record["reranked"] = evaluate_retrieval(*features, *labels, **how).record()
    if standardise:
        camids = torch.cat([query.camids, gallery.camids])
        both = standardise_by_camera(torch.cat(features), camids)
        again = evaluate_retrieval(both[: len(query)], both[len(query) :], *labels)
        record["standardised_transductive"] = again.record()
    record["verification"] = asdict(verify_pairs(*features, *labels))
    return record


def check_parts(dataset: ReIDDataset, *, train: bool = True) -> None:
    """Refuse a data set that cannot be trained on or evaluated with.

    Parameters
    ----------
    train : bool
        Whether it is to be trained on.

    Raises
    ------
    InputError
        For no training pictures; for a gallery without queries, or the reverse; and
        for neither, when it is not to be trained on.
    """
    query, gallery = len(dataset.query), len(dataset.gallery)
    if train and not len(dataset.train):
        raise InputError(f"The data set {dataset.name} has no training pictures.")
    if (query or gallery or not train) and not (query and gallery):
        raise InputError(
            f"The data set {dataset.name} has {query} query and {gallery} gallery "
            "pictures: evaluation needs both (training alone needs neither)."
        )
