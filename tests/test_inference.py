"""Using a trained model: find pictures, embed, search, cluster, export."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from PIL import Image

from o2cap import inference
from o2cap.config import ClusteringConfig
from o2cap.data import load_dataset
from o2cap.data.finding import find_pictures
from o2cap.data.images import ImageSet
from o2cap.data.loading import decode
from o2cap.errors import InputError
from o2cap.features import extract, standardise_by_camera
from o2cap.inference import (
    Clustering,
    Embedding,
    cluster,
    embed,
    export,
    load_embedding,
    search,
)
from o2cap.reranking import rerank
from o2cap.run import load_model
from o2cap.trainer import find_clusters, train


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
    config = tiny.config(
        tmp_path_factory.mktemp("runs") / "tiny",
        dataset="folders",
        root=pictures,
        epochs=1,
        clustering=ClusteringConfig(k1=6, k2=2, min_samples=2),
    )
    return train(config).directory


@pytest.fixture(scope="module")
def embedding(run: Path, pictures: Path) -> Embedding:
    return embed(run, pictures)


# ------------------------------------------------------------------------ find pictures


@pytest.mark.parametrize(
    ("name", "camera", "camid"),
    [
        ("0002_c3s1_000451_03.jpg", "c3", 3),  # Market-1501
        ("cam7/0002_c12_f0046182.jpg", "c12", 12),  # DukeMTMC-reID; the name is nearer
        ("cam7/20240131_c1_000.jpg", "cam7", 8),  # a date, no layout; 7 is taken
        ("Camera_02/x.png", "Camera_02", 2),
        ("c5/monday/x.png", "c5", 5),
        ("c5/cam6/x.png", "cam6", 6),
        ("cam/x.png", "", -1),
        ("abc4/x.png", "", -1),
        ("lobby/x.png", "lobby", 0),  # a camera of the run
        ("3/x.png", "", -1),
    ],
)
def test_names_say_cameras_and_no_identities(
    tmp_path: Path, name: str, camera: str, camid: int
) -> None:
    folder = tmp_path / "set"
    paint(folder / name, 0, 0, 0)
    found = find_pictures(folder, [(0, "lobby"), (7, "yard"), (3, "3")])
    assert list(found.paths) == [folder / name]
    assert found.camids.tolist() == [camid]
    assert (found.camera(0), found.identity(0)) == (camera, "")


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


def test_no_pictures(run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none here")
    for what, said in (
        (tmp_path, "holds no picture"),
        (tmp_path / "gone.jpg", r"gone\.jpg cannot be read \(No such file"),
        ([], "no pictures to embed"),
    ):
        with pytest.raises(InputError, match=said):
            embed(run, what)
    with pytest.raises(OSError, match="too long"):  # the program names it
        embed(run, tmp_path / ("n" * 300))


# -------------------------------------------------------------------------------- embed


def test_embed_is_the_model_on_the_pictures_in_order(
    run: Path, pictures: Path, embedding: Embedding
) -> None:
    config, model = load_model(run)
    size = {"height": config.height, "width": config.width}
    expected = extract(model, embedding.images, **size)
    assert torch.allclose(embedding.features, expected, atol=1e-6)
    swapped = embed(run, [pictures / "cam2", pictures / "cam1"])
    assert torch.allclose(swapped.features, expected.roll(15, 0), atol=1e-6)
    # Cameras have the numbers and names that they had in training.
    trained = load_dataset("folders", pictures).train
    assert torch.equal(embedding.images.camids, trained.camids)
    assert torch.equal(swapped.images.camids, trained.camids.roll(15))
    assert {embedding.images.camera(i) for i in (0, 14)} == {"cam1"}


def test_features_are_saved_and_read_back(embedding: Embedding, tmp_path: Path) -> None:
    path = tmp_path / "deep/features.npz"
    embedding.save(path)
    assert os.listdir(tmp_path / "deep") == ["features.npz"]
    back, images = load_embedding(path), embedding.images
    assert torch.equal(back.features, embedding.features)
    assert torch.equal(back.images.camids, images.camids)
    assert list(back.images.paths) == list(images.paths)
    assert (back.images.camera(3), back.images.identity(3)) == ("cam1", "")
    assert back.model == embedding.model


GOOD: dict[str, Any] = {
    "paths": np.array(["a.png", "b.png"]),
    "features": np.eye(2, dtype=np.float32),
    "camids": np.array([0, -1]),
    "cameras": np.array(["cam0", ""]),
    "identities": np.array(["", ""]),
    "model": np.array("0123"),
}


@pytest.mark.parametrize(
    "change",
    [
        {"features": None},
        {"features": np.full((2, 2), np.nan, np.float32)},
        {"features": np.eye(3, dtype=np.float32)},
        {"features": np.zeros(2, np.float32)},
        {"camids": np.array([0.0, 1.0])},
        {"camids": np.array([[0, 1]])},
        {"paths": np.array([b"a.png", b"b.png"])},
        {"paths": np.array(["a.png", "b.png"], dtype=object)},
        {"paths": np.array("a.png")},
    ],
)
def test_other_npz_files_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "features.npz"
    np.savez(path, **GOOD)
    load_embedding(path)
    columns = {k: v for k, v in (GOOD | change).items() if v is not None}
    np.savez(path, allow_pickle=True, **columns)
    with pytest.raises(InputError, match=r"features\.npz holds no features"):
        load_embedding(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
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
    assert found.images.camera(0) == "cam3"


def test_what_is_no_finished_run_or_no_device(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "half")
    (tmp_path / "half/model.safetensors").unlink()
    for call in (embed, cluster):
        with pytest.raises(InputError, match="cannot be read as settings"):
            call(tmp_path, pictures)
        with pytest.raises(InputError, match="not finished"):
            call(tmp_path / "half", pictures)
    with pytest.raises(InputError, match="cuda:99 cannot be used here"):
        embed(run, pictures, device="cuda:99")


# ------------------------------------------------------------------------------- search


@pytest.mark.parametrize("block", [2**24, 60])
def test_search_finds_what_brute_force_finds(
    run: Path,
    pictures: Path,
    embedding: Embedding,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every query at once, in blocks of two rows, too."""
    monkeypatch.setattr(inference, "_BLOCK_ELEMENTS", block)
    ranking = search(run, embedding.images, embedding, top=7)
    similarity = embedding.features @ embedding.features.T
    similarity.fill_diagonal_(-torch.inf)  # no picture is a match of itself
    best = similarity.topk(7)
    assert torch.allclose(1 - ranking.distance, best.values, atol=1e-6)
    assert torch.allclose(similarity.gather(1, ranking.index), best.values, atol=1e-6)
    row = ranking.matches(4)
    assert [m.rank for m in row] == list(range(1, 8))
    assert [m.path for m in row] == [
        str(embedding.images.paths[i]) for i in ranking.index[4]
    ]
    assert {m.camera for m in row} <= {"cam1", "cam2"}
    assert {m.same_identity for m in row} == {None}


def test_the_own_camera_and_what_is_far_can_be_left_out(
    run: Path, pictures: Path, embedding: Embedding
) -> None:
    query = pictures / "cam1/p2-0.png"
    everything = search(run, query, embedding, top=99).matches()
    assert len(everything) == 29
    other = search(run, query, embedding, top=99, same_camera="drop").matches()
    theirs = [m.path for m in everything if m.camera == "cam2"]
    assert [m.path for m in other] == theirs and len(theirs) == 15
    far = everything[9].distance
    near = search(run, query, embedding, top=99, max_distance=far + 1e-5).matches()
    assert near == [m for m in everything if m.distance <= far + 1e-5]
    nothing = search(run, query, embedding, max_distance=0, same_camera="drop")
    assert nothing.records() == [{"query": str(query), "matches": []}]


def test_search_by_neighbourhoods(run: Path, embedding: Embedding) -> None:
    few = embedding.images.select(torch.tensor([0, 20]))
    ranking = search(run, few, embedding, top=5, rerank=True)
    (distance,) = rerank(embedding.features[[0, 20]], embedding.features)
    distance[[0, 1], [0, 20]] = torch.inf
    best = distance.topk(5, largest=False).values
    assert torch.allclose(distance.gather(1, ranking.index), best, atol=1e-6)
    cosine = 1 - embedding.features[[0, 20]] @ embedding.features.T
    assert torch.allclose(ranking.distance, cosine.gather(1, ranking.index), atol=1e-6)


def test_features_standardised_by_camera_stay_apart_from_plain_ones(
    run: Path, pictures: Path, embedding: Embedding, tmp_path: Path
) -> None:
    camids = embedding.images.camids
    changed = embed(run, embedding, standardise=True)
    expected = standardise_by_camera(embedding.features, camids)
    assert torch.equal(changed.features, expected)
    changed.save(tmp_path / "f.npz")
    with pytest.raises(InputError, match=r"f\.npz were made .* by --standardise"):
        search(run, pictures / "cam1/p2-0.png", tmp_path / "f.npz")

    # Queries and gallery together have the statistics; the distance is the plain one.
    few = torch.tensor([0, 20])
    asked = search(run, embedding.images.select(few), embedding, standardise=True)
    x, y = embedding.features[few], embedding.features
    both = standardise_by_camera(torch.cat([x, y]), torch.cat([camids[few], camids]))
    similarity = both[:2] @ both[2:].T
    similarity[[0, 1], few] = -torch.inf
    best = similarity.topk(10).values
    assert torch.allclose(similarity.gather(1, asked.index), best, atol=1e-6)
    assert torch.allclose(asked.distance, (1 - x @ y.T).gather(1, asked.index))

    paint(tmp_path / "cam3/alone.png", 0, 0, 0)
    paint(tmp_path / "elsewhere/x.png", 0, 0, 0)
    with pytest.raises(InputError, match=r"needs more than .*alone\.png of its cam"):
        search(run, tmp_path / "cam3", embedding, standardise=True)
    with pytest.raises(InputError, match=r"--standardise needs the camera of .*x\.png"):
        embed(run, tmp_path / "elsewhere", standardise=True)
    single = embed(run, tmp_path / "cam3", standardise=True)  # similar to nothing
    single.save(tmp_path / "single.npz")
    assert not load_embedding(tmp_path / "single.npz").features.any()


def test_search_in_saved_features_and_in_other_forms(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    query, folder = pictures / "cam1/p2-0.png", pictures / "cam2"
    features = embed(run, folder)
    features.save(tmp_path / "features.npz")
    expected = search(run, query, folder, top=99).matches()
    assert len(expected) == 15  # all there are
    for gallery in (tmp_path / "features.npz", [folder]):
        assert search(run, query, gallery, top=99).matches() == expected


def test_features_of_another_model_are_refused(
    run: Path, pictures: Path, embedding: Embedding, tmp_path: Path
) -> None:
    replace(embedding, model="another").save(tmp_path / "old.npz")
    for call in (
        lambda: search(run, pictures / "cam1/p2-0.png", tmp_path / "old.npz"),
        lambda: cluster(run, tmp_path / "old.npz"),
    ):
        with pytest.raises(InputError, match=r"old\.npz were made by another model"):
            call()


def test_identities_come_from_one_layout_or_a_manifest(
    run: Path, tmp_path: Path
) -> None:
    gallery, query = tmp_path / "gallery", tmp_path / "0003_c1s1_000000_00.png"
    for pid in (0, 3, 4):  # 0: a distractor, which is nobody
        paint(gallery / f"{pid:04d}_c2s1_000001_00.png", pid, 2, 0)
    paint(query, 3, 1, 0)
    said = {m.identity: m.same_identity for m in search(run, query, gallery).matches()}
    assert said == {"3": True, "4": False, "": None}
    # With a single stranger among them the names are no layout, and say nothing.
    paint(gallery / "0003_c2_000.png", 7, 1, 0)
    matches = search(run, query, gallery).matches()
    assert {(m.identity, m.same_identity) for m in matches} == {("", None)}

    names = sorted(path.name for path in gallery.iterdir())
    lines = [f"gallery,{name},{name[:4]},0,yard,p{int(name[:4])}" for name in names]
    manifest = gallery / "m.csv"
    manifest.write_text("\n".join(["split,path,pid,camid,camera,identity", *lines]))
    matches = search(run, query, manifest).matches()
    assert {m.identity for m in matches} == {"p0", "p3", "p4"}
    assert {m.camera for m in matches} == {"yard"}
    assert {m.same_identity for m in matches} == {None}  # who the query is, is unknown
    inside = gallery / names[1]
    ranking = search(run, inside, manifest)
    assert {m.identity: m.same_identity for m in ranking.matches()} == {
        "p0": False,
        "p3": True,
        "p4": False,
    }
    embed(run, [manifest]).save(tmp_path / "f.npz")
    assert search(run, inside, tmp_path / "f.npz").matches() == ranking.matches()


def test_distractors_are_nobody(run: Path, tmp_path: Path) -> None:
    names = ["0000_c1s1_000001_00.png", "0000_c2s1_000001_00.png"]
    for folder, name in (
        ("bounding_box_train", "0009_c1s1_000001_00.png"),
        ("query", "0003_c2s1_000001_00.png"),
        *(("bounding_box_test", n) for n in (*names, "0003_c1s1_000001_00.png")),
    ):
        paint(tmp_path / folder / name, int(name[:4]), 1, 0)
    data = load_dataset("market1501", tmp_path)
    known = embed(run, data.gallery)
    for query, said in ((data.gallery.paths[0], None), (data.query, True)):
        found = search(run, query, known).matches()
        assert {m.same_identity for m in found if m.identity == ""} == {None}
        assert {m.same_identity for m in found if m.identity == "3"} == {said}


def test_rankings_are_saved(run: Path, embedding: Embedding, tmp_path: Path) -> None:
    ranking = search(
        run, embedding.images.select(torch.tensor([3, 17])), embedding, top=3
    )
    for suffix in ("json", "csv"):
        ranking.save(tmp_path / f"out/ranked.{suffix}")
    assert len(os.listdir(tmp_path / "out")) == 2
    whole = json.loads((tmp_path / "out/ranked.json").read_text())
    assert whole == ranking.records()
    assert [len(one["matches"]) for one in whole] == [3, 3]
    with (tmp_path / "out/ranked.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    flat = [{"query": one["query"]} | m for one in whole for m in one["matches"]]
    assert rows == [
        {k: "" if v is None else str(v) for k, v in row.items()} for row in flat
    ]


def test_search_needs_a_top_and_known_cameras(run: Path, tmp_path: Path) -> None:
    paint(tmp_path / "set/x.png", 0, 0, 0)
    with pytest.raises(InputError, match="top is 0"):
        search(run, tmp_path / "set", tmp_path / "set", top=0)
    with pytest.raises(InputError, match=r"the camera of .*set/x\.png, which is"):
        search(run, tmp_path / "set", tmp_path / "set", same_camera="drop")


# ------------------------------------------------------------------------------ cluster


def test_cluster_uses_the_settings_of_the_run(
    run: Path, embedding: Embedding, tmp_path: Path
) -> None:
    config, _ = load_model(run)
    for eps in (None, 0.05):
        found = cluster(run, embedding, eps=eps)
        if eps is not None:
            config = replace(config, clustering=replace(config.clustering, eps=eps))
        camids = embedding.images.camids
        assert torch.equal(
            found.clusters, find_clusters(embedding.features, camids, config)
        )
    found.save(tmp_path / "clusters.csv")
    with (tmp_path / "clusters.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = (embedding.images.paths, embedding.images.camids, found.clusters)
    assert rows == [
        {"path": str(p), "camid": str(int(c)), "camera": f"cam{c + 1}"}
        | {"cluster": str(int(k))}
        for p, c, k in zip(*columns, strict=True)
    ]


def test_too_few_clusters_come_with_advice(
    run: Path, embedding: Embedding, caplog: pytest.LogCaptureFixture
) -> None:
    few = replace(embedding, images=embedding.images.select(torch.arange(3)))
    found = cluster(run, replace(few, features=embedding.features[:3]))
    assert found.clusters.tolist() == [0, 0, 0]
    assert "3 pictures, 1 clusters, 0 outliers; no eps up to 0.8" in caplog.text


def test_a_clustering_that_knows_cameras_does_without_where_they_are_unknown(
    run: Path, embedding: Embedding, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "run/config.yaml"
    shutil.copytree(run, config.parent)
    text = config.read_text()
    config.write_text(text.replace("standardise: false", "standardise: true"))
    plain = cluster(run, embedding).clusters
    cluster(config.parent, embedding)
    assert "not known" not in caplog.text
    images = ImageSet(embedding.images.paths, torch.full_like(plain, -1))
    unknown = replace(embedding, images=images)
    assert torch.equal(cluster(config.parent, unknown).clusters, plain)
    assert "some cameras are not known" in caplog.text


def test_names_of_files_survive_csv(tmp_path: Path) -> None:
    names = ['a,"b"\n.png', "ü.png", os.fsdecode(b"\xff.png")]
    images = ImageSet([Path(n) for n in names], torch.zeros(3, dtype=torch.int64))
    Clustering(images, torch.tensor([0, 0, -1])).save(tmp_path / "clusters.csv")
    with (tmp_path / "clusters.csv").open(
        newline="", encoding="utf-8", errors="surrogateescape"
    ) as file:
        assert [row["path"] for row in csv.DictReader(file)] == names


# ------------------------------------------------------------------------------- export


def test_the_exported_model_is_the_model(
    run: Path,
    embedding: Embedding,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Read as anyone would who has onnxruntime and Pillow, in batches of any size."""
    export(run, tmp_path / "model.onnx")
    assert capfd.readouterr().out == ""
    assert os.listdir(tmp_path) == ["model.onnx"]
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    _, _, height, width = session.get_inputs()[0].shape
    pixels, _ = decode(embedding.images, height, width)
    pictures = np.float32(pixels.numpy().transpose(0, 3, 1, 2)) / 255
    for some in (slice(0, 1), slice(1, 30)):
        (features,) = session.run(["features"], {"pictures": pictures[some]})
        assert np.abs(features - embedding.features[some].numpy()).max() < 1e-4


def test_export_names_the_extra(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'o2cap\[onnx\]'"):
        export(run, tmp_path / "model.onnx")
