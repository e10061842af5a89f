"""Retrieval metrics and pseudo-label quality against sorted loops and by hand."""

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from o2cap import evaluation
from o2cap.errors import InputError
from o2cap.evaluation import clustering_quality, evaluate_retrieval

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def ints(*values):
    return torch.tensor(values, dtype=torch.int64)


def sorted_loops(qf, gf, q_pid, g_pid, q_cam, g_cam):
    """The protocol word for word: sort, remove, walk down the list."""
    similarity = (qf @ gf.T).tolist()
    aps, inps, firsts = [], [], []
    for q, row in enumerate(similarity):
        kept = [
            (-row[g], int(g_pid[g]) == int(q_pid[q]))
            for g in range(len(row))
            if g_pid[g] >= 0 and not (g_pid[g] == q_pid[q] and g_cam[g] == q_cam[q])
        ]
        hits = [hit for _, hit in sorted(kept)]  # False before True: wrong ones first
        ranks = [r for r, hit in enumerate(hits, 1) if hit]
        if q_pid[q] < 0 or not ranks:
            continue
        aps.append(np.mean([n / r for n, r in enumerate(ranks, 1)]))
        inps.append(len(ranks) / ranks[-1])
        firsts.append(ranks[0])
    cmc = [np.mean([f <= r for f in firsts]) for r in range(1, min(50, len(gf)) + 1)]
    return np.mean(aps), np.mean(inps), np.array(cmc), len(aps)


def random_case(seed, queries=12, gallery=60, ids=6, cameras=3, dim=4, grid=0):
    g = torch.Generator().manual_seed(seed)
    qf, gf = (torch.randn(n, dim, generator=g) for n in (queries, gallery))
    if grid:  # coarse values, so that many similarities tie exactly
        qf, gf = (f.mul(grid).round().div(grid) for f in (qf, gf))
    else:
        qf, gf = normalize(qf), normalize(gf)
    pids = [torch.randint(-1, ids, (n,), generator=g) for n in (queries, gallery)]
    cams = [torch.randint(cameras, (n,), generator=g) for n in (queries, gallery)]
    return qf, gf, *pids, *cams


def test_worked_by_hand():
    # One query (identity 1, camera 0); five gallery pictures by falling similarity:
    # wrong, match, own camera (removed), match, wrong. The matches rank 2 and 3.
    gallery = torch.tensor([[0.9], [0.8], [0.7], [0.6], [0.5]])
    m = evaluate_retrieval(
        torch.ones(1, 1), gallery, ints(1), ints(2, 1, 1, 1, 3), ints(0),
        ints(0, 1, 0, 2, 0),
    )  # fmt: skip
    assert math.isclose(m.mAP, (1 / 2 + 2 / 3) / 2)
    assert math.isclose(m.mINP, 2 / 3)
    assert m.cmc.tolist() == [0, 1, 1, 1, 1]
    assert m.left_out == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grid", [0, 1])
@pytest.mark.parametrize("seed", range(8))
def test_equals_sorted_loops(seed, grid, device):
    case = random_case(seed, grid=grid)
    m_ap, m_inp, cmc, queries = sorted_loops(*case)
    m = evaluate_retrieval(*(t.to(device) for t in case))
    np.testing.assert_allclose(m.mAP, m_ap, rtol=1e-12)
    np.testing.assert_allclose(m.mINP, m_inp, rtol=1e-12)
    np.testing.assert_allclose(m.cmc, cmc, rtol=1e-12)
    assert m.left_out == 12 - queries


@given(seed=st.integers(0, 10**6), data=st.data())
@settings(max_examples=20)
def test_order_scale_and_blocks_change_nothing(seed, data):
    qf, gf, q_pid, g_pid, q_cam, g_cam = random_case(seed, grid=2)
    before = evaluate_retrieval(qf, gf, q_pid, g_pid, q_cam, g_cam)
    q = torch.tensor(data.draw(st.permutations(range(len(qf)))))
    g = torch.tensor(data.draw(st.permutations(range(len(gf)))))
    elements = evaluation._BLOCK_ELEMENTS
    try:
        evaluation._BLOCK_ELEMENTS = 150  # two queries at a time
        after = evaluate_retrieval(
            4 * qf[q], gf[g], q_pid[q], g_pid[g], q_cam[q], g_cam[g]
        )
    finally:
        evaluation._BLOCK_ELEMENTS = elements
    np.testing.assert_allclose(after.mAP, before.mAP, rtol=1e-12)
    np.testing.assert_allclose(after.mINP, before.mINP, rtol=1e-12)
    np.testing.assert_array_equal(after.cmc, before.cmc)


def test_bounds_perfect_and_worst():
    pid = ints(0, 1, 2)
    perfect = evaluate_retrieval(
        torch.eye(3), torch.eye(3), pid, pid, ints(0, 0, 0), ints(1, 1, 1)
    )
    assert perfect.mAP == perfect.mINP == perfect.cmc[0] == 1
    # All pictures at one point: every wrong one counts as ranked before the match.
    one = torch.ones(3, 3)
    collapsed = evaluate_retrieval(one, one, pid, pid, ints(0, 0, 0), ints(1, 1, 1))
    assert collapsed.cmc.tolist() == [0, 0, 1]
    assert math.isclose(collapsed.mAP, 1 / 3)


def test_junk_is_neither_right_nor_wrong():
    gallery = torch.tensor([[0.9], [0.8]])
    m = evaluate_retrieval(
        torch.ones(1, 1), gallery, ints(5), ints(-1, 5), ints(0), ints(1, 1)
    )
    assert m.mAP == 1  # the junk picture ranked first is not there at all
    distractor = evaluate_retrieval(
        torch.ones(1, 1), gallery, ints(5), ints(0, 5), ints(0), ints(1, 1)
    )
    assert distractor.mAP == 0.5


def test_cmc_has_rank_50_in_a_large_gallery():
    m = evaluate_retrieval(*random_case(0, gallery=80))
    assert len(m.cmc) == 50
    assert (np.diff(m.cmc) >= 0).all()


def test_queries_without_a_match_are_reported(caplog):
    f = torch.eye(2)
    with caplog.at_level(logging.WARNING):
        m = evaluate_retrieval(f, f, ints(0, 7), ints(0, 1), ints(0, 0), ints(1, 1))
    assert (m.left_out, m.mAP) == (1, 1.0)
    assert [r.getMessage() for r in caplog.records] == [
        "1 of 2 queries have no match and are left out"
    ]


def test_nothing_to_score_is_an_input_error():
    f = torch.eye(2)
    with pytest.raises(InputError, match="No query"):
        evaluate_retrieval(f[:0], f, ints(), ints(0, 1), ints(), ints(0, 0))
    with pytest.raises(InputError, match="another camera"):  # one camera only
        evaluate_retrieval(f, f, ints(0, 1), ints(0, 1), ints(0, 0), ints(0, 0))
    with pytest.raises(InputError, match="another camera"):  # empty gallery
        evaluate_retrieval(f, f[:0], ints(0, 1), ints(), ints(0, 0), ints())


def test_wrong_shapes_and_nan_are_refused():
    f, two = torch.eye(2), ints(0, 1)
    with pytest.raises(ValueError, match="gallery"):
        evaluate_retrieval(f, f, two, ints(0), two, two)
    with pytest.raises(ValueError, match="not finite"):
        evaluate_retrieval(f * math.nan, f, two, two, two, two)


# ------------------------------------------------------------------ pseudo labels


def test_quality_by_hand():
    # Two clusters: {a, a, b} and {b}, one outlier of identity c.
    q = clustering_quality(
        ints(0, 0, 0, 1, -1), ints(1, 1, 2, 2, 3), ints(0, 1, 1, 0, 0)
    )
    assert (q.clusters, q.outlier_share, q.purity) == (2, 0.2, 0.75)
    assert q.cameras_per_cluster == 1.5
    # Pairs together in both: 1; in clusters: 3; in identities: 2; of 6.
    expected, top = 3 * 2 / 6, (3 + 2) / 2
    assert math.isclose(q.ari, (1 - expected) / (top - expected), abs_tol=1e-12)
    # H(identity) = 1 bit; H(identity | cluster) = 3/4 H(1/3).
    h_third = -(math.log2(1 / 3) / 3 + math.log2(2 / 3) * 2 / 3)
    homogeneity = 1 - 0.75 * h_third
    # H(cluster) = H(1/4); H(cluster | identity) = 1/2 bit.
    h_quarter = -(math.log2(1 / 4) / 4 + math.log2(3 / 4) * 3 / 4)
    completeness = 1 - 0.5 / h_quarter
    assert math.isclose(q.nmi, 2 / (1 / homogeneity + 1 / completeness))


@given(
    st.lists(
        st.tuples(st.integers(-1, 3), st.integers(-1, 3)), min_size=1, max_size=30
    ),
    st.randoms(use_true_random=False),
)
@settings(max_examples=20)
def test_quality_ignores_names_order_and_outliers(rows, random):
    clusters, pids = (torch.tensor(c) for c in zip(*rows, strict=True))
    order = torch.tensor(random.sample(range(len(rows)), len(rows)))
    renamed = torch.where(clusters < 0, clusters, 7 * (5 - clusters))
    a = clustering_quality(clusters, pids)
    b = clustering_quality(renamed[order], pids[order])
    for name in ("ari", "nmi", "purity", "outlier_share"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-12)
    scored = (clusters >= 0) & (pids >= 0)
    c = clustering_quality(clusters[scored], pids[scored])
    np.testing.assert_allclose(a.ari, c.ari)
    np.testing.assert_allclose(a.purity, c.purity)


def test_perfect_all_outliers_one_cluster_unknown():
    perfect = clustering_quality(ints(4, 4, 2), ints(0, 0, 9))
    assert perfect.ari == perfect.nmi == perfect.purity == 1
    nothing = clustering_quality(ints(-1, -1), ints(0, 1), ints(0, 1))
    assert (nothing.clusters, nothing.outlier_share) == (0, 1)
    assert math.isnan(nothing.ari) and math.isnan(nothing.cameras_per_cluster)
    single = clustering_quality(ints(0, 0, 0, 0), ints(0, 0, 1, 1), ints(0, 1, 2, 2))
    assert (single.ari, single.purity) == (0, 0.5)
    assert single.cameras_per_cluster == 3
    unknown = clustering_quality(ints(0, 1, -1), ints(-1, -1, -1))
    assert unknown.clusters == 2 and math.isnan(unknown.nmi)
    with pytest.raises(IndexError):
        clustering_quality(ints(0), ints(0, 1))
