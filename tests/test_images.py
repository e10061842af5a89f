"""ImageSet, ReIDDataset, and which files are pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from o2cap.data.images import ImageSet, ReIDDataset, is_picture, list_pictures


def images(n: int, *, pids: list[int] | None = None) -> ImageSet:
    paths = [Path("cam", f"{i}.jpg") for i in range(n)]
    column = None if pids is None else torch.tensor(pids, dtype=torch.int64)
    return ImageSet(paths, torch.arange(n) % 3, column)


def test_columns_must_have_equal_length_and_be_int64() -> None:
    paths = [Path("a.jpg"), Path("b.jpg")]
    with pytest.raises(ValueError, match=r"camids must be int64 of shape \[2\]"):
        ImageSet(paths, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"pids must be int64 .* not torch.int32"):
        two = torch.zeros(2, dtype=torch.int64)
        ImageSet(paths, two, two.to(torch.int32))


def test_without_identities_keeps_everything_but_the_identities() -> None:
    known = images(4, pids=[5, 5, 6, -1])
    hidden = known.without_identities()
    assert hidden.pids is None
    assert hidden.paths == known.paths
    assert torch.equal(hidden.camids, known.camids)
    assert known.pids is not None  # a copy: the original still has them


def test_select_by_index_and_by_mask() -> None:
    chosen = images(5, pids=[10, 11, 12, 13, 14]).select(torch.tensor([3, 0, 3]))
    assert [path.name for path in chosen.paths] == ["3.jpg", "0.jpg", "3.jpg"]
    assert chosen.camids.tolist() == [0, 0, 0]
    assert chosen.pids is not None and chosen.pids.tolist() == [13, 10, 13]
    masked = images(3).select(torch.tensor([True, False, True]))
    assert [path.name for path in masked.paths] == ["0.jpg", "2.jpg"]
    assert masked.pids is None
    assert len(images(3).select(torch.tensor([False] * 3))) == 0


def test_counts_leave_out_unknown_identities() -> None:
    dataset = ReIDDataset(
        "own", images(6, pids=[0, 0, 7, -1, -1, 7]), images(0), images(2)
    )
    assert dataset.counts() == {
        "train": {"images": 6, "identities": 2, "cameras": 3},
        "query": {"images": 0, "identities": 0, "cameras": 0},
        "gallery": {"images": 2, "identities": 0, "cameras": 2},
    }


def test_fingerprint_follows_the_pictures_not_the_place(tmp_path: Path) -> None:
    def dataset(folder: Path, content: bytes = b"12345") -> ReIDDataset:
        (folder / "cam").mkdir(parents=True)
        paths = [folder / "cam" / name for name in ("a.jpg", "b.jpg")]
        for path in paths:
            path.write_bytes(content)
        train = ImageSet(paths, torch.tensor([0, 1]), torch.tensor([3, 4]))
        return ReIDDataset("own", train, images(0), images(0))

    here = dataset(tmp_path / "here")
    assert here.fingerprint() == dataset(tmp_path / "there").fingerprint()
    assert here.fingerprint() != dataset(tmp_path / "x", b"123456").fingerprint()
    for changed in (
        here.train.select(torch.tensor([0])),
        here.train.select(torch.tensor([1, 0])),
        replace(here.train, camids=torch.tensor([0, 2])),
        replace(here.train, pids=torch.tensor([3, 5])),
        here.train.without_identities(),
    ):
        assert replace(here, train=changed).fingerprint() != here.fingerprint()
    hidden = here.fingerprint()
    (tmp_path / "here/cam/a.jpg").unlink()
    (tmp_path / "here/cam/a.jpg").symlink_to(tmp_path / "nowhere")
    assert here.fingerprint() != hidden  # and no traceback
    swapped = replace(here, train=here.query, query=here.train)
    assert swapped.fingerprint() != here.fingerprint()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", True),
        ("a.JPEG", True),
        ("a.b.png", True),
        ("a.webp", True),
        ("Thumbs.db", False),
        (".DS_Store", False),
        ("._a.jpg", False),
        ("jpg", False),
        ("a.jpg.part", False),
        ("a.npz", False),
    ],
)
def test_is_picture(name: str, expected: bool) -> None:
    assert is_picture(name) is expected


def test_list_pictures_goes_down_and_is_sorted(tmp_path: Path) -> None:
    wanted = ["a/z.jpg", "a/b/y.png", "c.bmp"]
    for name in [*wanted, ".hidden/x.jpg", "a/notes.txt", "a/._z.jpg"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert list_pictures(tmp_path) == sorted(tmp_path / name for name in wanted)
    assert list_pictures(tmp_path / "nowhere") == []
