"""Verification figures: what all pairs, one by one, say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import normalize

from o2cap import verification
from o2cap.verification import verify_pairs


def test_figures_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_BLOCK_ELEMENTS", 3 * 90)
    pids = [torch.randint(-1, 6, (n,)) for n in (40, 90)]
    camids = [torch.randint(0, 3, (n,)) for n in (40, 90)]
    centre = torch.randn(7, 8)
    q, g = (normalize(centre[p] + torch.randn(len(p), 8)) for p in pids)
    near, same = [], []
    for i in range(40):
        for j in range(90):
            one = bool(pids[0][i] == pids[1][j])
            if min(pids[0][i], pids[1][j]) < 0 or (
                one and camids[0][i] == camids[1][j]
            ):
                continue
            near.append(float(1 - q[i] @ g[j]))
            same.append(one)
    distance, kind = np.array(near), np.array(same)
    found = verify_pairs(q, g, *pids, *camids, false_match_rate=0.05)
    assert found.auc == pytest.approx(roc_auc_score(kind, -distance), abs=1e-4)
    within = distance <= found.threshold
    assert found.false_match_rate == pytest.approx(within[~kind].mean(), abs=1e-9)
    assert found.true_match_rate == pytest.approx(within[kind].mean(), abs=1e-9)
    assert found.false_match_rate <= 0.05
    assert (
        distance[~kind] <= found.threshold + 4 / 2**16
    ).mean() >= found.false_match_rate
    allowed = np.sort(distance[~kind])[int(0.05 * (~kind).sum())]
    assert found.threshold == pytest.approx(allowed, abs=2 / 2**15)


def test_perfect_features_part_all_pairs() -> None:
    pids, camids = torch.tensor([0, 1]), torch.tensor([0, 0])
    x = torch.eye(2)
    found = verify_pairs(x, x, pids, pids, camids, camids + 1)
    assert (found.auc, found.true_match_rate, found.false_match_rate) == (1, 1, 0)
    assert 0 < found.threshold <= 1
    assert np.isnan(verify_pairs(x, x, pids, pids, camids, camids).auc)  # one camera
