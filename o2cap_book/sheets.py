"""Sheets of pictures: a label in every camera, and what a search found."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice, zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from o2cap.data.images import ImageSet, open_picture
from o2cap.data.loading import decode
from o2cap.files import replacing

GREEN, VERMILLION, GREY = "#009E73", "#D55E00", "#8C8C8C"  # Okabe and Ito
# Large enough to be read at half the size.
_TALL, _FONT = 128, ImageFont.load_default(24)
_MARKS = {
    GREEN: [(0, 16), (7, 24), (19, 8)],  # a tick
    VERMILLION: [(1, 8), (17, 24), (9, 16), (1, 24), (17, 8)],  # a cross
}
_NOTHING = Image.new("RGB", (1, 1), "white")


def contact_sheet(
    images: ImageSet,
    rows: Tensor | None = None,
    *,
    limit: int = 8,
    per_camera: int = 3,
    name: str = "identity",
    notes: Sequence[str] | None = None,
) -> Image.Image:
    """Lay pictures out, one row a label and one group of columns a camera.

    The sheet shows what each of the first labels looks like in every camera. A
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
        What a row is, for the heading.
    notes : sequence of str, optional
        A short text for each row, instead of its label.

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
    each = max(1, min(per_camera, 30 // len(cameras)))
    members = [
        [((labels == p) & (images.camids == c)).nonzero()[:each, 0] for c in cameras]
        for p in shown
    ]
    cells = [cell for row in members for cell in row]
    each = max(map(len, cells))
    drawn = thumbnails(images.select(torch.cat(cells)), _TALL)
    pictures = map(Image.fromarray, drawn)
    white = Image.new("RGB", (drawn.shape[2], _TALL), "white")
    first = [int((images.camids == c).nonzero()[0]) for c in cameras]
    table = [[_text(name), *(_text(_camera(images, i) or "unknown") for i in first)]]
    for i, row in enumerate(members):
        one = int(torch.cat(row)[0])
        label = images.identity(one) if rows is None else str(int(shown[i]))
        table.append([_text(notes[i] if notes else label)])
        for cell in row:
            strip = [*islice(pictures, len(cell)), *[white] * (each - len(cell))]
            table[-1].append(_sheet([strip], gap=2))
    return _sheet(table)


def cluster_sheets(images: ImageSet, clusters: Tensor, folder: Path) -> None:
    """Write a contact sheet per cluster, ``cluster_0000.png`` on.

    Parameters
    ----------
    images : ImageSet
        N pictures.
    clusters : LongTensor [N]
        −1 for pictures to leave out.
    folder : Path
        Made where it is missing.
    """
    for cluster in clusters[clusters >= 0].unique().tolist():
        rows = clusters.where(clusters == cluster, -1)
        sheet = contact_sheet(images, rows, per_camera=8, name="cluster")
        write_sheet(sheet, folder / f"cluster_{cluster:04d}.png")


def write_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a .png file, whole or not at all."""
    with replacing(path) as part:
        sheet.save(part, "png")


def best_matches(
    query: ImageSet, gallery: ImageSet, similarity: Tensor, top: int = 10
) -> tuple[Tensor, Tensor]:
    """Rank the gallery for each query as the metrics do.

    Pictures of the query's own identity and camera are left out.

    Parameters
    ----------
    query, gallery : ImageSet
        Q and G pictures.
    similarity : FloatTensor [Q, G]
        Cosine similarity, ``query_features @ gallery_features.T``.
    top : int
        Matches of a query at most.

    Returns
    -------
    index : LongTensor [Q, K]
        The best matches, best first; −1 where there are fewer.
    distance : FloatTensor [Q, K]
        Their cosine distances.
    """
    similarity = similarity.float().cpu()
    if query.pids is not None and gallery.pids is not None:
        easy = (query.pids[:, None] == gallery.pids) & (gallery.pids >= 0)
        easy &= query.camids[:, None] == gallery.camids
        similarity = similarity.masked_fill(easy, -torch.inf)
    best = similarity.topk(min(top, len(gallery)))
    return best.indices.where(best.values.isfinite(), -1), 1 - best.values


def ranked_lists(
    query: ImageSet,
    gallery: ImageSet,
    index: Tensor,
    distance: Tensor,
    *,
    limit: int = 20,
    notes: Sequence[str] | None = None,
) -> Image.Image:
    """Draw the matches of each query in the gallery, best first.

    The sheet has a row per query: the query, then its matches by rank, each with its
    cosine distance and its camera. Where identities are known, a green frame and a tick
    mark a right match, a red frame and a cross a wrong one.

    Parameters
    ----------
    query, gallery : ImageSet
        Q and G pictures.
    index, distance : LongTensor [Q, K] and FloatTensor [Q, K]
        The matches in the gallery, −1 for none; see :func:`best_matches`.
    limit : int
        Queries at most: the first ones.
    notes : sequence of str, optional
        A short text for each query, written below it.
    """
    n, index = min(len(query), limit), index[:limit]
    matches = (gallery.paths[j] for j in index[index >= 0].tolist())
    paths = [*query.paths[:n], *matches]
    shown = ImageSet(paths, torch.arange(len(paths)), grey_range=gallery.grey_range)
    pixels = iter(thumbnails(shown, _TALL))
    queries = [*islice(pixels, n)]
    table = [[_text(str(rank or "query")) for rank in range(1 + index.shape[1])]]
    for i, row in enumerate(index.tolist()):
        mine = query.identity(i)
        note = notes[i] if notes else ""
        table.append([_framed(queries[i], "black", note, _camera(query, i))])
        for k, j in enumerate(row):
            if j >= 0:
                value, theirs = max(float(distance[i, k]), 0), gallery.identity(j)
                colour = GREEN if mine == theirs else VERMILLION
                colour = colour if mine and theirs else GREY
                text = f"{value:.2f}", _camera(gallery, j)
                table[-1].append(_framed(next(pixels), colour, *text))
    return _sheet(table)


def thumbnails(images: ImageSet, height: int) -> np.ndarray:
    """Return pictures as uint8 [N, height, W, 3]; W suits the shape of the first."""
    with open_picture(images.paths[0]) as first:
        width = round(height * min(max(first.width / first.height, 0.4), 2))
    return decode(images, height, width)[0].numpy()


def _camera(images: ImageSet, i: int) -> str:
    name = images.camera(i)
    return f"cam {name}" if name.isdecimal() else name


def _text(text: str) -> Image.Image:
    cell = Image.new("RGB", (round(_FONT.getlength(text)) + 2, 30), "white")
    ImageDraw.Draw(cell).text((1, 0), text, "black", _FONT)
    return cell


def _framed(pixels: np.ndarray, colour: str, first: str, last: str) -> Image.Image:
    """Return a picture in its frame, two lines below, the first with a mark."""
    line = [_text(first)]
    if colour in _MARKS:
        line.append(Image.new("RGB", (20, 30), "white"))
        ImageDraw.Draw(line[-1]).line(_MARKS[colour], colour, width=4)
    framed = ImageOps.expand(Image.fromarray(pixels), 4, colour)
    return _sheet([[framed], [_sheet([line], gap=4)], [_text(last)]], gap=2)


def _sheet(table: Sequence[Sequence[Image.Image]], gap: int = 16) -> Image.Image:
    """Paste the cells of a table, each into the middle of its column and row."""
    columns = zip_longest(*table, fillvalue=_NOTHING)
    wide = [max(cell.width for cell in column) + gap for column in columns]
    tall = [max(cell.height for cell in row) + gap for row in table]
    sheet = Image.new("RGB", (sum(wide), sum(tall)), "white")
    for row, y, height in zip(table, accumulate(tall, initial=0), tall, strict=False):
        for cell, x, width in zip(row, accumulate(wide, initial=0), wide, strict=False):
            place = (x + (width - cell.width) // 2, y + (height - cell.height) // 2)
            sheet.paste(cell, place)
    return sheet
