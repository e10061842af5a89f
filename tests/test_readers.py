"""Readers on trees in the exact real layouts, with all that lies about in them."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from o2cap import cli
from o2cap.data import images as walks
from o2cap.data import load_dataset
from o2cap.data.images import ImageSet
from o2cap.data.loading import read_picture
from o2cap.data.readers import (
    PUBLISHED,
    manifest_from_pattern,
    name_layout,
    verify_dataset,
)
from o2cap.errors import InputError


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 8), (90, 120, 60)).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = _jpeg()


def plant(root: Path, files: Iterable[str] | dict[str, bytes]) -> Path:
    """Write files (a tiny JPEG unless bytes are given), and return the root."""
    contents = files if isinstance(files, dict) else dict.fromkeys(files, JPEG)
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def table(images: ImageSet) -> set[tuple[str, int, int]]:
    assert images.pids is not None
    pids, camids = images.pids.tolist(), images.camids.tolist()
    return {
        (path.name, pid, camid)
        for path, pid, camid in zip(images.paths, pids, camids, strict=True)
    }


MARKET = [
    "bounding_box_train/0002_c1s1_000451_03.jpg",
    "bounding_box_train/0002_c6s4_015641_01.jpg",
    "bounding_box_train/0007_c3s3_077419_03.jpg",
    "query/0001_c1s1_001051_00.jpg",
    "query/0001_c2s1_000301_00.jpg",
    "bounding_box_test/-1_c1s1_000401_03.jpg",
    "bounding_box_test/-1_c4s6_020116_02.jpg",
    "bounding_box_test/0000_c1s1_000151_01.jpg",
    "bounding_box_test/0001_c1s1_002401_02.jpg",
    "bounding_box_test/0001_c3s1_000551_00.jpg",
]
STRAY = {
    "bounding_box_test/Thumbs.db": b"\xd0\xcf\x11\xe0",
    "bounding_box_train/.DS_Store": b"\0\0\0\1Bud1",
    "bounding_box_train/._0002_c1s1_000451_03.jpg": b"\0\5\x16\7",
    "query/readme.txt": b"hello",
    "gt_bbox/0001_c1s1_001051_00.jpg": JPEG,
    "gt_query/0001_c1s1_001051_00_good.mat": b"MATLAB",
}


@pytest.fixture
def market(tmp_path: Path) -> Path:
    return plant(plant(tmp_path / "Market-1501-v15.09.15", MARKET), STRAY)


def test_market1501(market: Path) -> None:
    dataset = load_dataset("market1501", market)
    assert table(dataset.train) == {
        ("0002_c1s1_000451_03.jpg", 2, 0),
        ("0002_c6s4_015641_01.jpg", 2, 5),
        ("0007_c3s3_077419_03.jpg", 7, 2),
    }
    assert table(dataset.query) == {
        ("0001_c1s1_001051_00.jpg", 1, 0),
        ("0001_c2s1_000301_00.jpg", 1, 1),
    }
    assert table(dataset.gallery) == {
        ("0000_c1s1_000151_01.jpg", 0, 0),
        ("0001_c1s1_002401_02.jpg", 1, 0),
        ("0001_c3s1_000551_00.jpg", 1, 2),
    }
    assert all(
        path.is_file() for part in dataset.splits().values() for path in part.paths
    )


def test_the_archives_top_folder_or_the_one_above_it(market: Path) -> None:
    above = load_dataset("market1501", market.parent)
    assert table(above.gallery) == table(load_dataset("market1501", market).gallery)
    plant(market.parent / ".half.partial", MARKET)  # hidden: not a second data set
    load_dataset("market1501", market.parent)
    plant(market.parent / "DukeMTMC-reID", MARKET)
    with pytest.raises(InputError, match=r"hold bounding_box_train.*DukeMTMC-reID"):
        load_dataset("market1501", market.parent)


def test_relative_root_gives_paths_that_survive_another_working_directory(
    market: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(market.parent)
    dataset = load_dataset("market1501", Path(market.name))
    monkeypatch.chdir("/")
    assert dataset.train.paths[0].is_file()


@pytest.mark.parametrize("name", ["holiday.jpg", "0002_c0s1_000451_03.jpg", "0002.png"])
def test_a_picture_with_a_broken_name_is_named(market: Path, name: str) -> None:
    plant(market, [f"bounding_box_train/{name}"])
    with pytest.raises(
        InputError, match=rf"bounding_box_train .*\b1 \({name}\); move them out"
    ):
        load_dataset("market1501", market)


def test_when_all_names_differ_it_is_another_data_set(tmp_path: Path) -> None:
    plant(tmp_path, [f"{name}/1.jpg" for name in ("query", "bounding_box_train")])
    plant(tmp_path, ["bounding_box_test/2.jpg"])
    with pytest.raises(InputError, match="this is no market1501, see --dataset manif"):
        load_dataset("market1501", tmp_path)


def test_many_broken_names_are_counted_and_some_named(market: Path) -> None:
    plant(market, [f"query/{i}.jpg" for i in range(1234)])
    plant(market, ["bounding_box_train/x.jpg"])
    both = r"1 \(x\.jpg\); move .* 1,234 \(0\.jpg, 1\.jpg, 10\.jpg, …\)"
    with pytest.raises(InputError, match=both):
        load_dataset("market1501", market)


def test_counts_that_differ_are_told_and_in_strict_mode_refused(
    market: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "o2cap"):
        load_dataset("market1501", market)
    assert "query: 3,368 images expected, 2 found" in caplog.text
    assert "train: 6 cameras expected, 3 found" in caplog.text
    assert "gallery: 750 identities expected, 1 found" in caplog.text
    assert "gallery: 3,819 junk expected, 2 found" in caplog.text
    with pytest.raises(InputError, match="query: 3,368 images expected, 2 found"):
        load_dataset("market1501", market, strict=True)


def test_published_counts_satisfy_strict_mode(
    market: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(
        PUBLISHED,
        "market1501",
        {
            "train": {"images": 3, "identities": 2, "cameras": 3},
            "query": {"images": 2, "identities": 1},
            # distractors are pictures to rank, but no identity; junk is neither
            "gallery": {"images": 3, "identities": 1, "junk": 2},
        },
    )
    load_dataset("market1501", market, strict=True)
    assert not caplog.records
    verification = verify_dataset("market1501", market, pictures=True)
    assert verification.problems == []
    assert ("gallery", "identities", 1, 1) in verification.rows
    assert ("gallery", "distractors", None, 1) in verification.rows


def test_published_counts_of_the_method_page() -> None:
    images = {
        name: tuple(splits[split]["images"] for split in ("train", "query", "gallery"))
        for name, splits in PUBLISHED.items()
    }
    assert images == {
        "market1501": (12_936, 3_368, 15_913),
        "dukemtmcreid": (16_522, 2_228, 17_661),
        "msmt17": (32_621, 11_659, 82_161),
        "veri776": (37_778, 1_678, 11_579),
    }
    market = PUBLISHED["market1501"]["gallery"]
    assert market["images"] + market["junk"] == 19_732  # files in bounding_box_test


def test_dukemtmcreid(tmp_path: Path) -> None:
    root = plant(
        tmp_path / "DukeMTMC-reID",
        [
            "bounding_box_train/0001_c2_f0046182.jpg",
            "bounding_box_train/7140_c8_f0100001.jpg",
            "query/0005_c2_f0046985.jpg",
            "bounding_box_test/0005_c5_f0051781.jpg",
            "bounding_box_test/0006_c8_f0021529.jpg",
        ],
    )
    plant(root, {"bounding_box_test/Thumbs.db": b"", "CITATION.txt": b"cite"})
    dataset = load_dataset("dukemtmcreid", root)
    assert table(dataset.train) == {
        ("0001_c2_f0046182.jpg", 1, 1),
        ("7140_c8_f0100001.jpg", 7140, 7),
    }
    assert table(dataset.gallery) == {
        ("0005_c5_f0051781.jpg", 5, 4),
        ("0006_c8_f0021529.jpg", 6, 7),
    }
    with pytest.raises(InputError, match="if this is no market1501"):
        load_dataset("market1501", root)


def msmt17(root: Path, train: str, test: str) -> Path:
    lists = {
        "list_train.txt": [
            "0000/0000_000_01_0303morning_0008_0.jpg 0",
            "0002/0002_003_14_0302noon_0412_1.jpg 2",
        ],
        "list_val.txt": ["0000/0000_029_15_0303morning_0022_0_ex.jpg 0"],
        "list_query.txt": ["0000/0000_005_05_0303morning_0045_1.jpg 0"],
        "list_gallery.txt": [
            "0000/0000_000_01_0303afternoon_0006_0.jpg 0",
            "0001/0001_001_09_0303morning_0001_2.jpg 1",
        ],
    }
    for name, lines in lists.items():
        folder = train if name in ("list_train.txt", "list_val.txt") else test
        plant(root / folder, [line.split()[0] for line in lines])
        plant(root, {name: ("\n".join(lines) + "\n").encode()})
    # not in any list: masks, leftovers
    plant(root / train, ["0000/Thumbs.db", "0000/0000_000_01_0303morning_0009_0.jpg"])
    return root


@pytest.mark.parametrize(
    ("version", "train", "test"),
    [("v1", "train", "test"), ("v2", "mask_train_v2", "mask_test_v2")],
)
def test_msmt17(tmp_path: Path, version: str, train: str, test: str) -> None:
    msmt17(tmp_path / f"MSMT17_{version.upper()}", train, test)
    dataset = load_dataset("msmt17", tmp_path)
    assert dataset.name == f"msmt17-{version}"
    assert table(dataset.train) == {
        ("0000_000_01_0303morning_0008_0.jpg", 0, 0),
        ("0002_003_14_0302noon_0412_1.jpg", 2, 13),
        ("0000_029_15_0303morning_0022_0_ex.jpg", 0, 14),
    }
    # test numbering starts again at 0, so person 0 here is not person 0 of train
    assert table(dataset.query) == {("0000_005_05_0303morning_0045_1.jpg", 3, 4)}
    assert table(dataset.gallery) == {
        ("0000_000_01_0303afternoon_0006_0.jpg", 3, 0),
        ("0001_001_09_0303morning_0001_2.jpg", 4, 8),
    }
    assert all(
        path.is_file() for part in dataset.splits().values() for path in part.paths
    )


def test_msmt17_lists_that_do_not_fit(tmp_path: Path) -> None:
    root = msmt17(tmp_path / "MSMT17_V1", "train", "test")
    (root / "test/0001/0001_001_09_0303morning_0001_2.jpg").unlink()
    with pytest.raises(
        InputError, match=r"list_gallery.txt do not exist: 1 \(.*0001/0001"
    ):
        load_dataset("msmt17", root)
    for line in (
        b"0000/0000_000_01_0303morning_0008_0.jpg",
        b"0000/picture.jpg 3",
        b"0000/0000_000_00_0303morning_0008_0.jpg 0",
        b"0000/0000_000_01_0303morning_0008_0.jpg -1",
        b"../0000/0000_000_01_0303morning_0008_0.jpg 0",
        b"/0000/0000_000_01_0303morning_0008_0.jpg 0",
        b"\xff\xfe",
    ):
        plant(root, {"list_train.txt": line + b"\n"})
        with pytest.raises(InputError, match=r"list_train.txt, line 1"):
            load_dataset("msmt17", root)
    (root / "list_train.txt").unlink()
    with pytest.raises(
        InputError, match=r"list_train.txt cannot be read \(No such file"
    ):
        load_dataset("msmt17", root)


def test_msmt17_both_versions_side_by_side(tmp_path: Path) -> None:
    msmt17(tmp_path / "MSMT17_V1", "train", "test")
    msmt17(tmp_path / "MSMT17_V2", "mask_train_v2", "mask_test_v2")
    with pytest.raises(
        InputError, match=r"train \+ test, or mask.* found: .*MSMT17_V1.*V2"
    ):
        load_dataset("msmt17", tmp_path)
    assert load_dataset("msmt17", tmp_path / "MSMT17_V2").name == "msmt17-v2"


VERI = [
    "image_train/0001_c001_00016450_0.jpg",
    "image_train/0776_c020_00085670_0.jpg",
    "image_query/0002_c002_00030600_0.jpg",
    "image_test/0002_c002_00030600_0.jpg",
    "image_test/0002_c018_00029240_0.jpg",
]


def test_veri776_by_file_names(tmp_path: Path) -> None:
    dataset = load_dataset("veri776", plant(tmp_path / "VeRi", VERI))
    assert table(dataset.train) == {
        ("0001_c001_00016450_0.jpg", 1, 0),
        ("0776_c020_00085670_0.jpg", 776, 19),
    }
    # image-to-image: the query stays in the gallery
    assert table(dataset.query) < table(dataset.gallery)
    assert table(dataset.gallery) == {
        ("0002_c002_00030600_0.jpg", 2, 1),
        ("0002_c018_00029240_0.jpg", 2, 17),
    }


# ---------------------------------------------------------- what names do not say


def test_names_say_identities_only_where_all_are_in_one_layout() -> None:
    def said(*names: str) -> list[tuple[int, int]] | None:
        found = name_layout([Path("x", name) for name in names])
        return (
            None
            if found is None
            else list(zip(*(c.tolist() for c in found), strict=True))
        )

    market = [Path(name).name for name in MARKET]
    assert said(*market[:3]) == [(1, 2), (6, 2), (3, 7)]
    # junk and distractors are nobody
    assert said(*market[5:9]) == [(1, -1), (4, -1), (1, -1), (1, 1)]
    assert said("0001_c2_f0046182.jpg") == [(2, 1)]
    assert said("0001_c001_00016450_0.jpg", "0776_c020_00085670_0.png") == [
        (1, 1),
        (20, 776),
    ]
    assert said("0007_c123s1_000451_03.png") == [(123, 7)]  # as ours are exported
    for other in (
        "20240131_c1_000.jpg",  # a date
        "20240131_c1s1_000451_03.jpg",
        "0042_c3_f0001.jpg",  # a track
        "0042_c1_000.jpg",  # a job
        "0002_c12345678901s1_000451_03.jpg",  # no camera, and none cut short
        "0002_c1s1_000451_03_copy.jpg",
        "0001_c2_f0046182.jpg",  # another layout
        "holiday.jpg",
    ):
        assert said(*market[:3], other) is None, other
        assert other == "0001_c2_f0046182.jpg" or said(other) is None, other
    assert said() is None


# --------------------------------------------------------------------- the root


def test_root_that_holds_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs --root: the folder of the data set"):
        load_dataset("market1501")
    with pytest.raises(InputError, match=r"folder of the data set; it is .*/nowhere"):
        load_dataset("msmt17", tmp_path / "nowhere")
    with pytest.raises(
        InputError,
        match=r"must hold image_train \+ image_query \+ image_test; found: none",
    ):
        load_dataset("veri776", tmp_path)
    plant(tmp_path, {"Market.zip": b"PK"})
    with pytest.raises(InputError, match=r"Market.zip\. Archives .* data_scripts/"):
        load_dataset("market1501", tmp_path / "Market.zip")
    with pytest.raises(InputError, match=r"needs --root: the CSV file; it is"):
        load_dataset("manifest", tmp_path)


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Did you mean market1501\?.* synthetic,"):
        load_dataset("market1510", tmp_path)
    with pytest.raises(TypeError, match="val"):
        load_dataset("msmt17", tmp_path, val=True)
    with pytest.raises(InputError, match=r"Did you mean folders\?"):
        verify_dataset("folder", tmp_path)
    with pytest.raises(InputError, match="leave --root out"):
        load_dataset("synthetic", tmp_path)


@pytest.mark.filterwarnings("ignore:.*(tag|EXIF|Truncated):UserWarning")
def test_unreadable_pictures_are_found_on_demand(market: Path) -> None:
    """By the function that trains on them: damaged EXIF is no fault."""
    odd = io.BytesIO()
    exif = Image.Exif()
    exif[274], exif[282] = 6, 72.0
    Image.new("RGB", (4, 8)).save(odd, "JPEG", exif=exif)
    damaged = odd.getvalue().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")
    plant(market, {"bounding_box_train/0007_c3s3_077419_03.jpg": damaged})
    assert read_picture(
        market / "bounding_box_train/0007_c3s3_077419_03.jpg", 4, 8
    ).shape
    plant(market, {"query/0001_c1s1_001051_00.jpg": JPEG[: len(JPEG) // 2]})
    plant(market, {"query/0001_c2s1_000301_00.jpg": b""})
    plain = verify_dataset("market1501", market).problems
    found = set(verify_dataset("market1501", market, pictures=True).problems)
    assert {Path(p.split()[0]).name for p in found.difference(plain)} == {
        "0001_c1s1_001051_00.jpg",
        "0001_c2s1_000301_00.jpg",
    }


# ------------------------------------------------------------------ the manifest


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str | bytes, *pictures: str) -> Path:
        folder = tmp_path / "own"
        plant(folder, pictures or ["cam1/a.jpg", "cam1/b.jpg", "cam2/a.jpg"])
        content = text if isinstance(text, bytes) else text.encode()
        return plant(folder, {"manifest.csv": content}) / "manifest.csv"

    return write


HEAD = "split,path,pid,camid\n"


def test_manifest(manifest: Callable[..., Path]) -> None:
    path = manifest(
        HEAD + "train,cam1/a.jpg,7,0\nquery,cam1/b.jpg,3,0\ngallery,cam2/a.jpg,4,12\n"
    )
    dataset = load_dataset("manifest", path)
    assert table(dataset.train) == {("a.jpg", 7, 0)}
    assert table(dataset.query) == {("b.jpg", 3, 0)}
    assert table(dataset.gallery) == {("a.jpg", 4, 12)}
    assert dataset.gallery.paths == [path.parent / "cam2/a.jpg"]


def test_manifest_without_identities_and_without_query(
    manifest: Callable[..., Path],
) -> None:
    path = manifest(HEAD + "train,cam1/a.jpg,,0\ntrain,cam2/a.jpg,,1\n")
    dataset = load_dataset("manifest", path)
    assert dataset.train.pids is None
    assert len(dataset.query) == len(dataset.gallery) == 0
    path = manifest(HEAD + "train,cam1/a.jpg,5,0\ntrain,cam2/a.jpg,-1,1\n")
    pids = load_dataset("manifest", path).train.pids
    assert pids is not None and pids.tolist() == [5, -1]


def test_manifest_spellings_that_are_welcome(manifest: Callable[..., Path]) -> None:
    text = (
        'camid, note ,"path",split,pid\r\n'
        '0,"two, words","cam 1/ä,b.jpg", train ,\r\n'
        "\r\n"
        '1.0,,"cam1/../cam1/a.jpg",query,9.0\r\n'
        "2,,cam 2\\b.jpg,query,9\r\n"
    )
    path = manifest(
        codecs.BOM_UTF8 + text.encode(), "cam 1/ä,b.jpg", "cam1/a.jpg", "cam 2/b.jpg"
    )
    dataset = load_dataset("manifest", path)
    assert dataset.train.paths[0].name == "ä,b.jpg"
    assert table(dataset.query) == {("a.jpg", 9, 1), ("b.jpg", 9, 2)}
    assert all(path.is_file() for path in [*dataset.train.paths, *dataset.query.paths])


def test_manifest_same_picture_in_query_and_gallery(
    manifest: Callable[..., Path],
) -> None:
    both = HEAD + "query,cam1/a.jpg,1,0\ngallery,./cam1/a.jpg,1,0\n"
    dataset = load_dataset("manifest", manifest(both))
    assert table(dataset.query) == table(dataset.gallery)
    contradiction = HEAD + "query,cam1/a.jpg,1,0\ngallery,cam1/a.jpg,2,0\n"
    with pytest.raises(InputError, match=r"line 3: .* in line 2 .* one pid and camid"):
        load_dataset("manifest", manifest(contradiction))
    thrice = both + "query,cam1/a.jpg,1,0\n"
    with pytest.raises(InputError, match=r"line 4: .* stands in line 2 already"):
        load_dataset("manifest", manifest(thrice))


A = "train,cam1/a.jpg,1,0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 0: it must be split,path,pid,camid"),
        ("path,pid,camid\ncam1/a.jpg,1,0\n", r"line 1: it must be split,path"),
        ("split;path;pid;camid\n" + A, r"must be split,path,pid,camid, with commas"),
        ("split,split,path,pid,camid\n" + A, r"line 1: it must be"),
        ("Split,path,pid,camid\n" + A, r"line 1: it must be"),
        (A + A, r"line 1: it must be"),
        (HEAD + A + "train,cam1/b.jpg,1\n", r"line 3: it has more or fewer fields"),
        (HEAD + "train,a.jpg,1,0,9\n", r"line 2: it has more or fewer fields"),
        (HEAD + "tain,cam1/a.jpg,1,0\n", r"line 2: .*'tain' is none of train, query"),
        *(
            (
                HEAD + f"train,cam1/a.jpg,1,{camid}\n",
                rf"line 2: the camid '{camid}' is no",
            )
            for camid in ("left", "", "-1", "1.5", "1_0", "٣", 10**18)
        ),
        (HEAD + "train,cam1/a.jpg,anna,1\n", r"line 2: the pid 'anna' is no whole"),
        (
            HEAD + "query,cam1/a.jpg,,1\n",
            r"line 2: the pid '' is no whole .*only the pid of",
        ),
        (
            HEAD + "gallery,cam1/a.jpg,-1,1\n",
            r"line 2: the pid '-1' .*only the pid of a train",
        ),
        (HEAD + A + A, r"line 3: cam1/a.jpg stands in line 2 already; only"),
        (HEAD + A + "train,./cam1//a.jpg,1,0\n", r"line 3: .* in line 2 already"),
        (HEAD + A + "query,cam1/a.jpg,1,0\n", r"line 3: .* in line 2 already"),
        (HEAD + A + '\n\nquery,"cam1/a.jpg,1,0\n', r"line [0-9]: unexpected end"),
        *(
            (HEAD + A + f"train,{path},1,0\n", rf"not be read: 1 \({re.escape(path)}\)")
            for path in (
                "",
                "cam1",
                "cam1/",
                "..",
                "cam1/A.jpeg",
                "a\0b.jpg",
                "x" * 5000,
            )
        ),
        (HEAD + f"train,{'x' * 200_000}.jpg,1,0\n", r"line 1: field larger"),
        (HEAD.encode() + b"train,caf\xe9.jpg,1,0\n", r"is not UTF-8 text; save it"),
        ((HEAD + A).encode("utf-16"), r"is not UTF-8 text; save it as CSV UTF-8"),
    ],
)
def test_manifest_mistakes(
    manifest: Callable[..., Path], text: str | bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_dataset("manifest", manifest(text))
    assert "manifest.csv" in str(caught.value)


def test_manifest_missing_files_are_counted_and_the_first_named(
    manifest: Callable[..., Path],
) -> None:
    lines = [f"train,cam1/{i}.jpg,1,0\n" for i in range(2000)]
    with pytest.raises(InputError) as caught:
        load_dataset("manifest", manifest(HEAD + A + "".join(lines)))
    assert "not be read: 2,000 (cam1/0.jpg, cam1/1.jpg, cam1/2.jpg, …)" in str(
        caught.value
    )


def test_manifest_missing_files_are_left_out_on_demand(
    manifest: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = manifest(HEAD + A + "train,cam1/gone.jpg,1,0\n")
    dataset = load_dataset("manifest", path, skip_missing=True)
    assert [p.name for p in dataset.train.paths] == ["a.jpg"]
    assert "not be read: 1 (cam1/gone.jpg)" in caplog.text
    assert "not be read: 1" in verify_dataset("manifest", path).problems[0]
    with pytest.raises(InputError, match=r"'tain' is none of"):
        wrong = manifest(HEAD + "tain,cam1/a.jpg,1,0\n")
        load_dataset("manifest", wrong, skip_missing=True)


def test_manifest_may_point_elsewhere_only_by_absolute_paths(
    manifest: Callable[..., Path], tmp_path: Path
) -> None:
    plant(tmp_path / "else", ["x.jpg"])
    outside = tmp_path / "else/x.jpg"
    dataset = load_dataset("manifest", manifest(HEAD + f"train,{outside},1,0\n"))
    assert dataset.train.paths == [outside]

    (tmp_path / "own/link.jpg").symlink_to(outside)
    (tmp_path / "own/folder").symlink_to(outside.parent, target_is_directory=True)
    for path in ("link.jpg", "folder/x.jpg", "../else/x.jpg", "cam1/../../else/x.jpg"):
        said = rf"line 2: {path} leads out of .*own, by .. or a link, to {outside}; wri"
        with pytest.raises(InputError, match=said):
            load_dataset("manifest", manifest(HEAD + f"train,{path},1,0\n"))
    # the same place under its absolute name has been looked at by then
    both = f"train,{outside},1,0\ntrain,../else/x.jpg,1,0\n"
    with pytest.raises(InputError, match=r"line 3: ../else/x.jpg leads out"):
        load_dataset("manifest", manifest(HEAD + both))

    (tmp_path / "own/inside.jpg").symlink_to(tmp_path / "own/cam1/b.jpg")
    inside = load_dataset("manifest", manifest(HEAD + "train,inside.jpg,1,0\n"))
    assert inside.train.paths[0].name == "inside.jpg"


def test_manifest_in_a_folder_that_is_itself_a_link(
    manifest: Callable[..., Path], tmp_path: Path
) -> None:
    manifest(HEAD + A)
    (tmp_path / "alias").symlink_to(tmp_path / "own", target_is_directory=True)
    dataset = load_dataset("manifest", tmp_path / "alias/manifest.csv")
    assert dataset.train.paths == [tmp_path / "alias/cam1/a.jpg"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_manifest_in_another_unicode_form_than_the_disk(
    manifest: Callable[..., Path], form: str
) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    disk, written = (unicodedata.normalize(f, "Tür/é.jpg") for f in (form, other))
    dataset = load_dataset("manifest", manifest(HEAD + f"train,{written},,0\n", disk))
    assert dataset.train.paths[0].is_file()
    twice = HEAD + f"train,{written},,0\ntrain,{disk},,0\n"
    with pytest.raises(InputError, match=r"line 3: .* stands in line 2 already"):
        load_dataset("manifest", manifest(twice, disk))


@pytest.fixture(scope="module")
def playground() -> Iterable[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield plant(Path(folder), [f"cam{i}/{i}.jpg" for i in range(9)])


fields = st.sampled_from(
    ["train", "query", "gallery", "", "0", "1", "-1", "7", "x", '"', "..", "cam1/1.jpg"]
) | st.text(max_size=8)
anything = st.lists(st.lists(fields, min_size=3, max_size=5), max_size=4)


@settings(max_examples=50)
@given(
    st.one_of(
        st.binary(max_size=60),
        anything.map(
            lambda table: HEAD + "\n".join(",".join(row) for row in table)
        ).map(lambda text: text.encode("utf-8", "surrogatepass")),
    )
)
def test_manifest_of_anything_loads_or_is_refused_in_one_sentence(
    playground: Path, content: bytes
) -> None:
    path = playground / "anything.csv"
    path.write_bytes(content)
    try:
        dataset = load_dataset("manifest", path)
    except InputError as error:
        assert "anything.csv" in str(error)
    else:
        assert all(p.is_file() for s in dataset.splits().values() for p in s.paths)


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.sampled_from([f"cam{i}/{i}.jpg" for i in range(9)]),
        st.tuples(
            st.sampled_from(["train", "query", "gallery"]),
            st.integers(0, 10**18 - 1),
            st.integers(0, 10**18 - 1),
        ),
        min_size=1,
    ),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    st.sampled_from(["\n", "\r\n"]),
    st.permutations(["split", "path", "pid", "camid", "time"]),
)
def test_manifest_round_trip(
    playground: Path,
    given: dict[str, tuple[str, int, int]],
    quoting: int,
    newline: str,
    header: list[str],
) -> None:
    path = playground / "round.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file,
            header,
            quoting=quoting,
            lineterminator=newline,  # type: ignore[arg-type]
        )
        writer.writeheader()
        for name, (split, pid, camid) in given.items():
            row = {"split": split, "path": name, "pid": pid, "camid": camid, "time": ""}
            writer.writerow(row)
    dataset = load_dataset("manifest", path)
    found = {
        (split, *row) for split, part in dataset.splits().items() for row in table(part)
    }
    assert found == {
        (split, Path(name).name, pid, camid)
        for name, (split, pid, camid) in given.items()
    }


# ------------------------------------------------------------ folders of cameras


def test_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plant(
        tmp_path,
        [
            "cam10/x.jpg",
            "cam2/deep/er/b.PNG",
            "cam2/a.jpeg",
            "cam2/.thumbnails/a.jpg",
            "cam2/Thumbs.db",
            "notes/readme.txt",
            ".git/a.jpg",
            "list.txt",
        ],
    )
    dataset = load_dataset("folders", tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in dataset.train.paths]
    assert names == ["cam2/a.jpeg", "cam2/deep/er/b.PNG", "cam10/x.jpg"]
    assert dataset.train.camids.tolist() == [0, 0, 1]
    assert dataset.train.pids is None
    assert len(dataset.query) == len(dataset.gallery) == 0
    note = "is taken for a camera, of 1 to 2 pictures: 2 (cam2, cam10); if they are"
    assert note in caplog.text
    verified = verify_dataset("folders", tmp_path)
    assert ("train", "images of camera 1, cam10", None, 1) in verified.rows
    assert verified.problems == [] and note in verified.notes[0]


def test_thermal_folders_are_read_with_one_range(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for camera, level in enumerate((7000, 7400)):
        (tmp_path / f"cam{camera}").mkdir()
        deep = np.full((8, 4), level, np.uint16)
        Image.fromarray(deep).save(tmp_path / f"cam{camera}/a.png")
    dataset = load_dataset("folders", tmp_path)
    assert "more than 8 bits of grey; in all of them 7000 is black" in caplog.text
    assert {part.grey_range for part in dataset.splits().values()} == {(7000, 7400)}
    assert verify_dataset("folders", tmp_path, pictures=True).problems == []


def test_folders_of_the_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="holds no folder with pictures, one for each camera"
    ):
        load_dataset("folders", tmp_path)
    plant(tmp_path, ["cam1/a.jpg", "b.jpg"])
    with pytest.raises(
        InputError, match=r"lie beside the camera folders: 1 \(b\.jpg\)"
    ):
        load_dataset("folders", tmp_path)


@pytest.mark.parametrize("name", ["market1501", "folders"])
def test_a_folder_that_cannot_be_read(
    name: str,
    market: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Never counts as empty."""
    shut, scan = market / "query", walks.os.scandir

    def refuse(folder: str) -> object:
        if Path(folder) == shut:
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(walks.os, "scandir", refuse)
    for call in (load_dataset, verify_dataset):
        with pytest.raises(
            InputError, match=rf"{shut} cannot be read \(Permission den"
        ):
            call(name, market)
    counts = load_dataset(name, market, skip_missing=True).counts()
    assert counts["query"]["images"] == 0 < counts["train"]["images"]
    assert f"{shut} cannot be read (Permission denied) and is left out" in caplog.text


# ---------------------------------------------------------- a manifest from a pattern


def by_command(folder: Path, pattern: str) -> Path:
    output = folder / "pictures.csv"
    words = ["data", "manifest", str(folder), "--pattern", pattern, "-o", str(output)]
    cli.run(words)
    return output


def test_manifest_from_a_pattern(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plant(tmp_path, ["3/0007_a_1.jpg", "3/0009_b.JPG", "10/0007_c.jpg", "10/x.jpg"])
    plant(tmp_path, ["3/deep/0007_c.jpg", "@eaDir/3/0007_a.jpg", "3/0007_c.png"])
    pattern = "{camid}/{pid}_{frame}.jpg"
    found, others = manifest_from_pattern(tmp_path, pattern)
    assert [path.relative_to(tmp_path).as_posix() for path in others] == [
        "10/x.jpg",
        "3/0007_c.png",
        "3/deep/0007_c.jpg",
    ]
    assert [row["frame"] for row in found] == ["c", "a_1", "b"]
    dataset = load_dataset("manifest", by_command(tmp_path, pattern))
    assert "3 pictures do not fit" in caplog.text and str(others[0]) in caplog.text
    assert table(dataset.train) == {
        ("0007_c.jpg", 7, 10),
        ("0007_a_1.jpg", 7, 3),
        ("0009_b.JPG", 9, 3),
    }


def test_names_in_a_pattern_are_numbered_and_kept(tmp_path: Path) -> None:
    """The table says where pictures lie, whatever their names and links are."""
    odd = os.fsdecode(b"ben-\xff.jpg")
    plant(tmp_path / "own", ["train/yard/anna-1.jpg", "query/door10/anna-1.jpg"])
    plant(tmp_path / "own", [f"gallery/door9/{odd}"])
    plant(tmp_path / "else", ["ben-2.jpg"])
    (tmp_path / "own/gallery/yard").symlink_to(tmp_path / "else")
    pattern = "{split}/{camid}/{pid}-{n}.{kind}"
    found, others = manifest_from_pattern(tmp_path / "own", pattern)
    assert others == []
    cameras = {(row["camera"], row["camid"]) for row in found}
    assert cameras == {("door9", 0), ("door10", 1), ("yard", 2)}
    assert {(row["identity"], row["pid"]) for row in found} == {("anna", 0), ("ben", 1)}
    csv_file = by_command(tmp_path / "own", pattern)
    csv_file.write_bytes(csv_file.read_bytes().replace(b"\xff", b"3"))
    (tmp_path / f"own/gallery/door9/{odd}").rename(
        tmp_path / "own/gallery/door9/ben-3.jpg"
    )
    dataset = load_dataset("manifest", csv_file)
    assert [len(part) for part in dataset.splits().values()] == [1, 1, 2]
    assert table(dataset.query) == {("anna-1.jpg", 0, 1)}
    assert table(dataset.gallery) == {("ben-3.jpg", 1, 0), ("ben-2.jpg", 1, 2)}


OTHERS = {  # MARS; persons and cameras in words; CVAT's export; frames of a video
    "{a}/{pid}/{pid}C{camid}T{t}F{f}.jpg": {"bbox/0001/0001C1T0001F001.jpg": 1},
    "person{pid}_cam{camid}_f{n}.jpg": {"person01_cam01_f2.jpg": 1},
    "{pid}_c{camid}s{s}_{frame}_{box}.jpg": {"1_c2s1_000015_00.jpg": 2},
    "{camid}_{day}_{n}.png": {"gate_2024-01-31_0.png": 1, "door_2024-01-31_0.png": 0},
    "{camid:2}/{n}.jpg": {"n/cam1/0.jpg": 0, "s/cam1/0.jpg": 1, "s/cam2/0.jpg": 2},
}


@pytest.mark.parametrize("pattern", OTHERS)
def test_layouts_of_others_in_one_line(tmp_path: Path, pattern: str) -> None:
    camids = OTHERS[pattern]
    plant(tmp_path, list(camids))
    train = load_dataset("manifest", by_command(tmp_path, pattern)).train
    found = zip(train.paths, train.camids.tolist(), strict=True)
    assert {p.relative_to(tmp_path).as_posix(): c for p, c in found} == camids


def test_numbers_that_would_fall_together_are_names(tmp_path: Path) -> None:
    plant(tmp_path, ["1_0.jpg", "01_0.jpg", f"{10**20}_0.jpg"])
    found, _ = manifest_from_pattern(tmp_path, "{camid}_{frame}.jpg")
    assert sorted(row["camid"] for row in found) == [0, 1, 2]
    assert {row["pid"] for row in found} == {""}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{pid}/{frame}.jpg", "has no {camid}"),
        ("{camid/{frame}.jpg", "has no {camid}"),
        ("{camid}/{}.jpg", "No picture in .* fits"),
        ("{camid}_{frame}.jpg", "No picture in .* fits .*, such as .*cam1/a.jpg"),
    ],
)
def test_patterns_that_do_not_work(
    manifest: Callable[..., Path], pattern: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        manifest_from_pattern(manifest("").parent, pattern)
