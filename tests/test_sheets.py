"""Sheets: each picture stands where its label, camera and rank say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageColor

from o2cap.data.images import ImageSet
from o2cap_book.sheets import (
    GREEN,
    GREY,
    VERMILLION,
    best_matches,
    cluster_sheets,
    contact_sheet,
    ranked_lists,
)

Colour = tuple[int, int, int]
FRAMES = {ImageColor.getrgb(c): c for c in (GREEN, GREY, VERMILLION)}


colour = tiny.colour


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return tiny.coloured(tmp_path_factory.mktemp("pictures"))


def chosen(pictures: ImageSet, *pairs: tuple[int, int]) -> ImageSet:
    """Return the first picture of each (identity, camera)."""
    assert pictures.pids is not None
    where = [
        int(((pictures.pids == pid) & (pictures.camids == camid)).nonzero()[0])
        for pid, camid in pairs
    ]
    return pictures.select(torch.tensor(where))


def seen(sheet: Image.Image, colours: Sequence[Colour]) -> list[list[Colour]]:
    """Return which of the colours stand side by side in each row, from the left."""
    pixels = np.asarray(sheet)
    rows: list[list[Colour]] = []
    for line in pixels:
        where = {
            c: int(np.flatnonzero((line == c).all(1))[0])
            for c in colours
            if (line == c).all(1).sum() > 30
        }
        row = sorted(where, key=lambda c: where[c])
        if row and (not rows or rows[-1] != row):
            rows.append(row)
    return rows


def test_contact_sheet_lays_identities_out_by_camera(pictures: ImageSet) -> None:
    every = [colour(p, c, k) for p in range(4) for c in range(3) for k in range(2)]
    assert seen(contact_sheet(pictures, limit=2), every) == [
        [colour(0, c, k) for c in range(3) for k in range(2)],
        [colour(1, c, k) for c in range(2) for k in range(2)],
    ]
    assert pictures.pids is not None
    labels = torch.where(pictures.pids == 3, 7, -1)
    sheet = contact_sheet(pictures, labels, per_camera=1, name="cluster")
    assert seen(sheet, every) == [[colour(3, c) for c in range(3)]]


def test_a_sheet_per_cluster(pictures: ImageSet, tmp_path: Path) -> None:
    clusters = torch.full((len(pictures),), -1)
    clusters[:4], clusters[15:18] = 0, 2  # numbers may have gaps
    cluster_sheets(pictures, clusters, tmp_path / "sheets")
    names = sorted(os.listdir(tmp_path / "sheets"))
    assert names == ["cluster_0000.png", "cluster_0002.png"]
    with Image.open(tmp_path / "sheets/cluster_0000.png") as picture:
        picture.verify()


def test_contact_sheet_needs_a_label(pictures: ImageSet) -> None:
    with pytest.raises(ValueError, match="give rows"):
        contact_sheet(pictures.without_identities())
    with pytest.raises(ValueError, match="give rows"):
        contact_sheet(pictures, torch.full((len(pictures),), -1))


def frames(sheet: Image.Image) -> list[str]:
    """Return the colours of a row's frames from the left: those at its left edges."""
    line = [tuple(p) for p in np.asarray(sheet)[len(np.asarray(sheet)) // 2].tolist()]
    edges = [p for p, before in zip(line[1:], line, strict=False) if p != before]
    return [FRAMES[p] for p in edges if p in FRAMES][::2]


def test_ranked_lists_order_mark_and_leave_out_the_own_camera(
    pictures: ImageSet,
) -> None:
    query = chosen(pictures, (0, 0))
    gallery = chosen(pictures, (0, 0), (1, 0), (0, 1), (2, 2), (0, 2))
    assert gallery.pids is not None
    gallery.pids[3] = -1  # neither right nor wrong
    similarity = torch.tensor([[0.99, 0.9, 0.8, 0.7, 0.6]])
    index, distance = best_matches(query, gallery, similarity, top=5)
    assert index.tolist() == [[1, 2, 3, 4, -1]]
    assert torch.allclose(distance[0, :4], torch.tensor([0.1, 0.2, 0.3, 0.4]))
    sheet = ranked_lists(query, gallery, index, distance, notes=["AP 58 %"])
    every = [colour(p, c) for p, c in ((0, 0), (1, 0), (0, 1), (2, 2), (0, 2))]
    assert seen(sheet, every) == [every]
    assert frames(sheet) == [VERMILLION, GREEN, GREY, GREEN]


def test_ranked_lists_without_identities_have_no_marks(pictures: ImageSet) -> None:
    bare = pictures.without_identities()
    query = bare.select(torch.tensor([0]))
    matches = best_matches(query, bare, torch.rand(1, len(bare)), top=3)
    assert frames(ranked_lists(query, bare, *matches)) == [GREY] * 3
    twice = chosen(pictures, (0, 0), (2, 1))
    matches = best_matches(twice, bare, torch.rand(2, len(bare)), top=3)
    assert frames(ranked_lists(twice, bare, *matches, limit=1)) == [GREY] * 3


def test_text_tells_rows_and_distances_apart(pictures: ImageSet) -> None:
    """What is written is drawn: other words, another sheet, pictures unchanged."""
    one, other = (
        np.asarray(contact_sheet(pictures, limit=2, notes=notes))
        for notes in (["a0", "b0"], ["a0", "b1"])
    )
    assert one.shape == other.shape and (one != other).any()
