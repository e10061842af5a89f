"""The losses against slow loops over the formulas, by hand, and by their gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from o2cap.losses import (
    cluster_loss,
    compare,
    compare_with_own,
    intra_camera_loss,
    offline_loss,
    online_loss,
    online_positives,
    online_similarity,
    reduce,
)
from o2cap.proxies import CameraProxies

TAU = 0.07


# ------------------------------------------ slow references, one loop a sentence


def reference_reduce(
    losses: list[Tensor], cameras: list[int], reduction: str
) -> Tensor:
    """Mean over the batch; or over each camera's anchors, summed over cameras."""
    if reduction == "mean":
        return sum(losses) / len(losses)
    total = torch.zeros((), dtype=torch.float64)
    for camera in set(cameras):
        of_camera = [x for x, c in zip(losses, cameras, strict=True) if c == camera]
        total = total + sum(of_camera) / len(of_camera)
    return total


def reference_contrast(
    f: Tensor, memory: Tensor, positives: list[int], negatives: list[int], tau: float
) -> Tensor:
    """Minus the mean log-share of each positive among positives and negatives."""
    logits = {p: f @ memory[p] / tau for p in [*positives, *negatives]}
    top = max(value.item() for value in logits.values())
    below = sum(torch.exp(value - top) for value in logits.values())
    shares = [logits[p] - top - torch.log(below) for p in positives]
    return -sum(shares) / len(positives)


def reference_offline(
    f: Tensor,
    proxy: Tensor,
    memory: Tensor,
    proxies: CameraProxies,
    *,
    temperature: float = TAU,
    negatives: int = 50,
    reduction: str = "camera_sum",
) -> Tensor:
    losses, cameras = [], []
    for i in range(len(f)):
        own = proxies.cluster[proxy[i]]
        positive = [p for p in range(len(memory)) if proxies.cluster[p] == own]
        others = [p for p in range(len(memory)) if proxies.cluster[p] != own]
        others.sort(key=lambda p: -(f[i] @ memory[p]).item())
        losses.append(
            reference_contrast(f[i], memory, positive, others[:negatives], temperature)
        )
        cameras.append(int(proxies.camera[proxy[i]]))
    return reference_reduce(losses, cameras, reduction)


def reference_online_choice(
    f: Tensor,
    own: int,
    memory: Tensor,
    proxies: CameraProxies,
    positives: int,
    balance: float,
) -> tuple[list[int], list[int]]:
    """Positives B_i of one anchor, and all others by falling mixed similarity."""
    s = [(balance * (f @ m) + (1 - balance) * (memory[own] @ m)).item() for m in memory]
    best_of_camera = []
    for camera in set(proxies.camera.tolist()):
        of_camera = [p for p in range(len(memory)) if proxies.camera[p] == camera]
        best_of_camera.append(max(of_camera, key=lambda p: s[p]))
    chosen = sorted(best_of_camera, key=lambda p: -s[p])[:positives]
    others = [p for p in range(len(memory)) if p not in chosen]
    return chosen, sorted(others, key=lambda p: -s[p])


def reference_online(
    f: Tensor,
    proxy: Tensor,
    memory: Tensor,
    proxies: CameraProxies,
    *,
    temperature: float = TAU,
    negatives: int = 50,
    positives: int = 3,
    balance: float = 0.15,
    reduction: str = "camera_sum",
) -> Tensor:
    losses, cameras = [], []
    for i in range(len(f)):
        chosen, others = reference_online_choice(
            f[i], int(proxy[i]), memory, proxies, positives, balance
        )
        losses.append(
            reference_contrast(f[i], memory, chosen, others[:negatives], temperature)
        )
        cameras.append(int(proxies.camera[proxy[i]]))
    return reference_reduce(losses, cameras, reduction)


def reference_intra(
    f: Tensor,
    proxy: Tensor,
    memory: Tensor,
    proxies: CameraProxies,
    *,
    temperature: float = TAU,
    reduction: str = "camera_sum",
) -> Tensor:
    losses, cameras = [], []
    for i in range(len(f)):
        own = int(proxy[i])
        camera = int(proxies.camera[own])
        rivals = [
            p
            for p in range(len(memory))
            if int(proxies.camera[p]) == camera and p != own
        ]
        losses.append(reference_contrast(f[i], memory, [own], rivals, temperature))
        cameras.append(camera)
    return reference_reduce(losses, cameras, reduction)


PAIRS = {
    "offline": (offline_loss, reference_offline),
    "online": (online_loss, reference_online),
    "intra": (intra_camera_loss, reference_intra),
}


def random_case(
    seed: int,
    *,
    batch: int = 7,
    n_proxies: int = 40,
    clusters: int = 12,
    cameras: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
    dim: int = 16,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, CameraProxies]:
    """Features, their proxies, the memory; proxies are distinct (cluster, camera)."""
    g = torch.Generator().manual_seed(seed)
    pairs = torch.cartesian_prod(torch.arange(clusters), torch.tensor(cameras))
    pairs = pairs[torch.randperm(len(pairs), generator=g)[:n_proxies]]
    memory = F.normalize(torch.randn(len(pairs), dim, generator=g, dtype=dtype))
    proxy = torch.randint(len(pairs), (batch,), generator=g)
    noise = torch.randn(batch, dim, generator=g, dtype=dtype)
    features = F.normalize(memory[proxy] + 0.2 * noise)
    label = torch.full((3,), -1)  # the losses do not read it
    return features, proxy, memory, CameraProxies(label, pairs[:, 0], pairs[:, 1])


CASES: dict[str, dict] = {
    "plenty of everything": {"n_proxies": 90, "clusters": 20},
    "fewer proxies than negatives": {"n_proxies": 20, "clusters": 6},
    "fewer cameras than positives": {"cameras": (0, 1)},
    "one camera": {"cameras": (4,), "n_proxies": 12},
    "cameras without a proxy": {"cameras": (1, 6, 17)},
    "one cluster": {"clusters": 1, "n_proxies": 6},
    "two proxies": {"clusters": 2, "n_proxies": 2},
    "one proxy": {"clusters": 1, "cameras": (3,), "n_proxies": 1},
    "one anchor": {"batch": 1},
}


@pytest.mark.parametrize("reduction", ["camera_sum", "mean"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_loops(name: str, case: dict, reduction: str) -> None:
    fast, slow = PAIRS[name]
    for seed in range(2):
        drawn = random_case(seed, **case)
        torch.testing.assert_close(
            fast(*drawn, reduction=reduction),
            slow(*drawn, reduction=reduction),
            rtol=1e-10,
            atol=1e-12,
        )


@pytest.mark.parametrize("name", ["offline", "online"])
@pytest.mark.parametrize("negatives", [0, 1, 7])
def test_equals_loops_with_few_negatives(name: str, negatives: int) -> None:
    fast, slow = PAIRS[name]
    drawn = random_case(3)
    torch.testing.assert_close(
        fast(*drawn, negatives=negatives), slow(*drawn, negatives=negatives)
    )


@pytest.mark.parametrize("positives", [1, 2, 6, 9])
@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_online_equals_loops_at_other_settings(positives: int, balance: float) -> None:
    drawn = random_case(5, n_proxies=70, clusters=15)
    settings = {"positives": positives, "balance": balance, "temperature": 0.3}
    torch.testing.assert_close(
        online_loss(*drawn, **settings), reference_online(*drawn, **settings)
    )


@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 9),
    clusters=st.integers(1, 8),
    cameras=st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True),
    share=st.floats(0.2, 1),
    negatives=st.integers(0, 30),
)
@settings(max_examples=30)
def test_equals_loops_on_any_case(
    seed: int,
    batch: int,
    clusters: int,
    cameras: list[int],
    share: float,
    negatives: int,
) -> None:
    drawn = random_case(
        seed,
        batch=batch,
        n_proxies=max(1, round(share * clusters * len(cameras))),
        clusters=clusters,
        cameras=tuple(cameras),
        dim=5,
    )
    for name in ("offline", "online"):
        fast, slow = PAIRS[name]
        ours = fast(*drawn, negatives=negatives)
        torch.testing.assert_close(ours, slow(*drawn, negatives=negatives))
        assert ours >= -1e-9  # a share is at most 1
    torch.testing.assert_close(intra_camera_loss(*drawn), reference_intra(*drawn))


def test_float32_is_close_to_float64() -> None:
    drawn = random_case(1, n_proxies=90, clusters=20, dim=256)
    single = [drawn[0].float(), drawn[1], drawn[2].float(), drawn[3]]
    for fast, slow in PAIRS.values():
        ours = fast(*single)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), slow(*drawn), rtol=1e-5, atol=1e-5)


def test_cluster_loss_equals_loops() -> None:
    features, cluster, memory, _ = random_case(0)
    losses = []
    for f, own in zip(features, cluster.tolist(), strict=True):
        rivals = [p for p in range(len(memory)) if p != own]
        losses.append(reference_contrast(f, memory, [own], rivals, 0.2))
    torch.testing.assert_close(
        cluster_loss(features, cluster, memory, temperature=0.2),
        sum(losses) / len(losses),
    )


def mixed_similarity(
    features: Tensor, proxy: Tensor, memory: Tensor, balance: float = 0.15
) -> Tensor:
    return online_similarity(*compare_with_own(features, proxy, memory), balance)


# ------------------------------------------ worked by hand

# Six proxies in the plane, at these cosines to the x axis; anchors lie on the x axis.
# proxy    0     1     2     3     4     5
# cluster  0     0     1     1     2     2
# camera   0     1     0     1     0     2
COSINES = (1.0, 0.6, 0.8, 0.0, -0.6, 0.28)


def by_hand() -> tuple[Tensor, Tensor, Tensor, CameraProxies]:
    x = torch.tensor(COSINES, dtype=torch.float64)
    memory = torch.stack([x, (1 - x * x).sqrt()], dim=1)
    proxies = CameraProxies(
        label=torch.arange(6),
        cluster=torch.tensor([0, 0, 1, 1, 2, 2]),
        camera=torch.tensor([0, 1, 0, 1, 0, 2]),
    )
    anchor = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    return anchor, torch.tensor([0]), memory, proxies


def test_offline_by_hand() -> None:
    # Cluster 0: proxies 0 and 1. The two nearest others: 2 (0.8) and 5 (0.28).
    below = math.exp(1 / 0.5) + math.exp(0.6 / 0.5)
    below += math.exp(0.8 / 0.5) + math.exp(0.28 / 0.5)
    expected = -0.5 * (
        math.log(math.exp(1 / 0.5) / below) + math.log(math.exp(0.6 / 0.5) / below)
    )
    ours = offline_loss(*by_hand(), temperature=0.5, negatives=2)
    assert ours.item() == pytest.approx(expected, abs=1e-12)
    # log(e^2 + e^1.2 + e^1.6 + e^0.56) = 2.8572, less the mean positive logit, 1.6
    assert expected == pytest.approx(1.2572, abs=1e-4)


def test_online_by_hand() -> None:
    # The anchor is its own proxy's entry, so s is the cosine. Best of camera 0:
    # proxy 0 (1.0; proxy 2 with 0.8 loses within its camera), of camera 1: proxy 1
    # (0.6), of camera 2: proxy 5 (0.28). Two positives: 0 and 1. Negatives: 2 and 5.
    chosen = online_positives(mixed_similarity(*by_hand()[:3]), by_hand()[3].camera, 2)
    assert chosen.tolist() == [[True, True, False, False, False, False]]
    # Three positives: 0, 1 and 5. Two negatives: 2 (0.8) and 3 (0.0).
    logits = [c / 0.5 for c in (1.0, 0.6, 0.28, 0.8, 0.0)]
    below = sum(map(math.exp, logits))
    expected = -sum(math.log(math.exp(x) / below) for x in logits[:3]) / 3
    ours = online_loss(*by_hand(), temperature=0.5, negatives=2)
    assert ours.item() == pytest.approx(expected, abs=1e-12)


def test_online_positives_need_not_be_of_the_cluster() -> None:
    anchor, proxy, memory, proxies = by_hand()
    memory = memory.clone()
    memory[3] = torch.tensor([0.96, -0.28], dtype=torch.float64)  # cluster 1, camera 1
    chosen = online_positives(
        mixed_similarity(anchor, proxy, memory), proxies.camera, 2
    )
    assert chosen.tolist() == [[True, False, False, True, False, False]]


def test_online_similarity_mixes_feature_and_proxy() -> None:
    anchor, _, memory, _ = by_hand()
    proxy = torch.tensor([3])  # m_3 = (0, 1), so m_3·m_p is the sine of p
    s = mixed_similarity(anchor, proxy, memory, balance=0.15)
    sines = [math.sqrt(1 - c * c) for c in COSINES]
    expected = [0.15 * c + 0.85 * d for c, d in zip(COSINES, sines, strict=True)]
    torch.testing.assert_close(s, torch.tensor([expected], dtype=torch.float64))


def test_intra_camera_by_hand() -> None:
    # Camera 0 has proxies 0, 2 and 4 (ledger 10: one camera in the batch works too).
    logits = [c / 0.5 for c in (1.0, 0.8, -0.6)]
    expected = math.log(sum(math.exp(x) for x in logits)) - logits[0]
    ours = intra_camera_loss(*by_hand(), temperature=0.5)
    assert ours.item() == pytest.approx(expected, abs=1e-12)


def test_at_the_start_the_baseline_is_the_log_of_the_number_of_clusters() -> None:
    features = F.normalize(torch.randn(8, 512))
    memory = F.normalize(torch.randn(300, 512))
    start = cluster_loss(features, torch.arange(8), memory, temperature=1.0)
    assert start.item() == pytest.approx(math.log(300), rel=0.02)


# ------------------------------------------ reductions


def test_reduce_by_hand() -> None:
    loss = torch.tensor([1.0, 3.0, 10.0])
    camera = torch.tensor([5, 5, 2])
    assert reduce(loss, camera, "camera_sum").item() == 2.0 + 10.0
    assert reduce(loss, camera, "mean").item() == pytest.approx(14 / 3)


def test_camera_sum_grows_with_the_cameras_in_a_batch() -> None:
    # Ledger 1: equal per-anchor losses, so only the number of cameras differs.
    loss = torch.full((12,), 1.7)
    for cameras in (1, 2, 3, 6, 12):
        camera = torch.arange(12) % cameras
        summed = reduce(loss, camera, "camera_sum")
        assert summed.item() == pytest.approx(1.7 * cameras, rel=1e-6)
        assert reduce(loss, camera, "mean").item() == pytest.approx(1.7, rel=1e-6)


def test_online_with_two_cameras_takes_no_negative_for_a_positive() -> None:
    # Ledger 2: two cameras give two positives, whatever `positives` asks for.
    features, proxy, memory, proxies = random_case(0, cameras=(0, 5))
    chosen = online_positives(
        mixed_similarity(features, proxy, memory), proxies.camera, 3
    )
    assert chosen.sum(dim=1).tolist() == [2] * len(features)
    for row in chosen:
        assert sorted(proxies.camera[row].tolist()) == [0, 5]


# ------------------------------------------ gradients

ALL: dict[str, Callable[..., Tensor]] = {
    "offline": offline_loss,
    "online": online_loss,
    "intra": intra_camera_loss,
    "cluster": lambda f, proxy, memory, proxies, **k: cluster_loss(
        f, proxy, memory, **k
    ),
}


@pytest.mark.parametrize("case", ["fewer proxies than negatives", "one anchor"])
@pytest.mark.parametrize("name", ALL)
def test_gradient_equals_finite_differences(name: str, case: str) -> None:
    features, proxy, memory, proxies = random_case(2, **CASES[case])
    features.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f: ALL[name](f, proxy, memory, proxies), (features,)
    )


@pytest.mark.parametrize("name", PAIRS)
def test_gradient_equals_that_of_the_loops(name: str) -> None:
    features, proxy, memory, proxies = random_case(4, n_proxies=90, clusters=20)
    grads = []
    for loss in PAIRS[name]:
        f = features.clone().requires_grad_()
        loss(f, proxy, memory, proxies).backward()
        grads.append(f.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_gradient_flows_through_features_only(name: str) -> None:
    features, proxy, memory, proxies = random_case(6)
    features.requires_grad_()
    memory.requires_grad_()
    ALL[name](features, proxy, memory, proxies).backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0
    assert memory.grad is None


def test_gradient_pulls_towards_positives_and_away_from_negatives() -> None:
    anchor, proxy, memory, proxies = by_hand()
    memory = memory.clone()
    memory[2] = torch.tensor([0.8, -0.6])  # a rival below the axis, proxy 1 above it
    anchor.requires_grad_()
    offline_loss(anchor, proxy, memory, proxies, negatives=1).backward()
    assert anchor.grad is not None
    assert anchor.grad[0, 1] < 0  # a descent step moves the anchor up


# ------------------------------------------ invariance, robustness


@pytest.mark.parametrize("reduction", ["camera_sum", "mean"])
@pytest.mark.parametrize("name", PAIRS)
def test_order_of_proxies_and_of_anchors_is_irrelevant(
    name: str, reduction: str
) -> None:
    features, proxy, memory, proxies = random_case(8, n_proxies=90, clusters=20)
    loss = PAIRS[name][0]
    before = loss(features, proxy, memory, proxies, reduction=reduction)

    order = torch.randperm(len(features))
    shuffled = loss(features[order], proxy[order], memory, proxies, reduction=reduction)
    torch.testing.assert_close(before, shuffled)

    order = torch.randperm(len(memory))
    renumbered = CameraProxies(
        proxies.label, proxies.cluster[order], proxies.camera[order]
    )
    shuffled = loss(
        features,
        order.argsort()[proxy],
        memory[order],
        renumbered,
        reduction=reduction,
    )
    torch.testing.assert_close(before, shuffled)


@pytest.mark.parametrize("name", ["offline", "online"])
def test_numbers_of_clusters_and_cameras_are_names_only(name: str) -> None:
    features, proxy, memory, proxies = random_case(8)
    renamed = CameraProxies(
        proxies.label, 1000 - 7 * proxies.cluster, proxies.camera * 31 + 2
    )
    loss = PAIRS[name][0]
    torch.testing.assert_close(
        loss(features, proxy, memory, proxies), loss(features, proxy, memory, renamed)
    )


@pytest.mark.parametrize("name", PAIRS)
def test_ties_between_duplicate_entries(name: str) -> None:
    # Which of two equal entries is a negative cannot matter: their logits are equal.
    features, proxy, memory, proxies = random_case(9, n_proxies=70, clusters=15)
    memory = memory[torch.arange(len(memory)) // 2 * 2]
    fast, slow = PAIRS[name]
    torch.testing.assert_close(
        fast(features, proxy, memory, proxies),
        slow(features, proxy, memory, proxies),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_finite_when_everything_is_the_same(name: str, dtype: torch.dtype) -> None:
    _, proxy, _, proxies = random_case(0)
    features = F.normalize(torch.ones(len(proxy), 16)).to(dtype).requires_grad_()
    memory = F.normalize(torch.ones(len(proxies), 16))
    loss = ALL[name](features, proxy, memory, proxies, temperature=0.01)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_finite_at_a_tiny_temperature_when_all_is_wrong(name: str) -> None:
    features, proxy, memory, proxies = random_case(0, dtype=torch.float32)
    features = (-memory[proxy]).requires_grad_()  # opposite to the own entry
    loss = ALL[name](features, proxy, memory, proxies, temperature=0.01)
    loss.backward()
    assert loss.isfinite()
    assert loss > 1
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("name", PAIRS)
def test_half_precision_features_are_compared_in_full(name: str) -> None:
    features, proxy, memory, proxies = random_case(3, dtype=torch.float32)
    rounded = features.bfloat16()
    torch.testing.assert_close(
        PAIRS[name][0](rounded, proxy, memory, proxies),
        PAIRS[name][0](rounded.float(), proxy, memory, proxies),
        rtol=0,
        atol=0,
    )


def test_a_single_proxy_has_nothing_to_learn() -> None:
    drawn = random_case(0, **CASES["one proxy"])
    for loss in PAIRS.values():
        assert loss[0](*drawn).item() == pytest.approx(0, abs=1e-12)


def test_a_similarity_known_already_changes_nothing() -> None:
    features, proxy, memory, proxies = random_case(2)
    features.requires_grad_()
    similarity, own = compare_with_own(features, proxy, memory)
    assert not similarity.requires_grad and not own.requires_grad
    torch.testing.assert_close(similarity, compare(features, memory))
    torch.testing.assert_close(own, compare(memory[proxy], memory))
    for loss, known in (
        (offline_loss, {"similarity": similarity}),
        (online_loss, {"similarity": similarity, "own": own}),
    ):
        grads = []
        for more in ({}, known):
            features.grad = None
            found = loss(features, proxy, memory, proxies, **more)
            found.backward()
            grads.append((found.detach(), features.grad))
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_gradient_after_the_memory_moved_is_refused() -> None:
    # The backward pass reads the memory: an update before it would go unnoticed.
    features, proxy, memory, proxies = random_case(2)
    loss = offline_loss(features.requires_grad_(), proxy, memory, proxies)
    memory[0] = -memory[0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
