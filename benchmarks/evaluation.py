"""CMC, mAP and mINP against sorted loops, side by side.

The rival sorts the whole gallery for every query, as common Re-ID code does; written
here anew. Both share the product of query and gallery features, which is reported by
itself: the ratio is about the ranking. Printed are medians of CPU time and the peak
of memory over the features.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluation --output evaluation.json
    python -m benchmarks.evaluation --queries 11659 --gallery 82161 --no-reference
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from benchmarks.clustering import clustered_features, peak_memory
from o2cap import evaluation
from o2cap.evaluation import RetrievalMetrics, evaluate_retrieval


@dataclass(frozen=True)
class Options:
    queries: int = 3_368
    """Query pictures (Market-1501: 3,368; MSMT17: 11,659)."""
    gallery: int = 15_913
    """Gallery pictures (Market-1501: 15,913; MSMT17: 82,161)."""
    dim: int = 256
    """Columns of the features; they change the product, not the ranking."""
    repeats: int = 3
    """Runs of each, of which the median counts."""
    reference: bool = True
    """Run the sorted loops too."""
    output: Path | None = None
    """Write the numbers here as JSON."""


def make_case(options: Options) -> tuple[Tensor, ...]:
    """Persons and cameras as many per picture as in Market-1501."""
    n = options.queries + options.gallery
    g = torch.Generator().manual_seed(0)
    pids = torch.randint(max(2, n // 26), (n,), generator=g)
    features, camids = clustered_features(n, options.dim, 0.6, 0.9)
    # So much of the person that some matches rank first and others far down.
    centre, _ = clustered_features(int(pids.max()) + 1, options.dim, 0.6, 0.9, seed=1)
    features = torch.nn.functional.normalize(features + centre[pids])
    q = options.queries
    parts = (features, pids, camids)
    return tuple(
        half for part in parts for half in (part[:q].clone(), part[q:].clone())
    )


def sorted_loops(case: tuple[Tensor, ...]) -> tuple[float, float, np.ndarray, float]:
    """mAP, mINP, CMC, and the CPU seconds of the ranking alone."""
    qf, gf, *rest = case
    q_pid, g_pid, q_cam, g_cam = (t.numpy() for t in rest)
    similarity = (qf @ gf.T).numpy()
    start = time.process_time()
    aps, inps, cmcs = [], [], []
    for q in range(len(similarity)):
        order = np.argsort(-similarity[q])
        kept = ~((g_pid[order] == q_pid[q]) & (g_cam[order] == q_cam[q]))
        hits = (g_pid[order] == q_pid[q])[kept]
        if not hits.any():
            continue
        cumulated = hits.cumsum()
        aps.append((cumulated / np.arange(1, len(hits) + 1) * hits).sum() / hits.sum())
        inps.append(hits.sum() / (np.flatnonzero(hits)[-1] + 1))
        cmcs.append(cumulated[:50] > 0)
    found = float(np.mean(aps)), float(np.mean(inps)), np.mean(cmcs, axis=0)
    return *found, time.process_time() - start


def ours(case: tuple[Tensor, ...]) -> tuple[RetrievalMetrics, float, float]:
    """Metrics, CPU seconds of all and of everything but the product."""
    inside = [0.0]
    score = evaluation._score_block

    def timed(*arguments: object) -> None:
        start = time.process_time()
        score(*arguments)
        inside[0] += time.process_time() - start

    evaluation._score_block = timed
    try:
        start = time.process_time()
        metrics = evaluate_retrieval(*case)
        total = time.process_time() - start
    finally:
        evaluation._score_block = score
    return metrics, total, inside[0]


def compare(options: Options) -> dict[str, Any]:
    case = make_case(options)
    totals, rankings, loops, memory = [], [], [], []
    result: dict[str, Any] = {}
    for _ in range(options.repeats):

        def work() -> None:
            metrics, total, ranking = ours(case)
            totals.append(total)
            rankings.append(ranking)
            result["mAP"], result["mINP"] = metrics.mAP, metrics.mINP
            result["rank-1"] = float(metrics.cmc[0])

        memory.append(peak_memory(work))
        if options.reference:
            m_ap, m_inp, cmc, seconds = sorted_loops(case)
            loops.append(seconds)
            result["difference"] = {
                "mAP": abs(m_ap - result["mAP"]),
                "mINP": abs(m_inp - result["mINP"]),
                "rank-1": abs(float(cmc[0]) - result["rank-1"]),
            }
    result["CPU seconds"] = {
        "with product": statistics.median(totals),
        "ranking": statistics.median(rankings),
    }
    result["peak GiB"] = statistics.median(memory)
    if loops:
        result["CPU seconds"]["sorted loops, ranking"] = statistics.median(loops)
        result["ratio"] = statistics.median(loops) / statistics.median(rankings)
    return result


def main(options: Options) -> None:
    ours(make_case(Options(queries=20, gallery=100, dim=options.dim)))  # compiles
    result = compare(options)
    for name, value in result.items():
        print(f"{name:14}{value}")
    if options.output:
        record = {
            "options": {k: v for k, v in asdict(options).items() if k != "output"},
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__},
            "date": time.strftime("%Y-%m-%d"),
            "comparison": result,
        }
        options.output.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
