"""Make the shipped starts anew: label-free weights, from rendered pictures.

    python data_scripts/pretrain.py                       # both, into o2cap/weights/
    python data_scripts/pretrain.py person --epochs 10 --folder /tmp/short

The loss is the warm start's (each picture is its own class, seen twice), with many more
pictures and more time. The pictures come from the training parts of data seeds that
nothing else uses, and no identity is read.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from safetensors.torch import save_file

from o2cap import losses
from o2cap.backbone import build_model
from o2cap.config import preset
from o2cap.data.images import ImageSet
from o2cap.data.loading import decode
from o2cap.data.samplers import instance_batches
from o2cap.data.synthetic import render_dataset
from o2cap.device import Hardware
from o2cap.learner import Learner
from o2cap.weights import EMBEDDED

SEEDS = tuple(range(1000, 1008))
PRESETS = {"person": "synthetic", "vehicle": "synthetic-vehicles"}
Kind = Literal["person", "vehicle"]


def pretrain(
    kind: Kind, epochs: int, folder: Path, batches: int = 100
) -> dict[str, object]:
    """Train a start, write it to `folder`, and return what its card says.

    Parameters
    ----------
    kind : "person" or "vehicle"
        What is rendered.
    epochs : int
        Length; the learning rate falls as a half cosine.
    folder : Path
        Where ``{kind}.safetensors`` goes.
    batches : int
        Of an epoch.
    """
    config = preset(PRESETS[kind], weights="none", precision="bf16")
    start = replace(config.warm_start, images=128, jitter=0.5, iterations=batches)
    config = replace(config, warm_start=start, threads=1)
    size = config.height, config.width
    decoded = []
    for seed in SEEDS:
        world = replace(config.synthetic, seed=seed, test_identities=0)
        decoded.append(decode(render_dataset(world, *size).train, *size))
    pixels = torch.cat([pixels for pixels, _ in decoded])
    images = ImageSet(
        [path for _, part in decoded for path in part.paths],
        torch.cat([part.camids for _, part in decoded]),
    )
    hardware = Hardware.choose(config)
    torch.manual_seed(config.seed)
    model = build_model(
        config.backbone,
        "none",
        height=config.height,
        width=config.width,
        pooling=config.pooling,
    )
    begun = time.perf_counter()
    with hardware.in_force(config):
        learner = Learner(config, hardware, model, pixels, images)
        for epoch in range(epochs):
            lr = start.lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
            generator = learner.begin("warm start", epoch, lr)
            once = instance_batches(
                len(images), batches, generator, images=start.images
            )
            for pictures in learner.pictures(
                once.repeat(1, 2), generator, start.jitter
            ):
                views = learner.embed(pictures)
                loss = losses.instance_loss(views, temperature=start.temperature)
                learner.step({"instance": loss})
            print(
                f"{kind}, epoch {epoch}: loss {learner.end()['loss']:.3f}", flush=True
            )
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: x.cpu().contiguous() for name, x in model.state_dict().items()}
    save_file(state, folder / f"{kind}.safetensors")
    return {
        "data seeds": f"{SEEDS[0]}-{SEEDS[-1]}, training parts",
        "pictures": len(images),
        f"epochs of {batches} batches": epochs,
        "pictures a batch, each twice": start.images,
        "colour jitter": start.jitter,
        "Adam, learning rate": f"{start.lr:g}, falling as a half cosine",
        "temperature": start.temperature,
        "pooling": config.pooling,
        "precision": hardware.precision,
        "seconds": round(time.perf_counter() - begun),
        "versions": f"torch {torch.__version__}, numpy {np.__version__}",
        "made on": torch.cuda.get_device_name()
        if hardware.device.type == "cuda"
        else f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": f"python data_scripts/pretrain.py {kind} --epochs {epochs}",
    }


def main(
    kinds: tyro.conf.Positional[tuple[Kind, ...]] = ("person", "vehicle"),
    epochs: int = 40,
    folder: Path = EMBEDDED,
) -> None:
    """Make starts of the small network: a minute on a GPU; on a CPU many more.

    Parameters
    ----------
    kinds
        What to render.
    epochs
        Length, 100 batches an epoch.
    folder
        Where the files and their card (card.json) go.
    """
    card = folder / "card.json"
    facts = json.loads(card.read_text("utf-8")) if card.is_file() else {}
    for kind in kinds:
        facts[kind] = pretrain(kind, epochs, folder)
        card.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
