"""Retrieval metrics (CMC, mAP, mINP) and the quality of pseudo labels."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
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
from o2cap.features import extract_all
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
    queries: int  # queries that were scored
    left_out: int  # queries without a match in the gallery

    def record(self) -> dict[str, float]:
        """Return mAP, rank1, rank5, rank10 and mINP, as records have them."""
        # Beyond the end of a gallery of fewer pictures nothing more is found.
        rank = {k: float(self.cmc[min(k, len(self.cmc)) - 1]) for k in (1, 5, 10)}
        ranks = {f"rank{k}": share for k, share in rank.items()}
        return {"mAP": self.mAP, **ranks, "mINP": self.mINP}


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
    query_features, gallery_features : float32 [Q, D] and [G, D], L2-normalised, on
        one device
    query_pids, query_camids : int64 [Q]
    gallery_pids, gallery_camids : int64 [G]
    distances : iterable of FloatTensor [B, G], optional
        Rank by these instead, blocks in the order of the queries: see
        :func:`o2cap.reranking.rerank`.

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
        average_precision=ap,
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


class Evaluator:
    """Query and gallery of a data set, decoded once.

    Parameters
    ----------
    config : Config
        Input size and reading options.
    dataset : ReIDDataset
        Its query and gallery; with neither, there is nothing to evaluate.
    hardware : Hardware
        Where features are extracted.

    Raises
    ------
    InputError
        At the first unreadable pictures, unless they are to be skipped.
    """

    def __init__(
        self, config: Config, dataset: ReIDDataset, hardware: Hardware
    ) -> None:
        self.config, self.hardware = config, hardware
        self.decoded = [
            decode(
                part,
                config.height,
                config.width,
                workers=config.workers,
                skip_unreadable=config.skip_unreadable,
            )
            for part in (dataset.query, dataset.gallery)
            if len(part)
        ]

    def __call__(self, model: ReIDModel) -> RetrievalMetrics | None:
        """Return the retrieval metrics of `model`, None without query and gallery."""
        if not self.decoded:
            return None
        (_, query), (_, gallery) = self.decoded
        features = self.features(model)
        assert query.pids is not None and gallery.pids is not None  # see check_parts
        return distributed.on_first(
            evaluate_retrieval,
            features[0],
            features[1],
            query.pids,
            gallery.pids,
            query.camids,
            gallery.camids,
        )

    def features(self, model: ReIDModel) -> list[Tensor]:
        """Return the features of query and gallery."""
        return [
            extract_all(model, pixels, self.config, self.hardware)
            for pixels, _ in self.decoded
        ]

    def record(self, model: ReIDModel) -> dict[str, Any]:
        """Return the metrics as a record's entries; none without query and gallery."""
        found = self(model)
        return {} if found is None else found.record()


def assess(
    query: ImageSet,
    gallery: ImageSet,
    query_features: Tensor,
    gallery_features: Tensor,
    *,
    same_camera: Literal["drop", "keep"] = "drop",
    rerank: bool = False,
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

    Returns
    -------
    dict
        Ranking metrics; under ``verification`` the figures of
        :func:`o2cap.verification.verify_pairs`; with `rerank`, under ``reranked``, the
        same ranking metrics again; and ``same_camera``.

    Raises
    ------
    InputError
        When no query has a match in the gallery.
    """
    assert query.pids is not None and gallery.pids is not None  # see check_parts
    cameras = (query.camids, gallery.camids)
    if same_camera == "keep":
        # As if each picture of the gallery had a camera of its own.
        place = {path: i for i, path in enumerate(gallery.paths)}
        own = torch.tensor([place.get(path, -1) for path in query.paths])
        cameras = (own, torch.arange(len(gallery)))
    features = (query_features, gallery_features)
    labels = (query.pids, gallery.pids, *cameras)
    record: dict[str, Any] = {**evaluate_retrieval(*features, *labels).record()}
    if rerank:
        blocks = reranking.rerank(*features)
        again = evaluate_retrieval(*features, *labels, distances=blocks)
        record["reranked"] = again.record()
    record["verification"] = asdict(verify_pairs(*features, *labels))
    return record | {"same_camera": same_camera}


def check_parts(
    dataset: ReIDDataset, *, train: bool = True, same_camera: str = "drop"
) -> None:
    """Refuse a data set that cannot be trained on or evaluated with.

    Parameters
    ----------
    train : bool
        Whether it is to be trained on.
    same_camera : "drop" or "keep"
        As for :func:`assess`.

    Raises
    ------
    InputError
        For no training pictures; a gallery without queries, or the reverse; or
        pictures there of which no identity is known, or none that can be found.
    """
    if train and len(dataset.train) == 0:
        raise InputError(f"The data set {dataset.name} has no training pictures.")
    for has, lacks in (("gallery", "query"), ("query", "gallery")):
        if len(getattr(dataset, has)) and not len(getattr(dataset, lacks)):
            raise InputError(
                f"The data set {dataset.name} has a {has} but no {lacks}; evaluation "
                "needs both (training alone needs neither)."
            )
    if not len(dataset.query):
        return
    cameras: dict[int, set[int]] = {}
    for pid, camid in _identified(dataset.gallery):
        cameras.setdefault(pid, set()).add(camid)
    if not any(
        cameras.get(pid, set()) - ({camid} if same_camera == "drop" else set())
        for pid, camid in _identified(dataset.query)
    ):
        raise InputError(
            f"The data set {dataset.name} cannot be evaluated with: no query has a "
            "picture of its identity in the gallery, from another camera (which "
            "o2cap evaluate --same-camera keep does not ask for)."
        )


def _identified(images: ImageSet) -> Iterator[tuple[int, int]]:
    if images.pids is None:
        return iter(())
    pairs = zip(images.pids.tolist(), images.camids.tolist(), strict=True)
    return ((pid, camid) for pid, camid in pairs if pid >= 0)
