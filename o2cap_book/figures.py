"""Pictures of data, of pseudo labels and of what was learnt, as matplotlib figures.

Colours are Okabe and Ito's, told apart by colour-blind readers too, and nothing is
said by colour alone: lines and points also differ in their markers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib import figure
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from o2cap.data.images import ImageSet
from o2cap.proxies import split_by_camera
from o2cap_book.sheets import thumbnails

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY, YELLOW = "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, YELLOW)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # 8 and 7: 56 different pairs
GREY, PALE = "#8C8C8C", "#D9D9D9"
GREYS = ("#757575", "#9E9E9E", "#C4C4C4")
HATCHES = ("", "//", "..", "xx", "\\\\", "--")

METHODS = (  # as tables and figures order them, each with a look of its own
    *("baseline", "intra", "offline", "online", "both"),
    *("both+gem", "both+ibn", "both+ibn+gem", "supervised"),
)


class Metric(NamedTuple):
    """How tables and figures show what was measured."""

    label: str
    factor: float  # from the record's unit to that of the label
    digits: int


METRICS = {  # by their names in a record
    "mAP": Metric("mAP (%)", 100, 1),
    "rank1": Metric("rank-1 (%)", 100, 1),
    "rank5": Metric("rank-5 (%)", 100, 1),
    "rank10": Metric("rank-10 (%)", 100, 1),
    "mINP": Metric("mINP (%)", 100, 1),
    "ari": Metric("ARI (0 to 1)", 1, 2),
    "clusters": Metric("clusters (number)", 1, 0),
    "outliers": Metric("outliers (pictures)", 1, 0),
    "cameras_per_cluster": Metric("cameras per cluster", 1, 2),
}

STYLE: dict[Any, Any] = {
    "axes.formatter.useoffset": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "figure.constrained_layout.hspace": 0.06,
    "figure.facecolor": "white",
    "font.size": 12,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.markersize": 5,
    "text.parse_math": False,  # a name with a dollar sign is no formula
}

History = Sequence[Mapping[str, Any]]
Array = np.ndarray


class Figure(figure.Figure):
    """A matplotlib figure that notebooks show with no magic command before."""

    def _repr_png_(self) -> bytes:
        return self.png()

    def png(self, dpi: int = 110) -> bytes:
        """Return the figure as a PNG file's content, `dpi` pixels per inch."""
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.savefig(buffer, format="png", dpi=dpi)
        return buffer.getvalue()


def look(name: str, place: int = 0) -> dict[str, Any]:
    """Return colour and marker of a method, the same in every figure.

    What is no method takes the look of its `place` among others, and the weights
    before training are grey.
    """
    if name == "before training":
        return {"color": GREY, "marker": "x"}
    i = METHODS.index(name) if name in METHODS else place
    return {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}


def panels(
    number: int, *, columns: int, size: tuple[float, float], sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure with `number` panels, `size` in inches each."""
    columns = min(columns, number)
    lines = -(-number // columns)
    width, height = size
    fig = Figure(figsize=(width * columns, height * lines + 0.3), layout="constrained")
    axes = fig.subplots(lines, columns, squeeze=False, sharey=sharey).flatten()
    for ax in axes[number:]:
        ax.remove()
    return fig, list(axes[:number])


def legend(fig: Figure, names: Iterable[str]) -> None:
    """Name the looks below the panels."""
    lines = [Line2D([], [], label=n, **look(n, i)) for i, n in enumerate(names)]
    fig.legend(handles=lines, loc="outside lower center", ncols=min(5, len(lines)))


def stack(
    bar: Callable[..., Any], parts: pd.DataFrame, colours: Sequence[str] = PALETTE
) -> None:
    """Draw columns by `bar` (an axes' ``bar`` or ``barh``), each upon those before.

    They differ in colour and hatch.
    """
    base = np.zeros(len(parts))
    for i, (label, size) in enumerate(parts.items()):
        style = {"color": colours[i % len(colours)], "hatch": HATCHES[i % len(HATCHES)]}
        bar(parts.index, size, 0.8, base, ec="white", label=label, **style)
        base = base + size


# --------------------------------------------------------------------------------- maps


@dataclass(frozen=True)
class Projection:
    """Features laid out in the plane.

    Parameters
    ----------
    coordinates : float32 ndarray [N, 2]
        Without unit; only who is near whom means something.
    method : str
        ``"pca"``, ``"tsne"`` or ``"umap"``.
    trustworthiness : float
        Of the ten nearest neighbours in the plane, how many are near in truth too:
        1 for a faithful map, about 0.5 for a random one.

    Book: :eq:`trustworthiness`
    """

    coordinates: np.ndarray
    method: str
    trustworthiness: float


def project(
    features: Tensor, method: Literal["umap", "tsne", "pca"] = "umap", seed: int = 0
) -> Projection:
    """Lay features out in the plane by UMAP or t-SNE, on cosine distance, or by PCA.

    Parameters
    ----------
    features : FloatTensor [N, D]
        N of 8 at least.
    method : str
        UMAP and t-SNE are maps of neighbourhoods: distances between far groups mean
        nothing. PCA, the two directions of largest variance, is linear and invents
        no groups, but hides most of what the features hold.
    seed : int
        Of the random numbers (PCA takes none). Coordinates still differ between
        machines.

    Raises
    ------
    ValueError
        When there are fewer than 8 features.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE, trustworthiness

    x = features.float().cpu().numpy()
    n = len(x)
    if n < 8:
        raise ValueError(f"a map needs 8 pictures at least, not {n}")
    how: dict[str, Any] = {"metric": "cosine", "random_state": seed}
    if method == "umap":
        from umap import UMAP  # seconds to import

        how["init"] = "spectral" if n > 50 else "random"
        maker = UMAP(n_neighbors=min(15, n - 1), n_jobs=1, **how)
    elif method == "tsne":
        maker = TSNE(perplexity=min(30, (n - 1) / 3), **how)
    else:
        maker = PCA(n_components=2, svd_solver="full")
    placed = maker.fit_transform(x).astype(np.float32)
    near = min(10, (n - 1) // 2)
    trust = trustworthiness(x, placed, n_neighbors=near, metric="cosine")
    return Projection(placed, method, float(trust))


@mpl.rc_context(STYLE)
def embedding_map(
    projection: Projection,
    images: ImageSet,
    labels: Tensor | None = None,
    *,
    limit: int = 8,
    name: str = "identity",
) -> Figure:
    """Draw a map twice: marked by identity and marked by camera.

    On a good map one identity's pictures lie together on the left, and cameras are
    mixed on the right. One point is one picture.

    Parameters
    ----------
    projection : Projection
        Of the N pictures' features.
    images : ImageSet
        The N pictures.
    labels : LongTensor [N], optional
        What the left map marks, such as clusters. By default the identity; with
        neither, only the right map is drawn.
    limit : int
        Labels to mark: those seen by most cameras, then those with most pictures.
        All others are grey.
    name : str
        What a label is, for the title.
    """
    labels = images.pids if labels is None else labels
    marks = {}
    if labels is not None:
        marks[name] = labels, most_seen(labels, images.camids, limit), 30
    marks["camera"] = images.camids, images.camids.unique().tolist(), 18
    kind = {"umap": "UMAP", "tsne": "t-SNE", "pca": "PCA"}[projection.method]
    place, trust = projection.coordinates, projection.trustworthiness
    fig, axes = panels(len(marks), columns=2, size=(5.2, 5.3))
    for ax, (what, (of, marked, size)) in zip(axes, marks.items(), strict=True):
        x, y = place.T
        rest = ~np.isin(of, marked)
        ax.scatter(x[rest], y[rest], 8, PALE, label="other" if rest.any() else None)
        for i, value in enumerate(marked):
            mine, label = (of == value).numpy(), str(value) if value >= 0 else "unknown"
            style = look(label, i) | {"ec": "black", "lw": 0.3, "label": label}
            ax.scatter(x[mine], y[mine], size, **style)
        ax.set(xlabel=f"{kind} 1 (no unit)", ylabel=f"{kind} 2 (no unit)")
        ax.set(xticks=[], yticks=[], title=f"by {what}")
        tight = {"ncols": 5, "columnspacing": 0.8, "handletextpad": 0.1}
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), **tight)
    fig.suptitle(f"{len(place):,} pictures; trustworthiness {trust:.2f}", fontsize=12)
    return fig


def most_seen(labels: Tensor, camids: Tensor, limit: int) -> list[int]:
    """Return the labels seen by most cameras, then with most pictures; sorted.

    The chapters take their example person so.

    Parameters
    ----------
    labels, camids : LongTensor [N]
        Identity or cluster of each picture, below 0 if unknown; and its camera.
    limit : int
        How many labels to return at most.
    """
    pictures = pd.DataFrame({"label": labels.numpy(), "camera": camids.numpy()})
    known = pictures[pictures["label"] >= 0].groupby("label")["camera"]
    seen = known.agg(["nunique", "size"])
    order = seen.sort_values(["nunique", "size"], ascending=False, kind="stable")
    return sorted(order.index[:limit])


# ------------------------------------------------------------------------------- curves

CURVES = (  # of a run's epochs
    *("clusters", "outliers", "cameras_per_cluster", "ari", "nmi"),
    *("loss", "mAP", "rank1"),
)


def curves(
    values: pd.DataFrame,
    size: tuple[float, float] = (2.75, 2.6),
    ends: Sequence[pd.DataFrame] = (),
) -> Figure:
    """Draw columns over the epochs, each in a panel, with a line for each run.

    Parameters
    ----------
    values : DataFrame
        By run and epoch.
    size : tuple of float
        Of a panel, in inches.
    ends : sequence of DataFrame
        Two of the same shape: where the bands around the lines begin and end.
    """
    runs = values.index.unique(level=0)
    fig, axes = panels(len(values.columns), columns=4, size=size)
    for ax, (title, column) in zip(axes, values.items(), strict=True):
        for i, run in enumerate(runs):
            line, style = column[run].dropna(), look(run, i)
            ax.plot(line, markevery=1 + len(line) // 30, **style)
            if ends:
                band = [end[title][run][line.index] for end in ends]
                ax.fill_between(
                    line.index, *band, color=style["color"], alpha=0.2, lw=0
                )
        low, high = ax.dataLim.intervaly
        ax.set_ylim(min(1.1 * low, 0), 1.1 * high if high > 0 else 1)
        ax.set(title=title, xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    if len(runs) > 1:
        legend(fig, runs)
    return fig


@mpl.rc_context(STYLE)
def training_curves(runs: Mapping[str, History] | History) -> Figure:
    """Draw what each epoch recorded, in small panels.

    The picture shows, over the epochs, the clusters and the outliers, the cameras in
    a cluster, the agreement with the identities (ARI, NMI), the loss, mAP and rank-1;
    panels of which nothing was recorded are left out. Several runs share the panels.
    Their losses are sums of different terms, so each is divided by its first value.

    Parameters
    ----------
    runs : sequence of dict, or mapping of such by name
        Records of the epochs, as in ``metrics.jsonl``.
    """
    named = runs if isinstance(runs, Mapping) else {"": runs}
    tables = [pd.DataFrame(history).set_index("epoch") for history in named.values()]
    found = pd.concat(tables, keys=named)
    loss = "loss (no unit)"
    if len(named) > 1 and "loss" in found:
        loss = "loss / its first value"
        found["loss"] /= found["loss"].groupby(level=0).transform("first")
    metrics = METRICS | {
        "nmi": Metric("NMI (0 to 1)", 1, 2),
        "loss": Metric(loss, 1, 2),
    }
    shown = {metrics[m]: found[m] for m in CURVES if m in found}
    values = pd.DataFrame({m.label: m.factor * v for m, v in shown.items()})
    return curves(values.dropna(axis=1, how="all"))


# ----------------------------------------------------------------------------- clusters


@mpl.rc_context(STYLE)
def camera_spread(clusters: Mapping[str, Tensor], camids: Tensor) -> Figure:
    """Count clusters by the number of cameras that see them.

    The picture has, for each number of cameras, one bar per named clustering (such as
    the first and the last epoch's). Clusters in one camera only teach nothing about
    the gap between cameras.

    Parameters
    ----------
    clusters : mapping of str to LongTensor [N]
        Pseudo labels by name, −1 for outliers.
    camids : LongTensor [N]
        The camera of each picture.
    """
    fig, (ax,) = panels(1, columns=1, size=(7, 2.9))
    width = 0.8 / len(clusters)
    for i, (name, labels) in enumerate(clusters.items()):
        cameras = split_by_camera(labels, camids).cluster.bincount()  # of each cluster
        number = cameras.bincount(minlength=2)[1:].numpy()
        x = np.arange(len(number)) + 1 + (i - (len(clusters) - 1) / 2) * width
        style: Any = {"color": PALETTE[i], "hatch": HATCHES[i], "ec": "white"}
        ax.bar_label(ax.bar(x, number, width, label=name, **style), fontsize=10)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set(xlabel="cameras in the cluster", ylabel="clusters (number)")
    ax.legend()
    return fig


def follow_clusters(epochs: Sequence[Tensor]) -> list[np.ndarray]:
    """Give the clusters of all epochs names that last: int64 [N] an epoch, −1 outlier.

    A cluster bears the name of the next epoch's cluster with which it shares pictures,
    where one-to-one pairs are chosen to share most pictures in all. The last epoch's
    names are its own labels; clusters with no successor get names above those.

    Parameters
    ----------
    epochs : sequence of LongTensor [N]
        Pseudo labels of each epoch, −1 for outliers.
    """
    named = [epochs[-1].numpy()]
    fresh = int(named[0].max(initial=-1)) + 1
    for labels in (e.numpy() for e in reversed(epochs[:-1])):
        after = named[-1]
        shared = np.zeros((labels.max(initial=-1) + 1, fresh), dtype=np.int64)
        both = (labels >= 0) & (after >= 0)
        np.add.at(shared, (labels[both], after[both]), 1)
        name = np.full(len(shared), -1)
        mine, theirs = linear_sum_assignment(shared, maximize=True)
        kept = shared[mine, theirs] > 0
        name[mine[kept]] = theirs[kept]
        alone = name < 0
        name[alone] = fresh + np.arange(alone.sum())
        fresh += int(alone.sum())
        named.append(np.where(labels >= 0, name[labels] if len(name) else -1, -1))
    return named[::-1]


FATES = (
    "stays in its cluster",
    "changes cluster",
    "outlier joins a cluster",
    "becomes an outlier",
    "stays an outlier",
)


def fates(epochs: Sequence[Tensor]) -> np.ndarray:
    """Count what becomes of the pictures from each epoch to the next, int64 [E−1, 5].

    Columns as in :data:`FATES`: in the same cluster (see :func:`follow_clusters`), in
    another cluster, outlier to cluster, cluster to outlier, outlier in both.
    """
    named = follow_clusters(epochs)
    rows = []
    for before, after in pairwise(named):
        was, now = before >= 0, after >= 0
        stays = was & now & (before == after)
        kinds = (stays, was & now & ~stays, ~was & now, was & ~now, ~was & ~now)
        rows.append([int(kind.sum()) for kind in kinds])
    return np.array(rows, dtype=np.int64).reshape(-1, len(FATES))


@mpl.rc_context(STYLE)
def cluster_flow(epochs: Sequence[Tensor]) -> Figure:
    """Draw how pictures move between clusters from epoch to epoch.

    Above, each bar counts what became of all pictures since the epoch before. Below
    are the pictures of the seven clusters that are largest in the last epoch, a thin
    line each. It has its cluster's colour where the picture already was in that
    cluster, one of the other six colours where it was in that one, a grey where it
    was in any other cluster (three greys tell neighbouring ones apart), and is white
    where the picture was an outlier.

    Parameters
    ----------
    epochs : sequence of LongTensor [N]
        Pseudo labels of each epoch, −1 for outliers.

    Raises
    ------
    ValueError
        When the last epoch has no cluster.
    """
    named = np.stack(follow_clusters(epochs))
    final = named[-1]
    if not (final >= 0).any():
        raise ValueError("the last epoch has no cluster to follow")
    size = np.bincount(final[final >= 0])
    largest = np.argsort(-size, kind="stable")[: len(PALETTE)]
    shades = np.array([to_rgb(c) for c in (*PALETTE, *GREYS, "white")])
    which = len(PALETTE) + named % len(GREYS)
    which[named < 0] = len(shades) - 1
    rows: list[int] = []
    ends = []
    for i, cluster in enumerate(largest):
        which[named == cluster] = i
        members = (final == cluster).nonzero()[0]
        members = members[np.lexsort(named[:, members])]
        some = np.linspace(0, len(members) - 1, min(len(members), 100)).astype(int)
        rows += members[some].tolist()
        ends.append(len(rows))

    n = len(epochs)
    fig = Figure(figsize=(8, 8), layout="constrained")
    top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    counts = pd.DataFrame(fates(epochs), range(1, n), FATES)
    stack(top.bar, counts, (BLUE, ORANGE, GREEN, VERMILLION, PALE))
    top.set(ylabel="all pictures (number)", xlim=(-0.5, n - 0.5))
    top.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    across = -0.5, n - 0.5
    how: Any = {"aspect": "auto", "interpolation": "nearest"}
    bottom.imshow(shades[which[:, rows].T], extent=(*across, len(rows), 0), **how)
    bottom.hlines(ends[:-1], *across, color="black", lw=1.5)
    middle = [(a + b) / 2 for a, b in pairwise([0, *ends])]
    bottom.set_yticks(middle, [f"{c} ({size[c]})" for c in largest])
    bottom.set(ylabel=f"largest of {len(size)} clusters (pictures)", xlabel="epoch")
    bottom.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    return fig


def cluster_replay(
    runs: Mapping[str, Sequence[Tensor]],
    images: ImageSet,
    labels: Tensor | None = None,
    *,
    limit: int = 3,
    per_camera: int = 2,
    between: int = 0,
) -> list[Image.Image]:
    """Draw how some pictures change clusters: the frames of a film, from epoch 0 on.

    Each run has a block of rows, and a row holds some pictures of one label. Those of
    one cluster stand together in a frame, outliers without one at the row's end, and
    each has its camera's number below. A blue frame holds pictures of that label only;
    in a red one with two lines there are others too, as many as the number above it
    says.

    Parameters
    ----------
    runs : mapping of str to sequence of LongTensor [N]
        For each run, by its name, the pseudo labels of each epoch, −1 for outliers;
        equally many epochs.
    images : ImageSet
        The N pictures.
    labels : LongTensor [N], optional
        What a row holds, such as a cluster. By default the identity.
    limit : int
        Rows in a block: the labels seen by most cameras, then with most pictures.
    per_camera : int
        Pictures of a label and camera at most: the first ones.
    between : int
        Frames between two epochs, in which the pictures move to their new places.
    """
    from o2cap.evaluation import clustering_quality  # seconds to import

    labels = images.pids if labels is None else labels
    assert labels is not None, "nobody knows the identities: give labels"
    pids = torch.full_like(labels, -1) if images.pids is None else images.pids
    shown = most_seen(labels, images.camids, limit)
    pictures = pd.DataFrame({"label": labels.numpy(), "camera": images.camids.numpy()})
    pictures = pictures[pictures["label"].isin(shown)].groupby(["label", "camera"])
    pictures = pictures.head(per_camera).sort_values(["label", "camera"])
    pixels = thumbnails(images.select(torch.tensor(pictures.index.tolist())), 64)
    pictures["order"] = range(len(pictures))
    _, tall, wide, _ = pixels.shape
    edge, gap, head, step = 60, 14, 44, tall + 42
    top = {label: head + i * step + 20 for i, label in enumerate(shown)}
    text, small = ImageFont.load_default(19), ImageFont.load_default(16)

    def place(clusters: Tensor) -> pd.DataFrame:
        """Give each picture its x: clusters by size, then outliers, each alone."""
        now = pictures.assign(cluster=clusters.numpy()[pictures.index])
        groups, inside = now.groupby(["label", "cluster"])["order"], now["cluster"] >= 0
        now["size"] = -groups.transform("size").where(inside, 0)
        now["group"] = groups.transform("min").where(inside, now["order"])
        now = now.sort_values(["label", "size", "group", "order"])
        gaps = (now["group"] != now["group"].shift()).groupby(now["label"]).cumsum() - 1
        now["x"] = edge + wide * now.groupby("label").cumcount() + gap * gaps
        return now

    places = {run: [place(c) for c in epochs] for run, epochs in runs.items()}
    right = max(now["x"].max() for film in places.values() for now in film) + wide + gap
    size = (max(620, right), head + len(shown) * step)

    def draw(words: str, now: pd.DataFrame, clusters: Tensor | None = None) -> Array:
        """Draw the block of a run; with its clusters, their frames."""
        block = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(block)
        pen.text((8, 14), words, "black", text)
        for label, y in top.items():
            pen.text((edge // 2, y + tall // 2), str(label), "black", text, "mm")
        for one in now.itertuples():
            x, y = round(one.x), top[one.label]
            block.paste(Image.fromarray(pixels[one.order]), (x, y))
            where = x + wide // 2, y + tall + 4
            pen.text(where, str(one.camera), "black", small, "mt")
        if clusters is None:
            return np.asarray(block)
        framed = now[now["cluster"] >= 0].groupby(["label", "cluster"])["x"]
        for (label, cluster), x in framed:
            others = int(((clusters == cluster) & (labels != label)).sum())
            colour = VERMILLION if others else BLUE
            left, right, y = x.min() - 3, x.max() + wide + 2, top[label]
            pen.rectangle((left, y - 3, right, y + tall + 2), None, colour, 2)
            if others:
                box = (left - 3, y - 6, right + 3, y + tall + 5)
                pen.rectangle(box, None, colour)
                pen.text((left + 3, y - 6), f"+{others}", colour, small, "lb")
        return np.asarray(block)

    films = []
    for run, epochs in runs.items():
        film: list[Array] = []
        for e, clusters in enumerate(epochs):
            found = clustering_quality(clusters, pids, images.camids)
            words = f"{run}, epoch {e}: {found.clusters} clusters"
            if np.isfinite(found.ari):
                words += f", ARI {found.ari:.2f}"
            if np.isfinite(found.cameras_per_cluster):
                words += f", {found.cameras_per_cluster:.2f} cameras per cluster"
            now = places[run][e]
            film.append(draw(words, now, clusters))
            for after in places[run][e + 1 : e + 2]:
                for share in np.arange(1, between + 1) / (between + 1):
                    moved = (3 - 2 * share) * share**2 * (after["x"] - now["x"])
                    film.append(draw(words, now.assign(x=now["x"] + moved)))
        films.append(film)
    return [Image.fromarray(np.vstack(blocks)) for blocks in zip(*films, strict=True)]
