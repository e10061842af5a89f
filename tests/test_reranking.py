"""Re-ranking: block by block what the dense formula gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from o2cap import reranking
from o2cap.data.images import ImageSet, ReIDDataset
from o2cap.errors import InputError
from o2cap.evaluation import assess, check_parts, evaluate_retrieval
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


# ------------------------------------------------------------------ what evaluate says


def people(n: int, cameras: int, start: int = 0) -> ImageSet:
    """Return n pictures of five identities that do not exist on any disk."""
    index = torch.arange(start, start + n)
    paths = [Path(f"{i}.png") for i in index.tolist()]
    return ImageSet(paths, index % cameras, index % 5)


def mean_ap(q: ImageSet, g: ImageSet, distance: Tensor, keep: bool) -> float:
    """Rank with loops; with `keep` only a query's own picture is left out."""
    assert q.pids is not None and g.pids is not None
    scores = []
    for i in range(len(q)):
        hits = []
        for j in distance[i].argsort(stable=True).tolist():
            same = bool(q.pids[i] == g.pids[j])
            camera = bool(q.camids[i] == g.camids[j])
            if q.paths[i] != g.paths[j] if keep else not (same and camera):
                hits.append(same)
        right = np.cumsum(hits)
        scores.append(np.mean([right[k] / (k + 1) for k in np.flatnonzero(hits)]))
    return float(np.mean(scores))


@pytest.mark.parametrize("same_camera", ["drop", "keep"])
def test_queries_that_are_in_the_gallery_do_not_find_themselves(
    same_camera: str,
) -> None:
    x = clustered(40, 5)
    everything = people(40, 3)
    few = everything.select(torch.arange(0, 40, 3))
    said = assess(few, everything, x[::3], x, same_camera=same_camera, rerank=True)
    keep = same_camera == "keep"
    cosine, again = 1 - x[::3] @ x.T, torch.cat(list(rerank(x[::3], x)))
    assert said["mAP"] == pytest.approx(mean_ap(few, everything, cosine, keep))
    reranked = said["reranked"]["mAP"]
    assert reranked == pytest.approx(mean_ap(few, everything, again, keep))
    assert said["same_camera"] == same_camera
    assert 0.5 < said["verification"]["auc"] <= 1


def test_one_camera_and_no_training_pictures_can_be_evaluated() -> None:
    nothing, x = people(0, 1), clustered(30, 5)
    query, gallery = people(10, 1), people(20, 1, start=10)
    data = ReIDDataset("mine", nothing, query, gallery)
    with pytest.raises(InputError, match="no training pictures"):
        check_parts(data)
    check_parts(data, train=False)
    with pytest.raises(InputError, match="--same-camera keep"):
        assess(query, gallery, x[:10], x[10:])
    said = assess(query, gallery, x[:10], x[10:], same_camera="keep")
    # As the standard protocol says of two cameras.
    assert query.pids is not None and gallery.pids is not None
    labels = (query.pids, gallery.pids, query.camids, gallery.camids + 1)
    assert said["mAP"] == evaluate_retrieval(x[:10], x[10:], *labels).mAP
