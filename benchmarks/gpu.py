"""Everything that only a GPU can show, as one record, in minutes.

    python -m benchmarks.gpu --output gpu.json --minutes 8

The peak of matrix products; training of a ResNet-50 at 256×128 in several ways, with
the longest kernels of a step; extraction; whether CPU and GPU agree; clustering up to a
million features; and some epochs on a rendered set of the shape of Market-1501.

It starts on a bare machine, where the package lies beside it and is not installed, and
writes the record after every piece. Each call stops in time; the next one goes on with
what is missing. Without a GPU the record says «not measured».
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import statistics
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import o2cap
from benchmarks import bare  # noqa: F401  (before what needs it)
from benchmarks import losses as rivals
from o2cap.backbone import ReIDModel, build_model
from o2cap.clustering import dbscan, jaccard_distance
from o2cap.config import BatchConfig, WarmStartConfig, preset
from o2cap.data import load_dataset
from o2cap.data.images import ImageSet, ReIDDataset
from o2cap.data.samplers import proxy_batches
from o2cap.data.transforms import augment
from o2cap.device import Hardware
from o2cap.evaluation import clustering_quality
from o2cap.features import autocast, extract, extract_all
from o2cap.files import read_json, replacing
from o2cap.learner import Learner
from o2cap.neighbours import nearest_neighbours
from o2cap.proxies import CameraProxies, ProxyMemory, split_by_camera
from o2cap.trainer import method_losses, train, train_epoch

Item = dict[str, Any]

SCHEDULE = (50, 400)  # epochs and iterations, as the paper trains
EVALUATIONS = 10  # after every fifth epoch


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
    clustering: tuple[int, ...] = (12_936, 32_621, 100_000, 1_000_000)
    dim: int = 2048
    identities: int = 751
    test_identities: int = 750
    counts: tuple[int, int, int] = (12_936, 3_368, 15_913)
    epochs: int = 3
    iterations: int = 400
    warm_up: int = 100
    compiler: str = "inductor"


TOY = Sizes(
    backbone="tiny_resnet",
    height=32,
    width=16,
    batches=(16,),
    pictures=64,
    clusters=6,
    steps=2,
    matrix=64,
    agreement=100,
    clustering=(200, 300),
    dim=32,
    identities=8,
    test_identities=2,
    counts=(60, 6, 12),
    epochs=2,
    iterations=2,
    warm_up=2,
    compiler="eager",  # traced, and not compiled
)


class Bench:
    """The pieces, on one device.

    Parameters
    ----------
    sizes : Sizes
        How large they are.
    device : str
        ``cuda``, or ``cpu`` for tests.
    """

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes, self.device = sizes, torch.device(device)
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
            evaluate_every=sizes.epochs,
            warm_start=WarmStartConfig(epochs=1, iterations=sizes.warm_up),
        )
        self.hardware = Hardware.choose(self.config)

    def pieces(self) -> dict[str, tuple[float, Callable[[], Item]]]:
        """Return what there is to measure, by name, in the order to do it.

        Before each stands how many seconds it may take: with less left it is not begun.
        """
        small = self.sizes.batches[0]
        few, many, *most = self.sizes.clustering

        def training(batch: int, way: str, precision: str, seconds: float = 12) -> None:
            work = partial(self.training, batch, precision, way)
            found[f"training, batch {batch}, {way}, {precision}"] = seconds, work

        def plain(batch: int) -> None:
            found[f"training, batch {batch}, plain"] = 12, partial(self.plain, batch)

        def clustering(n: int) -> None:
            found[f"clustering, {n:,}"] = 5 + n / 5000, partial(self.clustering, n)

        # What the goals are about comes first; what takes longest, last.
        found: dict[str, tuple[float, Callable[[], Item]]] = {}
        found["matrix products, bf16"] = 5, partial(self.peak, "bf16")
        training(small, "graphed", "bf16")
        plain(small)
        training(small, "eager", "bf16")
        found["epochs of the shape of Market-1501"] = 60, self.epochs
        clustering(many)
        for precision in ("bf16", "fp16"):
            name = f"a step's kernels, {precision}"
            found[name] = 10, partial(self.kernels, precision)
            training(small, "graphed", precision)
        found["extraction"] = 5, self.extraction
        clustering(few)
        for tf32 in (False, True):
            name = f"CPU and GPU, {'inside' if tf32 else 'outside'} TF32"
            found[name] = 10, partial(self.agreement, tf32)
        found["matrix products, fp16"] = 3, partial(self.peak, "fp16")
        training(small, "compiled", "bf16", 45)
        clustering(most.pop(0) if most else few)
        for batch in self.sizes.batches:
            for precision in ("bf16", "fp16"):
                training(batch, "graphed", precision)
                training(batch, "eager", precision)
            plain(batch)
            training(batch, "compiled", "bf16", 45)
        for n in most:
            clustering(n)
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

    def peak(self, precision: str) -> Item:
        """Matrix products of a precision of training: what the chip can do."""
        n = self.sizes.matrix
        kind = torch.bfloat16 if precision == "bf16" else torch.float16
        a, b = (torch.randn(n, n, device=self.device, dtype=kind) for _ in "ab")
        seconds = self.seconds(lambda: a @ b, 20)
        return {"n": n, "tera-operations/s": 2 * n**3 / seconds / 1e12}

    def model(self) -> ReIDModel:
        """Return the network, with random weights."""
        torch.manual_seed(0)
        size = {"height": self.sizes.height, "width": self.sizes.width}
        return build_model(self.sizes.backbone, "none", **size).to(self.device)

    @cached_property
    def pixels(self) -> Tensor:
        """Random pictures, on the CPU."""
        shape = (self.sizes.pictures, self.sizes.height, self.sizes.width, 3)
        random = torch.Generator().manual_seed(0)
        return torch.randint(256, shape, dtype=torch.uint8, generator=random)

    @cached_property
    def proxies(self) -> CameraProxies:
        """Clusters of six cameras, of the same size each."""
        place = torch.arange(self.sizes.pictures)
        return split_by_camera(place % self.sizes.clusters, place % 6)

    def epoch(self, batch: int, precision: str, way: str) -> tuple[Learner, Any]:
        """Return a learner, and what trains it for some steps: the trainer's own."""
        config = replace(
            self.config,
            precision=precision if self.device.type == "cuda" else "off",
            batch=BatchConfig(proxies=batch // 4, images=4),
            cuda_graphs=way == "graphed",
        )
        n = len(self.pixels)
        images = ImageSet([Path("random")] * n, torch.zeros(n).long())
        hardware = Hardware.choose(config)
        learner = Learner(config, hardware, self.model(), self.pixels, images)
        if way == "compiled":
            # In CUDA graphs of its own; no backend but this one makes them.
            mode = "reduce-overhead" if self.sizes.compiler == "inductor" else None
            compiled = torch.compile(
                learner.network, backend=self.sizes.compiler, mode=mode
            )
            learner.network = compiled  # type: ignore[assignment]
        entries = torch.randn(len(self.proxies), learner.model.dim, device=self.device)
        memory = ProxyMemory(F.normalize(entries))

        def run(steps: int) -> None:
            learner.config = replace(config, iterations=steps)
            train_epoch(learner, memory, self.proxies, 0)

        return learner, run

    def training(self, batch: int, precision: str, way: str) -> Item:
        """The trainer's epoch, and the network alone."""
        learner, run = self.epoch(batch, precision, way)
        hardware, steps = learner.hardware, self.sizes.steps
        index = next(iter(self.batches(batch)))
        random = torch.Generator().manual_seed(0)
        pictures = augment(self.pixels[index].to(self.device), random)

        def network(times: int) -> None:
            """Forward, backward, optimizer: no pictures, no losses, no memory."""
            passes = learner.graph[0] if learner.graph else learner.network
            for _ in range(times):
                learner.optimizer.zero_grad(set_to_none=True)
                with autocast(self.device, hardware.precision):
                    features = passes(pictures)
                learner.scaler.scale(features.square().sum()).backward()
                learner.scaler.step(learner.optimizer)
                learner.scaler.update()

        with hardware.in_force(learner.config):
            step = self.seconds(lambda: run(steps), 3) / steps
            alone = self.seconds(lambda: network(steps), 2) / steps
            found = {
                "batch": len(index),
                "proxies": len(self.proxies),
                "precision": hardware.precision,
                "images/s": len(index) / step,
                "ms/step": 1e3 * step,
                "network alone, ms/step": 1e3 * alone,
                "share outside the network": max(0.0, 1 - alone / step),
                "host, ms/step": 1e3 * self.host(learner, run),
                "host waits/step": self.host_waits(run),
            }
            if way == "eager":
                with FlopCounterMode(display=False) as counter:
                    network(1)
                found["tera-operations/step"] = counter.get_total_flops() / 1e12
        return found

    def batches(self, batch: int) -> Tensor:
        """Return the pictures of a batch of the trainer."""
        random = torch.Generator().manual_seed(0)
        return proxy_batches(self.proxies.label, 1, random, proxies=batch // 4)

    def host(self, learner: Learner, run: Callable[[int], None]) -> float:
        """Return in how many seconds the program has launched a step."""
        times, embed = [], learner.embed

        def noted(pictures: Tensor) -> Tensor:
            times.append(time.perf_counter())
            return embed(pictures)

        learner.embed = noted  # type: ignore[method-assign]
        self.wait()
        run(5)  # so few that the GPU's queue does not fill, where launching would wait
        learner.embed = embed  # type: ignore[method-assign]
        return float(np.median(np.diff(times)))

    def host_waits(self, run: Callable[[int], None]) -> float | None:
        """Return how often a step makes the host wait for the GPU, by torch's count."""
        if self.device.type != "cuda":
            return None
        counts = []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for steps in (2, 6):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    run(steps)
                counts.append(sum("synchroniz" in str(w.message) for w in caught))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return (counts[1] - counts[0]) / 4

    def plain(self, batch: int) -> Item:
        """A step in float32, with loops over the pictures, as the public codes do it.

        But for the pictures, which are decoded here and changed by our `augment`.
        """
        model = self.model().to(memory_format=torch.contiguous_format)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, foreach=False)
        entries = torch.randn(len(self.proxies), model.dim, device=self.device)
        memory, there = F.normalize(entries), self.proxies.to(self.device)
        pixels, index = self.pixels.to(self.device), next(iter(self.batches(batch)))
        proxy, index = there.label[index], index.to(self.device)
        random = torch.Generator().manual_seed(0)

        def step() -> None:
            features = model(augment(pixels[index], random).contiguous())
            loss = rivals.loops(features, proxy, memory, there)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rivals.loop_update(memory, features.detach(), proxy)

        seconds = self.seconds(step, 3)
        return {"batch": len(index), "images/s": len(index) / seconds}

    def kernels(self, precision: str) -> Item:
        """The twenty longest kernels of a step of the smallest batch."""
        learner, run = self.epoch(self.sizes.batches[0], precision, "eager")
        steps, gpu = min(10, self.sizes.steps), self.device.type == "cuda"
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
        with learner.hardware.in_force(learner.config):
            run(2)  # to warm up
            with profile(activities=kinds) as profiler:
                run(steps)
        times: Counter[str] = Counter()
        launches = 0
        for event in profiler.key_averages():
            spent = event.self_device_time_total if gpu else event.self_cpu_time_total
            if event.key.startswith("Optimizer."):  # a mark around its kernels
                continue
            if spent and (not gpu or str(event.device_type).endswith("CUDA")):
                times[event.key] += spent
                launches += event.count
        longest = {name: us / 1e3 / steps for name, us in times.most_common(20)}
        return {
            "kernels/step": launches / steps,
            "in all, ms/step": times.total() / 1e3 / steps,
            "longest, ms/step": longest,
        }

    def extraction(self) -> Item:
        """Features of all pictures, as before every clustering."""
        model, pixels = self.model(), self.pixels.to(self.device)
        with self.hardware.in_force(self.config):
            seconds = self.seconds(
                lambda: extract_all(model, pixels, self.config, self.hardware), 3
            )
        found = {"precision": self.hardware.extraction}
        return found | {"images/s": len(pixels) / seconds}

    # -------------------------------------------------------------------- agreement

    def agreement(self, tf32: bool) -> Item:
        """The same features, distances, labels, losses on CPU and device."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            return self._agreement()
        finally:
            torch.set_float32_matmul_precision(before)

    def _agreement(self) -> Item:
        n, dim = self.sizes.agreement, self.sizes.dim
        on_cpu, _ = self.features(n, dim, "cpu")
        there = on_cpu.to(self.device)
        sim_a, index_a = nearest_neighbours(on_cpu, 20)
        sim_b, index_b = (found.cpu() for found in nearest_neighbours(there, 20))
        jac_a, jac_b = jaccard_distance(on_cpu), jaccard_distance(there)
        labels = [dbscan(jaccard) for jaccard in (jac_a, jac_b)]
        for jaccard in (jac_a, jac_b):  # what is missing is 0, and as near as nothing
            np.subtract(1, jaccard.data, out=jaccard.data)

        cameras = torch.arange(n) % 6
        proxies = split_by_camera(torch.arange(n) // 12, cameras)
        memory = ProxyMemory.from_features(on_cpu, proxies)
        anchors = torch.arange(0, n, max(1, n // 32))[:32]

        def losses_on(device: torch.device) -> tuple[Tensor, Tensor]:
            features = on_cpu[anchors].to(device).requires_grad_()
            entries = ProxyMemory(memory.centroids.to(device))
            proxy, known = proxies.label[anchors].to(device), proxies.to(device)
            parts = method_losses(self.config, features, proxy, entries, known)
            found = torch.stack(list(parts.values()))
            found.sum().backward()
            assert features.grad is not None
            return found.detach().cpu(), features.grad.cpu()

        loss_a, grad_a = losses_on(torch.device("cpu"))
        loss_b, grad_b = losses_on(self.device)

        model, pixels = self.model(), self.pixels[:64]
        how = {"height": self.sizes.height, "width": self.sizes.width}
        precision = self.hardware.extraction
        there = extract(
            model, pixels, **how, device=self.device, precision=precision
        ).cpu()
        here = extract(model.cpu(), pixels, **how)
        return {
            "similarity, max difference": float((sim_a - sim_b).abs().max()),
            "neighbours, share equal": float((index_a == index_b).float().mean()),
            "Jaccard distance, max difference": float(abs(jac_a - jac_b).max()),
            "labels equal": bool(torch.equal(*labels)),
            "losses, max relative difference": float(
                ((loss_a - loss_b) / loss_a).abs().max()
            ),
            "gradient, max difference over its max": float(
                (grad_a - grad_b).abs().max() / grad_a.abs().max()
            ),
            "features of the network, least cosine": float(
                (here * there).sum(dim=1).min()
            ),
        }

    # ------------------------------------------------------------------- clustering

    def features(self, n: int, dim: int, device: Any) -> tuple[Tensor, Tensor]:
        """Return random features around n/17 centres, and the centre of each."""
        random = torch.Generator(device).manual_seed(0)
        centre = torch.arange(n, device=device) // 17
        found = torch.randn(n, dim, device=device, generator=random)
        found *= 0.8 / dim**0.5
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
        dbscan(jaccard_distance(features[:300]))  # libraries are loaded, loops compiled
        marks = []

        def mark() -> None:
            self.wait()
            marks.append(time.perf_counter())

        mark()
        neighbours = nearest_neighbours(features, 20)
        mark()
        distance = jaccard_distance(features, neighbours=neighbours, max_distance=0.5)
        mark()
        labels = dbscan(distance)
        mark()
        seconds = np.diff(marks).tolist()
        every, over_threads = torch.get_num_threads(), {}
        for threads in (1, 2, 4, 8) if n < 50_000 else ():
            torch.set_num_threads(threads)
            start = time.perf_counter()
            jaccard_distance(features, neighbours=neighbours, max_distance=0.5)
            over_threads[str(threads)] = time.perf_counter() - start
        torch.set_num_threads(every)
        quality = clustering_quality(labels, centre.cpu())
        return {
            "n": n,
            "dim": dim,
            "seconds": dict(zip(("search", "jaccard", "dbscan"), seconds, strict=True)),
            "threads": every,
            "jaccard by threads, seconds": over_threads,
            "search, tera-operations/s": 2 * n * n * dim / seconds[0] / 1e12,
            "clusters": quality.clusters,
            "ari": quality.ari,
            "host GiB over before": (process.memory_info().rss - before) / 2**30,
        }

    # -------------------------------------------------------------------- the epochs

    def market(self) -> ReIDDataset:
        """Render a set of the shape of Market-1501, small: it is enlarged anyway."""
        sizes = self.sizes
        whole = load_dataset(
            "synthetic",
            identities=sizes.identities,
            test_identities=sizes.test_identities,
            cameras=6,
            images_per_camera=6,
            presence=0.75,
            height=max(sizes.height // 4, 16),
            width=max(sizes.width // 4, 16),
            workers=0 if sizes is TOY else os.cpu_count() or 1,
        )

        def some(images: ImageSet, count: int) -> ImageSet:
            return images.select(torch.arange(min(count, len(images))))

        parts = zip(whole.splits().values(), sizes.counts, strict=True)
        return ReIDDataset("market-shaped", *(some(*part) for part in parts))

    def epochs(self) -> Item:
        """Some epochs of the trainer, and what the paper's schedule would take.

        The first epoch is left out of the estimate, since kernels are chosen in it.
        """
        dataset, start = self.market(), time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            config = replace(self.config, output=Path(work) / "run")
            history = train(config, dataset).history
        whole = time.perf_counter() - start
        stages = {
            stage: statistics.mean(r["seconds"][stage] for r in history[1:])
            for stage in ("extract", "cluster", "train")
        }
        evaluation = history[-1]["seconds"]["evaluate"]
        epochs, iterations = SCHEDULE
        longer = stages | {"train": stages["train"] * iterations / config.iterations}
        return {
            "counts": dataset.counts(),
            "epochs": len(history),
            "iterations": config.iterations,
            "epochs without training": sum("skipped" in r for r in history),
            "seconds in all": whole,
            "seconds/epoch": stages,
            "evaluation, seconds": evaluation,
            f"{epochs} epochs of {iterations} iterations, extrapolated, minutes": (
                epochs * sum(longer.values()) + EVALUATIONS * evaluation
            )
            / 60,
        }


class TimeUpError(Exception):
    """A piece took longer than there was time."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End the block with TimeUpError after some seconds."""

    def end(*_: object) -> None:
        raise TimeUpError("the time was up; the same command goes on")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def versions() -> dict[str, str]:
    """Return the versions of what is measured."""
    found = {"o2cap": o2cap.__version__, "torch": torch.__version__}
    return found | {"numpy": np.__version__, "CUDA": torch.version.cuda or "none"}


def measure(output: Path, minutes: float, toy: bool = False) -> Item:
    """Measure what the record lacks, until the time is up, and return the record.

    Parameters
    ----------
    output : Path
        The record; a call adds to what it holds of the same device.
    minutes : float
        When to stop.
    toy : bool
        Tiny sizes on the CPU, to see that every piece works; the numbers say nothing.
    """
    deadline = time.monotonic() + 60 * minutes
    sizes = TOY if toy else Sizes()
    has_gpu = torch.cuda.is_available() and not toy
    bench = Bench(sizes, "cuda" if has_gpu else "cpu")
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True)
    record: Item = {
        "date": time.strftime("%Y-%m-%d"),
        "GPU": torch.cuda.get_device_name() if has_gpu else "none",
        "toy": toy,
        "sizes": json.loads(json.dumps(asdict(sizes))),
        "versions": versions(),
        "commit": commit.stdout.strip() or None,
        "items": {},
        "rows": [],
    }
    if output.is_file():
        *old, items = read_json(output, "GPU", "toy", "sizes", "versions", "items")
        if old == [record[key] for key in ("GPU", "toy", "sizes", "versions")]:
            record["items"] = items
    items, pieces = record["items"], bench.pieces()
    for name, (needs, piece) in pieces.items():
        left = deadline - time.monotonic()
        if name in items and "not measured" not in items[name]:
            continue
        if not toy and not has_gpu:
            found = {"not measured": "no CUDA GPU where this record was written"}
        elif left < (0 if toy else needs):
            found = {"not measured": "the time was up; the same command goes on"}
        else:
            logging.info("%s (%.0f s left) ...", name, left)
            try:
                with at_most(left):
                    found = piece()
            except Exception as error:  # of this piece, and not of the next
                found = {"not measured": f"{type(error).__name__}: {error}"[:500]}
            logging.info("%s", json.dumps(found, indent=1))
        items[name] = found
        record["items"] = {name: items[name] for name in pieces if name in items}
        with replacing(output) as path:
            path.write_text(json.dumps(with_ratios(record), indent=1) + "\n")
    return record


def with_ratios(record: Item) -> Item:
    """Hold the training against the peak and the plain version."""
    items = record["items"]
    for name, item in items.items():
        if name.startswith("training") and "ms/step" in item:
            batch, _, precision = name.rsplit(", ", 2)
            peak = items.get(f"matrix products, {precision}", {})
            plain = items.get(f"{batch}, plain", {})
            eager = items.get(f"{batch}, eager, {precision}", {})
            work = eager.get("tera-operations/step")
            kernels = items.get(f"a step's kernels, {precision}", {})
            first = record["sizes"]["batches"][0]
            if f" {first}, " in name and "compiled" not in name and len(kernels) > 1:
                item["GPU busy"] = kernels["in all, ms/step"] / item["ms/step"]
            if work and "tera-operations/s" in peak:
                reached = 1e3 * work / item["ms/step"]
                item["share of the peak"] = reached / peak["tera-operations/s"]
            if "images/s" in plain:
                item["times the plain version"] = item["images/s"] / plain["images/s"]
    return record


def main() -> None:
    """Measure, and write the record."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    record = Path("reproduce/records/gpu.json")
    parser.add_argument("--output", type=Path, default=record, help="the record")
    parser.add_argument("--minutes", type=float, default=8, help="when to stop")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on the CPU")
    measure(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
