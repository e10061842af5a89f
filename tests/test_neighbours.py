"""Exact neighbours against a float64 sort, on every search path."""

import subprocess
import sys

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


@pytest.fixture(params=["int8", "float32", "generic", "faiss"])
def path(request, monkeypatch):
    """Every coarse search: tiles of integers, of floats, whole rows (as on a GPU)."""
    if request.param == "int8":
        monkeypatch.setattr(neighbours, "_multiplies_int8_fast", lambda device: True)
    else:
        monkeypatch.setattr(neighbours, "_multiplies_int8_fast", lambda device: False)
    if request.param == "generic":
        monkeypatch.setattr(neighbours, "_searches_in_tiles", lambda device: False)
    return {"backend": "faiss" if request.param == "faiss" else "torch"}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(neighbours, "_TILE_ROWS", 37)
    monkeypatch.setattr(neighbours, "_TILE_COLUMNS", 70)
    monkeypatch.setattr(neighbours, "_BLOCK_ELEMENTS", 5000)
    monkeypatch.setattr(neighbours, "_SAMPLE_ROWS", 20)


@pytest.mark.parametrize("cone", [0.0, 5.0])
@pytest.mark.parametrize("n, k", [(1, 1), (2, 2), (30, 1), (30, 30), (301, 20)])
def test_equals_a_sort(n, k, cone, path, small_tiles):
    f = cloud(n, cone=cone)
    expected = by_sorting(f, k)
    similarity, index = nearest_neighbours(f, k, **path)
    assert similarity.dtype == torch.float32 and index.dtype == torch.int64
    assert torch.equal(index, expected[1])
    torch.testing.assert_close(similarity, expected[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [1, 7, 150])
def test_queries_equal_a_sort(k, path, small_tiles):
    f, q = cloud(150), cloud(90, seed=1)
    expected = by_sorting(f, k, q)
    similarity, index = nearest_neighbours(f, k, q, **path)
    assert torch.equal(index, expected[1])
    torch.testing.assert_close(similarity, expected[0], atol=1e-6, rtol=0)


def test_rows_are_a_share_of_the_whole(path, small_tiles):
    f = cloud(130)
    f[100] = f[3]  # each is its own first neighbour
    whole = nearest_neighbours(f, 9, **path)
    shares = [
        nearest_neighbours(f, 9, rows=slice(a, b), **path)
        for a, b in ((0, 41), (41, 41), (41, 130))
    ]
    for part, all_rows in zip(zip(*shares, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(part), all_rows)


@pytest.mark.parametrize("copies", [2, 60])
def test_duplicates_come_in_order_after_the_row_itself(copies, path, small_tiles):
    # 60 copies are more than the candidates kept for k = 5: the crowded path.
    f = cloud(4, groups=4).repeat(copies, 1)
    similarity, index = nearest_neighbours(f, 5, **path)
    for i, found in enumerate(index.tolist()):
        others = [j for j in range(i % 4, len(f), 4) if j != i]
        first = min(5, copies)
        assert found[:first] == [i, *others][:first]
    assert (similarity[:, : min(5, copies)] == similarity[:, :1]).all()


def test_one_point(path):
    f = normalize(torch.ones(70, 3))
    _, index = nearest_neighbours(f, 4, **path)
    assert index[0].tolist() == [0, 1, 2, 3]
    assert index[2].tolist() == [2, 0, 1, 3]
    assert index[69].tolist() == [69, 0, 1, 2]


def test_a_bad_coarse_product_costs_time_not_exactness(monkeypatch, small_tiles):
    """Injected fault: noise on every coarse similarity, far above the gaps."""
    monkeypatch.setattr(neighbours, "_multiplies_int8_fast", lambda device: False)
    monkeypatch.setattr(neighbours, "_searches_in_tiles", lambda device: False)
    product = neighbours._product

    def noisy(a, b):
        # The same noise for a pair whenever it is asked, as rounding is.
        phase = 1e4 * (a.codes.sum(1)[:, None] + b.codes.sum(1))
        return product(a, b) + 0.05 * phase.sin()

    monkeypatch.setattr(neighbours, "_product", noisy)
    f = cloud(300, seed=3)
    assert torch.equal(nearest_neighbours(f, 12)[1], by_sorting(f, 12)[1])


@given(seed=st.integers(0, 10**6), n=st.integers(2, 60), k=st.integers(1, 12))
@settings(max_examples=40)
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


def test_similarity_of_a_pair_is_one_number():
    f = cloud(200, dim=33)
    similarity, index = nearest_neighbours(f, 200)
    full = torch.empty(200, 200).scatter_(1, index, similarity)
    assert torch.equal(full, full.T)


@pytest.mark.parametrize("device", DEVICES)
def test_device_of_the_features_is_the_device_of_the_answer(device):
    f = cloud(120)
    similarity, index = nearest_neighbours(f.to(device), 10)
    assert similarity.device.type == index.device.type == device
    assert torch.equal(index.cpu(), nearest_neighbours(f, 10)[1])


def test_pair_similarity():
    a, b = cloud(5, seed=1), cloud(6, seed=2)
    rows, columns = torch.tensor([0, 4, 2]), torch.tensor([5, 0, 2])
    expected = (a.double() @ b.double().T)[rows, columns].float()
    found = pair_similarity(a, b, rows, columns)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_global_precision_is_left_alone():
    before = torch.get_float32_matmul_precision()
    try:
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            with pytest.raises(RuntimeError), neighbours._reduced_precision():
                raise RuntimeError
            assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


def test_misuse_is_refused():
    f = cloud(10)
    for k in (0, 11):
        with pytest.raises(ValueError, match="k must be from 1 to the 10 rows"):
            nearest_neighbours(f, k)
    with pytest.raises(ValueError, match="queries have 5 columns, features 32"):
        nearest_neighbours(f, 2, f[:, :5])
    with pytest.raises(ValueError, match="not finite"):
        nearest_neighbours(f * float("nan"), 2)
    with pytest.raises(ValueError, match="not both"):
        nearest_neighbours(f, 2, f, rows=slice(0, 3))
    with pytest.raises(ValueError, match="step"):
        nearest_neighbours(f, 2, rows=slice(0, 9, 2))
    with pytest.raises(ValueError, match="backend"):
        nearest_neighbours(f, 2, backend="annoy")
    with pytest.raises(ValueError, match="shape"):
        nearest_neighbours(f[0], 1)
    assert nearest_neighbours(f, 3, f[:0])[1].shape == (0, 3)


def test_faiss_is_loaded_where_it_is_used():
    """On macOS it brings a second OpenMP runtime, which crashes beside torch's."""
    code = "import sys, o2cap.trainer, o2cap.inference; print('faiss' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
