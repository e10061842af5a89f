"""Using a trained model: embed, search, cluster."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from o2cap.config import ClusteringConfig
from o2cap.data import load_dataset
from o2cap.data.images import ImageSet
from o2cap.errors import InputError
from o2cap.features import extract
from o2cap.inference import (
    Clustering,
    Embedding,
    cluster,
    embed,
    find_pictures,
    load_embedding,
    search,
)
from o2cap.run import load_model
from o2cap.trainer import find_clusters, train

TINY = tiny.config(
    Path("run"),
    dataset="folders",
    clustering=ClusteringConfig(k1=6, k2=2, min_samples=2),
)


def paint(path: Path, pid: int, camid: int, k: int) -> None:
    """Write a picture of coloured stripes: the identity's, tinted by the camera."""
    rng = np.random.default_rng(pid)
    stripes = rng.integers(40, 200, (4, 1, 3)).repeat(8, axis=0).repeat(16, axis=1)
    noise = np.random.default_rng([pid, camid, k]).integers(0, 12, stripes.shape)
    tint = 20 * np.eye(3, dtype=int)[camid % 3]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((stripes + noise + tint).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a camera; 5 identities, 2 cameras, 3 pictures of each in each."""
    folder = tmp_path_factory.mktemp("pictures")
    for camid in (1, 2):
        for pid in range(5):
            for k in range(3):
                paint(folder / f"cam{camid}/p{pid}-{k}.png", pid, camid, k)
    return folder


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "tiny"
    return train(replace(TINY, root=pictures, output=output)).directory


# ------------------------------------------------------------------------ find pictures


@pytest.mark.parametrize(
    ("name", "camid", "pid"),
    [
        ("0002_c3s1_000451_03.jpg", 3, 2),  # Market-1501
        ("-1_c3s1_000451_03.jpg", 3, -1),  # its junk
        ("0002_c12_f0046182.jpg", 12, 2),  # DukeMTMC-reID
        ("cam7/0002_c3s1_000451_03.jpg", 3, 2),  # the name is nearer
        ("cam7/x.png", 7, -1),
        ("Camera_02/x.png", 2, -1),
        ("c5/monday/x.png", 5, -1),
        ("c5/cam6/x.png", 6, -1),
        ("cam/x.png", -1, -1),
        ("abc4/x.png", -1, -1),
        ("x.png", -1, -1),
    ],
)
def test_names_say_cameras_and_identities(
    tmp_path: Path, name: str, camid: int, pid: int
) -> None:
    folder = tmp_path / "set"
    paint(folder / name, 0, 0, 0)
    found = find_pictures(folder)
    assert list(found.paths) == [folder / name]
    assert found.camids.tolist() == [camid]
    assert (found.pids is None) if pid < 0 else (found.pids.tolist() == [pid])


def test_files_and_folders_are_taken_once_and_in_order(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures)
    first = Path("cam2/p0-1.png")
    found = find_pictures([first, Path("cam2"), pictures / "cam2"])
    rest = [p for p in sorted((pictures / "cam2").iterdir()) if p.name != first.name]
    assert list(found.paths) == [pictures / first, *rest]
    assert set(found.camids.tolist()) == {2}


def test_a_camera_folder_above_what_was_named_says_nothing(tmp_path: Path) -> None:
    paint(tmp_path / "cam1/mine/set/x.png", 0, 0, 0)
    assert find_pictures(tmp_path / "cam1/mine/set").camids.tolist() == [-1]
    assert find_pictures(tmp_path / "cam1/mine/set/x.png").camids.tolist() == [-1]


def test_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none here")
    with pytest.raises(InputError, match="holds no picture"):
        find_pictures(tmp_path)
    with pytest.raises(InputError, match=r"gone\.jpg does not exist"):
        find_pictures(tmp_path / "gone.jpg")
    with pytest.raises(InputError, match="No pictures were named"):
        find_pictures([])


# -------------------------------------------------------------------------------- embed


def test_embed_is_the_model_on_the_pictures_in_order(run: Path, pictures: Path) -> None:
    found = embed(run, pictures)
    config, model = load_model(run)
    expected = extract(
        model, found.images, height=config.height, width=config.width, batch_size=7
    )
    assert torch.allclose(found.features, expected, atol=1e-6)
    assert found.images.camids.tolist() == [1] * 15 + [2] * 15
    swapped = embed(run, [pictures / "cam2", pictures / "cam1"])
    assert torch.allclose(swapped.features, found.features.roll(15, 0), atol=1e-6)


def test_features_are_saved_and_read_back(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    found = embed(run, pictures)
    found.save(tmp_path / "deep/features.npz")
    assert os.listdir(tmp_path / "deep") == ["features.npz"]
    back = load_embedding(tmp_path / "deep/features.npz")
    assert torch.equal(back.features, found.features)
    assert torch.equal(back.images.camids, found.images.camids)
    assert list(back.images.paths) == list(found.images.paths)
    assert back.model == found.model
    with np.load(tmp_path / "deep/features.npz", allow_pickle=False) as file:
        assert sorted(file) == ["camids", "features", "model", "paths"]
        assert file["features"].shape == (30, found.features.shape[1])


GOOD = {
    "paths": np.array(["a.png", "b.png"]),
    "features": np.eye(2, dtype=np.float32),
    "camids": np.array([0, -1]),
    "model": np.array("0123"),
}


@pytest.mark.parametrize(
    "change",
    [
        {"features": None},
        {"features": np.full((2, 2), np.nan, np.float32)},
        {"features": np.eye(2)},
        {"features": np.eye(3, dtype=np.float32)},
        {"features": np.zeros(2, np.float32)},
        {"camids": np.array([0.0, 1.0])},
        {"camids": np.array([[0, 1]])},
        {"paths": np.array([b"a.png", b"b.png"])},
        {"paths": np.array(["a.png", "b.png"], dtype=object)},
        {"paths": np.array("a.png")},
        {k: v[:0] for k, v in GOOD.items() if v.ndim},
    ],
)
def test_other_npz_files_are_refused(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "features.npz"
    np.savez(path, **GOOD)
    load_embedding(path)
    columns = {k: v for k, v in (GOOD | change).items() if v is not None}
    np.savez(path, allow_pickle=True, **columns)
    with pytest.raises(InputError, match=r"features\.npz holds no features"):
        load_embedding(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_embedding(tmp_path / "gone.npz")
    path = tmp_path / "features.npz"
    np.savez(path, **GOOD)
    whole = path.read_bytes()
    for damaged in (b"", b"no archive", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="holds no features"):
            load_embedding(path)
    np.save(path.with_suffix(".npy"), np.eye(2))
    path.with_suffix(".npy").rename(path)
    with pytest.raises(InputError, match="holds no features"):
        load_embedding(path)


def test_unreadable_pictures_are_named_or_left_out(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cam3"
    shutil.copytree(pictures / "cam1", folder)
    broken = folder / "p1-1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(InputError, match=r"p1-1\.png cannot be read"):
        embed(run, folder)
    found = embed(run, folder, skip_unreadable=True)
    assert len(found.images) == len(found.features) == 14
    assert broken not in found.images.paths


@pytest.mark.parametrize("call", [embed, cluster])
def test_directories_that_are_no_finished_run(
    run: Path, pictures: Path, tmp_path: Path, call
) -> None:
    with pytest.raises(InputError, match="no run directory"):
        call(tmp_path, pictures)
    shutil.copytree(run, tmp_path / "half")
    (tmp_path / "half/model.safetensors").unlink()
    with pytest.raises(InputError, match="not finished"):
        call(tmp_path / "half", pictures)


def test_a_device_that_is_not_here(run: Path, pictures: Path) -> None:
    with pytest.raises(InputError, match="cuda:99 cannot be used here"):
        embed(run, pictures, device="cuda:99")


# ------------------------------------------------------------------------------- search


def test_search_finds_what_brute_force_finds(run: Path, pictures: Path) -> None:
    query = pictures / "cam1/p2-0.png"
    ranking = search(run, query, pictures, top=7)
    every = embed(run, pictures)
    own = list(every.images.paths).index(query)
    similarity = every.features @ every.features[own]
    order = [i for i in similarity.argsort(descending=True).tolist() if i != own][:7]
    assert list(ranking.found.paths) == [every.images.paths[i] for i in order]
    matches = ranking.matches()
    assert [m.rank for m in matches] == list(range(1, 8))
    assert [m.distance for m in matches] == pytest.approx(
        (1 - similarity[order]).clamp(min=0).tolist(), abs=2e-6
    )
    assert [m.camid for m in matches] == every.images.camids[order].tolist()
    assert {m.same_identity for m in matches} == {None}


def test_search_in_saved_features_and_in_other_forms(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    query, folder = pictures / "cam1/p2-0.png", pictures / "cam2"
    features = embed(run, folder)
    features.save(tmp_path / "features.npz")
    expected = search(run, query, folder, top=99).matches()
    assert len(expected) == 15  # all there are
    for gallery in (tmp_path / "features.npz", features, features.images, [folder]):
        found = search(run, query, gallery, top=99).matches()
        assert [m.path for m in found] == [m.path for m in expected]


def test_features_of_another_model_are_refused(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    own = embed(run, pictures)
    Embedding(own.images, own.features, "another").save(tmp_path / "old.npz")
    for call in (
        lambda: search(run, pictures / "cam1/p2-0.png", tmp_path / "old.npz"),
        lambda: cluster(run, tmp_path / "old.npz"),
    ):
        with pytest.raises(InputError, match=r"old\.npz were made by another model"):
            call()


def test_matches_are_marked_where_names_say_identities(
    run: Path, tmp_path: Path
) -> None:
    for pid in (3, 4):
        for k in range(2):
            paint(tmp_path / f"{pid:04d}_c2s1_00000{k}_00.png", pid, 2, k)
    paint(tmp_path / "query/0003_c1s1_000000_00.png", 3, 1, 0)
    paint(tmp_path / "stranger.png", 7, 1, 0)
    (query,) = find_pictures(tmp_path / "query").paths
    matches = search(run, query, tmp_path).matches()
    said = {Path(m.path).name[:4]: m.same_identity for m in matches}
    assert said == {"0003": True, "0004": False, "stra": None}


def test_rankings_are_saved(run: Path, pictures: Path, tmp_path: Path) -> None:
    query = pictures / "cam1/p2-0.png"
    ranking = search(run, query, pictures, top=3)
    for suffix in ("png", "json", "csv"):
        ranking.save(tmp_path / f"out/ranked.{suffix}")
    assert len(os.listdir(tmp_path / "out")) == 3
    with Image.open(tmp_path / "out/ranked.png") as picture:
        picture.verify()
    whole = json.loads((tmp_path / "out/ranked.json").read_text())
    assert whole["query"] == str(query)
    with (tmp_path / "out/ranked.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, match, said in zip(rows, ranking.matches(), whole["matches"], strict=True):
        assert said == vars(match)
        assert (row["rank"], row["path"]) == (str(match.rank), match.path)
    with pytest.raises(InputError, match=r"must end in \.png, \.json or \.csv"):
        ranking.save(tmp_path / "ranked.doc")


def test_search_needs_one_query_and_a_gallery(run: Path, pictures: Path) -> None:
    one = pictures / "cam1/p2-0.png"
    with pytest.raises(InputError, match="top is 0"):
        search(run, one, pictures, top=0)
    with pytest.raises(InputError, match="must be one picture"):
        search(run, pictures, pictures)
    with pytest.raises(InputError, match="no picture but the query itself"):
        search(run, one, one)


# ------------------------------------------------------------------------------ cluster


def test_cluster_uses_the_settings_of_the_run(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    found = cluster(run, pictures)
    embedding = embed(run, pictures)
    config, _ = load_model(run)
    assert torch.equal(found.clusters, find_clusters(embedding.features, config))
    found.save(tmp_path / "clusters.csv")
    with (tmp_path / "clusters.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "camid", "cluster"]
    columns = (embedding.images.paths, embedding.images.camids, found.clusters)
    assert rows[1:] == [
        [str(p), str(int(c)), str(int(k))] for p, c, k in zip(*columns, strict=True)
    ]


def test_a_contact_sheet_per_cluster(pictures: Path, tmp_path: Path) -> None:
    images = find_pictures(pictures)
    clusters = torch.full((30,), -1)
    clusters[:4], clusters[15:18] = 0, 1
    assert Clustering(images, clusters).save_sheets(tmp_path / "sheets") == 2
    names = sorted(os.listdir(tmp_path / "sheets"))
    assert names == ["cluster_0000.png", "cluster_0001.png"]
    with Image.open(tmp_path / "sheets/cluster_0000.png") as picture:
        picture.verify()
    with pytest.raises(InputError, match="sheets is not empty"):
        Clustering(images, clusters).save_sheets(tmp_path / "sheets")


def test_names_of_files_survive_csv(tmp_path: Path) -> None:
    names = ['a,"b"\n.png', "ü.png", os.fsdecode(b"\xff.png")]
    images = ImageSet([Path(n) for n in names], torch.zeros(3, dtype=torch.int64))
    Clustering(images, torch.tensor([0, 0, -1])).save(tmp_path / "clusters.csv")
    with (tmp_path / "clusters.csv").open(
        newline="", encoding="utf-8", errors="surrogateescape"
    ) as file:
        assert [row["path"] for row in csv.DictReader(file)] == names


# ------------------------------------------------------------------------ real pictures


@pytest.mark.skipif(
    "O2CAP_REAL_DATA" not in os.environ,
    reason="O2CAP_REAL_DATA does not name the folder of ward/manifest.csv",
)
def test_real_pictures(run: Path, tmp_path: Path) -> None:
    manifest = Path(os.environ["O2CAP_REAL_DATA"]) / "ward/manifest.csv"
    gallery = load_dataset("manifest", manifest).gallery
    gallery = gallery.select(torch.arange(0, len(gallery), 4))
    embed(run, gallery).save(tmp_path / "ward.npz")
    assert gallery.pids is not None
    hits = 0
    for i in range(0, len(gallery), len(gallery) // 20):
        best = search(run, Path(gallery.paths[i]), tmp_path / "ward.npz", top=1)
        j = list(gallery.paths).index(best.found.paths[0])
        hits += bool(gallery.pids[j] == gallery.pids[i])
    # A camera's frames of one person are near-doubles: even this network finds some.
    assert hits >= 8  # of 21; by chance 1 or 2
    best.save(tmp_path / "ranked.png")


def test_a_path_that_the_system_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be used .*too long"):
        find_pictures(tmp_path / ("n" * 300))
