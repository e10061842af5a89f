"""Exact neighbours against a float64 sort, on every search path."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from o2cap import neighbours
from o2cap.neighbours import nearest_neighbours, pair_similarity

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def cloud(n, dim=32, seed=0, cone=0.0, groups=8):
    """Clustered unit vectors; ``cone`` pushes all of them to one side."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(groups, dim, generator=g)[torch.arange(n) % groups]
    return normalize(centre + torch.randn(n, dim, generator=g) + cone)


def by_sorting(features, k, queries=None):
    """All similarities in float64; ties to the row itself, then the smaller index."""
    own = queries is None
    s = (features if own else queries).double() @ features.double().T
    if own:
        s.fill_diagonal_(torch.inf)
    order = np.argsort(-s.cpu().numpy(), axis=1, kind="stable")[:, :k]
    index = torch.from_numpy(order).to(features.device)
    if own:
        s.diagonal().copy_(features.double().square().sum(1))
    return s.gather(1, index).float(), index


def assert_equals(found, expected):
    similarity, index = found
    assert similarity.dtype == torch.float32 and index.dtype == torch.int64
    assert torch.equal(index, expected[1])
    torch.testing.assert_close(similarity, expected[0], atol=1e-6, rtol=0)


@pytest.fixture(params=["int8 in tiles", "float32 in tiles", "float32, whole rows"])
def path(request, monkeypatch):
    """Every coarse search, the last as on a GPU; all in small pieces."""
    fast, whole = "int8" in request.param, "whole" in request.param
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: fast)
    monkeypatch.setattr(neighbours, "_TILE", {} if whole else {"cpu": 37})
    monkeypatch.setattr(neighbours, "_ELEMENTS", {"cpu": 5000, "cuda": 5000})


@pytest.mark.parametrize("cone", [0.0, 5.0])
@pytest.mark.parametrize("n, k", [(1, 1), (2, 2), (30, 1), (30, 30), (301, 20)])
def test_equals_a_sort(n, k, cone, path):
    f = cloud(n, cone=cone)
    assert_equals(nearest_neighbours(f, k), by_sorting(f, k))
    queries = cloud(90, seed=1, cone=cone)
    assert_equals(nearest_neighbours(f, k, queries), by_sorting(f, k, queries))


@pytest.mark.parametrize("copies", [2, 60])
def test_duplicates_come_in_order_after_the_row_itself(copies, path):
    # 60 copies are more than the candidates kept for k = 5: a crowd.
    f = cloud(4, groups=4).repeat(copies, 1)
    similarity, index = nearest_neighbours(f, 5)
    for i, found in enumerate(index.tolist()):
        others = [j for j in range(i % 4, len(f), 4) if j != i]
        first = min(5, copies)
        assert found[:first] == [i, *others][:first]
    assert (similarity[:, : min(5, copies)] == similarity[:, :1]).all()


@pytest.mark.parametrize("point", [1.0, 0.0])
def test_one_point(point, path):
    _, index = nearest_neighbours(normalize(torch.full((70, 3), point)), 4)
    assert index[0].tolist() == [0, 1, 2, 3]
    assert index[2].tolist() == [2, 0, 1, 3]
    assert index[69].tolist() == [69, 0, 1, 2]


def test_a_bad_coarse_product_costs_time_not_exactness(monkeypatch, path):
    """Injected fault: noise on every coarse similarity, far above the gaps."""
    product_of = neighbours._coarse_product

    def noisy_product_of(asked, features):
        product, every = product_of(asked, features), features.sum(1)
        own = every if asked is features else asked.sum(1)

        def noisy(rows, columns):
            # The same noise for a pair whenever it is asked, as rounding is.
            phase = 1e4 * (own[rows, None] + every[columns])
            return product(rows, columns) + 0.05 * phase.sin()

        return noisy

    monkeypatch.setattr(neighbours, "_coarse_product", noisy_product_of)
    f = cloud(300, seed=3)
    assert torch.equal(nearest_neighbours(f, 12)[1], by_sorting(f, 12)[1])


@given(seed=st.integers(0, 10**6), n=st.integers(2, 60), k=st.integers(1, 12))
@settings(max_examples=20)
def test_order_of_rows_and_rotation_change_nothing(seed, n, k):
    k = min(k, n)
    f = cloud(n, dim=8, seed=seed)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=g)
    similarity, index = nearest_neighbours(f, k)
    moved = nearest_neighbours(f[order], k)
    assert torch.equal(moved[0], similarity[order])  # to the last bit
    assert torch.equal(order[moved[1]], index[order])
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=g))[0]
    turned, _ = nearest_neighbours(f @ rotation, k)
    torch.testing.assert_close(turned, similarity, atol=2e-6, rtol=0)


@pytest.mark.parametrize("threads", [1, 3])
def test_similarity_of_a_pair_is_one_number(threads):
    torch.set_num_threads(threads)
    f = cloud(200, dim=33)
    similarity, index = nearest_neighbours(f, 200)
    full = torch.empty(200, 200).scatter_(1, index, similarity)
    assert torch.equal(full, full.T)
    start, column = torch.tensor([0, 2, 2, 5]), torch.tensor([7, 9, 0, 9, 199])
    found = pair_similarity(f[:3], f, start, column)
    assert found.tolist() == full[[0, 0, 2, 2, 2], column].tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_device_of_the_features_is_the_device_of_the_answer(device):
    f = cloud(120)
    similarity, index = nearest_neighbours(f.to(device), 10)
    assert similarity.device.type == index.device.type == device
    assert torch.equal(index.cpu(), nearest_neighbours(f, 10)[1])


def test_misuse_is_refused():
    f = cloud(10)
    for k in (0, 11):
        with pytest.raises(ValueError, match="k must be from 1 to the 10 rows"):
            nearest_neighbours(f, k)
    for bad in ((f * float("nan"), 2), (f, 2, f * float("inf"))):
        with pytest.raises(ValueError, match="not finite"):
            nearest_neighbours(*bad)
    with pytest.raises(RuntimeError, match="size mismatch"):
        nearest_neighbours(f, 2, f[:, :5])
