"""Approximate neighbours instead of exact ones: time, recall, and what clusters do.

The features stand for persons on six cameras. They spread over all their columns,
which is the worst case for such indexes, or over a plane of fewer dimensions, as those
of trained networks nearly do. faiss searches them with an inverted file (IVF: look
only into the nearest cells) and with a graph (HNSW: walk to the query), each built
anew, as an epoch has to, and at several widths of search. Against them stands the
package's exact search. What matters is not the recall but what the clustering makes
of it, so the neighbours go on through Jaccard distance and DBSCAN; the adjusted Rand
index (ARI) compares the clusters with those of exact neighbours, and with the
identities. One process, CPU time, medians.

    OMP_NUM_THREADS=1 python -m benchmarks.approximate
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import faiss
import torch
import tyro
from torch import Tensor
from torch.nn.functional import normalize

from o2cap.clustering import dbscan, jaccard_distance
from o2cap.evaluation import clustering_quality
from o2cap.files import replacing
from o2cap.neighbours import nearest_neighbours

K1, K2, EPS, MIN_SAMPLES = 20, 6, 0.5, 4
# Dimensions of the plane that the features lie in, and the size of what a camera and
# a picture add to a person; so chosen that the clusters are neither bad nor perfect.
CASES = ((32, 0.4), (256, 0.9))
PROBES = (1, 4, 16, 64)  # cells of the inverted file that a query looks into
WIDTHS = (24, 64)  # candidates that a walk through the graph keeps
Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Options:
    sizes: tuple[int, ...] = (5_000, 10_000, 20_000, 40_000)
    """Numbers of pictures."""
    dim: int = 256
    """Columns of the features."""
    repeats: int = 3
    """Runs of each search, of which the median counts."""
    output: Path = Path("reproduce/records/approximate.json")
    """Where the numbers go, as JSON."""


def people(
    n: int, dim: int, dimensions: int, spread: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Features [N, D] and identities [N]: 17 pictures each, over six cameras."""
    g = torch.Generator().manual_seed(seed)
    persons, cameras = max(1, round(n / 17.2)), 6
    person = torch.randint(persons, (n,), generator=g)
    camera = torch.randint(cameras, (n,), generator=g)
    view = torch.randn(persons * cameras, dimensions, generator=g)
    together = torch.randn(persons, dimensions, generator=g)[person]
    together += 0.6 * torch.randn(cameras, dimensions, generator=g)[camera]
    together += spread * view[person * cameras + camera]
    together += spread * torch.randn(n, dimensions, generator=g)
    turned = torch.linalg.qr(torch.randn(dim, dimensions, generator=g)).Q
    return normalize(together @ turned.T), person


def inverted_file(features: Tensor, k: int, probes: int) -> tuple[Tensor, Tensor]:
    """Search the `probes` nearest of about 2 √N cells; more where they hold too few."""
    x = features.numpy()
    cells = round(2 * len(x) ** 0.5)
    index = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(x.shape[1]), x.shape[1], cells, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.min_points_per_centroid = 1
    index.train(x)
    index.add(x)
    index.nprobe = probes
    similarity, found = map(torch.from_numpy, index.search(x, k))
    while (short := (found < 0).any(1)).any():
        index.nprobe *= 2
        more = index.search(x[short.numpy()], k)
        similarity[short], found[short] = map(torch.from_numpy, more)
    return _itself_first(similarity, found)


def graph(features: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """Walk through a hierarchical small-world graph with 16 links a picture."""
    x = features.numpy()
    index = faiss.IndexHNSWFlat(x.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    index.add(x)
    index.hnsw.efSearch = width
    return _itself_first(*map(torch.from_numpy, index.search(x, k)))


def _itself_first(similarity: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's own number to the front, in place of the last if not found."""
    own = torch.arange(len(index))[:, None]
    itself = index == own
    itself[~itself.any(1), -1] = True
    shape = (len(index), index.shape[1] - 1)
    return (
        torch.cat([torch.ones(len(index), 1), similarity[~itself].view(shape)], 1),
        torch.cat([own, index[~itself].view(shape)], 1),
    )


def searches() -> dict[str, Search]:
    """Return each search by its name."""
    found: dict[str, Search] = {"exact": nearest_neighbours}
    for probes in PROBES:
        found[f"IVF, {probes} of the cells"] = partial(inverted_file, probes=probes)
    for width in WIDTHS:
        found[f"HNSW, width {width}"] = partial(graph, width=width)
    return found


def measure(
    n: int, dim: int, dimensions: int, spread: float, repeats: int
) -> list[dict[str, Any]]:
    """Return a row for each search: CPU seconds, recall, clusters, their ARI.

    As everywhere in this project, the index leaves out what is an outlier.
    """
    features, pids = people(n, dim, dimensions, spread)
    rows: list[dict[str, Any]] = []
    exact: Tensor | None = None
    exact_clusters: Tensor | None = None
    for name, search in searches().items():
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            found = search(features, K1)
            seconds.append(time.process_time() - start)
        distance = jaccard_distance(features, K1, K2, neighbours=found)
        clusters = dbscan(distance, EPS, MIN_SAMPLES)
        if exact is None or exact_clusters is None:
            exact, exact_clusters = found[1], clusters
        hit = (found[1][:, 1:, None] == exact[:, None, 1:]).any(2)
        rows.append(
            {
                "n": n,
                "dimensions": dimensions,
                "search": name,
                "seconds": statistics.median(seconds),
                "recall": float(hit.float().mean()),
                "clusters": int(clusters.max()) + 1,
                "outlier_share": float((clusters < 0).float().mean()),
                "ari_exact": clustering_quality(clusters, exact_clusters).ari,
                "ari_identities": clustering_quality(clusters, pids).ari,
            }
        )
    return rows


def main(options: Options) -> None:
    """Measure, print, and write."""
    measure(500, options.dim, *CASES[0], 1)  # compiles
    rows = []
    for (dimensions, spread), n in product(CASES, options.sizes):
        for row in measure(n, options.dim, dimensions, spread, options.repeats):
            rows.append(row)
            print(
                "{dimensions:4} dimensions {n:7} {search:22}{seconds:8.2f} s  recall "
                "{recall:.3f}  ARI to exact {ari_exact:.3f}, to identities "
                "{ari_identities:.3f}, outliers {outlier_share:.3f}".format(**row),
                flush=True,
            )
    record = {
        "what": "Approximate against exact neighbour search, and the clusters of both "
        "(benchmarks/approximate.py); CPU seconds of one thread, building included.",
        "options": {k: v for k, v in asdict(options).items() if k != "output"},
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "faiss": faiss.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    with replacing(options.output) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
