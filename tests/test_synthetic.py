"""The embedded data set: deterministic, free of leaks, one knob for the camera gap."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from o2cap.config import preset
from o2cap.data import load_configured, load_dataset, synthetic
from o2cap.data.images import ImageSet, ReIDDataset
from o2cap.data.readers import name_layout
from o2cap.data.synthetic import (
    SyntheticConfig,
    export_market1501,
    render_dataset,
    render_image,
)
from o2cap.errors import InputError

SMALL = SyntheticConfig(identities=8, test_identities=5, cameras=4, presence=0.7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> ReIDDataset:
    return render_dataset(SMALL, cache=folder)


def pixels(images: ImageSet) -> np.ndarray:
    """Return [N, H, W, 3] in 0..255."""
    return np.stack([np.asarray(Image.open(path)) for path in images.paths])


def keys(config: SyntheticConfig, dataset: ReIDDataset) -> dict[str, tuple[int, ...]]:
    """Return (split, identity, camera) of each file, from the public columns alone."""
    found = {}
    for name, images in dataset.splits().items():
        split = int(name != "train")
        assert images.pids is not None
        for path, pid, camid in zip(
            images.paths, images.pids.tolist(), images.camids.tolist(), strict=True
        ):
            found[str(path)] = (split, pid - split * config.identities, camid)
    return found


# ------------------------------------------------------------------- determinism
def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    one = replace(SMALL, identities=2, test_identities=0)
    sets = [
        render_dataset(replace(one, seed=seed), cache=tmp_path / str(i)).train
        for i, seed in enumerate((0, 0, 1))
    ]
    first, again, other = ([p.read_bytes() for p in part.paths] for part in sets)
    assert first == again
    assert torch.equal(sets[0].camids, sets[1].camids)
    assert first[0] != other[0]


def test_a_picture_depends_on_its_own_key_alone(dataset: ReIDDataset) -> None:
    # Rendered alone, out of order, as part of a set with other counts: the same.
    files = list(keys(SMALL, dataset).items())
    config = replace(SMALL, identities=77, test_identities=3, presence=0.2)
    for path, (split, number, camera) in files[::-19]:
        made = [
            render_image(config, split, number, camera, frame)
            for frame in range(SMALL.images_per_camera)
        ]
        stored = np.asarray(Image.open(path))
        assert any(np.array_equal(stored, image) for image in made)


def test_fewer_identities_are_a_part_of_more(
    dataset: ReIDDataset, folder: Path
) -> None:
    part = render_dataset(replace(SMALL, identities=3, test_identities=0), cache=folder)
    whole = {path.read_bytes() for path in dataset.train.paths}
    assert {path.read_bytes() for path in part.train.paths} <= whole
    assert len(part.query) == len(part.gallery) == 0


# -------------------------------------------------------------- splits and columns
@pytest.mark.parametrize(("seed", "presence"), [(0, 0.05), (1, 0.6), (2, 1.0)])
def test_every_query_has_a_match_in_another_camera(seed: int, presence: float) -> None:
    config = replace(SMALL, seed=seed, presence=presence, test_identities=40)
    split, number, camera, frame = synthetic._columns(config).T
    for who in range(40):
        seen = camera[(split == 1) & (number == who) & (frame > 0)]
        assert len(np.unique(seen)) >= 2
        assert len(seen) == len(np.unique(seen)) * (SMALL.images_per_camera - 1)


def test_columns(dataset: ReIDDataset) -> None:
    train, query, gallery = dataset.train, dataset.query, dataset.gallery
    assert train.pids is not None and query.pids is not None
    assert gallery.pids is not None
    assert set(train.pids.tolist()) == set(range(8))
    assert set(query.pids.tolist()) == set(gallery.pids.tolist()) == set(range(8, 13))
    for images in (train, query, gallery):
        assert images.camids.dtype == torch.int64
        assert set(images.camids.tolist()) == set(range(4))
    pairs = list(zip(query.pids.tolist(), query.camids.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))  # one query per identity and camera
    assert set(pairs) == set(
        zip(gallery.pids.tolist(), gallery.camids.tolist(), strict=True)
    )
    assert pixels(train).shape[1:] == (64, 32, 3)


def test_default_size() -> None:
    rows = synthetic._columns(SyntheticConfig())
    assert 1300 < (rows[:, 0] == 0).sum() < 1600


def test_one_camera_is_possible(folder: Path) -> None:
    config = SyntheticConfig(identities=2, test_identities=1, cameras=1)
    dataset = render_dataset(config, cache=folder)
    assert (len(dataset.train), len(dataset.query), len(dataset.gallery)) == (8, 1, 3)


# --------------------------------------------------------------------------- leaks
def test_names_and_order_tell_nothing(dataset: ReIDDataset) -> None:
    names = [path.name for path in dataset.train.paths]
    assert all(re.fullmatch(r"\d{6}\.png", name) for name in names)
    assert names == sorted(names)
    # Ranks of identity and camera along the order: as uncorrelated as chance has it.
    split, number, camera, frame = synthetic._columns(
        replace(SMALL, identities=60, test_identities=40)
    ).T
    place = np.arange(len(split))
    bound = 4 / np.sqrt(len(place))
    for column in (split, number, camera, frame):
        assert abs(np.corrcoef(place, column)[0, 1]) < bound
    # Neighbours in the order share an identity as seldom as any two pictures.
    same = (number[1:] == number[:-1]) & (split[1:] == split[:-1])
    assert same.mean() < 5 / 60
    # No text chunk of a file holds anything.
    assert Image.open(dataset.train.paths[0]).info == {}


# ------------------------------------------------------------------ the camera gap
@cache
def camera_means(strength: float) -> Any:
    """Return the mean sRGB colour of each camera's pictures [cameras, 3] and its
    standard error."""
    config = SyntheticConfig(strength=strength, cameras=5)
    each = np.array(
        [
            [render_image(config, 0, who, camera, 0).mean((0, 1)) for who in range(10)]
            for camera in range(5)
        ]
    )
    return each.mean(1), each.std(1).max() / np.sqrt(10)


def gap(means: np.ndarray) -> float:
    return float(np.linalg.norm(means[:, None] - means[None], axis=-1).mean())


def test_strength_zero_makes_cameras_alike() -> None:
    means, error = camera_means(0.0)
    assert np.abs(means - means.mean(0)).max() < 4 * error
    looks = synthetic._cameras("person", 3, 5, 0.0)
    for name in synthetic.CAMERA_AXES:
        assert len({look[name] for look in looks}) == 1
    assert all(np.array_equal(look["scene"], looks[0]["scene"]) for look in looks)


def test_the_gap_grows_with_strength() -> None:
    gaps = [gap(camera_means(strength)[0]) for strength in (0.0, 0.5, 1.0, 1.5)]
    assert gaps == sorted(gaps)
    assert gaps[2] > 3 * gaps[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_seed_has_the_same_total_gap(seed: int) -> None:
    looks = synthetic._cameras("person", seed, 6, 1.0)
    for name, (middle, half) in synthetic.CAMERA_AXES.items():
        values = sorted(look[name] for look in looks)
        np.testing.assert_allclose(values, middle + half * np.linspace(-1, 1, 6))


def test_the_background_belongs_to_the_camera() -> None:
    config = SyntheticConfig(cameras=5)
    corners = np.array(
        [
            [
                render_image(config, 0, who, camera, 0)[:6, :5].mean((0, 1))
                for who in range(12)
            ]
            for camera in range(5)
        ]
    )
    # Median over identities: passers-by and poles stand in some corners.
    centre = np.median(corners, 1)
    within = np.median(np.abs(corners - centre[:, None]).sum(-1))
    apart = np.abs(centre[:, None] - centre[None]).sum(-1)
    assert np.median(apart[~np.eye(5, dtype=bool)]) > 2 * within


def test_the_light_changes_from_track_to_track() -> None:
    # A corner of the background, at one camera: four pictures of each person's pass.
    config = SyntheticConfig(strength=0.0, cameras=1, images_per_camera=4)
    corners = np.array(
        [
            [render_image(config, 0, who, 0, i)[:6, :5].mean((0, 1)) for i in range(4)]
            for who in range(12)
        ]
    )
    track = np.median(corners, 1)  # a passer-by stands in some corners
    within = np.median(np.abs(corners - track[:, None]).sum(-1))
    assert np.median(np.abs(track - np.median(track, 0)).sum(-1)) > 2 * within


def test_clothes_have_few_colours_that_many_share() -> None:
    rng = np.random.default_rng(0)
    cloths = np.array([synthetic._cloth(rng) for _ in range(400)])
    near = np.abs(cloths[:, None] - cloths[None]).max(-1) < 0.1
    shared = near.mean(1)  # of the others, how many wear about this colour
    assert shared.min() > 0.05
    assert 0.1 < shared.mean() < 0.4


# --------------------------------------------------------------------- the pictures
def silhouette(who: int, camera: int, frame: int) -> np.ndarray:
    """Return which pixels show the body: those that its paint can change."""
    config = SyntheticConfig(strength=0.3, cameras=3)
    person = synthetic._identity("person", 0, 0, who)
    seen = []
    for value in (0.0, 1.0):
        paint = np.zeros(synthetic.COLUMNS)
        paint[synthetic.C0 : synthetic.C3 + 3] = value
        same = {
            k: paint if isinstance(v, np.ndarray) and v.ndim else v
            for k, v in person.items()
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(synthetic, "_identity", lambda *a, same=same: same)
            seen.append(render_image(config, 0, who, camera, frame, 128, 64))
    return np.abs(seen[0].astype(int) - seen[1]).max(-1) > 60


def test_people_fill_the_frame_and_keep_their_heads() -> None:
    for who in range(8):
        mask = silhouette(who, who % 3, 0)
        rows = np.flatnonzero(mask.any(1))
        assert 0 < rows[0] < 24, who  # a margin above the head, and a small one
        assert rows[-1] < 127, who  # and below the feet
        assert rows[-1] - rows[0] > 0.72 * 128, who
        columns = np.flatnonzero(mask.any(0))
        assert abs(columns.mean() - 32) < 12, who
        assert 0.12 < mask.mean() < 0.6, who


def test_viewpoints_are_three_dimensional() -> None:
    # A print on the chest is seen from the front and not from behind.
    config = SyntheticConfig(strength=0.0, cameras=1)
    person = dict(synthetic._identity("person", 0, 0, 0))
    person |= {"bag": "none", "garment": "tee", "hem": 0.5, "style": "short"}
    red = (1.0, 0.0, 0.0)
    shirt = {"mark_x": 0.05, "mark_z": 0.7, "mark_h": 0.05}
    person["torso"] = synthetic._paint(
        (0.1, 0.1, 0.1), c2=red, mark=synthetic.PRINT_FRONT, **shirt
    )
    amounts = []
    for angle in (0.0, 180.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(synthetic, "_identity", lambda *a: person)
            patch.setitem(synthetic.CAMERA_AXES, "azimuth", (angle, 0.0))
            patch.setitem(synthetic.CAMERA_AXES, "occlusion", (0.0, 0.0))
            patch.setattr(synthetic, "HEADING", 0.0)
            patch.setattr(synthetic, "TURNED", 0.0)
            patch.setattr(synthetic, "PASSER_BY", 0.0)
            synthetic._cameras.cache_clear()
            image = render_image(config, 0, 0, 0, 0, 128, 64).astype(int)
        synthetic._cameras.cache_clear()
        amounts.append(int((image[..., 0] - image[..., 1] > 90).sum()))
    assert amounts[0] > 60
    assert amounts[1] < 10


# ------------------------------------------------------------------------ the cache
def test_the_cache_is_used_again(
    dataset: ReIDDataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [path.stat().st_mtime_ns for path in dataset.train.paths]

    def fail(*args: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(synthetic, "render_image", fail)
    again = render_dataset(SMALL, cache=folder)
    assert [path.stat().st_mtime_ns for path in again.train.paths] == before
    with pytest.raises(AssertionError, match="rendered again"):
        render_dataset(replace(SMALL, strength=0.9), cache=folder)
    with pytest.raises(AssertionError, match="rendered again"):
        render_dataset(SMALL, 32, 16, cache=folder)


def test_a_broken_off_render_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, identities=2, test_identities=1)
    real, calls = synthetic.render_image, []

    def breaks(*args: Any) -> np.ndarray:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(synthetic, "render_image", breaks)
    with pytest.raises(KeyboardInterrupt):
        render_dataset(config, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
    # Killed outright, a temporary folder stays: it is never taken for the set.
    (tmp_path / ".unfinished-x" / "images").mkdir(parents=True)
    dataset = render_dataset(config, cache=tmp_path)
    assert all(path.is_file() for path in dataset.train.paths)
    assert len(dataset.train) == len(calls) - 5 - len(dataset.query) - len(
        dataset.gallery
    )


def test_a_cache_with_a_missing_file_is_made_again(tmp_path: Path) -> None:
    config = replace(SMALL, identities=1, test_identities=0)
    paths = render_dataset(config, cache=tmp_path).train.paths
    lost = paths[1].read_bytes()
    paths[1].unlink()
    again = render_dataset(config, cache=tmp_path)
    assert again.train.paths == paths
    assert paths[1].read_bytes() == lost


def test_the_cache_folder_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("O2CAP_CACHE", str(tmp_path / "here"))
    dataset = render_dataset(replace(SMALL, identities=1, test_identities=0), 32, 16)
    assert dataset.train.paths[0].is_relative_to(tmp_path / "here")


# ----------------------------------------------------------------------- the export
PATTERN = re.compile(r"(\d{4})_c(\d)s\d_(\d{6})_(\d{2})\.png")


def test_export(dataset: ReIDDataset, tmp_path: Path) -> None:
    folder = tmp_path / "market"
    export_market1501(dataset, folder)
    places = ("bounding_box_train", "query", "bounding_box_test")
    assert sorted(p.name for p in folder.iterdir()) == sorted(places)
    for (_, images), place in zip(dataset.splits().items(), places, strict=True):
        files = sorted((folder / place).iterdir())
        matches = [PATTERN.fullmatch(path.name) for path in files]
        assert len(files) == len(images) and all(matches)
        assert images.pids is not None
        columns = zip(images.pids.tolist(), (images.camids + 1).tolist(), strict=True)
        assert sorted(columns) == sorted(
            (int(m[1]), int(m[2])) for m in matches if m is not None
        )
    assert list(tmp_path.iterdir()) == [folder]
    read = load_dataset("market1501", folder)
    assert read.counts() == dataset.counts()
    assert all(name_layout(part.paths) for part in read.splits().values())
    with pytest.raises(InputError, match="not empty"):
        export_market1501(dataset, folder)


def test_export_leaves_nothing_half_written(
    dataset: ReIDDataset, tmp_path: Path
) -> None:
    nameless = replace(dataset, gallery=dataset.gallery.without_identities())
    with pytest.raises(InputError, match="gallery"):
        export_market1501(nameless, tmp_path / "market")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------ bad input
def test_the_kind_is_said_once_by_the_settings_or_by_the_name() -> None:
    few = SyntheticConfig(identities=1, test_identities=0, cameras=2)
    vehicles = load_dataset(
        "synthetic", kind="vehicle", identities=1, test_identities=0
    )
    assert vehicles.name == "synthetic-vehicle"
    with Image.open(vehicles.train.paths[0]) as picture:
        assert picture.size == (64, 64)
    for name, settings in (
        ("synthetic-vehicles", few),
        ("synthetic", replace(few, kind="vehicle")),
    ):
        shown = preset("smoke", dataset=name, synthetic=settings)
        assert load_configured(shown).name == "synthetic-vehicle"
    with pytest.raises(InputError, match="leave --root out"):
        load_dataset("synthetic", Path("x"))


def test_bad_sizes(tmp_path: Path) -> None:
    for height, width, workers in ((8, 32, 0), (64, 4000, 0), (64, 32, -1)):
        with pytest.raises(InputError):
            render_dataset(SMALL, height, width, workers=workers, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
