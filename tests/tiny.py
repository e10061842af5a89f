"""What the tests of the trainer and of the command line train on: in half a second.

54 training pictures of 6 identities in 3 cameras, 12 queries and 12 gallery pictures
of 4 others. An identity is two colours one above the other, a camera a tint.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from o2cap.config import (
    BatchConfig,
    ClusteringConfig,
    Config,
    OptimConfig,
    WarmStartConfig,
)
from o2cap.data.images import ImageSet, ReIDDataset

TRAIN, TEST, CAMERAS = 6, 4, 3


def config(output: Path, **changes: Any) -> Config:
    """Return settings with which a run takes half a second."""
    tiny = Config(
        output=output,
        backbone="tiny_resnet",
        weights="none",
        height=32,
        width=16,
        epochs=2,
        iterations=3,
        device="cpu",
        threads=1,
        evaluate_every=1,
        warm_start=WarmStartConfig(epochs=2, iterations=3, images=16),
        optim=OptimConfig(lr=1e-3, warmup=0.0, milestones=(0.5,)),
        batch=BatchConfig(proxies=4, images=2),
        clustering=ClusteringConfig(k1=8, k2=2, eps=0.5, min_samples=3),
    )
    return replace(tiny, **changes)


def options(**changes: Any) -> list[str]:
    """Return the same settings as options of ``o2cap train``, all but the output."""
    found = {
        "backbone": "tiny_resnet",
        "weights": "none",
        "height": 32,
        "width": 16,
        "epochs": 2,
        "iterations": 3,
        "device": "cpu",
        "threads": 1,
        "evaluate-every": 1,
        "warm-start.epochs": 2,
        "warm-start.iterations": 3,
        "warm-start.images": 16,
        "optim.lr": 1e-3,
        "optim.warmup": 0.0,
        "optim.milestones": 0.5,
        "batch.proxies": 4,
        "batch.images": 2,
        "clustering.standardise": False,
        "clustering.k1": 8,
        "clustering.k2": 2,
        "clustering.min-samples": 3,
    } | changes
    return [word for name, value in found.items() for word in (f"--{name}", str(value))]


def write_pictures(folder: Path) -> list[dict[str, Any]]:
    """Write the pictures, and ``manifest.csv``; return its rows.

    Files are numbered in an order that tells nothing of the identities.
    """
    random = np.random.default_rng(7)
    looks = random.integers(70, 186, (TRAIN + TEST, 2, 1, 1, 3))
    tints = random.integers(-35, 36, (CAMERAS, 1, 1, 3))
    rows: list[dict[str, Any]] = []
    (folder / "pictures").mkdir(parents=True)
    names = random.permutation(TRAIN * CAMERAS * 3 + TEST * CAMERAS * 2)
    for pid in range(TRAIN + TEST):
        for camid in range(CAMERAS):
            for shot in range(3 if pid < TRAIN else 2):
                upper, lower = looks[pid]
                body = np.concatenate(
                    [np.broadcast_to(part, (16, 16, 3)) for part in (upper, lower)]
                )
                noise = random.normal(0, 25, (32, 16, 3))
                pixels = (body + tints[camid] + noise).clip(0, 255).astype(np.uint8)
                path = f"pictures/{names[len(rows)]:03d}.png"
                Image.fromarray(pixels).save(folder / path)
                split = "train" if pid < TRAIN else ("query", "gallery")[shot]
                rows.append({"split": split, "path": path, "pid": pid, "camid": camid})
    rows.sort(key=lambda row: str(row["path"]))
    write_manifest(folder / "manifest.csv", rows)
    return rows


def write_manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write the manifest of `rows`."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["split", "path", "pid", "camid"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_dataset(folder: Path, rows: list[dict[str, Any]]) -> ReIDDataset:
    """Return the same pictures as a data set."""

    def part(split: str) -> ImageSet:
        mine = [row for row in rows if row["split"] == split]
        return ImageSet(
            paths=[folder / row["path"] for row in mine],
            camids=torch.tensor([int(row["camid"]) for row in mine]),
            pids=torch.tensor([int(row["pid"]) for row in mine]),
        )

    return ReIDDataset("tiny", part("train"), part("query"), part("gallery"))


def colour(pid: int, camid: int, k: int = 0) -> tuple[int, int, int]:
    """Return the colour of one of :func:`coloured`."""
    return (20 + 40 * pid, 30 + 50 * camid, 40 + 60 * k)


def coloured(folder: Path) -> ImageSet:
    """Write plain pictures, each of its own colour: 4 identities, 3 cameras, 2 of each.

    Identity 1 is never in camera 2.
    """
    rows = []
    for pid in range(4):
        for camid in range(3):
            for k in range(2):
                if (pid, camid) != (1, 2):
                    path = folder / f"{pid}-{camid}-{k}.png"
                    Image.new("RGB", (16, 32), colour(pid, camid, k)).save(path)
                    rows.append((path, camid, pid))
    paths, camids, pids = zip(*rows, strict=True)
    return ImageSet(paths, torch.tensor(camids), torch.tensor(pids))
