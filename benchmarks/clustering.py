"""Neighbours, sparse Jaccard and DBSCAN against the dense formula, side by side.

The rival computes the same formula (the book's `jaccard_distance`) the way public Re-ID
codes do: a flat faiss search, one row at a time into dense N x N arrays, and scikit-
learn's DBSCAN on the dense matrix; written here anew from the formula. Both run in one
process and take turns; printed are medians of CPU time, peaks of memory over the
features, and whether distances and labels agree. The camera-aware distance runs beside
them, up to eps as training asks for it.

    OMP_NUM_THREADS=1 python -m benchmarks.clustering --output clustering.json
    python -m benchmarks.clustering --n 200000 --dim 256 --cameras 40 --no-reference
    python -m benchmarks.clustering --curve --dim 256 --no-reference
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil
import torch
import tyro
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torch.nn.functional import normalize

from o2cap.clustering import (
    camera_aware_jaccard,
    camera_neighbours,
    dbscan,
    jaccard_distance,
)
from o2cap.neighbours import nearest_neighbours

K1, K2, EPS, MIN_SAMPLES = 20, 6, 0.5, 4
STAGES = ("neighbours", "jaccard", "dbscan")
Timings = dict[str, float]


@dataclass(frozen=True)
class Options:
    n: int = 12_936
    """Pictures (Market-1501 has 12,936 for training, MSMT17 32,621)."""
    dim: int = 2048
    """Columns of the features."""
    cameras: int = 6
    """Cameras that the pictures come from."""
    camera_gap: float = 0.6
    """Size of what a camera adds to a person, over the size of the person."""
    spread: float = 0.9
    """Size of what a single picture adds. 2.0 with a gap of 1.0: an untrained net."""
    repeats: int = 3
    """Runs of each, of which the median counts."""
    reference: bool = True
    """Run the dense formula too: 2 to 3 times 4 N^2 bytes, and minutes at 32,621."""
    curve: bool = False
    """Times and memory over N (2,000 to --n, doubling), with fitted exponents."""
    output: Path | None = None
    """Write the numbers here as JSON."""


def clustered_features(
    n: int, dim: int, camera_gap: float, spread: float, seed: int = 0, cameras: int = 6
) -> tuple[Tensor, Tensor]:
    """Features and camids of persons: 17 pictures each, as in Market-1501.

    A feature is the person, plus the camera, plus what that camera makes of that
    person, plus the picture; Gaussian each, then L2-normalised.
    """
    g = torch.Generator().manual_seed(seed)
    persons = max(1, round(n / 17.2))
    person = torch.randint(persons, (n,), generator=g)
    camera = torch.randint(cameras, (n,), generator=g)
    centre = torch.randn(persons, dim, generator=g)
    offset = torch.randn(cameras, dim, generator=g) * camera_gap
    view = torch.randn(persons * cameras, dim, generator=g) * camera_gap
    features = torch.empty(n, dim)
    for rows in torch.arange(n).split(8192):  # no second copy of all of it
        p, c = person[rows], camera[rows]
        noise = torch.randn(len(rows), dim, generator=g) * spread
        together = centre[p] + offset[c] + view[p * cameras + c] + noise
        features[rows] = normalize(together)
    return features, camera


def ours(features: Tensor, max_distance: float) -> tuple[Timings, Any, Tensor]:
    clock = [time.process_time()]
    found = nearest_neighbours(features, min(K1, len(features)))
    clock.append(time.process_time())
    distance = jaccard_distance(
        features, K1, K2, neighbours=found, max_distance=max_distance
    )
    clock.append(time.process_time())
    labels = dbscan(distance, EPS, MIN_SAMPLES)
    clock.append(time.process_time())
    return _stages(clock), distance, labels


def camera_aware(features: Tensor, camids: Tensor) -> tuple[Timings, Any, Tensor]:
    """The published lists within and across cameras, distances up to eps."""
    clock = [time.process_time()]
    found = camera_neighbours(features, camids)
    clock.append(time.process_time())
    distance = camera_aware_jaccard(
        features, camids, neighbours=found, max_distance=EPS
    )
    clock.append(time.process_time())
    labels = dbscan(distance, EPS, MIN_SAMPLES)
    clock.append(time.process_time())
    return _stages(clock), distance, labels


def dense(features: Tensor) -> tuple[Timings, np.ndarray, np.ndarray]:
    f = features.numpy()
    clock = [time.process_time()]
    index = faiss.IndexFlatIP(f.shape[1])
    index.add(f)
    rank = index.search(f, K1)[1]
    clock.append(time.process_time())
    distance = dense_jaccard(f, rank)
    clock.append(time.process_time())
    labels = DBSCAN(eps=EPS, min_samples=MIN_SAMPLES, metric="precomputed", n_jobs=1)
    labels = labels.fit_predict(distance)
    clock.append(time.process_time())
    return _stages(clock), distance, labels


def dense_jaccard(f: np.ndarray, rank: np.ndarray) -> np.ndarray:
    n, half = len(f), round(K1 / 2) + 1

    def reciprocal(i: int, k: int) -> np.ndarray:
        forward = rank[i, :k]
        return forward[(rank[forward, :k] == i).any(1)]

    full = [reciprocal(i, K1) for i in range(n)]
    halves = [reciprocal(i, half) for i in range(n)]
    v = np.zeros((n, n), np.float32)
    for i in range(n):
        members = full[i]
        for j in full[i]:
            shared = np.intersect1d(halves[j], full[i])
            if len(shared) > 2 / 3 * len(halves[j]):
                members = np.append(members, halves[j])
        members = np.unique(members)
        weight = np.exp(-(2 - 2 * (f[members] @ f[i])))
        v[i, members] = weight / weight.sum()
    del full, halves
    mean = np.empty_like(v)
    for i in range(n):
        mean[i] = v[rank[i, :K2]].mean(0)
    v = mean
    del mean
    owners = [np.flatnonzero(v[:, column]) for column in range(n)]
    distance = np.empty_like(v)
    for i in range(n):
        shared_sum = np.zeros(n, np.float32)
        for column in np.flatnonzero(v[i]):
            rows = owners[column]
            shared_sum[rows] += np.minimum(v[i, column], v[rows, column])
        distance[i] = 1 - shared_sum / (2 - shared_sum)
    return np.maximum(distance, 0, out=distance)


def agreement(features: Tensor, sparse: Any, matrix: np.ndarray) -> dict[str, Any]:
    """Largest difference of the distances; labels from ours and from scikit-learn."""
    largest = 0.0
    for i in range(0, len(matrix), 1024):
        block = sparse[i : i + 1024].tocoo()
        rows = np.ones(block.shape, np.float32)
        rows[block.coords] = block.data
        largest = max(largest, float(np.abs(rows - matrix[i : i + 1024]).max()))
    found: dict[str, Any] = {"max |dJ|": largest}
    for eps in (0.499, EPS, 0.5001):
        judge = DBSCAN(eps=eps, min_samples=MIN_SAMPLES, metric="precomputed", n_jobs=1)
        theirs = judge.fit_predict(matrix)
        labels = dbscan(sparse, eps, MIN_SAMPLES).numpy()
        core = np.zeros(len(labels), bool)
        core[judge.core_sample_indices_] = True
        found[f"eps {eps}"] = {
            "labels of core points differ": int((labels[core] != theirs[core]).sum()),
            "outliers differ": int(((labels < 0) != (theirs < 0)).sum()),
            "border points elsewhere": int(
                ((labels != theirs) & ~core & (labels >= 0) & (theirs >= 0)).sum()
            ),
            "ARI": float(adjusted_rand_score(theirs, labels)),
        }
    return found


def peak_memory(work: Callable[[], object]) -> float:
    """Largest resident memory during the work over that before it, GiB.

    The kernel's own high-water mark, so nothing is missed between samples; NaN
    where the system has none that can be reset.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # glibc: freed is free
        ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    before = psutil.Process().memory_info().rss
    work()
    lines = status.read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return (peak * 1024 - before) / 2**30


def _stages(clock: list[float]) -> Timings:
    steps = dict(zip(STAGES, np.diff(clock).tolist(), strict=True))
    steps["after neighbours"] = steps["jaccard"] + steps["dbscan"]
    steps["total"] = clock[-1] - clock[0]
    return steps


def _median(runs: list[Timings]) -> Timings:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def compare(options: Options) -> dict[str, Any]:
    """Both on the same features, taking turns."""
    features, camids = clustered_features(
        options.n,
        options.dim,
        options.camera_gap,
        options.spread,
        cameras=options.cameras,
    )
    rivals = ["whole", "up to eps", "camera-aware"] + ["dense"] * options.reference
    runs: dict[str, list[Timings]] = {name: [] for name in rivals}
    memory: dict[str, list[float]] = {name: [] for name in runs}
    kept: dict[str, Any] = {}

    def run(name: str) -> None:
        kept.pop(name, None)

        def work() -> None:
            if name == "dense":
                timings, *result = dense(features)
            elif name == "camera-aware":
                timings, *result = camera_aware(features, camids)
            else:
                timings, *result = ours(features, 1.0 if name == "whole" else EPS)
            runs[name].append(timings)
            kept[name] = result

        memory[name].append(peak_memory(work))

    for _ in range(options.repeats):
        for name in rivals:
            run(name)
    labels = kept["up to eps"][1]
    result: dict[str, Any] = {
        "entries per row": kept["whole"][0].nnz / options.n,
        "entries per row up to eps": kept["up to eps"][0].nnz / options.n,
        "clusters": int(labels.max()) + 1,
        "outlier share": float((labels < 0).float().mean()),
        "CPU seconds": {name: _median(runs[name]) for name in rivals},
        "peak GiB": {name: statistics.median(memory[name]) for name in rivals},
    }
    seconds = result["CPU seconds"]
    result["camera-aware / up to eps"] = {
        stage: seconds["camera-aware"][stage] / seconds["up to eps"][stage]
        for stage in seconds["up to eps"]
    }
    if options.reference:
        for name in ("whole", "up to eps"):
            result[f"dense / {name}"] = {
                stage: seconds["dense"][stage] / seconds[name][stage]
                for stage in seconds["dense"]
            }
        result["agreement"] = agreement(features, kept["whole"][0], kept["dense"][0])
    return result


def curve(options: Options) -> dict[str, Any]:
    """Ours over N, and the slope of each stage in the log-log plane."""
    sizes = [2000]
    while 2 * sizes[-1] <= options.n:
        sizes.append(2 * sizes[-1])
    rows = []
    for n in sizes:
        features, _ = clustered_features(
            n, options.dim, options.camera_gap, options.spread
        )
        runs: list[tuple[Timings, Any, Tensor]] = []
        memory = [
            peak_memory(lambda f=features, r=runs: r.append(ours(f, 1.0)))  # type: ignore[misc]
            for _ in range(options.repeats)
        ]
        rows.append(
            {
                "n": n,
                **_median([run[0] for run in runs]),
                "GiB": statistics.median(memory),
                "entries per row": runs[0][1].nnz / n,
            }
        )
        print({k: round(v, 4) for k, v in rows[-1].items()})
    exponents = {
        name: float(
            np.polyfit(np.log(sizes), np.log([max(r[name], 1e-6) for r in rows]), 1)[0]
        )
        for name in rows[0]
        if name != "n"
    }
    return {"rows": rows, "exponents": exponents}


def print_comparison(result: dict[str, Any]) -> None:
    seconds = result["CPU seconds"]
    print(
        f"{result['clusters']} clusters, {result['outlier share']:.1%} outliers, "
        f"{result['entries per row']:.0f} distances below 1 per row, "
        f"{result['entries per row up to eps']:.0f} up to eps"
    )
    print(f"{'CPU seconds':18}" + "".join(f"{name:>13}" for name in seconds), end="")
    print(f"{'ratio':>12}{'(to eps)':>12}" if "dense" in seconds else "")
    for stage in (*STAGES, "after neighbours", "total"):
        print(
            f"{stage:18}" + "".join(f"{t[stage]:13.3f}" for t in seconds.values()),
            end="",
        )
        if "dense" in seconds:
            ratios = (
                result[f"dense / {name}"][stage] for name in ("whole", "up to eps")
            )
            print("".join(f"{r:11.1f}x" for r in ratios), end="")
        print()
    print(
        f"{'peak GiB':18}" + "".join(f"{g:13.3f}" for g in result["peak GiB"].values())
    )
    ratio = result["camera-aware / up to eps"]["after neighbours"]
    print(f"camera-aware over plain, up to eps, after the search: {ratio:.2f}")
    for name, value in result.get("agreement", {}).items():
        print(f"{name}: {value}")


def main(options: Options) -> None:
    small, camids = clustered_features(500, options.dim, 0.6, 0.9)
    ours(small, 1.0)  # compiles
    camera_aware(small, camids)
    record: dict[str, Any] = {
        "options": {k: v for k, v in asdict(options).items() if k != "output"},
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "faiss": faiss.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    if options.curve:
        record["curve"] = curve(options)
        exponents = record["curve"]["exponents"].items()
        print("exponents:", {name: round(e, 2) for name, e in exponents})
    else:
        record["comparison"] = compare(options)
        print_comparison(record["comparison"])
    if options.output:
        options.output.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
