"""Rendered vehicles: the same machinery and the same promises as for pedestrians."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from o2cap.data import synthetic
from o2cap.data.synthetic import SyntheticConfig, render_dataset, render_image

SMALL = SyntheticConfig(kind="vehicle", identities=6, test_identities=4, cameras=3)


def test_a_small_set_is_deterministic(tmp_path: Path) -> None:
    first = render_dataset(SMALL, 64, 64, cache=tmp_path / "a")
    again = render_dataset(SMALL, 64, 64, cache=tmp_path / "b")
    assert first.name == "synthetic-vehicle"
    for split, images in first.splits().items():
        twin = again.splits()[split]
        assert [p.read_bytes() for p in images.paths] == [
            p.read_bytes() for p in twin.paths
        ]
    assert first.train.pids is not None and first.query.pids is not None
    assert not set(first.train.pids.tolist()) & set(first.query.pids.tolist())
    assert np.asarray(Image.open(first.train.paths[0])).shape == (64, 64, 3)


def test_people_and_vehicles_do_not_share_a_cache(tmp_path: Path) -> None:
    cars = render_dataset(replace(SMALL, test_identities=0), 32, 32, cache=tmp_path)
    people = replace(SMALL, kind="person", test_identities=0)
    other = render_dataset(people, 32, 32, cache=tmp_path)
    assert cars.train.paths[0].parents[1] != other.train.paths[0].parents[1]


def test_all_types_are_drawn() -> None:
    kinds = Counter(synthetic._identity("vehicle", 0, 0, i)["kind"] for i in range(300))
    assert set(kinds) == set(synthetic._CARS)
    assert min(kinds.values()) >= 8


def vehicle(kind: str) -> dict[str, Any]:
    return next(
        who
        for who in (synthetic._identity("vehicle", 0, 0, i) for i in range(300))
        if who["kind"] == kind
    )


@pytest.mark.parametrize("kind", list(synthetic._CARS))
def test_every_outline_is_convex(kind: str) -> None:
    # A block is the intersection of half-spaces, one per edge: a corner that lies
    # outside another edge would be cut off unseen.
    who = vehicle(kind)
    for name in ("outline", "cabin", "box"):
        points = who[name]
        if points is None:
            continue
        edge = np.roll(points, -1, axis=0) - points
        normal = np.stack([-edge[:, 1], edge[:, 0]], 1)
        outside = (normal[:, None] * (points[None] - points[:, None])).sum(-1)
        assert outside.max() < 1e-9, (kind, name)


def seen_colours(
    monkeypatch: pytest.MonkeyPatch, kind: str, azimuth: float, **columns: Any
) -> np.ndarray:
    """Render a type from one side, painted black but for the columns given."""
    who = dict(vehicle(kind))
    paint = who["paint"].copy()
    paint[synthetic.C0 : synthetic.C3 + 3] = 0.0
    paint[synthetic.GLOSS] = 0
    for name, value in columns.items():
        start = getattr(synthetic, name.upper())
        paint[start : start + np.size(value)] = value
    who["paint"] = paint
    monkeypatch.setattr(synthetic, "_identity", lambda *a: who)
    for axis, middle in (("azimuth", azimuth), ("occlusion", 0), ("saturation", 0)):
        monkeypatch.setitem(synthetic.CAMERA_AXES, axis, (middle, 0.0))
    monkeypatch.setattr(synthetic, "HEADING", 0.0)
    monkeypatch.setattr(synthetic, "TURNED", 0.0)
    synthetic._cameras.cache_clear()
    try:
        return render_image(replace(SMALL, strength=0.0), 0, 0, 0, 0, 128, 128).astype(
            int
        )
    finally:
        synthetic._cameras.cache_clear()


def reddish(image: np.ndarray) -> int:
    return int((image[..., 0] - image[..., 1] > 60).sum())


def test_lamps_are_white_in_front_and_red_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    front = seen_colours(monkeypatch, "sedan", 0.0)
    rear = seen_colours(monkeypatch, "sedan", 180.0)
    assert reddish(front) < 5
    assert reddish(rear) > 60


def test_a_decal_shows_from_the_side_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stripe = {"decal": 1.0, "c1": (1.0, 0.0, 0.0)}
    side = seen_colours(monkeypatch, "van", 90.0, **stripe)
    front = seen_colours(monkeypatch, "van", 0.0, **stripe)
    assert reddish(side) > 300
    assert reddish(front) < 20


def test_the_gap_grows_with_strength() -> None:
    gaps = []
    for strength in (0.0, 0.5, 1.0):
        config = SyntheticConfig(kind="vehicle", strength=strength, cameras=4)
        means = np.array(
            [
                [
                    render_image(config, 0, who, c, 0, 48, 48).mean((0, 1))
                    for who in range(12)
                ]
                for c in range(4)
            ]
        ).mean(1)
        gaps.append(np.linalg.norm(means[:, None] - means[None], axis=-1).mean())
    assert gaps == sorted(gaps)
    assert gaps[2] > 2 * gaps[0]


def test_the_vehicle_lies_within_the_picture() -> None:
    config = SyntheticConfig(kind="vehicle", strength=0.0, cameras=1)
    for number in range(12):
        who = synthetic._identity("vehicle", 0, 0, number)
        seen = []
        for value in (0.0, 1.0):
            paint = np.zeros(synthetic.COLUMNS)
            paint[synthetic.C0 : synthetic.C3 + 3] = value
            same = {k: paint if "paint" in k or k in ("dark", "rim") else v
                    for k, v in who.items()}  # fmt: skip
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(synthetic, "_identity", lambda *a, same=same: same)
                seen.append(render_image(config, 0, number, 0, 0, 96, 96))
        mask = np.abs(seen[0].astype(int) - seen[1]).max(-1) > 60
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert rows[0] > 0 and rows[-1] < 95
        assert columns[0] > 0 and columns[-1] < 95
        assert max(np.ptp(rows), np.ptp(columns)) > 0.7 * 96
        assert mask.mean() > 0.2
