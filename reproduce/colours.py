"""How far do colours alone get? A hand-made feature, beside the methods.

    python reproduce/colours.py --output reproduce/records/colours.json
    python reproduce/colours.py --ward ward/manifest.csv --output FILE

The strip is that of the chapter on metrics: in each of eight stripes from head
to feet, a histogram of 64 colours in the middle of the picture. *Standardised* removes
each camera's mean and spread, over the whole test set; *centred* the mean alone, of
query and gallery each. Nothing is trained. With ``--jobs runs/reproduce/jobs`` the runs
of ``both`` that the ablation left there are centred in the same way.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

import o2cap
from o2cap.config import preset
from o2cap.data import load_configured
from o2cap.data.loading import decode
from o2cap.evaluation import assess
from o2cap.files import replacing
from o2cap.inference import embed
from o2cap.run import read_run

WIDTHS = {"synthetic": 3 / 8, "synthetic-vehicles": 1.0, "ward": 3 / 8}


def colour_histogram(pixels: Tensor, middle: float = 3 / 8) -> Tensor:
    """Return unit vectors, FloatTensor [N, 512], for uint8 pictures [N, H, W, 3]."""
    side = round(pixels.shape[2] * (1 - middle) / 2)
    inside = pixels[:, :, side : pixels.shape[2] - side].long()
    colour = inside * 4 // 256 @ torch.tensor([16, 4, 1])
    counts = []
    for stripe in colour.chunk(8, dim=1):
        cells = torch.zeros(len(stripe), 64)
        counts.append(
            cells.scatter_add_(
                1,
                stripe.flatten(1),
                torch.ones(stripe[0].numel()).expand(len(stripe), -1),
            )
        )
    return F.normalize(torch.cat(counts, dim=1).sqrt())


def centre(features: Tensor, camids: Tensor) -> Tensor:
    """Remove each camera's mean, FloatTensor [N, D], L2-normalised."""
    changed = features.clone()
    for camera in camids.unique():
        changed[camids == camera] -= features[camids == camera].mean(0)
    return F.normalize(changed)


def main(
    output: Path,
    seeds: tuple[int, ...] = tuple(range(20, 30)),
    ward: Path | None = None,
    jobs: Path | None = None,
) -> None:
    """Write the record.

    Parameters
    ----------
    output
        The record's file.
    seeds
        Of the rendered people and vehicles.
    ward
        A manifest of WARD, if it is there.
    jobs
        The folder of the ablation's jobs, if it is there.
    """
    torch.set_num_threads(1)
    todo = [(n, preset(n, seed=s)) for n in list(WIDTHS)[:2] for s in seeds]
    if ward is not None:
        size = {"height": 128, "width": 64}
        todo.append(("ward", preset("own", root=ward, **size)))
    rows = []
    for name, config in todo:
        data = load_configured(config)
        parts = (data.query, data.gallery)
        features = [
            colour_histogram(decode(p, config.height, config.width)[0], WIDTHS[name])
            for p in parts
        ]
        found = assess(*parts, *features, standardise=True)
        means = [centre(f, p.camids) for f, p in zip(features, parts, strict=True)]
        kinds = {
            "strip": found,
            "strip, standardised": found["standardised_transductive"],
            "strip, centred": assess(*parts, *means),
        }
        for method, metrics in kinds.items():
            kept = {key: round(metrics[key], 6) for key in ("mAP", "rank1")}
            about = {"dataset": name, "method": method, "seed": config.seed}
            rows.append(about | {"metrics": kept})
        print(rows[-3:], flush=True)
    for run in sorted(jobs.glob("synthetic-both-seed*/run")) if jobs else ():
        config = read_run(run).config
        data = load_configured(config)
        parts = (data.query, data.gallery)
        means = [centre(embed(run, p).features, p.camids) for p in parts]
        found = assess(*parts, *means)
        kept = {key: round(found[key], 6) for key in ("mAP", "rank1")}
        about = {"dataset": "synthetic", "method": "both, centred"}
        rows.append(about | {"seed": config.seed, "metrics": kept})
    record = {
        "what": "Histograms of colours, without any training; `both`, centred alike.",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"o2cap": o2cap.__version__},
        "rows": rows,
    }
    with replacing(output) as path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
