"""Numbers at the edge: half precision, one camera, one proxy, identical features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from o2cap import losses
from o2cap.proxies import CameraProxies, split_by_camera

NAMES = ["offline_loss", "online_loss", "intra_camera_loss", "cluster_loss"]


def case(
    cameras: int, clusters: int, spread: float
) -> tuple[Tensor, Tensor, Tensor, CameraProxies]:
    """Return anchors, their proxies, the memory and its proxies, in float64."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(clusters).repeat_interleave(cameras)
    proxies = split_by_camera(labels, torch.arange(cameras).repeat(clusters))
    mean = torch.randn(1, 32, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(proxies), 32, generator=generator, dtype=torch.float64)
    centroids = F.normalize(mean + spread * noise)
    proxy = torch.arange(len(proxies)).repeat(2)
    more = torch.randn(len(proxy), 32, generator=generator, dtype=torch.float64)
    return F.normalize(centroids[proxy] + spread * more), proxy, centroids, proxies


def loss_of(
    name: str, features: Tensor, proxy: Tensor, centroids: Tensor, proxies: Any
) -> Tensor:
    if name == "cluster_loss":
        return losses.cluster_loss(features, proxy, centroids)
    return getattr(losses, name)(features, proxy, centroids, proxies)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("cameras", "clusters", "spread"),
    [(3, 30, 0.3), (3, 30, 1e-4), (1, 20, 0.3), (1, 1, 0.3), (3, 1, 0.0), (2, 9, 0.0)],
    ids=["usual", "near", "one camera", "one proxy", "one cluster", "identical"],
)
def test_gradients_agree_with_float64_and_are_finite(
    name: str, cameras: int, clusters: int, spread: float
) -> None:
    features, proxy, centroids, proxies = case(cameras, clusters, spread)
    # The numbers that float32 holds: only the arithmetic may differ.
    features, centroids = features.float().double(), centroids.float().double()
    gradients = []
    for dtype in (torch.float64, torch.float32):
        given = features.detach().to(dtype, copy=True).requires_grad_()
        loss = loss_of(name, given, proxy, centroids.to(dtype), proxies)
        loss.backward()
        assert loss.isfinite() and given.grad is not None
        gradients.append(given.grad.double())
    if spread == 0:  # ties: any of the negatives may be chosen, and all are equal
        assert gradients[1].isfinite().all()
        gradients = [g.sum(dim=0) for g in gradients]
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_cannot_overflow_the_logits(
    name: str, dtype: torch.dtype
) -> None:
    """1 / τ = 10⁶ is beyond float16; the memory's float32 holds it."""
    features, proxy, centroids, proxies = case(3, 30, 0.3)
    assert torch.tensor(1e6).half().isinf()
    half = features.to(dtype).requires_grad_()
    options = {"temperature": 1e-6}
    given = (half, proxy, centroids.float())
    if name == "cluster_loss":
        loss = losses.cluster_loss(*given, **options)
    else:
        loss = getattr(losses, name)(*given, proxies, **options)
    assert loss.dtype == torch.float32 and loss.isfinite()
    plain = loss_of(name, features.to(dtype), proxy, centroids.float(), proxies)
    exact = loss_of(name, features, proxy, centroids, proxies)
    assert torch.allclose(plain.double(), exact, rtol=0.05)
