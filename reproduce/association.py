"""When does offline association help? A diagnosis, and clusters broken on purpose.

    python reproduce/association.py --output reproduce/records/association.json
    … --ward ward/manifest.csv --weights mobilenet_v2_imagenet.safetensors

The record's rows have a part. *diagnosis*: what the two losses would do with the
clusters of an epoch, against the true identities, in runs with both losses, for several
camera gaps and both starts; *real*: the same for WARD, before training. *fragments*:
the true identities as pseudo labels, a share of them cut into clusters of one camera
and a share merged with another, trained with each loss. Identities serve to look, and
to break; the losses see pseudo labels, as ever. The record grows run by run, and a
second call goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Generator, Tensor

import o2cap
from o2cap import losses
from o2cap.backbone import build_model
from o2cap.config import Config, LossConfig, SyntheticConfig, preset
from o2cap.data import load_configured
from o2cap.features import extract
from o2cap.files import read_json, replacing
from o2cap.neighbours import nearest_neighbours
from o2cap.proxies import ProxyMemory, split_by_camera
from o2cap.run import load_model
from o2cap.trainer import find_clusters, train

Row = dict[str, Any]

STRENGTHS = (0.5, 1.0, 1.5)
STARTS = ("embedded", "none")  # the shipped weights; random ones, and the warm start
WHEN = (0, 5, 10, 15, 19)  # epochs, before whose training the clusters are looked at
SHARES = ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.3))
METHODS = ("offline", "intra", "online", "both", "both+spare")
EPOCHS = 5  # labels that stay the same are learned soon
ANCHORS = 600


def diagnose(
    features: Tensor,
    clusters: Tensor,
    camids: Tensor,
    pids: Tensor,
    settings: LossConfig | None = None,
) -> dict[str, float]:
    """Say what both losses would pull and push, were training to begin here.

    Up to 600 anchors, evenly spread over the clustered pictures, meet a fresh memory.
    A proxy's identity is that of most of its pictures; a *true match* of an anchor is
    a proxy of its identity in another camera.

    Parameters
    ----------
    features : FloatTensor [N, D]
        L2-normalised.
    clusters, camids, pids : LongTensor [N]
        Pseudo labels (−1 for outliers), cameras and true identities.
    settings : LossConfig
        Numbers of positives and negatives, and the balance.

    Returns
    -------
    dict
        Shares, 0 to 1: ``own_camera`` of the 20 neighbours; ``one_camera`` of the
        clusters; of the true matches ``pulled`` (in the anchor's cluster), ``pushed``
        (among offline's negatives), and ``chance`` (pushed, if the negatives were drawn
        blindly); ``contested`` of online's positives outside the cluster (also
        offline's negatives), and of these ``contested_right`` (true matches);
        ``precision`` and ``recall`` of online's positives in other cameras. And
        ``cameras``, per cluster.
    """
    settings = settings or LossConfig()
    proxies = split_by_camera(clusters, camids)
    memory = ProxyMemory.from_features(features, proxies).centroids
    inside = (clusters >= 0).nonzero().flatten()
    spread = torch.linspace(0, len(inside) - 1, min(ANCHORS, len(inside))).long()
    anchor = inside[spread]
    own = proxies.label[anchor]

    votes = torch.zeros(len(proxies), int(pids.max()) + 1)
    votes.index_put_(
        (proxies.label[inside], pids[inside]), torch.ones(len(inside)), True
    )
    identity, camera = votes.argmax(1), proxies.camera
    elsewhere = camera != camids[anchor, None]
    true = (identity == pids[anchor, None]) & elsewhere

    similarity, row = losses.compare_with_own(features[anchor], own, memory)
    cluster = proxies.cluster[own][:, None] == proxies.cluster
    ranked = similarity.masked_fill(cluster, -torch.inf)
    hard = ranked.topk(min(settings.negatives, len(proxies) - 1)).indices
    negative = torch.zeros_like(cluster).scatter(1, hard, True) & ~cluster
    mixed = losses.online_similarity(similarity, row, settings.balance)
    picked = losses.online_positives(mixed, camera, settings.positives)
    outside = picked & elsewhere & ~cluster

    def share(part: Tensor, whole: Tensor) -> float:
        return float((part & whole).sum() / whole.sum().clamp(min=1))

    _, near = nearest_neighbours(features, min(21, len(features)))
    free = ~cluster
    odds = negative.sum(1) / free.sum(1).clamp(min=1)
    missed = (true & ~cluster).sum(1)
    counts = proxies.cluster.bincount()
    return {
        "own_camera": float((camids[near[:, 1:]] == camids[:, None]).float().mean()),
        "one_camera": float((counts == 1).float().mean()),
        "cameras": float(counts.float().mean()),
        "pulled": share(cluster, true),
        "pushed": share(negative, true),
        "chance": float((odds * missed).sum() / true.sum().clamp(min=1)),
        "contested": share(negative, outside),
        "contested_right": share(true, outside & negative),
        "precision": share(true, picked & elsewhere),
        "recall": share(picked, true),
    }


def fragment(
    pids: Tensor, camids: Tensor, cut: float, merge: float, seed: int
) -> Tensor:
    """Return identities as pseudo labels, some broken: LongTensor [N].

    Parameters
    ----------
    pids, camids : LongTensor [N]
        True identities and cameras.
    cut : float
        Share of the identities that become one cluster a camera.
    merge : float
        Share of the clusters then merged, in random pairs.
    seed : int
        Decides which.
    """
    chance = Generator().manual_seed(seed)
    _, label = pids.unique(return_inverse=True)
    number = int(label.max()) + 1
    broken = torch.randperm(number, generator=chance)[: round(cut * number)]
    part = torch.where(torch.isin(label, broken), camids + 1, 0)
    _, label = torch.stack([label, part], 1).unique(dim=0, return_inverse=True)
    number = int(label.max()) + 1
    pairs = torch.randperm(number, generator=chance)[: 2 * round(merge * number / 2)]
    into = torch.arange(number)
    into[pairs[::2]] = pairs[1::2]
    return into[label].unique(return_inverse=True)[1]


def configure(job: Row, **changes: Any) -> Config:
    """Return the settings of a job."""
    config = preset("synthetic", seed=job["seed"], threads=1, **changes)
    return replace(config, synthetic=SyntheticConfig(strength=job.get("strength", 1.0)))


def run_diagnosis(job: Row, device: str) -> list[Row]:
    """Train with both losses, and diagnose the clusters of some epochs."""
    config = configure(job, device=device, evaluate_every=100, weights=job["weights"])
    images = load_configured(config)
    pids = images.train.pids
    assert pids is not None
    distance = replace(config.clustering, distance=job["distance"])
    config = replace(config, clustering=distance)
    epochs, rows = count(), []

    def watched(features: Tensor, camids: Tensor, config: Config) -> Tensor:
        """Cluster as the trainer does, and look."""
        clusters = find_clusters(features, camids, config)
        epoch = next(epochs)
        if epoch in WHEN:
            rows.append(
                job | {"epoch": epoch} | diagnose(features, clusters, camids, pids)
            )
        return clusters

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("o2cap.trainer.find_clusters", watched),
    ):
        train(replace(config, output=Path(folder) / "run"), images)
    return rows


def run_fragments(job: Row, device: str) -> list[Row]:
    """Train on broken identities."""
    method, _, spare = job["method"].partition("+")
    config = configure(
        job, method=method, device=device, evaluate_every=100, epochs=EPOCHS
    )
    config = replace(
        config, loss=replace(config.loss, spare_online_positives=bool(spare))
    )
    images = load_configured(config)
    pids, camids = images.train.pids, images.train.camids
    assert pids is not None
    labels = fragment(pids, camids, job["cut"], job["merge"], job["seed"])
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, output=Path(folder) / "run")
        final = train(config, images, pseudo_labels=labels).final
        _, model = load_model(Path(folder) / "run", "start.safetensors")
        size: Row = {"height": config.height, "width": config.width}
        features = extract(model, images.train, **size, device="cpu")
    found = diagnose(features, labels, camids, pids)
    return [job | {"mAP": final["mAP"], "rank1": final["rank1"]} | found]


def run_real(job: Row, device: str) -> list[Row]:
    """Diagnose the plain clusters of real pictures, by weights from ImageNet."""
    size: Row = {"height": 128, "width": 64}
    network = {"backbone": "mobilenet_v2", "weights": job["weights"]}
    config = preset("own", root=Path(job["root"]), device=device, **size, **network)
    plain = replace(config.clustering, standardise=False)
    config = replace(config, clustering=plain)
    images = load_configured(config).train
    assert images.pids is not None
    model = build_model(config.backbone, config.weights, **size, pooling=config.pooling)
    features = extract(model, images, **size, device=device)
    clusters = find_clusters(features, images.camids, config)
    found = diagnose(features, clusters, images.camids, images.pids)
    return [job | {"epoch": 0} | found]


def jobs(seeds: list[int], ward: str = "", weights: str = "") -> Iterator[Row]:
    """Yield all runs, the quickest answers first."""
    if ward:
        yield {"part": "real", "root": ward, "weights": weights}
    for seed in seeds:
        for cut, merge in SHARES:
            for method in METHODS:
                yield {
                    "part": "fragments",
                    "seed": seed,
                    "cut": cut,
                    "merge": merge,
                    "method": method,
                }
        for strength in STRENGTHS:
            for start in STARTS:
                # the distance that knows the cameras: at the book's gap only
                for distance in ("jaccard", "camera_aware")[: 1 + (strength == 1)]:
                    yield {
                        "part": "diagnosis",
                        "seed": seed,
                        "strength": strength,
                        "weights": start,
                        "distance": distance,
                    }


def work(job: Row, device: str) -> list[Row]:
    """Run one job."""
    torch.set_num_threads(1)
    run = {"real": run_real, "diagnosis": run_diagnosis, "fragments": run_fragments}
    return run[job["part"]](job, device)


def main() -> None:
    """Run what the record lacks."""
    say = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    say.add_argument("--output", type=Path, required=True)
    say.add_argument("--seeds", type=int, nargs="+", default=range(20, 25))
    say.add_argument("--ward", default="", help="a manifest of WARD, if it is there")
    say.add_argument("--weights", default="", help="MobileNetV2's, for WARD")
    say.add_argument("--device", default="cpu")
    say.add_argument("--workers", type=int, default=1)
    given = say.parse_args()
    record: Row = {
        "what": "When offline association helps: diagnosis and broken identities.",
        "versions": {"o2cap": o2cap.__version__, "torch": torch.__version__},
        "device": given.device,
        "rows": [],
    }
    if given.output.is_file():
        record = read_json(given.output)
    done = [{k: row[k] for k in row["job"]} for row in record["rows"]]
    todo = [
        job
        for job in jobs(given.seeds, given.ward, given.weights)
        if _key(job) not in map(_key, done)
    ]
    with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
        waiting = {pool.submit(work, job, given.device): job for job in todo}
        for ended in as_completed(waiting):
            rows = [row | {"job": sorted(waiting[ended])} for row in ended.result()]
            record["rows"] += rows
            record["created"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            with replacing(given.output) as path:
                path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(rows[-1], flush=True)


def _key(job: Row) -> str:
    return json.dumps(job, sort_keys=True)


if __name__ == "__main__":
    main()
