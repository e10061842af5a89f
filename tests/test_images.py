"""ImageSet, ReIDDataset, and what a walk through folders finds."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from o2cap.data import images as module
from o2cap.data.images import ImageSet, ReIDDataset, list_pictures
from o2cap.errors import InputError


def images(n: int, *, pids: list[int] | None = None) -> ImageSet:
    paths = [Path("cam", f"{i}.jpg") for i in range(n)]
    column = None if pids is None else torch.tensor(pids, dtype=torch.int64)
    return ImageSet(paths, torch.arange(n) % 3, column, grey_range=(7, 9))


def test_columns_must_have_equal_length() -> None:
    paths = [Path("a.jpg"), Path("b.jpg")]
    two = torch.zeros(2, dtype=torch.int64)
    for columns in ((two[:1],), (two, two[:1]), (two, None, ["a"])):
        with pytest.raises(ValueError, match="as long as there are paths"):
            ImageSet(paths, *columns)


def test_without_identities_keeps_everything_but_the_identities() -> None:
    known = images(4, pids=[5, 5, 6, -1])
    hidden = known.without_identities()
    assert hidden.pids is None
    assert (hidden.paths, hidden.grey_range) == (known.paths, (7, 9))
    assert torch.equal(hidden.camids, known.camids)
    assert known.pids is not None  # a copy: the original still has them


def test_select_by_index_and_by_mask() -> None:
    chosen = images(5, pids=[10, 11, 12, 13, 14]).select(torch.tensor([3, 0, 3]))
    assert [path.name for path in chosen.paths] == ["3.jpg", "0.jpg", "3.jpg"]
    assert chosen.camids.tolist() == [0, 0, 0]
    assert chosen.pids is not None and chosen.pids.tolist() == [13, 10, 13]
    assert chosen.grey_range == (7, 9)
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


# ------------------------------------------------------------------- the fingerprint


def test_fingerprint_follows_the_pictures_not_the_place(tmp_path: Path) -> None:
    def dataset(
        folder: Path, content: bytes = b"12345", inner: str = "cam"
    ) -> ReIDDataset:
        (folder / inner).mkdir(parents=True)
        paths = [folder / inner / name for name in ("a.jpg", "b\u00fc.jpg")]
        for path in paths:
            path.write_bytes(content)
        train = ImageSet(paths, torch.tensor([0, 1]), torch.tensor([3, 4]))
        return ReIDDataset("own", train, images(0), images(0), root=folder)

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
    swapped = replace(here, train=here.query, query=here.train)
    assert swapped.fingerprint() != here.fingerprint()
    # Copied by a system that writes an ü in another form.
    other = replace(here.train, paths=[here.train.paths[0], tmp_path / "here/cam/x"])
    twin = tmp_path / "here/cam/bu\u0308.jpg"
    twin.write_bytes(b"12345")
    other = replace(here.train, paths=[here.train.paths[0], twin])
    assert replace(here, train=other).fingerprint() == here.fingerprint()
    # Pictures directly in the root, whatever it is called.
    beside = [dataset(tmp_path / name, inner="") for name in ("one", "two")]
    assert beside[0].fingerprint() == beside[1].fingerprint() != here.fingerprint()
    (tmp_path / "here/cam/a.jpg").unlink()
    before = here.fingerprint()
    (tmp_path / "here/cam/a.jpg").symlink_to(tmp_path / "nowhere")
    assert before == here.fingerprint() != beside[0].fingerprint()  # and no traceback


# ---------------------------------------------------------------------------- a walk


def plant(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_walk_goes_down_and_is_sorted(tmp_path: Path) -> None:
    wanted = ["a/z.jpg", "a/b/y.PNG", "c.bmp", "d.e.jpeg", "f.jfif", "g.gif", "h.tiff"]
    plant(tmp_path, *wanted, "notes.txt", "jpg", "a.jpg.part", "a.npz")
    (tmp_path / "folder.jpg").mkdir()
    assert list_pictures(tmp_path) == sorted(tmp_path / name for name in wanted)


def test_what_other_programs_leave_behind_is_no_data(tmp_path: Path) -> None:
    plant(tmp_path, "cam1/a.jpg", "#1/b.jpg", "@gate/c.jpg")
    plant(
        tmp_path,
        *("cam1/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "cam1/.@__thumb/a.jpg"),
        *("#recycle/a.jpg", "#snapshot/a.jpg", "@Recycle/a.jpg"),
        *("$RECYCLE.BIN/S-1/a.jpg", "System Volume Information/a.jpg"),
        *("__MACOSX/cam1/a.jpg", "cam1/._a.jpg", "cam1/.DS_Store", "cam1/Thumbs.db"),
        *("cam1/.ipynb_checkpoints/a.jpg", "lost+found/a.jpg", ".git/a.jpg"),
    )
    found = [path.relative_to(tmp_path).as_posix() for path in list_pictures(tmp_path)]
    assert found == ["#1/b.jpg", "@gate/c.jpg", "cam1/a.jpg"]


def test_pictures_that_are_not_read_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plant(tmp_path, "a.jpg", "b.heic", "c.HEIC", "sub/d.avif", "@eaDir/e.avif")
    assert len(list_pictures(tmp_path)) == 1
    assert "left out, as not read: 2 .heic, 1 .avif; convert" in caplog.text


def test_links_to_folders_are_followed_and_none_is_entered_twice(
    tmp_path: Path,
) -> None:
    plant(tmp_path / "root", "cam1/a.jpg", "cam2/b.jpg")
    plant(tmp_path / "else", "c.jpg")
    for name, target in {
        "cam3": tmp_path / "else",
        "a_latest": tmp_path / "root/cam2",  # comes before cam2, and is not it
        "loop": tmp_path / "root",
        "cam1/up": tmp_path / "root",
    }.items():
        (tmp_path / "root" / name).symlink_to(target, target_is_directory=True)
    (tmp_path / "root/gone.jpg").symlink_to(tmp_path / "nowhere")
    found = list_pictures(tmp_path / "root")
    names = [path.relative_to(tmp_path / "root").as_posix() for path in found]
    assert names == ["cam1/a.jpg", "cam2/b.jpg", "cam3/c.jpg", "gone.jpg"]


@pytest.mark.parametrize("how", ["may not be read", "is stale", "is a link to itself"])
def test_a_folder_that_cannot_be_read_is_not_empty(
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plant(tmp_path, "cam1/a.jpg", "cam2/b.jpg", "cam3/c.jpg")
    shut = tmp_path / "cam2/shut"
    if how == "is a link to itself":
        shut.symlink_to(shut)
    else:
        plant(shut, "secret.jpg")
        number = 13 if how == "may not be read" else 116
        scan = os.scandir

        def refuse(folder: str) -> object:
            if folder == str(shut):
                raise OSError(number, os.strerror(number), folder)
            return scan(folder)

        monkeypatch.setattr(module.os, "scandir", refuse)
    with pytest.raises(InputError, match=rf"{shut} cannot be read \(.*--skip-unread"):
        list_pictures(tmp_path)
    names = [path.name for path in list_pictures(tmp_path, skip_unreadable=True)]
    assert names == ["a.jpg", "b.jpg", "c.jpg"]
    assert f"{shut} cannot be read" in caplog.text and "left out" in caplog.text
    with pytest.raises(InputError, match="nowhere cannot be read"):
        list_pictures(tmp_path / "nowhere")
