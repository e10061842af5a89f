"""Everything that only a GPU can show, in pieces that resume, as one record.

On a machine with a CUDA GPU: images per second of training and extraction with a
ResNet-50 at 256×128, the share of a step outside the network and of the measured peak
of matrix products, a plain version of the same step beside it; whether CPU and GPU
agree; clustering at 100,000 and 1,000,000 features; and the paper's whole schedule on a
rendered set of the shape of Market-1501. Elsewhere the record says «not measured».

    python -m benchmarks.gpu

Each call stops after `--minutes`, what is measured is kept, and the same call goes on.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import tyro
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import losses as rivals
from o2cap.backbone import ReIDModel, build_model
from o2cap.clustering import dbscan, jaccard_distance
from o2cap.config import BatchConfig, Config, preset
from o2cap.data import load_dataset
from o2cap.data.images import ImageSet, ReIDDataset
from o2cap.data.samplers import proxy_batches
from o2cap.data.transforms import augment
from o2cap.device import Hardware
from o2cap.evaluation import clustering_quality
from o2cap.features import autocast, extract, extract_all
from o2cap.files import read_json, replacing
from o2cap.neighbours import nearest_neighbours
from o2cap.proxies import CameraProxies, ProxyMemory, split_by_camera
from o2cap.trainer import method_losses, train, train_epoch

Item = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large the pieces are."""

    backbone: str = "resnet50"
    height: int = 256
    width: int = 128
    batches: tuple[int, ...] = (32, 256)
    pictures: int = 4096
    clusters: int = 750
    steps: int = 40
    matrix: int = 8192
    agreement: int = 4096
    clustering: tuple[int, ...] = (100_000, 1_000_000)
    dim: int = 2048
    identities: int = 751
    test_identities: int = 750
    counts: tuple[int, int, int] = (12_936, 3_368, 15_913)
    epochs: int = 50
    iterations: int = 400


TOY = Sizes(
    backbone="tiny_resnet",
    height=32,
    width=16,
    batches=(16,),
    pictures=64,
    clusters=6,
    steps=2,
    matrix=64,
    agreement=200,
    clustering=(300,),
    dim=32,
    identities=8,
    test_identities=4,
    counts=(100, 10, 40),
    epochs=2,
    iterations=2,
)


@dataclass
class Options:
    """What to measure, and where to keep it."""

    output: Path = Path("reproduce/records/gpu.json")
    """The record; a call adds to what it holds of the same device."""
    work: Path = Path("runs/gpu")
    """Run directory of the whole schedule."""
    minutes: float = 9
    """When to stop; the same call goes on."""
    toy: bool = False
    """Tiny sizes on the CPU, to see that every piece works; the numbers say nothing."""


class Bench:
    """The pieces, on one device.

    Parameters
    ----------
    sizes : Sizes
        How large they are.
    device : str
        ``cuda``, or ``cpu`` for tests.
    deadline : float
        Value of `time.monotonic` at which to stop.
    """

    def __init__(self, sizes: Sizes, device: str, deadline: float) -> None:
        self.sizes, self.deadline = sizes, deadline
        self.config = preset(
            "market1501",
            dataset="synthetic",
            backbone=sizes.backbone,
            weights="none",
            height=sizes.height,
            width=sizes.width,
            device=device,
            epochs=sizes.epochs,
            iterations=sizes.iterations,
        )
        self.hardware = Hardware.choose(self.config)
        self.device = self.hardware.device

    def pieces(self) -> dict[str, Callable[[], Item]]:
        """Return what there is to measure, by name, in the order to do it."""
        found: dict[str, Callable[[], Item]] = {"matrix products": self.peak}
        for batch in self.sizes.batches:
            found[f"training, batch {batch}"] = lambda b=batch: self.training(b)
        found["extraction"] = self.extraction
        found["CPU and GPU"] = self.agreement
        for n in self.sizes.clustering:
            found[f"clustering, {n:,}"] = lambda n=n: self.clustering(n)
        found["whole schedule"] = lambda: {}  # needs the run directory; see main
        return found

    def seconds(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Return the median seconds of `work`, GPU work included; once to warm up."""
        found = []
        for _ in range(repeats + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found[1:])

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # ------------------------------------------------------------------- the network

    def peak(self) -> Item:
        """Matrix products of the precision of training: what the chip can do."""
        n = self.sizes.matrix
        kinds = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        kind = kinds[self.hardware.precision]
        a, b = (torch.randn(n, n, device=self.device, dtype=kind) for _ in "ab")
        seconds = self.seconds(lambda: a @ b, 20)
        return {
            "n": n,
            "dtype": str(kind),
            "tera-operations/s": 2 * n**3 / seconds / 1e12,
        }

    def model(self) -> ReIDModel:
        """Return the network, as the trainer sets it up."""
        torch.manual_seed(0)
        model = build_model(
            self.sizes.backbone,
            "none",
            height=self.sizes.height,
            width=self.sizes.width,
        ).to(self.device)
        return model.to(memory_format=torch.channels_last)

    def pixels(self) -> Tensor:
        """Return random pictures where the trainer would keep them."""
        shape = (self.sizes.pictures, self.sizes.height, self.sizes.width, 3)
        random = torch.Generator().manual_seed(0)
        found = torch.randint(256, shape, dtype=torch.uint8, generator=random)
        return self.hardware.place(found)

    def training(self, batch: int) -> Item:
        """The trainer's own epoch, the network alone, and a plain version of it."""
        sizes, device, hardware = self.sizes, self.device, self.hardware
        config = replace(
            self.config,
            iterations=sizes.steps,
            batch=BatchConfig(proxies=batch // 4, images=4),
        )
        model, pixels = self.model(), self.pixels()
        place = torch.arange(sizes.pictures)
        proxies = split_by_camera(place % sizes.clusters, place // sizes.clusters % 6)
        memory = ProxyMemory(torch.randn(len(proxies), model.dim, device=device))
        fused = device.type == "cuda"
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=fused)
        scaler = GradScaler(device.type, enabled=hardware.precision == "fp16")

        def epoch(iterations: int) -> None:
            train_epoch(
                *(model, optimizer, scaler, memory, proxies, pixels),
                replace(config, iterations=iterations),
                hardware,
                epoch=0,
                paths=[],
            )

        random = torch.Generator().manual_seed(0)
        index = proxy_batches(proxies.label, 1, random, proxies=batch // 4)[0]
        pictures = augment(hardware.batch(pixels, index), random)

        def network() -> None:
            """Forward, backward, optimizer: no pictures, no losses, no memory."""
            optimizer.zero_grad(set_to_none=True)
            with autocast(device, hardware.precision):
                features = model(pictures)
            scaler.scale(features.square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()

        n = len(index)
        with hardware.in_force(config):
            step = self.seconds(lambda: epoch(sizes.steps), 3) / sizes.steps
            alone = self.seconds(network, sizes.steps)
            with FlopCounterMode(display=False) as counter:
                network()
            waits = self.host_waits(epoch)
        plain = self.plain(index, pixels, proxies)
        return {
            "batch": n,
            "proxies": len(proxies),
            "precision": hardware.precision,
            "images/s": n / step,
            "ms/step": 1e3 * step,
            "network alone, ms/step": 1e3 * alone,
            "share outside the network": max(0.0, 1 - alone / step),
            "tera-operations/step": counter.get_total_flops() / 1e12,
            "host waits/step": waits,
            "plain version, images/s": n / plain,
            "times the plain version": plain / step,
        }

    def host_waits(self, epoch: Callable[[int], None]) -> float | None:
        """Return how often a step makes the host wait for the GPU, by torch's count."""
        if self.device.type != "cuda":
            return None
        counts = []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for iterations in (2, 6):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    epoch(iterations)
                counts.append(sum("synchroniz" in str(w.message) for w in caught))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return (counts[1] - counts[0]) / 4

    def plain(self, index: Tensor, pixels: Tensor, proxies: CameraProxies) -> float:
        """Return the seconds of a step in float32, with loops over the pictures.

        As the public codes do it, but for the pictures, which are decoded here and
        changed by our `augment`.
        """
        model = self.model().to(memory_format=torch.contiguous_format)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, foreach=False)
        memory = F.normalize(torch.randn(len(proxies), model.dim, device=self.device))
        there, proxy = proxies.to(self.device), proxies.label[index].to(self.device)
        random = torch.Generator().manual_seed(0)

        def step() -> None:
            pictures = augment(self.hardware.batch(pixels, index), random)
            features = model(pictures.contiguous())
            loss = rivals.loops(features, proxy, memory, there)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rivals.loop_update(memory, features.detach(), proxy)

        return self.seconds(step, 3)

    def extraction(self) -> Item:
        """Features of all pictures, as before every clustering."""
        model, pixels = self.model(), self.pixels()
        with self.hardware.in_force(self.config):
            seconds = self.seconds(
                lambda: extract_all(model, pixels, self.config, self.hardware), 3
            )
        return {
            "images/s": len(pixels) / seconds,
            "precision": self.hardware.extraction,
        }

    # -------------------------------------------------------------------- agreement

    def agreement(self) -> Item:
        """The same features, distances, labels, losses on CPU and device."""
        n, dim = self.sizes.agreement, self.sizes.dim
        on_cpu, _ = self.features(n, dim, "cpu")
        there = on_cpu.to(self.device)
        sim_a, index_a = nearest_neighbours(on_cpu, 20)
        sim_b, index_b = (found.cpu() for found in nearest_neighbours(there, 20))
        jac_a, jac_b = jaccard_distance(on_cpu), jaccard_distance(there)

        cameras = torch.arange(n) % 6
        proxies = split_by_camera(torch.arange(n) // 12, cameras)
        centroids = ProxyMemory.from_features(on_cpu, proxies).centroids
        anchors = torch.arange(0, n, max(1, n // 32))[:32]

        def losses_on(device: torch.device) -> tuple[Tensor, Tensor]:
            features = on_cpu[anchors].to(device).requires_grad_()
            parts = method_losses(
                self.config,
                features,
                proxies.label[anchors].to(device),
                centroids.to(device),
                proxies.to(device),
            )
            found = torch.stack(list(parts.values()))
            found.sum().backward()
            assert features.grad is not None
            return found.detach().cpu(), features.grad.cpu()

        loss_a, grad_a = losses_on(torch.device("cpu"))
        loss_b, grad_b = losses_on(self.device)

        model, pixels = self.model(), self.pixels()[:256]
        size = {"height": self.sizes.height, "width": self.sizes.width}
        model_there = extract(
            model,
            pixels,
            **size,
            device=self.device,
            precision=self.hardware.extraction,
        ).cpu()
        model_here = extract(model.cpu(), pixels.cpu(), **size)
        return {
            "similarity, max difference": float((sim_a - sim_b).abs().max()),
            "neighbours, share equal": float((index_a == index_b).float().mean()),
            "Jaccard distance, max difference": float(abs(jac_a - jac_b).max()),
            "labels equal": bool(torch.equal(dbscan(jac_a), dbscan(jac_b))),
            "losses, max relative difference": float(
                ((loss_a - loss_b) / loss_a).abs().max()
            ),
            "gradient, max difference over its max": float(
                (grad_a - grad_b).abs().max() / grad_a.abs().max()
            ),
            "features of the network, least cosine": float(
                (model_here * model_there).sum(dim=1).min()
            ),
        }

    # ------------------------------------------------------------------- clustering

    def features(self, n: int, dim: int, device: Any) -> tuple[Tensor, Tensor]:
        """Return random features around n/17 centres, and the centre of each."""
        random = torch.Generator(device).manual_seed(0)
        centre = torch.arange(n, device=device) // 17
        found = torch.randn(n, dim, device=device, generator=random).mul_(
            0.8 / dim**0.5
        )
        centres = torch.randn(n // 17 + 1, dim, device=device, generator=random)
        for rows in torch.arange(n, device=device).split(100_000):  # no second copy
            found[rows] += F.normalize(centres)[centre[rows]]
            found[rows] = F.normalize(found[rows])
        return found, centre

    def clustering(self, n: int) -> Item:
        """Neighbour search on the device, Jaccard and DBSCAN on the CPU."""
        dim = self.sizes.dim
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            while 3 * 4 * n * dim > free:  # features, their codes, working room
                dim //= 2
        process, before = psutil.Process(), psutil.Process().memory_info().rss
        features, centre = self.features(n, dim, self.device)
        marks = [time.perf_counter()]

        def mark() -> None:
            self.wait()
            marks.append(time.perf_counter())

        neighbours = nearest_neighbours(features, 20)
        mark()
        distance = jaccard_distance(features, neighbours=neighbours, max_distance=0.5)
        mark()
        labels = dbscan(distance)
        mark()
        seconds = np.diff(marks).tolist()
        quality = clustering_quality(labels, centre.cpu())
        return {
            "n": n,
            "dim": dim,
            "seconds": dict(zip(("search", "jaccard", "dbscan"), seconds, strict=True)),
            "search, tera-operations/s": 2 * n * n * dim / seconds[0] / 1e12,
            "clusters": quality.clusters,
            "ari": quality.ari,
            "host GiB over before": (process.memory_info().rss - before) / 2**30,
        }

    # ----------------------------------------------------------- the whole schedule

    def market(self) -> ReIDDataset:
        """Render a set of the shape of Market-1501."""
        sizes = self.sizes
        whole = load_dataset(
            "synthetic",
            identities=sizes.identities,
            test_identities=sizes.test_identities,
            cameras=6,
            images_per_camera=6,
            presence=0.75,
            height=sizes.height,
            width=sizes.width,
            workers=os.cpu_count() or 1,
        )

        def some(images: ImageSet, count: int) -> ImageSet:
            return images.select(torch.arange(min(count, len(images))))

        parts = zip(whole.splits().values(), sizes.counts, strict=True)
        return ReIDDataset("market-shaped", *(some(*part) for part in parts))

    def schedule(self, work: Path) -> Item | None:
        """Train as the paper does; None when the time was up before the end."""
        config: Config = replace(self.config, output=work)

        class Pause(Exception):
            pass

        def on_epoch(record: Item) -> None:
            longest = max(sum(record["seconds"].values()), 1)
            if time.monotonic() + longest > self.deadline and (
                record["epoch"] < config.epochs - 1
            ):
                raise Pause

        try:
            result = train(config, self.market(), on_epoch=on_epoch)
        except Pause:
            return None
        stages: dict[str, float] = {}
        for record in result.history:
            for stage, seconds in record["seconds"].items():
                stages[stage] = stages.get(stage, 0.0) + seconds
        counts, devices = read_json(work / "environment.json", "counts", "device")
        names = ("mAP", "rank1", "rank5", "rank10", "mINP")
        return {
            "counts": counts,
            "device": devices,
            "epochs": config.epochs,
            "iterations": config.iterations,
            "epochs without training": sum("skipped" in r for r in result.history),
            "seconds": stages,
            "seconds in all": sum(stages.values()),
            "training, images/s": config.epochs
            * config.iterations
            * config.batch.proxies
            * config.batch.images
            / stages["train"],
            "metrics": {name: result.final[name] for name in names},
        }


def versions() -> dict[str, str]:
    """Return the versions of what is measured."""
    found = {name: version(name) for name in ("o2cap", "torch", "torchvision", "numpy")}
    return found | {"CUDA": torch.version.cuda or "none"}


def main(options: Options) -> Item:
    """Measure what the record lacks, until the time is up, and return the record."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    deadline = time.monotonic() + 60 * options.minutes
    sizes = TOY if options.toy else Sizes()
    has_gpu = torch.cuda.is_available()
    bench = Bench(sizes, "cpu" if options.toy or not has_gpu else "cuda", deadline)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "none"
    record: Item = {
        "date": time.strftime("%Y-%m-%d"),
        "GPU": name,
        "toy": options.toy,
        "sizes": json.loads(json.dumps(asdict(sizes))),
        "versions": versions(),
        "items": {},
        "rows": [],
    }
    if options.output.is_file():
        same = ("GPU", "toy", "sizes", "versions")
        old = read_json(options.output, *same, "items", "rows")
        if old[:-2] == [record[key] for key in same]:
            record["items"], record["rows"] = old[-2:]

    def keep() -> None:
        with replacing(options.output) as path:
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    for piece, measure in bench.pieces().items():
        if not options.toy and not has_gpu:
            reason = "no CUDA GPU where this record was written"
            record["items"][piece] = {"not measured": reason}
            continue
        if piece in record["items"] and "not measured" not in record["items"][piece]:
            continue
        found: Item | None = None
        if time.monotonic() < deadline:
            logging.info("%s ...", piece)
            last = piece == "whole schedule"
            found = bench.schedule(options.work) if last else measure()
        if found is None:
            reason = "the time was up; the same command goes on"
            record["items"][piece] = {"not measured": reason}
        else:
            record["items"][piece] = found
            logging.info("%s", json.dumps(found, indent=1))
        keep()
    items = record["items"]
    peak = items["matrix products"].get("tera-operations/s")
    for item in items.values():
        if peak and "tera-operations/step" in item:
            done = 1e3 * item["tera-operations/step"] / item["ms/step"]
            item["share of the peak"] = done / peak
    if "metrics" in items["whole schedule"]:
        row = {"dataset": "market-shaped", "method": bench.config.method, "seed": 0}
        row |= {"metrics": items["whole schedule"]["metrics"], "versions": versions()}
        record["rows"] = [row]
    keep()
    return record


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
