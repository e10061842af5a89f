"""Clusters split by camera, and the memory that follows its images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from o2cap.proxies import CameraProxies, ProxyMemory, split_by_camera

# ------------------------------------------ split_by_camera


def test_split_by_hand() -> None:
    clusters = torch.tensor([0, 0, 1, -1, 0, 1, 1, -1])
    camids = torch.tensor([3, 3, 3, 3, 7, 0, 3, 9])
    proxies = split_by_camera(clusters, camids)
    # by cluster, then camera: (0, 3), (0, 7), (1, 0), (1, 3)
    assert proxies.cluster.tolist() == [0, 0, 1, 1]
    assert proxies.camera.tolist() == [3, 7, 0, 3]
    assert proxies.label.tolist() == [0, 0, 3, -1, 1, 2, 3, -1]
    assert len(proxies) == 4
    assert proxies.most_per_cluster == 2


columns = st.lists(st.tuples(st.integers(-1, 6), st.integers(0, 9)), max_size=60)


@given(columns)
@settings(max_examples=30)
def test_split_on_any_labels(rows: list[tuple[int, int]]) -> None:
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)
    clusters, camids = table[:, 0].contiguous(), table[:, 1].contiguous()
    proxies = split_by_camera(clusters, camids)
    assert proxies.label.dtype == torch.int64
    # an image's proxy is of its cluster and its camera; an outlier has none
    for i, (cluster, camera) in enumerate(rows):
        p = int(proxies.label[i])
        assert (p == -1) == (cluster == -1)
        if p >= 0:
            assert (proxies.cluster[p], proxies.camera[p]) == (cluster, camera)
    # every proxy has an image, and no two are the same (cluster, camera)
    assert set(proxies.label.tolist()) - {-1} == set(range(len(proxies)))
    pairs = set(zip(proxies.cluster.tolist(), proxies.camera.tolist(), strict=True))
    assert len(pairs) == len(proxies)
    sizes = [sum(y == cluster for y, _ in pairs) for cluster in {y for y, _ in pairs}]
    assert proxies.most_per_cluster == max(sizes, default=0)


@given(columns, st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_split_does_not_depend_on_the_order_of_images(
    rows: list[tuple[int, int]], random
) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)
    before = split_by_camera(table[:, 0].contiguous(), table[:, 1].contiguous())
    moved = table[order]
    after = split_by_camera(moved[:, 0].contiguous(), moved[:, 1].contiguous())
    assert after.cluster.equal(before.cluster)
    assert after.camera.equal(before.camera)
    assert after.label.equal(before.label[order])


def test_all_outliers_give_no_proxy() -> None:
    proxies = split_by_camera(torch.full((5,), -1), torch.arange(5))
    assert len(proxies) == 0
    assert proxies.most_per_cluster == 0
    assert proxies.label.tolist() == [-1] * 5


def test_split_refuses_columns_of_different_lengths() -> None:
    with pytest.raises(IndexError):
        split_by_camera(torch.zeros(3).long(), torch.zeros(4).long())


# ------------------------------------------ ProxyMemory


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    )


def update_by_loop(
    centroids: Tensor, features: Tensor, proxy: Tensor, momentum: float
) -> Tensor:
    """Image by image in batch order, in float64."""
    entries = centroids.double()
    for f, p in zip(features.double(), proxy.tolist(), strict=True):
        mixed = momentum * entries[p] + (1 - momentum) * f
        entries[p] = mixed / mixed.norm()
    return entries


@given(
    momentum=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    proxy=st.lists(st.integers(0, 6), max_size=40),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_update_equals_the_loop(momentum: float, proxy: list[int], seed: int) -> None:
    start, features = unit(7, 5, seed=seed), unit(len(proxy), 5, seed=seed + 100)
    index = torch.tensor(proxy, dtype=torch.int64)
    memory = ProxyMemory(start, momentum)
    memory.update(features, index)
    expected = update_by_loop(start, features, index, momentum)
    torch.testing.assert_close(memory.centroids.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(memory.centroids.norm(dim=1), torch.ones(7))
    untouched = [p for p in range(7) if p not in proxy]
    assert memory.centroids[untouched].equal(ProxyMemory(start).centroids[untouched])


def test_update_by_hand_compounds_in_batch_order() -> None:
    # m = (1, 0); first f = (0, 1), then f = (1, 0); mu = 0.5.
    # (.5, .5) -> (1, 1)/sqrt 2; then (.5 + .3536, .3536) -> norm .9239
    memory = ProxyMemory(torch.tensor([[1.0, 0.0]]), momentum=0.5)
    memory.update(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 0]))
    torch.testing.assert_close(
        memory.centroids, torch.tensor([[0.92388, 0.38268]]), rtol=0, atol=1e-5
    )
    # the other way round the last image pulls to the other side
    memory = ProxyMemory(torch.tensor([[1.0, 0.0]]), momentum=0.5)
    memory.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    torch.testing.assert_close(
        memory.centroids, torch.tensor([[0.70711, 0.70711]]), rtol=0, atol=1e-5
    )


def test_momentum_is_the_share_of_the_old_entry() -> None:
    start, features = unit(3, 8), unit(4, 8, seed=1)
    proxy = torch.tensor([2, 0, 2, 0])
    keeps, follows = ProxyMemory(start, 1.0), ProxyMemory(start, 0.0)
    keeps.update(features, proxy)
    follows.update(features, proxy)
    torch.testing.assert_close(keeps.centroids, start)
    torch.testing.assert_close(follows.centroids[[2, 0]], features[[2, 3]])
    torch.testing.assert_close(follows.centroids[1], start[1])


@given(st.randoms(use_true_random=False))
@settings(max_examples=10)
def test_order_matters_only_within_a_proxy(random) -> None:
    start, features = unit(5, 6), unit(20, 6, seed=1)
    proxy = torch.arange(20) % 5
    order = list(range(20))
    random.shuffle(order)
    # back into batch order within each proxy, wherever the proxies stand
    queues = {p: [i for i in range(20) if i % 5 == p] for p in range(5)}
    stable = [queues[i % 5].pop(0) for i in order]
    one, two = ProxyMemory(start), ProxyMemory(start)
    one.update(features, proxy)
    two.update(features[stable], proxy[stable])
    assert one.centroids.equal(two.centroids)


def test_update_leaves_no_trace_in_autograd_and_takes_half_precision() -> None:
    memory = ProxyMemory(unit(3, 4))
    features = unit(2, 4, seed=1).requires_grad_()
    memory.update(features, torch.tensor([0, 0]))
    assert not memory.centroids.requires_grad
    memory.update(features.detach().bfloat16(), torch.tensor([1, 2]))
    assert memory.centroids.dtype == torch.float32
    torch.testing.assert_close(memory.centroids.norm(dim=1), torch.ones(3))


def test_from_features_is_the_normalised_mean() -> None:
    features = unit(9, 4)
    clusters = torch.tensor([0, 0, 0, 1, 1, -1, 0, 1, -1])
    camids = torch.tensor([0, 0, 1, 1, 1, 0, 1, 0, 1])
    proxies = split_by_camera(clusters, camids)
    memory = ProxyMemory.from_features(features, proxies, momentum=0.7)
    assert memory.momentum == 0.7
    for p in range(len(proxies)):
        members = [
            i
            for i in range(9)
            if clusters[i] == proxies.cluster[p] and camids[i] == proxies.camera[p]
        ]
        mean = torch.stack([features[i] for i in members]).mean(dim=0)
        torch.testing.assert_close(memory.centroids[p], mean / mean.norm())
    # the features of an epoch are not changed by what the memory learns
    copy = features.clone()
    memory.update(unit(4, 4, seed=2), torch.arange(4))
    assert features.equal(copy)


def test_memory_travels_in_a_state_dict_and_is_no_parameter() -> None:
    memory = ProxyMemory(unit(3, 4))
    assert list(memory.parameters()) == []
    other = ProxyMemory(unit(3, 4, seed=5))
    other.load_state_dict(memory.state_dict())
    assert other.centroids.equal(memory.centroids)


def test_entries_given_are_normalised_in_a_copy() -> None:
    given_entries = 3 * unit(4, 4)
    memory = ProxyMemory(given_entries)
    torch.testing.assert_close(memory.centroids, given_entries / 3)
    memory.update(unit(1, 4, seed=3), torch.tensor([0]))
    torch.testing.assert_close(given_entries.norm(dim=1), torch.full((4,), 3.0))


def test_to_moves_every_column() -> None:
    proxies = split_by_camera(torch.tensor([0, 1]), torch.tensor([0, 1]))
    moved = proxies.to(torch.device("meta"))
    assert isinstance(moved, CameraProxies)
    for column in (moved.label, moved.cluster, moved.camera):
        assert column.device.type == "meta"
