"""What goes beyond the paper: weights, negatives and features that know the cameras."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from o2cap.data.images import ImageSet
from o2cap.evaluation import assess, evaluate_retrieval
from o2cap.features import standardise_by_camera
from o2cap.losses import camera_entropy_weights, offline_loss, online_positives, reduce
from o2cap.proxies import ProxyMemory, drop_single_camera, split_by_camera

# ------------------------------------------------------- camera-entropy weights


def test_camera_entropy_by_hand() -> None:
    # Cluster 0: 2 + 2 pictures of two cameras, 1 bit. Cluster 1: one camera, 0 bits.
    clusters = torch.tensor([0, 0, 0, 0, 1, 1, -1])
    camids = torch.tensor([3, 3, 5, 5, 3, 3, 3])
    proxies = split_by_camera(clusters, camids)
    assert torch.allclose(proxies.camera_entropy, torch.tensor([1.0, 0.0]))
    weight = camera_entropy_weights(torch.tensor([0, 1, 0, 2]), proxies)
    e = math.e
    high, low = 2 * e / (e + 1), 2 / (e + 1)
    assert torch.allclose(weight, torch.tensor([high, high, high, low]))


@given(
    labels=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1),
    seed=st.integers(0, 99),
)
@settings(max_examples=50)
def test_camera_entropy_is_its_formula(
    labels: list[tuple[int, int]], seed: int
) -> None:
    numbers = sorted({cluster for cluster, _ in labels})
    clusters = torch.tensor([numbers.index(cluster) for cluster, _ in labels])
    camids = torch.tensor([camera for _, camera in labels])
    proxies = split_by_camera(clusters, camids)
    chance = torch.Generator().manual_seed(seed)
    proxy = torch.randint(len(proxies), (9,), generator=chance)
    entropy = {}
    for k in range(len(numbers)):
        share = camids[clusters == k].bincount() / (clusters == k).sum()
        entropy[k] = -sum(float(p) * math.log2(p) for p in share if p > 0)
    batch = proxies.cluster[proxy].tolist()
    total = sum(math.exp(entropy[k]) for k in set(batch))
    expected = [len(set(batch)) * math.exp(entropy[k]) / total for k in batch]
    found = camera_entropy_weights(proxy, proxies)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------ negatives that are spared


def slow_offline(
    f: Tensor, y: int, m: Tensor, cluster: Tensor, spare: Tensor, negatives: int
) -> float:
    """One anchor, by the formula: spared proxies are in no denominator."""
    s = f @ m.T
    positives = [p for p in range(len(m)) if int(cluster[p]) == y]
    others = [p for p in range(len(m)) if int(cluster[p]) != y and not spare[p]]
    hardest = sorted(others, key=lambda p: -float(s[p]))[:negatives]
    total = sum(math.exp(float(s[q]) / 0.07) for q in positives + hardest)
    terms = [math.log(math.exp(float(s[p]) / 0.07) / total) for p in positives]
    return -sum(terms) / len(positives)


@pytest.mark.parametrize("negatives", [0, 3, 50])
def test_spared_proxies_are_no_negatives(negatives: int) -> None:
    clusters, camids = torch.arange(60) % 7, torch.arange(60) // 7 % 3
    proxies = split_by_camera(clusters, camids)
    m = F.normalize(torch.randn(len(proxies), 5))
    f = F.normalize(torch.randn(6, 5)).requires_grad_()
    proxy = torch.randint(len(proxies), (6,))
    spare = online_positives(f.detach() @ m.T, proxies.camera, 3)
    found = offline_loss(
        f, proxy, m, proxies, negatives=negatives, spare=spare, reduction="none"
    )
    expected = [
        slow_offline(f[i].detach(), int(proxies.cluster[proxy[i]]), m, *rest, negatives)
        for i in range(6)
        for rest in [(proxies.cluster, spare[i])]
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    found.sum().backward()
    assert f.grad is not None and f.grad.isfinite().all()


def test_sparing_everything_leaves_the_positives() -> None:
    proxies = split_by_camera(torch.arange(12) % 4, torch.arange(12) // 4)
    m = F.normalize(torch.randn(12, 5))
    spare = torch.ones(2, 12, dtype=torch.bool)
    args = (m[:2], torch.tensor([0, 1]), m, proxies)
    alone = offline_loss(*args, negatives=0)
    assert torch.allclose(offline_loss(*args, negatives=50, spare=spare), alone)


def test_losses_one_by_one_reduce_to_their_sum() -> None:
    loss, camera = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([4, 4, 7])
    assert reduce(loss, camera, "none") is loss
    assert reduce(loss, camera, "camera_sum") == 1.5 + 5
    assert reduce(loss, camera, "mean") == pytest.approx(8 / 3)


# ---------------------------------------------------------- clusters of one camera


def test_clusters_of_one_camera_become_outliers() -> None:
    clusters = torch.tensor([0, 0, 1, 1, 2, -1, 4, 4])
    camids = torch.tensor([1, 2, 3, 3, 0, 0, 9, 2])
    found = drop_single_camera(clusters, camids)
    assert found.tolist() == [0, 0, -1, -1, -1, -1, 4, 4]
    nothing = torch.full((3,), -1)
    assert drop_single_camera(nothing, camids[:3]).equal(nothing)


# -------------------------------------------------------------------- the features


def test_standardised_features_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0], [0.0, 9.0]])
    camids = torch.tensor([0, 0, 7, 7])
    found = standardise_by_camera(features, camids)
    # each camera: mean 2 (7), s.d. 1 (2), in the one dimension that varies
    assert found.tolist() == [[-1, 0], [1, 0], [0, -1], [0, 1]]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 99))
@settings(max_examples=50)
def test_standardised_features_are_their_formula(cameras: list[int], seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(len(cameras), 6, generator=chance))
    camids = torch.tensor(cameras) * 3
    found = standardise_by_camera(features, camids)
    assert found.isfinite().all()
    for camera in set(camids.tolist()):
        mine = features[camids == camera].double()
        if len(mine) == 1:  # no spread: similar to nothing
            assert not found[camids == camera].any()
            continue
        standard = (mine - mine.mean(0)) / mine.std(0, correction=0)
        expected = F.normalize(standard).float()
        torch.testing.assert_close(found[camids == camera], expected, rtol=0, atol=1e-4)


def test_a_camera_that_sees_one_thing_has_no_spread() -> None:
    features = F.normalize(torch.randn(1, 8)).expand(5, 8)
    found = standardise_by_camera(features, torch.zeros(5, dtype=torch.int64))
    assert not found.any()


def test_the_transductive_score_stands_beside_the_plain_one() -> None:
    x = F.normalize(torch.randn(30, 6))
    pids, camids = torch.arange(30) % 5, torch.arange(30) // 5 % 3
    paths = [Path(f"{i}.png") for i in range(30)]
    whole = ImageSet(paths, camids, pids)
    parts = torch.arange(10), torch.arange(10, 30)
    sets = [whole.select(rows) for rows in parts]
    plain, both = (
        assess(*sets, x[:10], x[10:], standardise=given) for given in (False, True)
    )
    changed = standardise_by_camera(x, camids)  # queries and gallery as one set
    labels = [column[rows] for column in (pids, camids) for rows in parts]
    again = evaluate_retrieval(changed[:10], changed[10:], *labels)
    assert both == plain | {"standardised_transductive": again.record()}
    assert again.mAP != plain["mAP"]


# ------------------------------------------------------------------------ the memory


def test_pictures_that_stand_together_move_the_memory_as_one_by_one() -> None:
    start = torch.randn(10, 4)
    features = F.normalize(torch.randn(12, 4))
    proxy = torch.tensor([7, 2, 0]).repeat_interleave(4)
    one, other = ProxyMemory(start), ProxyMemory(start)
    one.update(features, proxy)
    other.update(features, proxy, together=4)
    assert torch.equal(one.centroids, other.centroids)
    expected = F.normalize(start)
    for f, p in zip(features, proxy.tolist(), strict=True):
        expected[p] = F.normalize(0.2 * expected[p] + 0.8 * f, dim=0)
    torch.testing.assert_close(one.centroids, expected)
