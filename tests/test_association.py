"""The diagnosis of clusters, and clusters that are broken on purpose."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from o2cap.config import LossConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "reproduce"))

from association import diagnose, fragment

PIDS = torch.arange(12).repeat_interleave(6)
CAMIDS = torch.arange(3).repeat_interleave(2).repeat(12)


@pytest.mark.parametrize("cut", [0, 0.25, 1])
def test_a_cut_makes_clusters_of_one_camera_of_some_people(cut):
    labels = fragment(PIDS, CAMIDS, cut, 0.0, seed=1)
    whole = 0
    for pid in range(12):
        mine = pid == PIDS
        assert not torch.isin(labels[mine], labels[~mine]).any()
        kinds = {int(n) for n in labels[mine]}
        assert len(kinds) in (1, 3)
        for label in kinds if len(kinds) == 3 else ():
            assert len(CAMIDS[labels == label].unique()) == 1
        whole += len(kinds) == 1
    assert whole == round((1 - cut) * 12)
    assert len(labels.unique()) == int(labels.max()) + 1


def test_a_merge_joins_clusters_in_pairs():
    labels = fragment(PIDS, CAMIDS, 0.0, 0.5, seed=1)
    sizes = labels.unique(return_counts=True)[1]
    assert sorted(sizes.tolist()) == [6] * 6 + [12] * 3
    other = fragment(PIDS, CAMIDS, 0.0, 0.5, seed=2)
    assert not labels.equal(other)


def test_true_clusters_push_no_true_match():
    torch.manual_seed(0)
    features = normalize(torch.randn(72, 16))
    found = diagnose(features, PIDS, CAMIDS, PIDS)
    assert (found["pulled"], found["pushed"], found["contested_right"]) == (1, 0, 0)
    assert (found["cameras"], found["one_camera"]) == (3, 0)


def test_what_is_pushed_is_counted_by_hand():
    # Ann at 0 and 40 degrees in cameras 0 and 1, Ben at 15 and 100: the hardest
    # negative is Ben's for both pictures of Ann, and Ann's for both of Ben.
    angle = torch.deg2rad(torch.tensor([0.0, 40, 15, 100]))
    features = torch.stack([angle.cos(), angle.sin()], 1)
    pids, camids = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    alone = torch.arange(4)
    one = diagnose(features, alone, camids, pids, LossConfig(negatives=1))
    assert (one["pulled"], one["pushed"]) == (0, 0)
    assert one["chance"] == pytest.approx(1 / 3)
    assert (one["one_camera"], one["cameras"]) == (1, 1)
    # With three negatives all else is pushed. Online takes the nearest of the other
    # camera: right from Ann at 0 and Ben at 100, wrong from the two between.
    every = diagnose(features, alone, camids, pids)
    assert (every["pushed"], every["contested"]) == (1, 1)
    assert every["precision"] == every["recall"] == every["contested_right"] == 0.5
