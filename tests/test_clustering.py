"""Sparse Jaccard and DBSCAN against the dense formula, scikit-learn and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from sklearn.cluster import DBSCAN
from torch.nn.functional import normalize

from o2cap.clustering import (
    camera_aware_jaccard,
    camera_neighbours,
    dbscan,
    eps_of_most_clusters,
    jaccard_distance,
)
from o2cap.features import standardise_by_camera
from o2cap.neighbours import nearest_neighbours

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def crowd(n, dim=16, seed=0, groups=None, spread=0.6):
    """Unit vectors in groups of about eight, the size of a small cluster."""
    g = torch.Generator().manual_seed(seed)
    groups = groups or max(1, n // 8)
    centre = torch.randn(groups, dim, generator=g)
    member = torch.randint(groups, (n,), generator=g)
    return normalize(centre[member] + spread * torch.randn(n, dim, generator=g))


def dense_jaccard(features, index, k1=20, k2=6):
    """The formula of the book, in float64, with sets and full rows."""
    f, index = features.double().numpy(), index.tolist()
    n = len(f)
    half = round(k1 / 2) + 1

    def reciprocal(i, k):
        return {j for j in index[i][:k] if i in index[j][:k]}

    v = np.zeros((n, n))
    for i in range(n):
        original = reciprocal(i, k1)
        expanded = set(original)
        for j in original:
            candidate = reciprocal(j, half)
            if len(candidate & original) > 2 / 3 * len(candidate):
                expanded |= candidate
        members = sorted(expanded)
        weight = np.exp(-(2 - 2 * f[members] @ f[i]))
        v[i, members] = weight / weight.sum()
    v = np.stack([v[index[i][:k2]].mean(0) for i in range(n)])
    s = np.stack([np.minimum(v, row).sum(1) for row in v])
    return np.maximum(1 - s / (2 - s), 0)


def to_dense(distance):
    dense = np.ones(distance.shape)
    entries = distance.tocoo()
    dense[entries.coords] = entries.data
    return dense


def same_partition(a, b):
    """Equal up to the names of the clusters."""
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    one_to_one = len({p[0] for p in pairs}) == len({p[1] for p in pairs}) == len(pairs)
    return one_to_one and all((x < 0) == (y < 0) for x, y in pairs)


# ----------------------------------------------------------------------- Jaccard


def test_five_pictures_by_hand():
    # Two groups, {0, 1, 2} and {3, 4}; all pictures of a group are one point.
    f = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
    # k1 = 2, half set 2. Lists: 0: 0 1; 1: 1 0; 2: 2 0; 3: 3 4; 4: 4 3. Picture 2 is
    # in nobody's list, so R*(2) = {2}; no expansion adds to it. V before expansion:
    # 0 and 1: (1/2, 1/2, 0, 0, 0); 2: (0, 0, 1, 0, 0); 3, 4: (0, 0, 0, 1/2, 1/2).
    # With k2 = 2, V_2 = mean of V_2 and V_0 = (1/4, 1/4, 1/2, 0, 0): s = 1/2 with 0
    # and 1, so J = 1 - (1/2) / (3/2) = 2/3.
    t = 2 / 3
    expected = [
        [0, 0, t, 1, 1],
        [0, 0, t, 1, 1],
        [t, t, 0, 1, 1],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
    ]
    distance = jaccard_distance(f, 2, 2)
    np.testing.assert_allclose(to_dense(distance), expected, atol=2.5e-7)
    assert distance.nnz == 9 + 4  # zeros are kept, ones are not
    assert dbscan(distance, 0.5, 2).tolist() == [0, 0, -1, 1, 1]
    assert dbscan(distance, 0.7, 2).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spread", [0.3, 0.6, 3.0])
@pytest.mark.parametrize("n, k1, k2", [(300, 20, 6), (200, 15, 4), (120, 6, 1)])
def test_equals_the_dense_formula(n, k1, k2, spread, device):
    f = crowd(n, seed=n, spread=spread)
    _, index = nearest_neighbours(f, k1)
    expected = dense_jaccard(f, index, k1, k2)
    distance = jaccard_distance(f.to(device), k1, k2)
    assert isinstance(distance, csr_array) and distance.dtype == np.float32
    found = to_dense(distance)
    assert np.abs(found - expected).max() <= 1e-6
    np.testing.assert_array_equal(found, found.T)
    for eps in (0.499, 0.5001):
        reference = DBSCAN(eps=eps, min_samples=4, metric="precomputed")
        core = np.zeros(n, bool)
        core[reference.fit(expected).core_sample_indices_] = True
        labels = dbscan(distance, eps, 4).numpy()
        assert same_partition(labels[core], reference.labels_[core])
        np.testing.assert_array_equal(labels < 0, reference.labels_ < 0)


def test_zeros_are_stored_and_ones_are_missing():
    f = crowd(400, spread=0.3)
    f[200:] = f[:200]
    distance = jaccard_distance(f)
    stored = set(zip(*(c.tolist() for c in distance.tocoo().coords), strict=True))
    assert {(i, i) for i in range(400)} <= stored
    assert (distance.diagonal() == 0).all()
    assert distance.nnz < 400 * 400 / 2
    assert distance.nnz == len(stored)


@pytest.mark.parametrize("limit", [0.0, 0.5, 0.8])
def test_max_distance_leaves_out_what_is_farther(limit):
    f = crowd(200, spread=1.0)
    whole, near = jaccard_distance(f), jaccard_distance(f, max_distance=limit)
    expected = to_dense(whole)
    expected[expected > limit] = 1
    np.testing.assert_array_equal(to_dense(near), expected)
    assert near.nnz == (whole.data <= np.round(limit * 2**21) / 2**21).sum()
    assert torch.equal(dbscan(near, limit), dbscan(whole, limit))


def test_fewer_images_than_neighbours():
    f = crowd(9, groups=2)
    index = nearest_neighbours(f, 9)[1]
    expected = dense_jaccard(f, index)
    assert np.abs(to_dense(jaccard_distance(f)) - expected).max() <= 1e-6
    one = jaccard_distance(f[:1])
    assert one.toarray().tolist() == [[0]] and one.nnz == 1
    assert dbscan(one).tolist() == [-1]
    assert dbscan(one, min_samples=1).tolist() == [0]


def test_given_neighbours_are_used_and_checked():
    f = crowd(60)
    wide = nearest_neighbours(f, 30)
    a, b = jaccard_distance(f), jaccard_distance(f, neighbours=wide)
    np.testing.assert_array_equal(a.toarray(), b.toarray())
    similarity, index = wide
    far = index.clone()
    far[3, 4] = 60
    for bad in (far, -index, index.flip(1), index[:, :19], index[:50]):
        with pytest.raises(ValueError, match="neighbour"):
            jaccard_distance(
                f, neighbours=(similarity[: len(bad), : bad.shape[1]], bad)
            )
    with pytest.raises(ValueError, match="neighbours must be two tensors"):
        jaccard_distance(f, neighbours=(similarity[:50], index))


def test_settings_out_of_range_are_refused():
    f = crowd(30)
    for k1, k2 in ((20, 21), (20, 0), (0, 0)):
        with pytest.raises(ValueError, match="k2 must be"):
            jaccard_distance(f, k1, k2)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 90))
@settings(max_examples=20)
def test_order_and_rotation_of_the_features(seed, n):
    f = crowd(n, dim=8, seed=seed, spread=0.8)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=g)
    before, after = jaccard_distance(f), jaccard_distance(f[order])
    np.testing.assert_array_equal(
        after.toarray(), before.toarray()[order][:, order]
    )  # to the last bit
    # Lists given, so that no near tie between neighbours is turned into another.
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=g))[0]
    s, i = nearest_neighbours(f, min(n, 20))
    turned = jaccard_distance(f @ rotation, neighbours=(s, i))
    np.testing.assert_allclose(to_dense(turned), to_dense(before), atol=1e-6)


def test_torch_keeps_its_threads():
    """numba computes by the same OpenMP, and would leave its own number behind."""
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        jaccard_distance(normalize(torch.randn(60, 8)), 8, 2)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


def test_number_of_threads_changes_nothing():
    f, camids = crowd(400, spread=1.0), torch.arange(400) % 3
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for distance in (jaccard_distance(f), camera_aware_jaccard(f, camids)):
            found.append((distance.indices, distance.data, distance.indptr))
    for one, two in zip(found[:2], found[2:], strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- the tie at 0.5


def tied(seed, members=24, sources=9, size=5, k1=20):
    """Members whose six neighbourhoods are their own and those of five sources.

    Sources are groups of ``size`` mutual neighbours with weights of any value; every
    list is filled up with one-way neighbours, which are never reciprocal. Two members
    that share four sources overlap in exactly 4/6, those of three in 3/6, and so on.
    """
    rng = np.random.default_rng(seed)
    ring = 3 * k1
    n = ring + sources * size + members
    around = [[(i + d) % ring for d in range(k1)] for i in range(ring)]
    index = np.empty((n, k1), np.int64)
    index[:ring] = around
    for s in range(sources):
        first = ring + s * size
        for i in range(first, first + size):
            others = [j for j in range(first, first + size) if j != i]
            index[i] = [i, *rng.permutation(others), *around[s][: k1 - size]]
    chosen = []
    for i in range(n - members, n):
        pick = rng.permutation(sources)[:5]
        chosen.append(set(pick.tolist()))
        index[i] = [i, *(ring + pick * size), *around[i % ring][: k1 - 6]]
    f = normalize(torch.from_numpy(rng.standard_normal((n, 6))).float())
    similarity = torch.from_numpy((f.numpy()[:, None] * f.numpy()[index]).sum(2))
    return f, similarity, torch.from_numpy(index), chosen


@pytest.mark.parametrize("seed", range(6))
def test_an_overlap_of_four_sixths_is_exactly_half(seed):
    f, similarity, index, chosen = tied(seed)
    m = len(chosen)
    distance = jaccard_distance(f, neighbours=(similarity, index))
    block = to_dense(distance)[-m:, -m:]
    assert np.abs(to_dense(distance) - dense_jaccard(f, index)).max() <= 1e-6
    ties = 0
    for a in range(m):
        for b in range(m):
            shared = len(chosen[a] & chosen[b])
            if a != b and shared == 4:
                assert block[a, b] == 0.5
                ties += 1
            elif a != b:
                # The same five sources: 5/6; fewer than four: beyond 0.5.
                assert (block[a, b] < 0.5) == (shared == 5)
    assert ties > 20


@pytest.mark.parametrize("seed", range(6))
def test_ties_are_resolved_alike_in_any_order_of_rows(seed):
    f, similarity, index, _ = tied(seed)
    n = len(f)
    order = torch.from_numpy(np.random.default_rng(seed + 1).permutation(n))
    place = torch.empty_like(order)
    place[order] = torch.arange(n)  # new row of each old row
    before = jaccard_distance(f, neighbours=(similarity, index))
    after = jaccard_distance(
        f[order], neighbours=(similarity[order], place[index[order]])
    )
    np.testing.assert_array_equal(after.toarray(), before.toarray()[order][:, order])
    a, b = dbscan(before)[order], dbscan(after)
    assert torch.equal(a < 0, b < 0)
    core = torch.from_numpy(((to_dense(before) <= 0.5).sum(1) >= 4)[order])
    assert same_partition(a[core], b[core])


@pytest.mark.parametrize("seed", range(3))
def test_equal_lists_give_equal_labels(seed):
    f, similarity, index, _ = tied(seed)
    # A twin of the last member: the same lists (but for itself), the same weights.
    n = len(f)
    twin = index[-1:].clone()
    twin[0, 0] = n
    index = torch.cat([index, twin])
    similarity = torch.cat([similarity, similarity[-1:]])
    f = torch.cat([f, f[-1:]])
    distance = jaccard_distance(f, neighbours=(similarity, index))
    dense = distance.toarray()
    others = np.arange(n - 1)
    np.testing.assert_array_equal(dense[-1, others], dense[-2, others])
    labels = dbscan(distance)
    assert labels[-1] == labels[-2]


# ------------------------------------------------------------------ camera-aware


def slow_camera_aware(features, camids, k1_intra, k1_inter, k2_intra, k2_inter):
    """The formula, in float64, with sets and full rows."""
    f, cameras = features.double().numpy(), camids.tolist()
    n = len(f)
    near = np.argsort(-(f @ f.T), axis=1, kind="stable").tolist()

    def others(i, same):
        return [j for j in near[i] if j != i and (cameras[j] == cameras[i]) == same]

    intra = [[i, *others(i, True)][: k1_intra + 1] for i in range(n)]
    inter = [others(i, False)[: k1_inter + 1] for i in range(n)]
    v = np.zeros((n, n))
    for i in range(n):
        members = {i}
        for lists in (intra, inter):
            members |= {j for j in lists[i] if i in lists[j]}
        members = sorted(members)
        weight = np.exp(-(2 - 2 * f[members] @ f[i]))
        v[i, members] = weight / weight.sum()
    v = np.stack(
        [v[intra[i][:k2_intra] + inter[i][:k2_inter]].mean(0) for i in range(n)]
    )
    s = np.stack([np.minimum(v, row).sum(1) for row in v])
    return np.maximum(1 - s / (2 - s), 0)


def test_camera_aware_by_hand():
    # Two people, each once in cameras 0 and 1. Pictures of a camera look alike: by 82 /
    # 83, those of a person by 19 / 83 only, the others by 18 / 83.
    f = normalize(
        torch.tensor([[9.0, 1, 1, 0], [9, 1, 0, 1], [1, 9, 1, 0], [1, 9, 0, 1]])
    )
    camids = torch.tensor([0, 0, 1, 1])
    blind = to_dense(jaccard_distance(f, 2, 1))
    assert blind[0, 1] < 0.1 and blind[0, 2] == 1  # by camera, not by person
    # Lists of two: the whole own camera, and the other one, the same person first.
    # All are mutual, so E is everybody. With k2 = 1 / 1 a row is the mean of the own V
    # and that of the same person in the other camera, so equal for both of a person.
    lengths = {"k1_intra": 1, "k1_inter": 1, "k2_intra": 1, "k2_inter": 1}
    distance = to_dense(camera_aware_jaccard(f, camids, **lengths))
    same, person, other = (np.exp(2 * s / 83 - 2) for s in (82, 19, 18))
    share = 2 * (same + other) / (1 + same + person + other)
    apart = 1 - share / (2 - share)
    expected = [[0, apart, 0, apart], [apart, 0, apart, 0]] * 2
    np.testing.assert_allclose(distance, expected, atol=2.5e-7)


CAMERAS = {
    "three": lambda n: torch.arange(n) * 7 % 3,
    "one": lambda n: torch.full((n,), 4),
    "small ones": lambda n: torch.arange(n).clamp(max=5) * 2,  # five have one picture
    "two of very different size": lambda n: (torch.arange(n) < 9).long(),
}


@pytest.mark.parametrize("cameras", CAMERAS)
@pytest.mark.parametrize("lengths", [(5, 20, 2, 4), (5, 20, 3, 3), (1, 2, 1, 1)])
@pytest.mark.parametrize("n", [1, 8, 150])
def test_camera_aware_equals_the_formula(n, lengths, cameras):
    f, camids = crowd(n, seed=n, dim=8), CAMERAS[cameras](n)
    names = ("k1_intra", "k1_inter", "k2_intra", "k2_inter")
    given = dict(zip(names, lengths, strict=True))
    distance = camera_aware_jaccard(f, camids, **given)
    assert distance.dtype == np.float32
    found = to_dense(distance)
    expected = slow_camera_aware(f, camids, *lengths)
    assert np.abs(found - expected).max() <= 1e-6
    np.testing.assert_array_equal(found, found.T)
    near = camera_aware_jaccard(f, camids, **given, max_distance=0.5)
    np.testing.assert_array_equal(
        to_dense(near), np.where(found > 0.5, np.float32(1), found)
    )


def test_camera_lists_are_what_the_distance_searches():
    f, camids = crowd(70), torch.arange(70) % 4 * 3
    lists = camera_neighbours(f, camids)
    np.testing.assert_array_equal(
        camera_aware_jaccard(f, camids, neighbours=lists).toarray(),
        camera_aware_jaccard(f, camids).toarray(),
    )
    with pytest.raises(ValueError, match="row numbers"):
        camera_aware_jaccard(f, camids, neighbours=(lists[0], lists[1] - 1))


@pytest.mark.parametrize(
    "bad", [torch.arange(29), torch.arange(30) - 1, torch.arange(30) / 2]
)
def test_bad_cameras_are_refused(bad):
    for function in (camera_aware_jaccard, standardise_by_camera):
        with pytest.raises(ValueError, match="camids must be 30 whole numbers"):
            function(crowd(30), bad)


def test_bad_lengths_of_camera_lists_are_refused():
    f, camids = crowd(30), torch.arange(30) % 3
    for name in ("k1_intra", "k1_inter", "k2_intra", "k2_inter"):
        with pytest.raises(ValueError, match="at least 1"):
            camera_aware_jaccard(f, camids, **{name: 0})
    with pytest.raises(ValueError, match="at most k1"):
        camera_aware_jaccard(f, camids, k2_inter=22)


# ------------------------------------------------------------------------ DBSCAN


def random_distance(seed, n, grid=0.05):
    """A symmetric matrix on a coarse grid: many distances are equal to eps."""
    rng = np.random.default_rng(seed)
    points = rng.random((n, 2))
    d = np.linalg.norm(points[:, None] - points, axis=2)
    d = np.minimum(np.round(d / grid) * grid, 1).astype(np.float32)
    near = np.nonzero(d <= 0.4)
    return d.astype(np.float64), csr_array((d[near], near), shape=(n, n))


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 60),
    eps=st.sampled_from([0.0, 0.1, 0.15, 0.22]),
    min_samples=st.integers(1, 6),
)
@settings(max_examples=30)
def test_dbscan_is_that_of_the_dense_matrix(seed, n, eps, min_samples):
    dense, sparse = random_distance(seed, n)
    labels = dbscan(sparse, eps, min_samples)
    assert labels.dtype == torch.int64
    # eps is met in spite of rounding: the grid of 0.05 is no multiple of 2**-21
    expected = DBSCAN(eps=eps + 1e-6, min_samples=min_samples, metric="precomputed")
    assert labels.tolist() == expected.fit_predict(dense).tolist()


def test_a_missing_diagonal_counts_the_point_itself_and_a_zero_is_near():
    near = csr_array((np.float32([0.2, 0.2]), ([0, 1], [1, 0])), shape=(2, 2))
    same = csr_array((np.float32([0, 0]), ([0, 1], [1, 0])), shape=(2, 2))
    for pair in (near, same):
        assert pair.nnz == 2  # no diagonal stored
        assert dbscan(pair, 0.5, 2).tolist() == [0, 0]
        assert dbscan(pair, 0.5, 3).tolist() == [-1, -1]
        assert pair.nnz == 2


def test_eps_of_most_clusters():
    """Two pairs, 0.4 apart, a picture near one of them, and one near nothing."""
    place = np.array([0, 0.1, 0.5, 0.6, 0.85, 2.0])
    dense = np.abs(place - place[:, None])
    near = csr_array(np.where(dense <= 0.8, dense + 1, 0).astype(np.float32))
    near.data -= 1
    for min_samples, expected in (
        (1, (0.35, 2, 0)),
        (2, (0.35, 2, 1)),
        (3, (0.5, 1, 1)),
    ):
        eps, clusters, outliers = eps_of_most_clusters(near, min_samples)
        assert (eps, clusters, outliers) == expected
    features = crowd(200, groups=10, spread=0.4)
    distance = jaccard_distance(features, max_distance=0.8)
    eps, clusters, outliers = eps_of_most_clusters(distance)
    counts = [len(set(dbscan(distance, e / 20).tolist()) - {-1}) for e in range(1, 17)]
    assert clusters == max(counts) == counts[round(20 * eps) - 1]
    assert outliers == int((dbscan(distance, eps) < 0).sum())


def test_no_cluster():
    assert dbscan(csr_array((5, 5), dtype=np.float32)).tolist() == [-1] * 5


def test_dbscan_settings_out_of_range_are_refused():
    d = csr_array((3, 3), dtype=np.float32)
    for eps in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="eps"):
            dbscan(d, eps)
    with pytest.raises(ValueError, match="min_samples"):
        dbscan(d, 0.5, 0)
