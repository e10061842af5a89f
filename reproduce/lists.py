"""How long should lists of neighbours be? Clusters by many lengths, before training.

    python reproduce/lists.py --output reproduce/records/lists.json

Rendered people with 2 to 32 pictures in each camera that they pass, features of the
shipped start; nothing is trained. Each row scores one way to cluster by the adjusted
Rand index, outliers counted as clusters of one. Identities serve to score alone.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
from scipy.sparse import csr_array
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

import o2cap
from o2cap.backbone import build_model
from o2cap.clustering import camera_aware_jaccard, dbscan, jaccard_distance
from o2cap.config import preset
from o2cap.data import load_configured
from o2cap.features import extract
from o2cap.weights import EMBEDDED
from o2cap_book.batch import write_record

PICTURES = (2, 4, 8, 16, 32)  # in a camera; with many, of fewer people
PLAIN = (8, 10, 15, 20, 30)
INTRA, INTER = (2, 3, 5, 8), (3, 5, 10, 20, 30)
EPS = (0.5, 0.6)


def score(distance: csr_array, eps: float, pids: Tensor) -> dict[str, float]:
    """Cluster, and return how well that agrees with the identities."""
    clusters = dbscan(distance, eps)
    alone = clusters < 0
    found = {
        "clusters": int(clusters.max()) + 1,
        "outliers": float(alone.float().mean()),
    }
    sizes = clusters[~alone].bincount() if found["clusters"] else torch.zeros(1)
    clusters[alone] = found["clusters"] + torch.arange(int(alone.sum()))
    ari = float(adjusted_rand_score(pids, clusters))
    return {"ari": ari, **found, "median": int(sizes.median())}


def main(output: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Write the record.

    Parameters
    ----------
    output
        The record's file.
    seeds
        Of the rendered people.
    """
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed, pictures in product(seeds, PICTURES):
        config = preset("synthetic", seed=seed)
        people = 100 if pictures < 16 else 50
        world = replace(
            config.synthetic,
            images_per_camera=pictures,
            identities=people,
            test_identities=2,
        )
        images = load_configured(replace(config, synthetic=world)).train
        size: dict[str, Any] = {"height": config.height, "width": config.width}
        weights = str(EMBEDDED / "person.safetensors")
        model = build_model(config.backbone, weights, pooling=config.pooling, **size)
        features = extract(model, images, device="cpu", **size)
        assert images.pids is not None
        about = {"seed": seed, "pictures": pictures, "n": len(features)}
        for k1 in PLAIN:
            k2 = round(0.3 * k1)
            way: dict[str, Any] = {"distance": "jaccard", "k1": k1, "k2": k2}
            plain = jaccard_distance(features, k1, k2, max_distance=max(EPS))
            for eps in EPS:
                found = score(plain, eps, images.pids)
                rows.append({**about, **way, "eps": eps, **found})
        for intra, inter in product(INTRA, INTER):
            lengths: dict[str, Any] = {
                "k1_intra": intra,
                "k1_inter": inter,
                "k2_inter": min(3, inter),
            }
            aware = camera_aware_jaccard(
                features, images.camids, max_distance=max(EPS), **lengths
            )
            way = {"distance": "camera_aware", **lengths}
            for eps in EPS:
                found = score(aware, eps, images.pids)
                rows.append({**about, **way, "eps": eps, **found})
        print(about, flush=True)
    record = {
        "what": "Clusters before training, by the lengths of the lists and eps.",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"o2cap": o2cap.__version__, "torch": torch.__version__},
        "rows": rows,
    }
    write_record(record, output)


if __name__ == "__main__":
    tyro.cli(main)
