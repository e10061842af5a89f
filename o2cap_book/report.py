"""One page about a run: a single HTML file that opens anywhere, offline."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from o2cap.config import PRESETS, Config, load
from o2cap.data import load_configured
from o2cap.data.images import ImageSet, ReIDDataset
from o2cap.data.loading import decode
from o2cap.errors import InputError
from o2cap.evaluation import evaluate_retrieval
from o2cap.files import replacing, usable
from o2cap.inference import UNREADABLE, embed
from o2cap.sheets import contact_sheet, ranked_lists
from o2cap_book.figures import (
    Figure,
    camera_spread,
    cluster_flow,
    embedding_map,
    fates,
    project,
    training_curves,
)

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
    with usable(run):
        is_run = (run / "config.yaml").is_file()
    if not is_run:
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
    page = Template(_PAGE).substitute(title=title, body="\n".join(body))
    path = run / "report.html"
    with replacing(path) as temporary:
        # A file name that is no valid UTF-8 may stand in an error message.
        temporary.write_bytes(page.encode("utf-8", "replace"))
    return path


# ------------------------------------------------------------------------------ reading


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
        for needed in ("dataset", "started", "fingerprint", "counts"):
            environment[needed]
        done = run / "summary.json"
        summary = json.loads(done.read_text("utf-8")) if done.is_file() else None
    except FileNotFoundError as error:
        raise InputError(
            f"{run} holds no finished epoch to report (no {error.filename})."
        ) from error
    except UNREADABLE as error:
        raise InputError(f"The run in {run} is damaged ({error}).") from error
    if not history:
        raise InputError(f"{run} holds no finished epoch to report.")
    return history, clusters, environment, summary


def _same_data(
    config: Config, environment: dict[str, Any], dataset: ReIDDataset | None
) -> tuple[str, ReIDDataset | None]:
    """Return the pictures of the run, or None and the reason why they are not there.

    They are those of the data set that could be read, where others were to be left out.
    """
    try:
        dataset = dataset or load_configured(config)
        known = environment["fingerprint"]
        if dataset.fingerprint() == known and config.skip_unreadable:
            readable = (
                decode(images, 1, 1, skip_unreadable=True)[1] if len(images) else images
                for images in dataset.splits().values()
            )
            dataset = ReIDDataset(dataset.name, *readable)
            # (A run of an older version does not say.)
            same = {"kept": dataset.fingerprint()}
            known = environment.get("unreadable", same)["kept"] or known
        if dataset.fingerprint() == known:
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


# ----------------------------------------------------------------------------- sections


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
    if math.isfinite(final.get("ari", math.nan)):
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
        found = embed(
            run, images, device=device, skip_unreadable=config.skip_unreadable
        )
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
    return _section("Search in the gallery, and its map", *parts)


def _ranked(query: ImageSet, gallery: ImageSet, asked: Tensor, searched: Tensor) -> str:
    """Return the ranked lists of the three best and the three worst queries."""
    assert query.pids is not None and gallery.pids is not None
    examined = torch.linspace(0, len(query) - 1, 200).long().unique()
    precision = {}
    for i in examined.tolist():
        one = slice(i, i + 1)
        with contextlib.suppress(InputError):  # a query without a match
            precision[i] = evaluate_retrieval(
                asked[one],
                searched,
                query.pids[one],
                gallery.pids,
                query.camids[one],
                gallery.camids,
            ).mAP
    order = sorted(precision, key=lambda i: precision[i])
    text = f"of {len(order)} queries"
    if len(examined) < len(query):
        text += f" (evenly chosen from {len(query):,})"
    parts = []
    for name, chosen in (("best", order[-3:][::-1]), ("worst", order[:3])):
        scores = [f"AP {precision[i]:.0%}" for i in chosen]
        index = torch.tensor(chosen)
        lists = ranked_lists(
            query.select(index), gallery, asked[index] @ searched.T, notes=scores
        )
        parts.append(
            _figure(
                lists,
                f"Ranked lists of the {name} queries, {', '.join(scores)}.",
                f"The {name} {text} by average precision (AP). Pictures of the "
                "query's own identity and camera are left out, as the metrics do.",
            )
        )
    return "".join(parts)


def _map(images: ImageSet, features: Tensor, clusters: Tensor | None) -> str:
    if len(images) < 8:
        return "<p>There are too few pictures for a map.</p>"
    name = "identity" if clusters is None else "cluster"
    placed = project(features)
    return _figure(
        embedding_map(placed, images, clusters, name=name),
        f"UMAP map of {len(images)} pictures by {name} and by camera, trustworthiness "
        f"{placed.trustworthiness:.2f}.",
        f"One point is one picture. Good: each {name} in one place (left), cameras "
        "mixed (right). Distances between far groups mean nothing.",
    )


def _timing(history: list[dict[str, Any]]) -> str:
    stages: dict[str, float] = {}
    for record in history:
        for stage, seconds in record["seconds"].items():
            stages[stage] = stages.get(stage, 0) + seconds
    total = sum(stages.values()) or 1
    rows = [
        (
            escape(stage),
            f"{seconds:,.1f}",
            f"{seconds / len(history):,.2f}",
            f'<span class="bar" style="width:{8 * seconds / total:.2f}em"></span> '
            f"{seconds / total:.0%}",
        )
        for stage, seconds in stages.items()
    ]
    header = ("stage", "seconds", "seconds per epoch", "share")
    return _section("Time", _table(header, rows, "Seconds per stage of the epochs"))


def _settings(config: Config) -> str:
    usual = PRESETS.get(config.preset)
    before = _flat(usual.to_dict()) if usual else {}
    here = _flat(config.to_dict())
    rows = [
        (
            escape(name),
            escape(str(value)),
            "" if before.get(name, value) == value else escape(str(before[name])),
        )
        for name, value in here.items()
    ]
    header = ("setting", "value", f"in the preset {config.preset}, if it differs")
    changed = [row for row in rows if row[2]]
    table = _table(header, rows, "All settings")
    return _section(
        "Configuration",
        _table(header, changed, "Settings changed") if changed else "",
        f"<details><summary>All settings</summary>{table}</details>",
    )


def _environment(environment: dict[str, Any]) -> str:
    counts = environment["counts"]
    columns = ("images", "identities", "cameras")
    data = [(escape(k), *(f"{counts[k][c]:,}" for c in columns)) for k in counts]
    facts = _flat({k: v for k, v in environment.items() if k != "counts"})
    rows = [(escape(k), escape(str(v))) for k, v in facts.items()]
    return _section(
        "Data and environment",
        _table(("part", *columns), data, "Data (0 identities: unknown)"),
        _table(("fact", "value"), rows, "Environment"),
    )


# --------------------------------------------------------------------------------- HTML


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _figure(figure: Figure | Image, alt: str, caption: str) -> str:
    data = base64.b64encode(figure._repr_png_() or b"").decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    if isinstance(figure, Image):
        width = figure.width / 2  # sharp on a fine screen, too
    else:
        width = figure.get_size_inches()[0] * 96
    return (
        f'<figure><div class="wide" tabindex="0"><img alt="{escape(alt)}" '
        f'src="data:image/png;base64,{data}" width="{width:.0f}"></div>{below}</figure>'
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """Return a table; `header` and `caption` are text, cells are HTML."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(f"<td>{cell}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in plain.items():
        deeper = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{name}.") if deeper else {prefix + name: value}
    return found


def _short(value: float | None) -> str:
    if value is None:
        return "not measured"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --text: #1b1f24; --soft: #57606a; --back: #fff; --card: #f3f5f7;
  --line: #d0d7de; --accent: #0072b2; --note: #d55e00 }
@media (prefers-color-scheme: dark) { :root { --text: #e8ebee; --soft: #a7b0ba;
  --back: #14171a; --card: #1f2429; --line: #3b434b; --accent: #56b4e9;
  --note: #e69f00 } }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--back);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 }
h1 em { font-style: normal; color: var(--accent) }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem }
header p, figcaption, caption, dd span { color: var(--soft) }
.tiles { display: grid; gap: .6rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)) }
.tiles div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem }
dt { font-size: .9rem } dd { margin: 0 } dd b { font-size: 1.6rem; display: block }
dd span { font-size: .85rem }
.notes { border-left: .3rem solid var(--note); padding-left: 1rem; margin-top: 1.5rem }
.notes h2 { margin-top: 0 } .notes ul { padding-left: 1.1rem }
figure { margin: 1rem 0 2rem }
img { max-width: 100%; height: auto; background: #fff; border-radius: .5rem }
@media (max-width: 36rem) { img { max-width: none; width: 36rem } }
figcaption { max-width: 45rem; font-size: .95rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-size: .95rem }
caption { text-align: left; padding-bottom: .3rem }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line) }
tbody th { font-weight: normal; white-space: nowrap }
.bar { display: inline-block; height: .7em; background: var(--accent) }
summary { cursor: pointer }
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
"""
