"""Readers on trees in the exact real layouts, with all that lies about in them."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from o2cap.data import load_dataset
from o2cap.data import readers as benchmarks
from o2cap.data.images import ImageSet
from o2cap.data.readers import PUBLISHED, Count, verify_dataset
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


def rows(images: ImageSet) -> set[tuple[str, int, int]]:
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
    assert rows(dataset.train) == {
        ("0002_c1s1_000451_03.jpg", 2, 0),
        ("0002_c6s4_015641_01.jpg", 2, 5),
        ("0007_c3s3_077419_03.jpg", 7, 2),
    }
    assert rows(dataset.query) == {
        ("0001_c1s1_001051_00.jpg", 1, 0),
        ("0001_c2s1_000301_00.jpg", 1, 1),
    }
    assert rows(dataset.gallery) == {
        ("0000_c1s1_000151_01.jpg", 0, 0),
        ("0001_c1s1_002401_02.jpg", 1, 0),
        ("0001_c3s1_000551_00.jpg", 1, 2),
    }
    assert all(
        path.is_file() for part in dataset.splits().values() for path in part.paths
    )


def test_the_archives_top_folder_or_the_one_above_it(market: Path) -> None:
    above = load_dataset("market1501", market.parent)
    assert rows(above.gallery) == rows(load_dataset("market1501", market).gallery)
    plant(market.parent / ".half.partial", MARKET)  # hidden: not a second data set
    load_dataset("market1501", market.parent)
    plant(market.parent / "DukeMTMC-reID", MARKET)
    with pytest.raises(InputError, match="holds several data sets"):
        load_dataset("market1501", market.parent)


def test_relative_root_gives_paths_that_survive_another_working_directory(
    market: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(market.parent)
    dataset = load_dataset("market1501", Path(market.name))
    monkeypatch.chdir("/")
    assert dataset.train.paths[0].is_file()


@pytest.mark.parametrize(
    "name",
    ["holiday.jpg", "0002_c0s1_000451_03.jpg", "0002.png", "0002_c1_f0046182.JPG"],
)
def test_a_picture_with_a_broken_name_is_named(market: Path, name: str) -> None:
    plant(market, [f"bounding_box_train/{name}"])
    with pytest.raises(InputError, match=rf"bounding_box_train .*\b1 \({name}\)"):
        load_dataset("market1501", market)


def test_many_broken_names_are_counted_and_some_named(market: Path) -> None:
    plant(market, [f"query/{i}.jpg" for i in range(1234)])
    plant(market, ["bounding_box_train/x.jpg"])
    with pytest.raises(InputError, match=r"There are 1 more") as caught:
        load_dataset("market1501", market)
    assert "(x.jpg)" in str(caught.value)
    problems = verify_dataset("market1501", market).problems
    assert "1,234 (0.jpg, 1.jpg, 10.jpg, …)" in problems[1]


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
    assert Count("gallery", "identities", 1, 1) in verification.rows
    assert Count("gallery", "distractors", None, 1) in verification.rows


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
    assert rows(dataset.train) == {
        ("0001_c2_f0046182.jpg", 1, 1),
        ("7140_c8_f0100001.jpg", 7140, 7),
    }
    assert rows(dataset.gallery) == {
        ("0005_c5_f0051781.jpg", 5, 4),
        ("0006_c8_f0021529.jpg", 6, 7),
    }
    with pytest.raises(InputError, match="are not named as market1501's are"):
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
    root = msmt17(tmp_path / f"MSMT17_{version.upper()}", train, test)
    dataset = load_dataset("msmt17", tmp_path)
    assert dataset.name == f"msmt17-{version}"
    assert rows(dataset.train) == {
        ("0000_000_01_0303morning_0008_0.jpg", 0, 0),
        ("0002_003_14_0302noon_0412_1.jpg", 2, 13),
        ("0000_029_15_0303morning_0022_0_ex.jpg", 0, 14),
    }
    # test numbering starts again at 0, so person 0 here is not person 0 of train
    assert rows(dataset.query) == {("0000_005_05_0303morning_0045_1.jpg", 3, 4)}
    assert rows(dataset.gallery) == {
        ("0000_000_01_0303afternoon_0006_0.jpg", 3, 0),
        ("0001_001_09_0303morning_0001_2.jpg", 4, 8),
    }
    assert all(
        path.is_file() for part in dataset.splits().values() for path in part.paths
    )
    without = load_dataset("msmt17", root, val=False)
    assert len(without.train) == 2
    assert rows(without.gallery) == rows(dataset.gallery)


def test_msmt17_expects_fewer_pictures_without_val(tmp_path: Path) -> None:
    root = msmt17(tmp_path, "train", "test")

    def expected(**options: bool) -> int | None:
        table = verify_dataset("msmt17", root, **options).rows
        return next(r.expected for r in table if r[:2] == ("train", "images"))

    assert (expected(), expected(val=False)) == (32_621, 30_248)


def test_msmt17_lists_that_do_not_fit(tmp_path: Path) -> None:
    root = msmt17(tmp_path / "MSMT17_V1", "train", "test")
    (root / "test/0001/0001_001_09_0303morning_0001_2.jpg").unlink()
    with pytest.raises(
        InputError, match=r"list_gallery.txt do not exist: 1 \(0001/0001"
    ):
        load_dataset("msmt17", root)
    for line in (
        "0000/0000_000_01_0303morning_0008_0.jpg",
        "0000/picture.jpg 3",
        "0000/0000_000_00_0303morning_0008_0.jpg 0",
        "0000/0000_000_01_0303morning_0008_0.jpg -1",
        "../0000/0000_000_01_0303morning_0008_0.jpg 0",
        "/0000/0000_000_01_0303morning_0008_0.jpg 0",
    ):
        plant(root, {"list_train.txt": f"{line}\n".encode()})
        with pytest.raises(InputError, match=r"list_train.txt, line 1"):
            load_dataset("msmt17", root)
    (root / "list_val.txt").unlink()
    (root / "list_query.txt").unlink()
    with pytest.raises(InputError, match=r"has no list_val.txt, list_query.txt"):
        load_dataset("msmt17", root)


def test_msmt17_both_versions_side_by_side(tmp_path: Path) -> None:
    msmt17(tmp_path / "MSMT17_V1", "train", "test")
    msmt17(tmp_path / "MSMT17_V2", "mask_train_v2", "mask_test_v2")
    with pytest.raises(InputError, match=r"MSMT17_V1: train \+ test; .*MSMT17_V2"):
        load_dataset("msmt17", tmp_path)
    assert load_dataset("msmt17", tmp_path / "MSMT17_V2").name == "msmt17-v2"


VERI = [
    "image_train/0001_c001_00016450_0.jpg",
    "image_train/0776_c020_00085670_0.jpg",
    "image_query/0002_c002_00030600_0.jpg",
    "image_test/0002_c002_00030600_0.jpg",
    "image_test/0002_c018_00029240_0.jpg",
]


def labels(*items: tuple[str, str, str]) -> bytes:
    lines = "\n".join(
        f'<Item imageName="{name}" vehicleID="{vehicle}" cameraID="{camera}" '
        'colorID="1" typeID="4" />'
        for name, vehicle, camera in items
    )
    return (
        '<?xml version="1.0" encoding="gb2312" ?>\n<!-- 车辆 -->\n'
        f'<TrainingImages Version="1.0"><Items number="1">{lines}</Items>'
        "</TrainingImages>"
    ).encode("gb2312")


def test_veri776_by_file_names(tmp_path: Path) -> None:
    dataset = load_dataset("veri776", plant(tmp_path / "VeRi", VERI))
    assert rows(dataset.train) == {
        ("0001_c001_00016450_0.jpg", 1, 0),
        ("0776_c020_00085670_0.jpg", 776, 19),
    }
    # image-to-image: the query stays in the gallery
    assert rows(dataset.query) < rows(dataset.gallery)
    assert rows(dataset.gallery) == {
        ("0002_c002_00030600_0.jpg", 2, 1),
        ("0002_c018_00029240_0.jpg", 2, 17),
    }


def test_veri776_with_its_lists_and_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = plant(tmp_path / "VeRi", VERI)
    plant(root, ["image_train/0009_c001_00000001_0.jpg"])  # not in the list
    names = {
        "name_train.txt": b"0001_c001_00016450_0.jpg\r\n0776_c020_00085670_0.jpg\r\n",
        "name_query.txt": b"0002_c002_00030600_0.jpg\n",
        "train_label.xml": labels(("0001_c001_00016450_0.jpg", "0001", "c001")),
        "test_label.xml": labels(("0002_c018_00029240_0.jpg", "0002", "c018")),
    }
    dataset = load_dataset("veri776", plant(root, names))
    assert len(dataset.train) == 2
    assert "are not in name_train.txt: 1 (0009_c001_00000001_0.jpg)" in caplog.text
    assert "contradicts" not in caplog.text

    wrong = {"test_label.xml": labels(("0002_c018_00029240_0.jpg", "0002", "c017"))}
    notes = verify_dataset("veri776", plant(root, wrong)).notes
    assert any("contradicts" in n and "0002_c018_00029240_0.jpg" in n for n in notes)

    plant(root, {"name_query.txt": b"0002_c002_00030600_0.jpg\n0003_c001_1_0.jpg\n"})
    with pytest.raises(InputError, match=r"name_query.txt do not exist: 1 \(0003_c001"):
        load_dataset("veri776", root)


@pytest.mark.parametrize(
    "content",
    [
        b"<Items><Item",
        b"",
        b'<?xml version="1.0" encoding="klingon"?><Items/>',
        b'<?xml version="1.0" encoding="gb2312"?><Items>\xff\xff</Items>',
        b'<Items><Item imageName="a.jpg" vehicleID="x" cameraID="c001"/></Items>',
        b'<Items><Item imageName="a.jpg" vehicleID="1"/></Items>',
        b'<!DOCTYPE a [<!ENTITY b "bb">]><Items>&b;&b;</Items>',
    ],
)
def test_veri776_with_a_broken_label_file(tmp_path: Path, content: bytes) -> None:
    root = plant(plant(tmp_path, VERI), {"train_label.xml": content})
    with pytest.raises(InputError, match=r"train_label\.xml"):
        load_dataset("veri776", root)


# --------------------------------------------------------------------- the root


def test_root_that_holds_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs --root: the folder with bounding_box"):
        load_dataset("market1501")
    with pytest.raises(InputError, match=r"nowhere does not exist; for msmt17 it is"):
        load_dataset("msmt17", tmp_path / "nowhere")
    with pytest.raises(InputError, match="no folder image_train and no image_query"):
        load_dataset("veri776", tmp_path)
    plant(tmp_path, {"Market.zip": b"PK"})
    with pytest.raises(InputError, match=r"is a file; .* data_scripts/market1501.py"):
        load_dataset("market1501", tmp_path / "Market.zip")
    with pytest.raises(InputError, match=r"is a folder; for manifest it is a CSV file"):
        load_dataset("manifest", tmp_path)


def test_a_missing_folder_is_named(market: Path) -> None:
    (market / "query").rename(market.parent / "elsewhere")
    with pytest.raises(InputError, match=rf"{market} has no folder query; expected"):
        load_dataset("market1501", market.parent)


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Did you mean market1501\?.* synthetic,"):
        load_dataset("market1510", tmp_path)
    with pytest.raises(InputError, match=r"Did you mean val\?"):
        load_dataset("msmt17", tmp_path, vall=True)
    with pytest.raises(InputError, match=r"'val' does not exist\. There are: none"):
        load_dataset("market1501", tmp_path, val=True)
    with pytest.raises(InputError, match=r"Did you mean folders\?"):
        verify_dataset("folder", tmp_path)
    with pytest.raises(InputError, match="leave --root out"):
        load_dataset("synthetic", tmp_path)
    with pytest.raises(InputError, match=r"Did you mean cameras\?"):
        load_dataset("synthetic", camera=3)


def test_unreadable_pictures_are_found_on_demand(market: Path) -> None:
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
    assert rows(dataset.train) == {("a.jpg", 7, 0)}
    assert rows(dataset.query) == {("b.jpg", 3, 0)}
    assert rows(dataset.gallery) == {("a.jpg", 4, 12)}
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
        '1,,"cam1/../cam1/a.jpg",query,9\r\n'
    )
    path = manifest(codecs.BOM_UTF8 + text.encode(), "cam 1/ä,b.jpg", "cam1/a.jpg")
    dataset = load_dataset("manifest", path)
    assert dataset.train.paths[0].name == "ä,b.jpg"
    assert rows(dataset.query) == {("a.jpg", 9, 1)}
    assert all(path.is_file() for path in [*dataset.train.paths, *dataset.query.paths])


def test_manifest_same_picture_in_query_and_gallery(
    manifest: Callable[..., Path],
) -> None:
    both = HEAD + "query,cam1/a.jpg,1,0\ngallery,./cam1/a.jpg,1,0\n"
    dataset = load_dataset("manifest", manifest(both))
    assert rows(dataset.query) == rows(dataset.gallery)
    contradiction = HEAD + "query,cam1/a.jpg,1,0\ngallery,cam1/a.jpg,2,0\n"
    with pytest.raises(InputError, match=r"line 3: .* another pid or camid in line 2"):
        load_dataset("manifest", manifest(contradiction))


A = "train,cam1/a.jpg,1,0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"first line must be split,path,pid,camid"),
        ("path,pid,camid\ncam1/a.jpg,1,0\n", r"not 'path,pid,camid'"),
        ("split;path;pid;camid\n" + A, r"with commas.*not 'split;path;pid;camid'"),
        ("split,split,path,pid,camid\n" + A, "first line must be"),
        ("Split,path,pid,camid\n" + A, "first line must be"),
        (A + A, "first line must be"),
        (HEAD, "holds no pictures"),
        (HEAD + A + "train,cam1/b.jpg,1\n", r"line 3: 3 fields where the header has 4"),
        (HEAD + "train,a.jpg,1,0,9\n", r"line 2: 5 fields"),
        (HEAD + "tain,cam1/a.jpg,1,0\n", r"line 2: .*'tain'.*Did you mean train"),
        (
            HEAD + "train,cam1/a.jpg,1,left\n",
            r"line 2: the camid 'left' is not a whole",
        ),
        (HEAD + "train,cam1/a.jpg,1,\n", r"line 2: the camid '' is not"),
        (HEAD + "train,cam1/a.jpg,1,-1\n", r"line 2: the camid '-1' is not"),
        (HEAD + "train,cam1/a.jpg,1,1.0\n", r"line 2: the camid '1.0' is not"),
        (HEAD + "train,cam1/a.jpg,1,1_0\n", r"line 2: the camid '1_0' is not"),
        (HEAD + "train,cam1/a.jpg,1,٣\n", r"line 2: the camid '٣' is not"),
        (HEAD + f"train,cam1/a.jpg,1,{10**18}\n", r"line 2: the camid"),
        (HEAD + "train,cam1/a.jpg,anna,1\n", r"line 2: the pid 'anna' is not"),
        (HEAD + "query,cam1/a.jpg,,1\n", r"line 2: the pid is unknown; only train"),
        (HEAD + "gallery,cam1/a.jpg,-1,1\n", r"line 2: the pid is unknown; only train"),
        (HEAD + "train,,1,0\n", r"line 2: the path is empty"),
        (HEAD + "train,a\0b.jpg,1,0\n", r"line 2: .*NUL"),
        (HEAD + "train,../secret.jpg,1,0\n", r"line 2: \.\./secret\.jpg leads out"),
        (HEAD + "train,cam1/../../own2/a.jpg,1,0\n", r"line 2: .* leads out"),
        (HEAD + "train,..,1,0\n", r"line 2: \.\. leads out"),
        (HEAD + A + A, r"line 3: cam1/a.jpg stands in line 2 already, in train"),
        (
            HEAD + A + "train,./cam1//a.jpg,1,0\n",
            r"line 3: .* stands in line 2 already",
        ),
        (
            HEAD + A + "query,cam1/a.jpg,1,0\n",
            r"line 3: .* in line 2 already, in train",
        ),
        (
            HEAD + A + "\n\n" + 'query,"cam1/a.jpg,1,0\n',
            r"after line 4: unexpected end",
        ),
        (HEAD + A + "train,cam1,1,0\n", r"do not exist: 1 \(cam1\)"),
        (HEAD + A + "train,cam1/,1,0\n", r"do not exist: 1 \(cam1/\)"),
        (HEAD + A + "train,cam1/A.jpeg,1,0\n", r"do not exist: 1 \(cam1/A.jpeg\)"),
        (HEAD + A + "train,cam1\\a.jpg,1,0\n", r"do not exist: 1 .*/ between folders"),
        (HEAD + f"train,{'x' * 5000}.jpg,1,0\n", r"do not exist: 1"),
        (HEAD + f"train,{'x' * 200_000}.jpg,1,0\n", r"after line 1: field larger"),
        (HEAD.encode() + b"train,caf\xe9.jpg,1,0\n", r"is not UTF-8 text; save it"),
        ((HEAD + A).encode("utf-16"), r"is UTF-16; save it as «CSV UTF-8»"),
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
    assert "do not exist: 2,000 (cam1/0.jpg, cam1/1.jpg, cam1/2.jpg, …)" in str(
        caught.value
    )


def test_manifest_missing_files_are_left_out_on_demand(
    manifest: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = manifest(HEAD + A + "train,cam1/gone.jpg,1,0\n")
    dataset = load_dataset("manifest", path, skip_missing=True)
    assert [p.name for p in dataset.train.paths] == ["a.jpg"]
    assert "do not exist: 1 (cam1/gone.jpg)" in caplog.text
    assert "do not exist: 1" in verify_dataset("manifest", path).problems[0]
    with pytest.raises(InputError, match=r"'tain'.*Did you mean train"):
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
    with pytest.raises(InputError, match=r"line 2: link.jpg leads out"):
        load_dataset("manifest", manifest(HEAD + "train,link.jpg,1,0\n"))
    (tmp_path / "own/folder").symlink_to(outside.parent, target_is_directory=True)
    with pytest.raises(InputError, match=r"line 2: folder/x.jpg leads out"):
        load_dataset("manifest", manifest(HEAD + "train,folder/x.jpg,1,0\n"))
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


@pytest.fixture(scope="module")
def playground() -> Iterable[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield plant(Path(folder), [f"cam{i}/{i}.jpg" for i in range(9)])


fields = st.sampled_from(
    ["train", "query", "gallery", "", "0", "1", "-1", "7", "x", '"', "..", "cam1/1.jpg"]
) | st.text(max_size=8)
anything = st.lists(st.lists(fields, min_size=3, max_size=5), max_size=4)


@settings(max_examples=200, deadline=None)
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
        assert sum(map(len, dataset.splits().values())) > 0
        assert all(p.is_file() for s in dataset.splits().values() for p in s.paths)


@settings(max_examples=100, deadline=None)
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
    table: dict[str, tuple[str, int, int]],
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
        for name, (split, pid, camid) in table.items():
            row = {"split": split, "path": name, "pid": pid, "camid": camid, "time": ""}
            writer.writerow(row)
    dataset = load_dataset("manifest", path)
    found = {
        (split, *row) for split, part in dataset.splits().items() for row in rows(part)
    }
    assert found == {
        (split, Path(name).name, pid, camid)
        for name, (split, pid, camid) in table.items()
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
    assert "notes holds no picture and is no camera" in caplog.text
    table = verify_dataset("folders", tmp_path).rows
    assert Count("train", "images of camera 1, cam10", None, 1) in table


def test_folders_of_the_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no pictures; it must be a folder that"):
        load_dataset("folders", tmp_path)
    plant(tmp_path, ["cam1/a.jpg", "b.jpg"])
    with pytest.raises(
        InputError, match=r"lie beside the camera folders: 1 \(b\.jpg\)"
    ):
        load_dataset("folders", tmp_path)


def test_a_folder_that_cannot_be_read(
    market: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(benchmarks.os, "scandir", refuse)
    with pytest.raises(InputError, match=f"{market} cannot be read: Permission denied"):
        load_dataset("market1501", market)
