"""Are two pictures of one identity? How well a threshold on their distance says it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_BINS = 2**16  # of the cosine distance, from 0 to 2
_BLOCK_ELEMENTS = 2**22  # distances held at once


@dataclass(frozen=True)
class Verification:
    """How well the cosine distance of two pictures tells if they show one identity."""

    auc: float  # a pair of one identity is nearer than another pair; area under the ROC
    threshold: float  # pairs up to this distance are taken for one identity
    true_match_rate: float  # share of the pairs of one identity that it finds
    false_match_rate: float  # share of the other pairs that it takes for one


def verify_pairs(
    query_features: Tensor,
    gallery_features: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_camids: Tensor,
    gallery_camids: Tensor,
    *,
    false_match_rate: float = 1e-3,
) -> Verification:
    """Score the decision "the same identity" over all pairs of query and gallery.

    Pairs of one identity and one camera are left out, as in the ranking metrics, and
    so are unknown identities. Distances are counted in bins of 2/65536, which is how
    exact the threshold is; the bins bound the memory.

    Parameters
    ----------
    query_features, gallery_features : FloatTensor [Q, D] and [G, D]
        L2-normalised, on one device.
    query_pids, query_camids : LongTensor [Q]
    gallery_pids, gallery_camids : LongTensor [G]
    false_match_rate : float
        At most this share of the pairs of two identities may be below the threshold.

    Returns
    -------
    Verification
        NaN where there are no pairs of one identity, or none of two.
    """
    device = query_features.device
    pids, camids, own_pids, own_camids = (
        c.to(device) for c in (gallery_pids, gallery_camids, query_pids, query_camids)
    )
    counts = torch.zeros(2, _BINS, dtype=torch.float64)
    size = max(1, _BLOCK_ELEMENTS // max(1, len(pids)))
    for rows in torch.arange(len(own_pids), device=device).split(size):
        distance = (1 - query_features[rows] @ gallery_features.T).clamp(0, 2)
        same = own_pids[rows, None] == pids
        easy = same & (own_camids[rows, None] == camids)
        known = (own_pids[rows, None] >= 0) & (pids >= 0) & ~easy
        for kind, pairs in enumerate((~same, same)):
            kept = distance.where(pairs & known, -1)  # outside of what is counted
            counts[kind] += kept.histc(_BINS, 0, 2).double().cpu()
    # Shares of the pairs up to each bin's end, and before the first: the ROC curve.
    false, true = F.pad(counts.cumsum(1) / counts.sum(1, keepdim=True), (1, 0))
    last = int((false <= false_match_rate).sum()) - 1
    return Verification(
        auc=float(torch.trapezoid(true, false)),
        threshold=2 * last / _BINS,
        true_match_rate=float(true[last]),
        false_match_rate=float(false[last]),
    )
