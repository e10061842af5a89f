"""Which pictures are drawn when."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Generator, Tensor

from o2cap.data.samplers import instance_batches, proxy_batches


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


labels = st.lists(st.integers(-1, 7), min_size=1, max_size=60)


def numbered(rows: list[int]) -> Tensor:
    """Renumber so that every number from 0 on is in use, −1 kept."""
    known = sorted({row for row in rows if row >= 0})
    return torch.tensor([known.index(row) if row >= 0 else -1 for row in rows])


@settings(max_examples=40)
@given(
    rows=labels.filter(lambda rows: max(rows) >= 0),
    iterations=st.integers(1, 9),
    proxies=st.integers(1, 9),
    images=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_proxy_batches_on_any_labels(
    rows: list[int], iterations: int, proxies: int, images: int, seed: int
) -> None:
    label = numbered(rows)
    n_proxies = int(label.max()) + 1
    together = min(proxies, n_proxies)
    batches = proxy_batches(
        label, iterations, seeded(seed), proxies=proxies, images=images
    )
    assert batches.dtype == torch.int64
    assert batches.shape == (iterations, together * images)
    visited = label[batches].reshape(iterations, together, images)
    assert (visited >= 0).all()  # no outlier
    assert (visited == visited[..., :1]).all()  # images of a proxy stand together
    visited = visited[..., 0]
    for batch in visited.tolist():
        assert len(set(batch)) == together
    # images: distinct where the proxy has enough of them
    size = label[label >= 0].bincount()
    picks = batches.reshape(iterations * together, images).tolist()
    for proxy, drawn in zip(visited.flatten().tolist(), picks, strict=True):
        if size[proxy] >= images:
            assert len(set(drawn)) == images
    # a pass visits every proxy at most once; all but a last partial batch of them
    in_pass = n_proxies // together
    for start in range(0, iterations, in_pass):
        of_pass = visited[start : start + in_pass].flatten().tolist()
        assert len(set(of_pass)) == len(of_pass)


def test_a_pass_visits_every_proxy_once() -> None:
    label = torch.arange(24).repeat(4)
    batches = proxy_batches(label, 9, seeded(), proxies=8, images=4)
    passes = label[batches].reshape(3, 24, 4)[..., 0]
    for order in passes:
        assert sorted(order.tolist()) == list(range(24))
    assert not passes[0].equal(passes[1])  # reshuffled


def test_a_last_partial_batch_is_dropped_by_chance_not_by_number() -> None:
    label = torch.arange(11).repeat(4)
    batches = proxy_batches(label, 300, seeded(), proxies=8)
    visits = label[batches].reshape(300, 8, 4)[..., 0].flatten().bincount()
    # a pass is one batch: every proxy is left out in 3 of 11 passes
    assert chisquare(visits.numpy()).pvalue > 0.01
    assert visits.sum() == 2400


def test_fewer_images_than_asked_for_are_drawn_again() -> None:
    label = torch.tensor([0, 1, 1, -1])
    batches = proxy_batches(label, 200, seeded(), proxies=2, images=4)
    drawn = batches.reshape(400, 4)
    for row in drawn.tolist():
        assert set(row) in ({0}, {1}, {2}, {1, 2})
    counts = batches[label[batches] == 1].bincount(minlength=3)[1:]
    assert chisquare(counts.numpy()).pvalue > 0.01


def test_fewer_proxies_than_a_batch_wants() -> None:
    label = torch.tensor([0, 0, 1, 1, 2, 2])
    batches = proxy_batches(label, 5, seeded(), proxies=8, images=2)
    assert batches.shape == (5, 6)
    for batch in batches:
        assert sorted(batch.tolist()) == [0, 1, 2, 3, 4, 5]


def test_more_proxies_than_draws() -> None:
    # Ledger 5: some are not visited; none is visited twice before all were once.
    label = torch.arange(1000)
    batches = proxy_batches(label, 10, seeded(), proxies=8, images=4)
    visited = label[batches].reshape(80, 4)[:, 0]
    assert visited.unique().numel() == 80


def test_one_proxy() -> None:
    batches = proxy_batches(torch.tensor([-1, 0, 0]), 3, seeded(), proxies=8, images=4)
    assert batches.shape == (3, 4)
    assert set(batches.flatten().tolist()) == {1, 2}


def test_no_proxy_is_refused() -> None:
    with pytest.raises(ValueError, match="no proxy"):
        proxy_batches(torch.tensor([-1, -1]), 3, seeded())


def test_every_image_of_a_proxy_is_as_likely_in_every_place() -> None:
    label = torch.tensor([0] * 6 + [1] * 5)
    batches = proxy_batches(label, 2000, seeded(1), proxies=2, images=4)
    for proxy, size, first in ((0, 6, 0), (1, 5, 6)):
        drawn = batches[label[batches] == proxy].reshape(2000, 4) - first
        for place in range(4):
            counts = drawn[:, place].bincount(minlength=size)
            assert chisquare(counts.numpy()).pvalue > 0.001
        # so are all ordered pairs of different images
        pairs = (drawn[:, 0] * size + drawn[:, 1]).bincount(minlength=size * size)
        pairs = pairs.reshape(size, size)
        assert pairs.diagonal().sum() == 0
        apart = pairs[~torch.eye(size, dtype=torch.bool)]
        assert chisquare(apart.numpy()).pvalue > 0.001


def test_samplers_are_decided_by_their_seed() -> None:
    label = torch.arange(40) % 13
    one = proxy_batches(label, 20, seeded(5))
    assert proxy_batches(label, 20, seeded(5)).equal(one)
    assert not proxy_batches(label, 20, seeded(6)).equal(one)
    one = instance_batches(40, 20, seeded(5), images=7)
    assert instance_batches(40, 20, seeded(5), images=7).equal(one)
    assert not instance_batches(40, 20, seeded(6), images=7).equal(one)


@settings(max_examples=25)
@given(
    n=st.integers(1, 50),
    iterations=st.integers(1, 12),
    images=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_instance_batches_pass_over_all_pictures(
    n: int, iterations: int, images: int, seed: int
) -> None:
    batches = instance_batches(n, iterations, seeded(seed), images=images)
    together = min(images, n)
    assert batches.shape == (iterations, together)
    assert batches.min() >= 0
    assert batches.max() < n
    in_pass = n // together
    for start in range(0, iterations, in_pass):
        seen = batches[start : start + in_pass].flatten().tolist()
        assert len(set(seen)) == len(seen)
