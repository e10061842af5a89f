"""One page about a run: a single HTML file that opens anywhere, offline."""

from __future__ import annotations

import base64
import io
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import torch
from PIL.Image import Image
from torch import Tensor

from o2cap.config import PRESETS, Config
from o2cap.data import load_configured
from o2cap.data.images import ImageSet, ReIDDataset
from o2cap.errors import InputError
from o2cap.evaluation import evaluate_retrieval
from o2cap.files import replacing
from o2cap.inference import embed
from o2cap.proxies import split_by_camera
from o2cap.run import RunResult, read_run
from o2cap_book.figures import (
    Figure,
    camera_spread,
    cluster_flow,
    embedding_map,
    fates,
    project,
    training_curves,
)
from o2cap_book.sheets import best_matches, contact_sheet, ranked_lists

METRICS = {"mAP": "mAP", "rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10"}
MAPPED = 1000  # pictures on the map: more take minutes and only blacken it


@dataclass(frozen=True)
class Picture:
    """A figure of the page: PNG, what it shows in words, and what to see in it."""

    image: Figure | Image
    alt: str
    caption: str = ""

    @property
    def data(self) -> str:
        """The PNG file, in base64."""
        if isinstance(self.image, Figure):
            return base64.b64encode(self.image.png()).decode()
        self.image.save(content := io.BytesIO(), "PNG")
        return base64.b64encode(content.getvalue()).decode()

    @property
    def width(self) -> float:
        """In pixels of the page; a sheet is twice as fine."""
        if isinstance(self.image, Figure):
            return 96 * self.image.get_size_inches()[0]
        return self.image.width / 2


def report(
    run: Path, dataset: ReIDDataset | None = None, *, device: str = "auto"
) -> Path:
    """Write ``report.html`` into a run directory: everything about the run.

    Headline metrics, warnings, curves, what became of the clusters, ranked lists good
    and bad, a map by identity and by camera, seconds per stage, configuration and
    environment. Parts that need the pictures say so when these are not there; features
    of query and gallery are computed anew.

    Parameters
    ----------
    run : Path
        A run directory; the run may still be going on.
    dataset : ReIDDataset, optional
        The run's pictures, if not those that its settings name.
    device : str
        Where features are computed, as the setting of the same name.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    InputError
        When the directory is no run, or holds no finished epoch, or is damaged.
    """
    found = read_run(run, finished=False)
    if not found.history:
        raise InputError(f"{run} holds no finished epoch to report.")
    try:
        clusters = [found.clusters(epoch) for epoch in range(len(found.history))]
    except Exception as error:  # numpy raises many kinds on damaged files
        raise InputError(f"The run in {run} is damaged ({error}).") from error
    data, missing = _same_data(found, dataset)
    has_clusters = bool((clusters[-1] >= 0).any())
    finished = (run / "summary.json").is_file()
    loader = jinja2.PackageLoader("o2cap_book", "")
    pages = jinja2.Environment(autoescape=True, trim_blocks=True, loader=loader)
    facts = _flat(found.environment)
    page = pages.get_template("report.html.j2").render(
        run=found,
        name=run.resolve().name,
        finished=finished,
        metrics=METRICS,
        unseen=sorted((r for r in found.history if _missed(r) > 0), key=_missed),
        missing=missing,
        curves=_curves(found.history),
        clusters=_clusters(found.config, clusters, data) if has_clusters else [],
        searched=bool(data and len(data.query)),
        search=_search(found, data, clusters[-1], device) if data and finished else [],
        seconds=sum((Counter(r["seconds"]) for r in found.history), Counter()),
        settings=_settings(found.config),
        environment={k: v for k, v in facts.items() if not k.startswith("counts.")},
    )
    path = run / "report.html"
    with replacing(path) as temporary:
        # A file name that is no valid UTF-8 may stand in an error message.
        temporary.write_bytes(page.encode("utf-8", "replace"))
    return path


def _same_data(
    run: RunResult, dataset: ReIDDataset | None
) -> tuple[ReIDDataset | None, str]:
    """Return the pictures of the run, or None and the reason why they are not there."""
    try:
        dataset = dataset or load_configured(run.config)
        if dataset.fingerprint() != run.environment["fingerprint"]:
            raise InputError("the data set found is not the one the run was trained on")
    except (InputError, OSError) as error:
        return None, str(error)
    listed = run.directory / "unreadable.txt"
    text = listed.read_text("utf-8", "surrogateescape") if listed.is_file() else ""
    lost = set(text.splitlines())
    kept = torch.tensor([str(path) not in lost for path in dataset.train.paths])
    return replace(dataset, train=dataset.train.select(kept)), ""


def _missed(record: dict[str, Any]) -> int:
    """Return how many proxies an epoch did not visit; one without training, none."""
    return record.get("proxies", 0) - record.get("proxies_visited", 0)


def _curves(history: list[dict[str, Any]]) -> Picture:
    first, last = history[0], history[-1]
    names = {"clusters": "clusters", "outliers": "outliers", "loss": "loss"}
    names |= {"cameras_per_cluster": "cameras per cluster", "ari": "ARI", "mAP": "mAP"}
    ends = [
        f"{name} {' and '.join(_short(record.get(key)) for record in (first, last))}"
        for key, name in names.items()
        if key in first or key in last
    ]
    alt = f"Curves over the epochs. First and last epoch: {'; '.join(ends)}"
    return Picture(training_curves(history), alt)


def _short(value: float | None) -> str:
    if value is None:
        return "not measured"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _clusters(
    config: Config, clusters: list[Tensor], dataset: ReIDDataset | None
) -> list[Picture]:
    last = clusters[-1]
    inside = int((last >= 0).sum())
    stayed = ""
    if len(clusters) > 1:
        share = fates(clusters)[-1][0] / len(last)
        stayed = f" Since the epoch before, {share:.0%} stayed in their cluster."
    flow = Picture(
        cluster_flow(clusters),
        f"Pictures moving between clusters over {len(clusters)} epochs. In the "
        f"last, {inside} of {len(last)} pictures are in a cluster.{stayed}",
        "Above: what became of all pictures since the epoch before; a cluster is "
        "followed by the pictures it shares with the next epoch's. Below: a line "
        "for each picture of the largest final clusters. White is an outlier, "
        "grey another cluster, which may have been merged or dissolved.",
    )
    if dataset is None:
        return [flow]
    shown = {"last epoch": last}
    if len(clusters) > 1 and bool((clusters[0] >= 0).any()):
        shown = {"first epoch": clusters[0]} | shown
    single = []
    for name, labels in shown.items():
        cameras = split_by_camera(labels, dataset.train.camids).cluster.bincount()
        single.append(f"{name} {int((cameras == 1).sum())} of {len(cameras)}")
    spread = Picture(
        camera_spread(shown, dataset.train.camids),
        f"Clusters by number of cameras. In one camera only: {'; '.join(single)}",
        "Clusters that only one camera sees cannot teach what changes between cameras.",
    )
    largest = last[last >= 0].bincount().argsort(descending=True, stable=True)[:6]
    rows = torch.where(torch.isin(last, largest), last, -1)
    sheet = Picture(
        contact_sheet(dataset.train, rows, name="cluster"),
        f"Contact sheet of the {len(largest)} largest clusters by camera.",
        "The largest clusters of the last epoch: is each row one identity?",
    )
    return [flow, spread, sheet]


def _search(
    run: RunResult, dataset: ReIDDataset, clusters: Tensor, device: str
) -> list[Picture]:
    """Return ranked lists and a map of the gallery; else a map of the clusters."""

    def features(images: ImageSet) -> tuple[ImageSet, Tensor]:
        found = embed(
            run.directory,
            images,
            device=device,
            skip_unreadable=run.config.skip_unreadable,
        )
        return found.images, found.features

    if not len(dataset.query):
        few = torch.linspace(0, len(clusters) - 1, MAPPED).long().unique()
        images, placed = features(dataset.train.select(few))
        labels = clusters[few] if bool((clusters[few] >= 0).any()) else None
        return _map(images, placed, labels)
    query, asked = features(dataset.query)
    gallery, searched = features(dataset.gallery)
    assert query.pids is not None and gallery.pids is not None
    identities, cameras = (query.pids, gallery.pids), (query.camids, gallery.camids)
    metrics = evaluate_retrieval(asked, searched, *identities, *cameras)
    precision = torch.as_tensor(metrics.average_precision)
    order = precision.argsort()[: int(precision.isfinite().sum())]  # NaN is last
    found = []
    for name, chosen in (("best", order[-3:].flip(0)), ("worst", order[:3])):
        scores = [f"AP {p:.0%}" for p in precision[chosen].tolist()]
        pair = query.select(chosen), gallery
        matches = best_matches(*pair, asked[chosen] @ searched.T)
        lists = ranked_lists(*pair, *matches, notes=scores)
        alt = f"Ranked lists of the {name} queries, {', '.join(scores)}."
        caption = (
            f"The {name} of {len(order)} queries by average precision (AP). Pictures "
            "of the query's own identity and camera are left out, as the metrics do."
        )
        found.append(Picture(lists, alt, caption))
    # whole identities, and not those that stand for «nobody in particular» (0)
    some = gallery.pids.argsort(descending=True, stable=True)[:MAPPED]
    return found + _map(gallery.select(some), searched[some], None)


def _map(images: ImageSet, features: Tensor, clusters: Tensor | None) -> list[Picture]:
    if len(images) < 8:  # too few for a map
        return []
    name = "identity" if clusters is None else "cluster"
    placed = project(features, "tsne")  # UMAP compiles longer than this takes
    alt = f"Map of {len(images)} pictures by {name} and by camera, trustworthiness"
    caption = (
        f"One point is one picture. Good: each {name} in one place (left), cameras "
        "mixed (right). Distances between far groups mean nothing."
    )
    image = embedding_map(placed, images, clusters, name=name)
    return [Picture(image, f"{alt} {placed.trustworthiness:.2f}.", caption)]


def _settings(config: Config) -> list[tuple[str, Any, str]]:
    """Return each setting: name, value, and that of the preset where it differs."""
    here = _flat(config.to_dict())
    usual = PRESETS.get(config.preset)
    before = here | (_flat(usual.to_dict()) if usual else {})
    return [
        (name, value, "" if before[name] == value else str(before[name]))
        for name, value in here.items()
    ]


def _flat(plain: dict[str, Any]) -> dict[str, Any]:
    """Return nested entries under their path, ``clustering.k1``."""
    return pd.json_normalize(plain).to_dict("records")[0]
