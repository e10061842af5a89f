"""One page about a run: a single HTML file that opens anywhere, offline."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from o2cap.config import PRESETS, Config, load
from o2cap.data.images import ImageSet, ReIDDataset
from o2cap.data.loading import decode
from o2cap.errors import InputError
from o2cap.files import replacing
from o2cap.inference import embed
from o2cap.trainer import load_configured
from o2cap.visualization import (
    Figure,
    camera_spread,
    cluster_flow,
    contact_sheet,
    embedding_map,
    fates,
    project,
    ranked_lists,
    training_curves,
)

logger = logging.getLogger("o2cap")

METRICS = {"mAP": "mAP", "rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10"}
MAPPED = 1000  # pictures on the map: more take minutes and only blacken it


def report(
    run: Path, dataset: ReIDDataset | None = None, *, device: str = "auto"
) -> Path:
    """Write ``report.html`` into a run directory: everything about the run.

    Headline metrics, warnings, curves, what became of the clusters, ranked lists good
    and bad, a UMAP map by identity and by camera, seconds per stage, configuration
    and environment. Parts that need the pictures say so when these are not there;
    features of query and gallery are computed anew.

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
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run} is no run directory (it has no config.yaml).")
    config = load(run / "config.yaml")
    history, clusters, environment, summary = _read(run)
    missing, dataset = _same_data(config, environment, dataset)
    warnings = _warnings(config, history, summary) + ([missing] if missing else [])
    body = [
        _headline(run, config, history, environment, summary),
        _notes(warnings),
        _curves(history),
        _clusters(config, clusters, dataset),
        _retrieval(run, config, dataset, summary, clusters, device),
        _timing(history),
        _settings(config),
        _environment(environment),
    ]
    title = escape(f"{environment['dataset']}, {config.method}: an O2CAP run")
    page = _PAGE.replace("TITLE", title, 1).replace("BODY", "\n".join(body), 1)
    path = run / "report.html"
    with replacing(path) as temporary:
        # A file name that is no valid UTF-8 may stand in an error message.
        temporary.write_bytes(page.encode("utf-8", "replace"))
    return path


# ------------------------------------------------------------------------------- reading


def _read(run: Path) -> tuple[list[dict[str, Any]], list[Tensor], dict, dict | None]:
    """Return records, pseudo labels, environment, and the summary if there is one."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        history = [json.loads(line) for line in lines]
        clusters = []
        for record in history:
            name = run / f"pseudo_labels/epoch_{record['epoch']:03d}.npz"
            with np.load(name, allow_pickle=False) as file:
                clusters.append(torch.from_numpy(file["clusters"]))
        environment = json.loads((run / "environment.json").read_text("utf-8"))
        done = run / "summary.json"
        summary = json.loads(done.read_text("utf-8")) if done.is_file() else None
    except FileNotFoundError as error:
        raise InputError(
            f"{run} holds no finished epoch to report (no {error.filename})."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"The run in {run} is damaged ({error}).") from error
    if not history:
        raise InputError(f"{run} holds no finished epoch to report.")
    return history, clusters, environment, summary


def _same_data(
    config: Config, environment: dict[str, Any], dataset: ReIDDataset | None
) -> tuple[str, ReIDDataset | None]:
    """Return the data set of the run, or None and the reason why it is not there."""
    try:
        dataset = dataset or load_configured(config)
        if dataset.fingerprint() == environment["fingerprint"]:
            return "", dataset
        reason = "the data set found is not the one the run was trained on"
    except (InputError, OSError) as error:
        reason = str(error)
    return f"Parts that need the pictures are left out: {reason}", None


def _warnings(
    config: Config, history: list[dict[str, Any]], summary: dict[str, Any] | None
) -> list[str]:
    found = []
    if summary is None:
        found.append(
            f"The run is not finished: {len(history)} of {config.epochs} epochs are "
            "done. The same o2cap train command goes on with it."
        )
    if skipped := [str(r["epoch"]) for r in history if r.get("skipped")]:
        found.append(
            f"No training took place in epoch {', '.join(skipped)}: there were fewer "
            "than two clusters. A larger clustering.eps finds more."
        )
    unseen = [r for r in history if r.get("proxies_visited", 0) < r.get("proxies", 0)]
    if unseen:
        worst = max(unseen, key=lambda r: r["proxies"] - r["proxies_visited"])
        found.append(
            f"In {len(unseen)} of {len(history)} epochs not every proxy was visited "
            f"(epoch {worst['epoch']}: {worst['proxies_visited']} of "
            f"{worst['proxies']}). More iterations would reach them."
        )
    if "mAP" not in history[-1]:
        found.append(
            "There is no mAP: the data have no query and gallery with identities."
            if summary
            else "The last epoch was not evaluated."
        )
    return found


# ------------------------------------------------------------------------------ sections


def _headline(
    run: Path,
    config: Config,
    history: list[dict[str, Any]],
    environment: dict[str, Any],
    summary: dict[str, Any] | None,
) -> str:
    final, before = history[-1], (summary or {}).get("before", {})
    tiles = []
    for key, name in METRICS.items():
        if key in final:
            was = f"before training {before[key]:.1%}" if key in before else ""
            tiles.append((name, f"{final[key]:.1%}", was))
    people = environment["counts"]["train"]["identities"]
    true = f"for {people} identities" if people else "identities unknown"
    tiles.append(("clusters", f"{final['clusters']:,}", true))
    if "ari" in final:
        was = f"in the first epoch {history[0].get('ari', 0):.2f}"
        tiles.append(("ARI of the clusters", f"{final['ari']:.2f}", was))
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{value}</b> <span>{note}</span></dd></div>"
        for name, value, note in tiles
    )
    return (
        f"<header><h1>{escape(environment['dataset'])}, method "
        f"<em>{escape(config.method)}</em></h1>"
        f"<p>Epoch {final['epoch']}, the last of {len(history)}; seed {config.seed}; "
        f"started {escape(environment['started'])}; "
        f"<code>{escape(run.resolve().name)}</code></p>"
        f'<dl class="tiles">{items}</dl></header>'
    )


def _notes(warnings: list[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    return f'<section class="notes"><h2>To know first</h2><ul>{items}</ul></section>'


def _curves(history: list[dict[str, Any]]) -> str:
    first, last = history[0], history[-1]
    names = {"clusters": "clusters", "outliers": "outliers", "loss": "loss"}
    names |= {"cameras_per_cluster": "cameras per cluster", "ari": "ARI", "mAP": "mAP"}
    alt = "Curves over the epochs. First and last epoch: " + "; ".join(
        f"{name} {_short(first.get(key))} and {_short(last.get(key))}"
        for key, name in names.items()
        if key in first or key in last
    )
    return _section("Curves", _figure(training_curves(history), alt, ""))


def _clusters(
    config: Config, clusters: list[Tensor], dataset: ReIDDataset | None
) -> str:
    last = clusters[-1]
    inside = int((last >= 0).sum())
    if not inside:
        return _section("Clusters", "<p>The last epoch has no cluster.</p>")
    stayed = ""
    if len(clusters) > 1:
        share = fates(clusters)[-1] / len(last)
        stayed = f" Since the epoch before, {share[0]:.0%} stayed in their cluster."
    parts = [
        _figure(
            cluster_flow(clusters),
            f"Pictures moving between clusters over {len(clusters)} epochs. In the "
            f"last, {inside} of {len(last)} pictures are in a cluster.{stayed}",
            "Above: what became of all pictures since the epoch before; a cluster is "
            "followed by the pictures it shares with the next epoch's. Below: a line "
            "for each picture of the largest final clusters. White is an outlier, "
            "grey another cluster, which may have been merged or dissolved.",
        )
    ]
    if dataset is not None:
        images = dataset.train
        if config.skip_unreadable:
            _, images = decode(images, 1, 1, skip_unreadable=True)
        parts.append(_spread(clusters, images.camids))
        largest = last[last >= 0].bincount().argsort(descending=True, stable=True)[:6]
        rows = torch.where(torch.isin(last, largest), last, -1)
        parts.append(
            _figure(
                contact_sheet(images, rows, name="cluster"),
                f"Contact sheet of the {len(largest)} largest clusters by camera.",
                "The largest clusters of the last epoch: is each row one identity?",
            )
        )
    return _section("Clusters", *parts)


def _spread(clusters: list[Tensor], camids: Tensor) -> str:
    shown = {"last epoch": clusters[-1]}
    if len(clusters) > 1 and bool((clusters[0] >= 0).any()):
        shown = {"first epoch": clusters[0]} | shown
    counts = {}
    for name, labels in shown.items():
        each = [
            int(camids[labels == c].unique().numel())
            for c in labels[labels >= 0].unique()
        ]
        counts[name] = f"{sum(n == 1 for n in each)} of {len(each)}"
    alt = "Clusters by number of cameras. In one camera only: " + "; ".join(
        f"{name} {count}" for name, count in counts.items()
    )
    return _figure(
        camera_spread(shown, camids),
        alt,
        "Clusters that only one camera sees cannot teach what changes between cameras.",
    )


def _retrieval(
    run: Path,
    config: Config,
    dataset: ReIDDataset | None,
    summary: dict[str, Any] | None,
    clusters: list[Tensor],
    device: str,
) -> str:
    if dataset is None or summary is None:
        return ""

    def features(images: ImageSet) -> tuple[ImageSet, Tensor]:
        found = embed(run, images, device=device, skip_unreadable=config.skip_unreadable)
        return found.images, found.features

    if not len(dataset.query):
        few = torch.linspace(0, len(clusters[-1]) - 1, MAPPED).long().unique()
        images, placed = features(dataset.train)
        images, labels = images.select(few), clusters[-1][few]
        return _section(
            "Map of the training pictures",
            _map(images, placed[few], labels if bool((labels >= 0).any()) else None),
        )
    query, asked = features(dataset.query)
    gallery, searched = features(dataset.gallery)
    assert gallery.pids is not None
    parts = [_ranked(query, gallery, asked, searched)]
    # whole identities, and not those that stand for «nobody in particular» (0)
    some = gallery.pids.argsort(descending=True, stable=True)[:MAPPED]
    parts.append(_map(gallery.select(some), searched[some], None))
    return _section("Search in the gallery", *parts)
