"""Pictures of data, of pseudo labels and of what was learnt, as matplotlib figures.

Colours are Okabe and Ito's, told apart by colour-blind readers too, and nothing is
said by colour alone: lines and points also differ in their markers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Any, Literal, ParamSpec

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import figure, font_manager
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from o2cap.data.images import ImageSet, open_picture
from o2cap.data.loading import decode
from o2cap.errors import InputError

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY, YELLOW = "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, YELLOW)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # 8 and 7: 56 different pairs
GREY, PALE = "#8C8C8C", "#D9D9D9"
GREYS = ("#757575", "#9E9E9E", "#C4C4C4")

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
P = ParamSpec("P")


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


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the one style, and leave matplotlib's settings as they were."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


# ----------------------------------------------------------------------------- pictures


@_styled
def contact_sheet(
    images: ImageSet,
    rows: Tensor | None = None,
    *,
    limit: int = 8,
    per_camera: int = 3,
    name: str = "identity",
) -> Figure:
    """Lay pictures out, one row a label and one group of columns a camera.

    The picture shows what each of the first labels looks like in every camera. A
    white space means that the camera has no (further) picture of it.

    Parameters
    ----------
    images : ImageSet
        N pictures.
    rows : LongTensor [N], optional
        The label that decides a picture's row, such as its cluster or proxy; −1 for
        pictures to leave out. By default the identity.
    limit : int
        Rows at most: the smallest labels.
    per_camera : int
        Pictures of a label and camera at most: the first ones. Fewer where many
        cameras share the width.
    name : str
        What a row is, for its label.

    Raises
    ------
    ValueError
        When there are no identities and no `rows`, or no label of 0 or more.
    """
    labels = images.pids if rows is None else rows
    if labels is None or not bool((labels >= 0).any()):
        raise ValueError("there is no label to make rows of: give rows")
    shown = labels[labels >= 0].unique()[:limit]
    cameras = images.camids[torch.isin(labels, shown)].unique()
    cells = {
        (i, j): ((labels == label) & (images.camids == camera)).nonzero().flatten()
        for i, label in enumerate(shown)
        for j, camera in enumerate(cameras)
    }
    most = max(len(members) for members in cells.values())
    each = max(1, min(per_camera, most, 30 // len(cameras)))
    place, index = [], []
    for (i, j), members in cells.items():
        for k, member in enumerate(members[:each].tolist()):
            place.append((i, j, k))
            index.append(member)
    pixels = _thumbnails(images, index)
    _, height, width, _ = pixels.shape
    step, group = height + 4, each * (width + 2) + 8
    sheet = np.full((len(shown) * step, len(cameras) * group, 3), 255, np.uint8)
    for (i, j, k), picture in zip(place, pixels, strict=True):
        x = j * group + k * (width + 2)
        sheet[i * step : i * step + height, x : x + width] = picture
    ax = _sheet_axes(sheet)
    ax.set_yticks([i * step + height / 2 for i in range(len(shown))], shown.tolist())
    ax.set_ylabel(name)
    ax.set_xticks(
        [j * group + (group - 8) / 2 for j in range(len(cameras))],
        ["unknown" if c < 0 else str(c) for c in cameras.tolist()],
    )
    ax.set_xlabel("camera")
    return ax.figure  # type: ignore[return-value]


@_styled
def ranked_lists(
    query: ImageSet,
    gallery: ImageSet,
    similarity: Tensor,
    *,
    top: int = 10,
    notes: Sequence[str] | None = None,
    same_camera: bool = False,
) -> Figure:
    """Draw, for each query, the gallery's pictures most similar to it, best first.

    The picture has a row per query: the query, then its matches, each with its
    cosine distance (1 − similarity) and its camera. Where identities are known, a
    green frame and a tick mark a right match, a red frame and a cross a wrong one.

    Parameters
    ----------
    query, gallery : ImageSet
        Q and G pictures.
    similarity : FloatTensor [Q, G]
        Cosine similarity, ``query_features @ gallery_features.T``.
    top : int
        Matches to show.
    notes : sequence of str, optional
        A short text for each query, written at its row.
    same_camera : bool
        Show also the pictures of the query's own identity and camera, which the
        metrics leave out.

    Raises
    ------
    ValueError
        When `similarity` has another shape, or there is no query.
    """
    if similarity.shape != (len(query), len(gallery)) or not len(query):
        raise ValueError(
            f"similarity must be [{len(query)}, {len(gallery)}] with a query at "
            f"least, not {list(similarity.shape)}"
        )
    similarity = similarity.float().cpu()
    one, other = (
        torch.full_like(part.camids, -1) if part.pids is None else part.pids
        for part in (query, gallery)
    )
    known = (one[:, None] >= 0) & (other >= 0)
    same = known & (one[:, None] == other)
    if not same_camera:
        left_out = same & (query.camids[:, None] == gallery.camids)
        similarity = similarity.masked_fill(left_out, -torch.inf)
    best = similarity.topk(min(top, len(gallery)), dim=1)
    found = [
        [j for j, s in zip(*row, strict=True) if s > -torch.inf]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    pictures = ImageSet(
        [*query.paths, *(gallery.paths[j] for row in found for j in row)],
        torch.zeros(len(query) + sum(map(len, found)), dtype=torch.int64),
    )
    pixels = iter(_thumbnails(pictures, range(len(pictures))))
    queries = [next(pixels) for _ in found]
    height, width, _ = queries[0].shape
    step, across, gap = round(1.55 * height), max(width + 10, 58), 24
    columns = 1 + max(map(len, found))
    sheet = np.full((len(found) * step, gap + columns * across, 3), 255, np.uint8)
    ax = _sheet_axes(sheet)

    def put(picture: np.ndarray, i: int, x: int, colour: str, text: str) -> None:
        y = i * step + 4
        sheet[y : y + height, x : x + width] = picture
        frame = Rectangle((x - 1, y - 1), width, height, fill=False, ec=colour, lw=3)
        ax.add_patch(frame)
        ax.text(x + width / 2, y + height + 4, text, ha="center", va="top", size=10)

    for i, row in enumerate(found):
        camera = _camera(query.camids[i])
        put(queries[i], i, 4, "black", f"query\n{camera}")
        for rank, j in enumerate(row):
            colour, mark = GREY, ""
            if known[i, j]:
                colour, mark = (GREEN, " ✓") if same[i, j] else (VERMILLION, " ✗")
            distance = max(1 - float(similarity[i, j]), 0)
            text = f"{distance:.2f}{mark}\n{_camera(gallery.camids[j])}"
            put(next(pixels), i, 4 + gap + (rank + 1) * across, colour, text)
    ax.images[0].set_data(sheet)
    ax.set_yticks(
        [i * step + height / 2 for i in range(len(found))], notes or [""] * len(found)
    )
    ax.set_xticks(
        [4 + gap + (rank + 1) * across + width / 2 for rank in range(columns - 1)],
        [str(rank + 1) for rank in range(columns - 1)],
    )
    ax.set_xlabel("rank; below each match its cosine distance and its camera")
    return ax.figure  # type: ignore[return-value]


def _camera(camid: Tensor) -> str:
    return f"cam {int(camid)}" if camid >= 0 else ""


def _thumbnails(images: ImageSet, index: Sequence[int], height: int = 96) -> np.ndarray:
    """Return pictures as uint8 [M, height, W, 3]; W suits the shape of the first."""
    chosen = images.select(torch.tensor(index, dtype=torch.int64))
    width = height // 2
    with suppress(InputError), open_picture(chosen.paths[0]) as first:  # decode tells
        width = round(height * min(max(first.width / first.height, 0.4), 2))
    return decode(chosen, height, width)[0].numpy()


def _sheet_axes(sheet: np.ndarray) -> Axes:
    """Return axes with the array drawn on them, and ticks without lines."""
    height, width, _ = sheet.shape
    inches = min(max(width / 80, 3), 10)
    fig = Figure(
        figsize=(inches + 0.9, inches * height / width + 0.7), layout="constrained"
    )
    ax = fig.subplots()
    ax.imshow(sheet, aspect="equal", interpolation="antialiased")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax


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
    if method == "umap":
        from umap import UMAP  # seconds to import

        placed = UMAP(
            n_neighbors=min(15, n - 1),
            metric="cosine",
            init="spectral" if n > 50 else "random",
            random_state=seed,
            n_jobs=1,
        ).fit_transform(x)
    elif method == "pca":
        placed = PCA(n_components=2, svd_solver="full").fit_transform(x)
    else:
        placed = TSNE(
            perplexity=min(30, (n - 1) / 3), metric="cosine", random_state=seed
        ).fit_transform(x)
    near = min(10, (n - 1) // 2)
    trust = trustworthiness(x, placed, n_neighbors=near, metric="cosine")
    return Projection(np.asarray(placed, dtype=np.float32), method, float(trust))


@_styled
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
    panels: list[tuple[str, Tensor, list[int]]] = []
    if labels is not None:
        panels.append((name, labels, _most_seen(labels, images.camids, limit)))
    panels.append(("camera", images.camids, images.camids.unique().tolist()))
    fig = Figure(figsize=(5.2 * len(panels), 5.6), layout="constrained")
    kind = {"umap": "UMAP", "tsne": "t-SNE", "pca": "PCA"}[projection.method]
    x, y = projection.coordinates.T
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    for ax, (what, of, marked) in zip(axes, panels, strict=True):
        rest = ~torch.isin(of, torch.tensor(marked)).numpy()
        ax.scatter(x[rest], y[rest], s=8, c=PALE, label="other" if any(rest) else None)
        for i, value in enumerate(marked):
            mine = (of == value).numpy()
            ax.scatter(
                x[mine],
                y[mine],
                s=30 if what != "camera" else 18,
                c=PALETTE[i % 7],
                marker=MARKERS[i % 8],
                edgecolors="black",
                linewidths=0.3,
                label="unknown" if value < 0 else str(value),
            )
        ax.set(xlabel=f"{kind} 1 (no unit)", ylabel=f"{kind} 2 (no unit)")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(f"by {what}")
        ax.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.07),
            ncols=5,
            columnspacing=0.8,
            handletextpad=0.1,
        )
    fig.suptitle(
        f"{len(x):,} pictures; trustworthiness {projection.trustworthiness:.2f}",
        fontsize=12,
    )
    return fig


def _most_seen(labels: Tensor, camids: Tensor, limit: int) -> list[int]:
    """Return the labels seen by most cameras, then with most pictures; sorted."""
    rank = {
        label: (-len(camids[labels == label].unique()), -int((labels == label).sum()))
        for label in labels[labels >= 0].unique().tolist()
    }
    return sorted(sorted(rank, key=lambda label: (*rank[label], label))[:limit])


# ------------------------------------------------------------------------------- curves


@_styled
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
    wanted = {
        "clusters": "clusters (number)",
        "outliers": "outliers (pictures)",
        "cameras_per_cluster": "cameras per cluster",
        "ari": "ARI (0 to 1)",
        "nmi": "NMI (0 to 1)",
        "loss": "loss (no unit)" if len(named) == 1 else "loss / its first value",
        "mAP": "mAP (%)",
        "rank1": "rank-1 (%)",
    }
    everything = [record for history in named.values() for record in history]
    panels = [k for k in wanted if any(_measured(r, k) for r in everything)]
    last = max(record["epoch"] for record in everything)
    columns = min(4, len(panels))
    n_rows = -(-len(panels) // columns)
    fig = Figure(figsize=(2.75 * columns, 2.6 * n_rows + 0.3), layout="constrained")
    axes = fig.subplots(n_rows, columns, squeeze=False).flatten()
    for ax, key in zip(axes, panels, strict=False):
        for i, history in enumerate(named.values()):
            seen = [(r["epoch"], r[key]) for r in history if _measured(r, key)]
            x, y = np.array(seen, dtype=float).reshape(-1, 2).T
            if key in ("mAP", "rank1"):
                y = 100 * y
            elif key == "loss" and len(named) > 1 and len(y):
                y = y / y[0]
            marker = MARKERS[i % 8] if len(x) <= 30 else ""
            ax.plot(x, y, color=PALETTE[i % 7], marker=marker)
        ax.set_title(wanted[key])
        low, high = ax.dataLim.intervaly
        ax.set_ylim(min(1.1 * low, 0), 1.1 * high if high > 0 else 1)
        ax.set_xlim(-0.5, last + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.set_xlabel("epoch")
    for ax in axes[len(panels) :]:
        ax.remove()
    if len(named) > 1:
        lines = axes[0].get_lines()
        fig.legend(
            lines, list(named), loc="outside lower center", ncols=min(5, len(named))
        )
    return fig


def _measured(record: Mapping[str, Any], key: str) -> bool:
    return key in record and np.isfinite(record[key])


# ----------------------------------------------------------------------------- clusters


@_styled
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
    counts = {}
    for name, labels in clusters.items():
        inside = labels >= 0
        pairs = torch.stack([labels[inside], camids[inside]]).unique(dim=1)
        counts[name] = pairs[0].bincount().bincount(minlength=2)[1:].numpy()
    most = max(map(len, counts.values()))
    fig = Figure(figsize=(7, 3.2), layout="constrained")
    ax = fig.subplots()
    width = 0.8 / len(counts)
    for i, (name, number) in enumerate(counts.items()):
        x = np.arange(1, len(number) + 1) + (i - (len(counts) - 1) / 2) * width
        hatch = ("", "//", "..")[i % 3]
        bars = ax.bar(x, number, width, color=PALETTE[i], ec="white", hatch=hatch)
        bars.set_label(name)
        ax.bar_label(bars, fontsize=10)
    ax.set_xticks(range(1, most + 1))
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


@_styled
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
    colours = np.array([to_rgb(c) for c in (*PALETTE, *GREYS, "white")])
    which = len(PALETTE) + named % len(GREYS)
    which[named < 0] = len(colours) - 1
    for i, cluster in enumerate(largest):
        which[named == cluster] = i
    rows: list[int] = []
    ends = []
    for cluster in largest:
        members = (final == cluster).nonzero()[0]
        members = (
            members[np.lexsort(named[:-1, members])] if len(epochs) > 1 else members
        )
        some = np.linspace(0, len(members) - 1, min(len(members), 100)).astype(int)
        rows += members[some].tolist()
        ends.append(len(rows))

    n = len(epochs)
    fig = Figure(figsize=(8, 8), layout="constrained")
    top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    base = np.zeros(n - 1)
    looks = ((BLUE, ""), (ORANGE, "//"), (GREEN, ".."), (VERMILLION, "xx"), (PALE, ""))
    for label, count, (colour, hatch) in zip(
        FATES, fates(epochs).T, looks, strict=True
    ):
        bars = top.bar(
            range(1, n), count, 0.8, base, color=colour, hatch=hatch, ec="white"
        )
        bars.set_label(label)
        base += count
    top.set(ylabel="all pictures (number)", xlim=(-0.5, n - 0.5))
    top.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    bottom.imshow(
        colours[which[:, rows].T],
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, n - 0.5, len(rows), 0),
    )
    bottom.hlines(ends[:-1], -0.5, n - 0.5, color="black", lw=1.5)
    middle = [(a + b) / 2 for a, b in pairwise([0, *ends])]
    bottom.set_yticks(middle, [f"{c} ({size[c]})" for c in largest])
    bottom.set_ylabel(f"largest of {len(size)} clusters (pictures)")
    bottom.set_xlabel("epoch")
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

    Raises
    ------
    ValueError
        When there are no identities and no `labels`, or no label of 0 or more.
    """
    from o2cap.evaluation import clustering_quality  # seconds to import

    labels = images.pids if labels is None else labels
    if labels is None or not bool((labels >= 0).any()):
        raise ValueError("there is no label to make rows of: give labels")
    pids = torch.full_like(labels, -1) if images.pids is None else images.pids
    shown = _most_seen(labels, images.camids, limit)
    rows = []
    for label in shown:
        mine = (labels == label).nonzero().flatten()
        cameras = images.camids[mine]
        first = [mine[cameras == camera][:per_camera] for camera in cameras.unique()]
        rows.append(torch.cat(first).tolist())
    index = [i for row in rows for i in row]
    pixels = _thumbnails(images, index, 64)
    _, tall, wide, _ = pixels.shape
    edge, gap, head, step = 60, 14, 44, tall + 42
    block = head + len(rows) * step

    # Where each picture stands, and what the headings say.
    places: list[dict[tuple[str, int], tuple[int, int]]] = []
    headings: list[list[str]] = []
    for e in range(len(next(iter(runs.values())))):
        places.append({})
        headings.append([])
        for r, (run, epochs) in enumerate(runs.items()):
            found = clustering_quality(epochs[e], pids, images.camids)
            words = f"{run}, epoch {e}: {found.clusters} clusters"
            if np.isfinite(found.ari):
                words += f", ARI {found.ari:.2f}"
            if np.isfinite(found.cameras_per_cluster):
                words += f", {found.cameras_per_cluster:.2f} cameras per cluster"
            headings[e].append(words)
            for i, row in enumerate(rows):
                left, top = edge, r * block + head + i * step + 20
                for group in _grouped(epochs[e], row):
                    for picture in group:
                        places[e][run, picture] = left, top
                        left += wide
                    left += gap
    right = max(x for place in places for x, _ in place.values()) + wide + gap
    size = (max(620, right), len(runs) * block)
    font = font_manager.findfont("DejaVu Sans")
    text, small = (ImageFont.truetype(font, points) for points in (17, 14))

    def draw(e: int, share: float) -> Image.Image:
        now = places[e]
        if share:
            eased, after = (3 - 2 * share) * share**2, places[e + 1]
            now = {
                k: (round(x + eased * (after[k][0] - x)), y)
                for k, (x, y) in now.items()
            }
        frame = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(frame)
        for r, (run, epochs) in enumerate(runs.items()):
            pen.text((8, r * block + 14), headings[e][r], "black", text)
            for picture, array in zip(index, pixels, strict=True):
                x, y = now[run, picture]
                frame.paste(Image.fromarray(array), (x, y))
                camera = str(int(images.camids[picture]))
                pen.text((x + wide // 2, y + tall + 4), camera, "black", small, "mt")
            for label, row in zip(shown, rows, strict=True):
                y = now[run, row[0]][1]
                pen.text((edge // 2, y + tall // 2), str(label), "black", text, "mm")
                for group in _grouped(epochs[e], row):
                    cluster = epochs[e][group[0]]
                    if share or cluster < 0:
                        continue
                    x, end = now[run, group[0]][0], now[run, group[-1]][0] + wide
                    box, bottom = (x - 3, y - 3, end + 2), y + tall
                    others = int(((epochs[e] == cluster) & (labels != label)).sum())
                    colour = VERMILLION if others else BLUE
                    pen.rectangle((*box, bottom + 2), outline=colour, width=2)
                    if others:
                        box = (x - 6, y - 6, end + 5)
                        pen.rectangle((*box, bottom + 5), outline=colour)
                        pen.text((x, y - 6), f"+{others}", colour, small, "lb")
        return frame

    steps = (len(places) - 1) * (between + 1) + 1
    return [
        draw(i // (between + 1), i % (between + 1) / (between + 1))
        for i in range(steps)
    ]


def _grouped(clusters: Tensor, pictures: Sequence[int]) -> list[list[int]]:
    """Return the pictures by cluster, most first; outliers last, each alone."""
    groups: dict[int, list[int]] = {}
    for picture in pictures:
        cluster = int(clusters[picture])
        groups.setdefault(cluster if cluster >= 0 else ~picture, []).append(picture)
    order = sorted(groups, key=lambda c: (c < 0, -len(groups[c]), groups[c]))
    return [groups[c] for c in order]
