"""The contrastive losses over proxies: offline, online, intra-camera, cluster-level.

All take a batch of B anchors: their L2-normalised features f_i, [B, D], and their
proxies p(i), [B]; and the memory entries m_p, [P, D], which get no gradient. None
loops over samples, proxies or cameras, and none copies the memory or gathers more of
it than the anchors' own entries, at most B rows (:func:`compare_with_own`). They
compute in the precision of the memory, whatever that of the features.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from o2cap.proxies import CameraProxies

Reduction = Literal["camera_sum", "mean", "none"]


def offline_loss(
    features: Tensor,
    proxy: Tensor,
    centroids: Tensor,
    proxies: CameraProxies,
    *,
    temperature: float = 0.07,
    negatives: int = 50,
    reduction: Reduction = "camera_sum",
    similarity: Tensor | None = None,
    spare: Tensor | None = None,
) -> Tensor:
    """Return the offline association loss (paper, Section III-B).

    Positives of an anchor are the proxies of its cluster, A_i; negatives the
    `negatives` other proxies most similar to f_i.

    ``L_off(i) = −1/|A_i| Σ_{p ∈ A_i} log [exp(f_i·m_p/τ) / Σ_q exp(f_i·m_q/τ)]``,
    q over A_i and the negatives.

    Parameters
    ----------
    features : FloatTensor [B, D]
        L2-normalised; the gradient flows through them only.
    proxy : LongTensor [B]
        Proxy of each anchor.
    centroids : FloatTensor [P, D]
        Memory entries.
    proxies : CameraProxies
        Cluster and camera of each of the P proxies.
    temperature, negatives, reduction
        τ, the number of negatives, and see :func:`reduce`.
    similarity : FloatTensor [B, P], optional
        What :func:`compare` returns, for a caller that adds several losses.
    spare : bool Tensor [B, P], optional
        Proxies that are no negatives of an anchor, such as those that online
        association pulls it towards (beyond the paper).

    Returns
    -------
    Tensor
        A scalar.

    Book: :eq:`offline_loss`
    """
    if similarity is None:
        similarity = compare(features.detach(), centroids)
    ranking = similarity
    if spare is not None:
        ranking = similarity.masked_fill(spare, -torch.inf)
    positive = proxies.cluster[proxy][:, None] == proxies.cluster
    given = (features, centroids, similarity, ranking, positive)
    loss = _contrast(*given, proxies.most_per_cluster, negatives, temperature)
    return reduce(loss, proxies.camera[proxy], reduction)


def online_loss(
    features: Tensor,
    proxy: Tensor,
    centroids: Tensor,
    proxies: CameraProxies,
    *,
    temperature: float = 0.07,
    negatives: int = 50,
    positives: int = 3,
    balance: float = 0.15,
    reduction: Reduction = "camera_sum",
    similarity: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """Return the online association loss (paper, Section III-C).

    Positives are chosen by :func:`online_positives`, whatever the clusters say;
    negatives are the `negatives` others most similar by the same measure.

    Parameters and result as in :func:`offline_loss`; `positives` is the number k of
    positives, `balance` the weight w of the anchor's own feature, and `own` belongs to
    `similarity`: both come from :func:`compare_with_own`.

    Book: :eq:`online_loss`
    """
    if similarity is None or own is None:
        similarity, own = compare_with_own(features, proxy, centroids)
    mixed = online_similarity(similarity, own, balance)
    chosen = online_positives(mixed, proxies.camera, positives)
    given = (features, centroids, similarity, mixed, chosen)
    loss = _contrast(*given, positives, negatives, temperature)
    return reduce(loss, proxies.camera[proxy], reduction)


def compare(features: Tensor, centroids: Tensor) -> Tensor:
    """Return the similarities f_i·m_p, [B, P], in the precision of the memory."""
    return features.to(centroids.dtype) @ centroids.detach().T


@torch.no_grad()
def compare_with_own(
    features: Tensor, proxy: Tensor, centroids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return f_i·m_p and m_{p(i)}·m_p, both FloatTensor [B, P], from one product.

    Reading the memory is what a product of so few rows costs, so it is read once.
    """
    rows = torch.cat([features.to(centroids.dtype), centroids[proxy]])
    similarity, own = compare(rows, centroids).split(len(features))
    return similarity, own


def online_similarity(similarity: Tensor, own: Tensor, balance: float = 0.15) -> Tensor:
    """Return s_i(p) = w f_i·m_p + (1 − w) m_{p(i)}·m_p, FloatTensor [B, P].

    Parameters
    ----------
    similarity, own : FloatTensor [B, P]
        f_i·m_p and m_{p(i)}·m_p, as :func:`compare_with_own` returns them.
    balance : float
        w.

    Book: :eq:`online_similarity`
    """
    return balance * similarity + (1 - balance) * own


@torch.no_grad()
def online_positives(similarity: Tensor, camera: Tensor, positives: int = 3) -> Tensor:
    """Return the positives B_i of each anchor, bool [B, P].

    The most similar proxy of each camera competes; the `positives` best of them
    win. That equals: take the best proxy, strike out its camera, and again. A
    camera without a proxy never competes, and with fewer cameras than `positives`
    there are fewer positives (the public code counts a negative as a positive).

    Parameters
    ----------
    similarity : FloatTensor [B, P]
        s_i(p).
    camera : LongTensor [P]
        Camera of each proxy.
    positives : int
        How many to choose.

    Book: :eq:`online_positives`
    """
    chosen = torch.zeros_like(similarity, dtype=torch.bool)
    value, best = similarity.max(dim=1, keepdim=True)
    for turn in range(positives):
        if turn:
            similarity = similarity.masked_fill(camera[best] == camera, -torch.inf)
            value, best = similarity.max(dim=1, keepdim=True)
        chosen.scatter_(1, best, chosen.gather(1, best) | value.isfinite())
    return chosen


def intra_camera_loss(
    features: Tensor,
    proxy: Tensor,
    centroids: Tensor,
    proxies: CameraProxies,
    *,
    temperature: float = 0.07,
    reduction: Reduction = "camera_sum",
) -> Tensor:
    """Return CAP's intra-camera loss (arXiv 2012.10674, Section «Intra-camera»).

    Cross-entropy of the anchor's own proxy over all proxies of its own camera.
    Parameters and result as in :func:`offline_loss`.

    Book: :eq:`intra_camera_loss`
    """
    logits = compare(features, centroids) / temperature
    other = proxies.camera[proxy][:, None] != proxies.camera
    logits = logits.masked_fill(other, -torch.inf)
    loss = F.cross_entropy(logits, proxy, reduction="none")
    return reduce(loss, proxies.camera[proxy], reduction)


def cluster_loss(
    features: Tensor, cluster: Tensor, centroids: Tensor, *, temperature: float = 0.07
) -> Tensor:
    """Return the camera-blind baseline: mean cross-entropy over all clusters.

    Parameters
    ----------
    features : FloatTensor [B, D]
        L2-normalised anchors.
    cluster : LongTensor [B]
        Cluster of each.
    centroids : FloatTensor [K, D]
        One entry per cluster.
    temperature : float
        τ.

    Book: :eq:`cluster_loss`
    """
    return F.cross_entropy(compare(features, centroids) / temperature, cluster)


def instance_loss(features: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Return the loss of the label-free warm start: find the other view.

    Instance discrimination within the batch: each picture is its own class, seen
    twice; a view must find the other one among all views of the batch (mean
    cross-entropy over 2B − 1 candidates; NT-Xent in SimCLR, arXiv 2002.05709).

    Parameters
    ----------
    features : FloatTensor [2B, D]
        L2-normalised; row i and row i + B are views of one picture.
    temperature : float
        Of the softmax.

    Book: :eq:`instance_loss`
    """
    similarity = features.float() @ features.float().T / temperature
    similarity = similarity.fill_diagonal_(-torch.inf)
    other = torch.arange(len(features), device=features.device)
    return F.cross_entropy(similarity, other.roll(len(features) // 2))


def camera_entropy_weights(proxy: Tensor, proxies: CameraProxies) -> Tensor:
    """Return a weight for each anchor: the more cameras see its cluster, the larger.

    Of the K clusters in the batch, cluster k has the entropy H_k, in bits, of its
    camera histogram (over all its pictures of the epoch). Its anchors weigh
    ``K e^{H_k} / Σ_k e^{H_k}``, 1 on average over the clusters. (The weight of 3C;
    beyond the paper.)

    Parameters
    ----------
    proxy : LongTensor [B]
        Proxy of each anchor.
    proxies : CameraProxies
        Cluster and camera of each proxy, and the proxy of each picture.

    Returns
    -------
    FloatTensor [B]

    Book: :eq:`camera_entropy_weights`
    """
    cluster = proxies.cluster[proxy]
    # Each cluster counts once: its anchors share it.
    once = 1 / (cluster[:, None] == cluster).sum(dim=1)
    power = proxies.camera_entropy[cluster].exp()
    return once.sum() * power / (once * power).sum()


def reduce(loss: Tensor, camera: Tensor, reduction: Reduction) -> Tensor:
    """Return one number for a batch of per-anchor losses.

    ``camera_sum``: the mean over the anchors of each camera, summed over the cameras
    in the batch. It is the public code's, and grows with the number of cameras that
    a batch happens to hold. ``mean``: the plain mean. ``none``: the losses as they are.

    Parameters
    ----------
    loss : FloatTensor [B]
        Loss of each anchor.
    camera : LongTensor [B]
        Camera of each anchor.

    Book: :eq:`reduce`
    """
    if reduction != "camera_sum":
        return loss.mean() if reduction == "mean" else loss
    same = (camera[:, None] == camera).sum(dim=1)
    return (loss / same).sum()


class _Picked(torch.autograd.Function):
    """The similarities at `index`, [B, K], with the gradient that they lack.

    They are read from the whole product, which the ranking needed anyway, and the
    gradient Σ_k g_ik m_index(i,k) is summed over rows of the memory in place:
    autograd would gather a [B, K, D] copy of the entries for both.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, centroids: Tensor, similarity: Tensor, index: Tensor
    ) -> Tensor:
        ctx.save_for_backward(index, centroids)
        ctx.dtype = features.dtype
        return similarity.gather(1, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        index, centroids = ctx.saved_tensors
        how: Any = {"per_sample_weights": gradient, "mode": "sum"}
        of_features = F.embedding_bag(index, centroids, **how)
        return of_features.to(ctx.dtype), None, None, None


def _contrast(
    features: Tensor,
    centroids: Tensor,
    similarity: Tensor,
    ranking: Tensor,
    positive: Tensor,
    most: int,
    negatives: int,
    temperature: float,
) -> Tensor:
    """Return −mean over positives of the log-softmax over positives and negatives.

    `ranking`, [B, P], says which negatives are the hardest; `positive` is bool
    [B, P], with at most `most` in a row (given, so that a GPU is not asked for it
    and waited for). A rank of −∞ is no negative. Rows with fewer positives, or few
    other proxies, are padded and masked.
    """
    count = positive.sum(dim=1)
    # Ranked with all positives first, a prefix holds what is needed.
    width = min(positive.shape[1], most + negatives)
    rank, index = ranking.masked_fill(positive, torch.inf).topk(width, dim=1)
    place = torch.arange(width, device=index.device)
    is_positive = place < count[:, None]
    is_used = (place < (count[:, None] + negatives)) & (rank > -torch.inf)
    logits = _Picked.apply(features, centroids, similarity, index) / temperature
    log_share = logits.masked_fill(~is_used, -torch.inf).log_softmax(dim=1)
    return -torch.where(is_positive, log_share, 0.0).sum(dim=1) / count
