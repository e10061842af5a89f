"""Both losses and the memory update against loops, in products of B×P×D.

Prints CPU times (medians, one process, the rivals taking turns), their ratio to one
product of the batch with the memory, [B, D] × [D, P], and to the per-sample loops in
the style of the public codes, written here anew from the formulas.

    OMP_NUM_THREADS=1 python benchmarks/losses.py --output losses.json
"""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from o2cap.losses import compare_with_own, offline_loss, online_loss
from o2cap.proxies import CameraProxies, ProxyMemory

TAU, NEGATIVES, POSITIVES, BALANCE, MOMENTUM = 0.07, 50, 3, 0.15, 0.2


def make_case(
    batch: int, n_proxies: int, dim: int, cameras: int
) -> tuple[Tensor, Tensor, ProxyMemory, CameraProxies]:
    """Random memory; anchors near their entries; a cluster is seen by half the cameras.

    Anchors come four to a proxy, as the sampler gives them.
    """
    g = torch.Generator().manual_seed(0)
    cluster = torch.arange(n_proxies) // (cameras // 2)
    camera = (torch.arange(n_proxies) + cluster) % cameras
    memory = ProxyMemory(torch.randn(n_proxies, dim, generator=g), MOMENTUM)
    proxy = torch.randperm(n_proxies, generator=g)[: batch // 4].repeat_interleave(4)
    noise = torch.randn(batch, dim, generator=g) / dim**0.5
    features = F.normalize(memory.centroids[proxy] + noise)
    return features, proxy, memory, CameraProxies(proxy, cluster, camera)


def loops(
    features: Tensor, proxy: Tensor, memory: Tensor, proxies: CameraProxies
) -> Tensor:
    """Both losses, one camera and one anchor at a time."""
    total = features.new_zeros(())
    for camera in proxies.camera[proxy].unique():
        anchors = (proxies.camera[proxy] == camera).nonzero().flatten()
        entries = memory.detach().clone()  # a copy of the memory for each camera
        similarity = features[anchors] @ entries.T
        with torch.no_grad():
            own = entries[proxy[anchors]] @ entries.T
            mixed = BALANCE * similarity + (1 - BALANCE) * own
        of_camera = features.new_zeros(())
        for k, i in enumerate(anchors):
            f, s = similarity[k], mixed[k]
            same = (proxies.cluster == proxies.cluster[proxy[i]]).nonzero().flatten()
            rest = f.detach().clone()
            rest[same] = -torch.inf
            of_camera = of_camera + _one(f, same, rest)
            best = []
            for other in proxies.camera.unique():
                members = (proxies.camera == other).nonzero().flatten()
                best.append(members[s[members].argmax()])
            candidates = torch.stack(best)
            order = s[candidates].argsort(descending=True)
            chosen = candidates[order[:POSITIVES]]
            rest = s.clone()
            rest[chosen] = -torch.inf
            of_camera = of_camera + _one(f, chosen, rest)
        total = total + of_camera / len(anchors)
    return total


def _one(f: Tensor, positive: Tensor, rest: Tensor) -> Tensor:
    negative = rest.argsort(descending=True)[:NEGATIVES]
    logits = f[torch.cat([positive, negative])] / TAU
    return -logits.log_softmax(0)[: len(positive)].mean()


def loop_update(memory: Tensor, features: Tensor, proxy: Tensor) -> None:
    """The memory update, image by image."""
    for f, p in zip(features, proxy, strict=True):
        memory[p] = MOMENTUM * memory[p] + (1 - MOMENTUM) * f
        memory[p] /= memory[p].norm()


def ours(
    features: Tensor, proxy: Tensor, memory: Tensor, proxies: CameraProxies
) -> Tensor:
    """Both losses of the package, as the trainer adds them."""
    given = (features, proxy, memory, proxies)
    similarity, own = compare_with_own(features, proxy, memory)
    return offline_loss(*given, similarity=similarity) + online_loss(
        *given, similarity=similarity, own=own
    )


def cpu_times(
    rivals: dict[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
    """Return the median CPU milliseconds of each; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(repeats + 1):
        for name, run in rivals.items():
            start = time.process_time()
            run()
            if turn:  # the first turn warms up
                times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(found) for name, found in times.items()}


@contextlib.contextmanager
def extra_memory() -> Iterator[list[float]]:
    """Give a list that holds, afterwards, the MiB by which the block's peak rose."""
    process, found, done = psutil.Process(), [0.0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], (process.memory_info().rss - before) / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


@dataclass
class Arguments:
    """What to measure."""

    batch: int = 32
    """Anchors B."""
    proxies: tuple[int, ...] = (1_000, 5_000, 20_000)
    """Numbers of proxies P."""
    dim: int = 2048
    """Length D of a feature."""
    cameras: int = 6
    """Cameras."""
    matmul: Literal["highest", "high", "medium"] = "highest"
    """Precision of float32 products, ours and the loops' (torch's setting)."""
    repeats: int = 7
    """Repetitions, of which the median is taken."""
    large: bool = True
    """Also B = 256 with P = 50,000 (D = 2048: 0.4 GB of memory entries)."""
    output: Path | None = None
    """JSON file to write."""


def measure(arguments: Arguments, batch: int, n_proxies: int) -> dict[str, float]:
    """Return one row of the table."""
    features, proxy, memory, proxies = make_case(
        batch, n_proxies, arguments.dim, arguments.cameras
    )
    centroids = memory.centroids
    features.requires_grad_()
    a, b = (
        ours(features, proxy, centroids, proxies),
        loops(features, proxy, centroids, proxies),
    )
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def forward_backward(loss: Callable[..., Tensor]) -> None:
        features.grad = None
        loss(features, proxy, centroids, proxies).backward()

    detached = features.detach()
    copy = centroids.clone()
    times = cpu_times(
        {
            "product": lambda: detached @ centroids.T,
            "ours": lambda: forward_backward(ours),
            "loops": lambda: forward_backward(loops),
            "update": lambda: memory.update(detached, proxy, 4),
            "loop_update": lambda: loop_update(copy, detached, proxy),
        },
        arguments.repeats,
    )
    row = {"batch": batch, "proxies": n_proxies, "dim": arguments.dim} | times
    row["ours_in_products"] = times["ours"] / times["product"]
    row["loops_over_ours"] = times["loops"] / times["ours"]
    row["loop_update_over_update"] = times["loop_update"] / times["update"]
    return row


def measure_large(arguments: Arguments) -> dict[str, float]:
    """Return times and extra memory at a large size, the loop losses left out."""
    features, proxy, memory, proxies = make_case(
        256, 50_000, arguments.dim, arguments.cameras
    )
    features.requires_grad_()

    def step() -> None:
        features.grad = None
        ours(features, proxy, memory.centroids, proxies).backward()

    step()  # what the first call loads is not counted
    with extra_memory() as extra:
        step()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    detached, copy = features.detach(), memory.centroids.clone()
    times = cpu_times(
        {
            "ours": step,
            "update": lambda: memory.update(detached, proxy, 4),
            "loop_update": lambda: loop_update(copy, detached, proxy),
        },
        3,
    )
    return {
        "batch": 256,
        "proxies": 50_000,
        "extra_mib": extra[0],
        "memory_entries_mib": memory.centroids.numel() * 4 / 2**20,
    } | times


def main(arguments: Arguments) -> None:
    """Measure, print, and write what was asked for."""
    torch.set_float32_matmul_precision(arguments.matmul)
    large = measure_large(arguments) if arguments.large else None
    rows = [measure(arguments, arguments.batch, p) for p in arguments.proxies]
    print(f"B = {arguments.batch}, D = {arguments.dim}; CPU ms, medians")
    print(
        "     P  product   ours  loops  update  loop update  ours in   loops  loop up."
    )
    print(
        "                                                    products   /ours /update"
    )
    for row in rows:
        print(
            "{proxies:6.0f} {product:8.1f} {ours:6.1f} {loops:6.0f} {update:7.2f} "
            "{loop_update:12.2f} {ours_in_products:8.1f} {loops_over_ours:7.1f} "
            "{loop_update_over_update:7.1f}".format(**row)
        )
    if large is not None:
        print(
            "B = 256, P = 50,000: ours {ours:.0f} CPU ms with {extra_mib:.0f} MiB over "
            "the memory's own {memory_entries_mib:.0f}; update {update:.1f}, loop "
            "update {loop_update:.1f}".format(**large)
        )
    if arguments.output is not None:
        record = {
            "torch": torch.__version__,
            "matmul": arguments.matmul,
            "threads": torch.get_num_threads(),
            "rows": rows,
            "large": large,
        }
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
