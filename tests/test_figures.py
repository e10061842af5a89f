"""Figures: what they show is what they were given."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from o2cap.data.images import ImageSet
from o2cap_book import figures as viz

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return tiny.coloured(tmp_path_factory.mktemp("pictures"))


def test_figures_show_themselves_and_leave_settings_alone() -> None:
    before = dict(mpl.rcParams)
    figure = viz.camera_spread({"a": torch.tensor([0, 0])}, torch.tensor([0, 1]))
    assert figure._repr_png_().startswith(PNG)
    assert dict(mpl.rcParams) == before


# --------------------------------------------------------------------------------- maps


def check_map(method: str) -> None:
    """Groups far apart stay together on a map, which repeats."""
    group = torch.arange(12) % 2
    noise = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    features = torch.nn.functional.normalize(torch.eye(16)[group] + 0.1 * noise)
    placed = viz.project(features, method, seed=1)  # type: ignore[arg-type]
    assert placed.coordinates.shape == (12, 2)
    distance = np.linalg.norm(
        placed.coordinates[:, None] - placed.coordinates[None], axis=2
    )
    np.fill_diagonal(distance, np.inf)
    assert (group[distance.argmin(1)] == group).all()
    assert placed.trustworthiness > 0.8
    again = viz.project(features, method, seed=1)  # type: ignore[arg-type]
    assert np.array_equal(placed.coordinates, again.coordinates)


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_maps_keep_groups_together_and_repeat(method: str) -> None:
    check_map(method)


def test_umap_keeps_groups_together_and_repeats() -> None:
    """In a program of its own, interpreted: to compile takes longer than the map."""
    code = "from test_figures import check_map; check_map('umap')"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        check=True,
    )


def test_pca_keeps_the_two_directions_of_largest_variance() -> None:
    features = torch.randn(50, 6) * torch.tensor([1.0, 9, 2, 5, 1, 3])
    centred = features - features.mean(dim=0)
    _, largest = torch.linalg.eigh((centred.T @ centred).double())
    wanted = centred.double() @ largest[:, [-1, -2]]
    placed = viz.project(features, "pca").coordinates
    assert np.allclose(np.abs(placed), wanted.abs().numpy(), atol=1e-4)


def test_a_map_needs_eight_pictures() -> None:
    with pytest.raises(ValueError, match="8 pictures"):
        viz.project(torch.eye(7))


def test_a_map_marks_what_most_cameras_see(pictures: ImageSet) -> None:
    assert pictures.pids is not None
    placed = viz.Projection(np.random.rand(len(pictures), 2), "tsne", 0.9)
    figure = viz.embedding_map(placed, pictures, limit=3)
    left, right = figure.axes
    sizes = {c.get_label(): len(c.get_offsets()) for c in left.collections}
    assert sizes == {"other": 4, "0": 6, "2": 6, "3": 6}  # 1 is missing in a camera
    looks = {
        tuple(c.get_paths()[0].vertices[0])
        for c in right.collections
        if len(c.get_offsets())
    }
    assert len(looks) == 3  # markers, not colours alone
    assert "0.90" in figure.get_suptitle()
    mine = left.collections[1].get_offsets()
    assert np.allclose(mine, placed.coordinates[(pictures.pids == 0).numpy()])
    (only,) = viz.embedding_map(placed, pictures.without_identities()).axes
    assert only.get_title() == "by camera"


# ------------------------------------------------------------------------------- curves


def history(scale: float = 1.0) -> list[dict[str, object]]:
    records: list[dict[str, object]] = [
        {"epoch": e, "clusters": 9 - e, "outliers": e, "loss": scale * (4 - e)}
        for e in range(3)
    ]
    records[2]["mAP"] = 0.5
    return records


def test_curves_show_what_was_recorded_and_nothing_else() -> None:
    axes = viz.training_curves(history()).axes
    lines = {ax.get_title(): ax.get_lines()[0].get_xydata().tolist() for ax in axes}
    assert lines == {
        "clusters (number)": [[0, 9], [1, 8], [2, 7]],
        "outliers (pictures)": [[0, 0], [1, 1], [2, 2]],
        "loss (no unit)": [[0, 4], [1, 3], [2, 2]],
        "mAP (%)": [[2, 50]],
    }
    assert all(ax.get_xlabel() == "epoch" for ax in axes)


def test_a_method_looks_the_same_in_every_figure() -> None:
    seen = []
    for named in ("both", "baseline"), ("offline", "both"), ("both", "a run"):
        axes = viz.training_curves({name: history() for name in named}).axes
        for ax in axes:
            line = ax.get_lines()[named.index("both")]
            seen.append((line.get_color(), line.get_marker()))
    assert len(set(seen)) == 1
    looks = [tuple(viz.look(name).values()) for name in viz.METHODS]
    assert len(set(looks)) == len(looks)


def test_curves_of_several_runs() -> None:
    skipped = history(20)
    del skipped[1]["loss"]  # an epoch that was skipped
    figure = viz.training_curves({"one": history(), r"$\frac{costs": skipped})
    panel = next(ax for ax in figure.axes if ax.get_title() == "loss / its first value")
    first, second = panel.get_lines()
    assert first.get_ydata().tolist() == [1, 0.75, 0.5]
    assert second.get_xydata().tolist() == [[0, 1], [2, 0.5]]
    assert first.get_marker() != second.get_marker()
    assert [t.get_text() for t in figure.legends[0].get_texts()][1] == r"$\frac{costs"
    assert figure.png().startswith(PNG)


# ----------------------------------------------------------------------------- clusters

labellings = st.integers(1, 12).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(-1, 3), min_size=n, max_size=n), min_size=1, max_size=4
    )
)


def dense(labels: list[int]) -> Tensor:
    """Number clusters from 0 without gaps, as DBSCAN does; −1 stays."""
    names = sorted(set(labels) - {-1})
    return torch.tensor([names.index(c) if c >= 0 else -1 for c in labels])


@settings(max_examples=50)
@given(labellings)
def test_following_keeps_the_partition_and_shares_most(rows: list[list[int]]) -> None:
    epochs = [dense(row) for row in rows]
    named = viz.follow_clusters(epochs)
    assert named[-1].tolist() == epochs[-1].tolist()
    for labels, name in zip(epochs, named, strict=True):
        pairs = set(zip(labels.tolist(), name.tolist(), strict=True))
        old, new = zip(*pairs, strict=True)
        assert len(set(old)) == len(set(new)) == len(pairs)
        assert ((labels.numpy() < 0) == (name < 0)).all()
    for labels, name, after in zip(epochs, named, named[1:], strict=False):
        both = (name >= 0) & (after >= 0)
        kept = int((name == after)[both].sum())
        theirs = sorted(set(after.tolist()) - {-1})
        n = int(labels.max()) + 1
        targets = theirs + [-2] * n
        best = max(
            sum(
                int(((labels.numpy() == c) & (after == target)).sum())
                for c, target in enumerate(order)
            )
            for order in set(permutations(targets, n))
        )
        assert kept == best


@settings(max_examples=50)
@given(labellings, st.permutations(range(4)))
def test_fates_do_not_depend_on_cluster_numbers(
    rows: list[list[int]], order: list[int]
) -> None:
    epochs = [dense(row) for row in rows]
    found = viz.fates(epochs)
    assert found.shape == (len(epochs) - 1, 5)
    assert (found.sum(axis=1) == len(rows[0])).all()
    inside = [int((e >= 0).sum()) for e in epochs]
    assert (found[:, :3].sum(axis=1) == inside[1:]).all()
    assert (found[:, [0, 1, 3]].sum(axis=1) == inside[:-1]).all()
    renamed = [[order[c] if c >= 0 else -1 for c in row] for row in rows]
    again = viz.fates([dense(row) for row in renamed])
    assert again[:, 2:].tolist() == found[:, 2:].tolist()
    if len(epochs) == 2:  # beyond two, equally good pairs may differ
        assert again.tolist() == found.tolist()


def test_fates_by_hand() -> None:
    # two clusters merge (the larger lasts), one loses a picture, one gains one
    before = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, -1, -1])
    after = torch.tensor([5, 5, 5, 5, 5, 3, 3, -1, 3, -1])
    assert viz.fates([before, after]).tolist() == [[5, 2, 1, 1, 1]]


def test_cluster_flow_colours_by_hand() -> None:
    epochs = [torch.tensor([1, 1, 0, -1, 2]), torch.tensor([0, 0, 0, 1, 1])]
    top, bottom = viz.cluster_flow(epochs).axes
    raster = bottom.images[0].get_array()
    shown = [[to_hex(c).upper() for c in row] for row in raster]
    first, second = viz.PALETTE[:2]
    # cluster 0: two pictures were there already, one was elsewhere; then cluster 1
    assert [row[1] for row in shown] == [first] * 3 + [second] * 2
    assert sorted(row[0] for row in shown[:3])[0] == first
    assert sum(row[0] == first for row in shown[:3]) == 2
    assert sum(row[0] in viz.GREYS for row in shown[:3]) == 1
    assert {row[0] for row in shown[3:]} == {"#FFFFFF", second}
    assert [t.get_text() for t in bottom.get_yticklabels()] == ["0 (3)", "1 (2)"]
    heights = [bar.get_height() for bar in top.patches]
    assert heights == viz.fates(epochs)[0].tolist()


def test_cluster_flow_of_one_epoch_and_of_none() -> None:
    assert viz.cluster_flow([torch.tensor([0, 0, -1])]).png().startswith(PNG)
    with pytest.raises(ValueError, match="no cluster"):
        viz.cluster_flow([torch.tensor([0, 0]), torch.tensor([-1, -1])])


def test_camera_spread_counts_by_hand() -> None:
    camids = torch.tensor([0, 1, 2, 0, 0, 1, 1, 2])
    first = torch.tensor([0, 0, 0, 1, 1, 2, 2, -1])  # three cameras, one, one
    last = torch.tensor([0, 0, -1, 1, -1, 1, -1, -1])  # two, two
    (ax,) = viz.camera_spread({"first": first, "last": last}, camids).axes
    heights = [[int(b.get_height()) for b in bars] for bars in ax.containers]
    assert heights == [[2, 0, 1], [0, 2]]
    assert ax.get_xlabel() == "cameras in the cluster"


def places(frame: Image.Image, pictures: ImageSet) -> dict[int, tuple[int, ...]]:
    """Return where each picture of identity 0 lies in a frame: left, top, right."""
    array, found = np.asarray(frame), {}
    for i in range(6):
        with Image.open(pictures.paths[i]) as one:
            rows, columns = np.nonzero((array == one.getpixel((0, 0))).all(axis=2))
        if len(rows):
            found[i] = int(columns.min()), int(rows.min()), int(columns.max()) + 1
    return found


def test_replay_by_hand(pictures: ImageSet) -> None:
    # the six pictures of identity 0; number 6 is one of identity 1
    first, last = torch.full((2, len(pictures)), -1)
    first[:7] = torch.tensor([3, 3, 0, 0, -1, -1, 0])
    last[:6] = 1
    frames = viz.cluster_replay({"a run": [first, last]}, pictures, limit=1, between=3)
    assert len(frames) == 5 and len({frame.size for frame in frames}) == 1
    before, halfway, after = (places(frames[i], pictures) for i in (0, 2, 4))
    # who shares a cluster stands side by side, and outliers stand apart, at the end
    for (i, j), together in {
        (0, 1): 1,
        (1, 2): 0,
        (2, 3): 1,
        (3, 4): 0,
        (4, 5): 0,
    }.items():
        assert (before[i][2] == before[j][0]) == together
        assert after[i][2] == after[j][0]
    assert before[4][0] > after[4][0] and before[0] == after[0]
    assert after[5][0] < halfway[5][0] < before[5][0]
    assert (
        len({top for found in (before, halfway, after) for _, top, _ in found.values()})
        == 1
    )
    # frames: blue, red with a number, none for outliers and on the way
    edge = {
        i: to_hex(np.array(frames[0].getpixel((x - 3, y + 9))) / 255).upper()
        for i, (x, y, _) in before.items()
    }
    assert [edge[0], edge[2]] == [viz.BLUE, viz.VERMILLION]
    white = np.asarray(frames[0]).reshape(-1, 3)
    assert edge[4] == edge[5] == "#FFFFFF"
    assert (white == [213, 94, 0]).all(axis=1).sum() > 400
    for i, colours in {2: (), 4: (viz.BLUE,)}.items():
        seen = {tuple(p) for p in np.asarray(frames[i]).reshape(-1, 3).tolist()}
        for name in (viz.BLUE, viz.VERMILLION):
            assert (tuple(bytes.fromhex(name[1:])) in seen) == (name in colours)


def test_replay_of_clusters_where_no_identity_is_known(pictures: ImageSet) -> None:
    unknown, labels = pictures.without_identities(), torch.arange(22) // 6
    still = {"one": [labels, labels], "other": [labels.flip(0), labels]}
    a, b = viz.cluster_replay(still, unknown, labels, limit=2)
    half = a.height // 2
    assert np.array_equal(np.asarray(a)[50:half], np.asarray(b)[50:half])
    assert not np.array_equal(np.asarray(a)[half + 50 :], np.asarray(b)[half + 50 :])
