"""A disk that is full, or may not be written to: one sentence, nothing lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_trainer import Stop, outcome, snapshot, stop_at

from o2cap import trainer
from o2cap.__main__ import main
from o2cap.errors import InputError
from o2cap.files import replacing
from o2cap.run import load_model
from o2cap.trainer import train

NOBODY = 65534


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Do without root's right to write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    """The pictures, where other users may read them: pytest's folders are its own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        tiny.write_pictures(Path(name, "data"))
        yield Path(name, "data")


def config(data: Path, output: Path) -> Any:
    return tiny.config(output, dataset="manifest", root=data / "manifest.csv")


def words(data: Path, output: Path) -> list[str]:
    """Return the command with the same settings."""
    where = ["--root", str(data / "manifest.csv"), "--output", str(output)]
    return ["train", "--dataset", "manifest", *where, *tiny.options()]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    return train(config(data, tmp_path_factory.mktemp("whole") / "run")).directory


@pytest.fixture(scope="module")
def half(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left after its first epoch."""
    run = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(Stop):
        train(config(data, run), on_epoch=stop_at(0))
    return run


@pytest.fixture(scope="module")
def begun(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left in its first epoch, after the warm start."""

    def train_epoch(*_: Any, **__: Any) -> None:
        raise Stop

    run = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(trainer, "train_epoch", train_epoch)
        train(config(data, run))
    return run


def refusal(code: int, said: str) -> str:
    """Return the one sentence that a command ended with."""
    assert code in (1, 2) and "Traceback" not in said and "Exception" not in said
    (sentence,) = [line for line in said.splitlines() if line.startswith("o2cap: ")]
    return sentence


# -------------------------------------------------------------------------- read-only


def test_a_folder_that_may_not_be_written_to(
    data: Path, half: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(half, data.parent / "run"))
    for path in (data.parent, run, *run.rglob("*")):
        os.chown(path, NOBODY if os.geteuid() == 0 else -1, -1)
    before = snapshot(run)
    run.chmod(0o555)
    with nobody():
        code = main(words(data, run))
    said = refusal(code, capsys.readouterr().err)
    assert str(run) in said and "cannot be used (Permission denied)" in said
    assert snapshot(run) == before

    run.chmod(0o755)  # and now it is shut in the midst of the last epoch
    (run / ".metrics.jsonl.left.part").touch()
    (run / "pseudo_labels").chmod(0o555)
    with nobody():
        code = main(words(data, run))
    assert "epoch_001.npz cannot be written (Permission denied)" in refusal(
        code, capsys.readouterr().err
    )
    assert snapshot(run) == before

    (run / "pseudo_labels").chmod(0o755)
    with nobody():
        assert main(words(data, run)) == 0
    assert outcome(run) == outcome(whole)


def test_a_folder_that_may_not_be_entered_is_named(data: Path) -> None:
    (data.parent / "shut").mkdir(mode=0)
    with nobody():
        for output in (data.parent / "shut", data.parent / "shut/run"):
            with pytest.raises(PermissionError, match="shut"):
                train(config(data, output))
            with pytest.raises(InputError, match="shut"):
                load_model(output)


# ----------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no disk may be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def leave_free(disk: Path, pages: int) -> None:
    """Fill the disk but for some pages of 4 KiB."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    free = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(
            file.fileno(), 0, free.f_bavail * free.f_bsize - 4096 * pages
        )


def test_a_disk_that_fills_up_at_any_write(
    data: Path,
    begun: Path,
    whole: Path,
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Labels, metrics, TensorBoard's events and the checkpoint find no room in turn."""
    run = small_disk / "run"
    # (A checkpoint is written beside the next epoch, which finds no room, either.)
    # TensorBoard does not name its file.
    names = ("epoch_000.npz", "metrics.jsonl", "A file", "epoch_001.npz")
    for pages, name in enumerate(names):
        shutil.rmtree(run, ignore_errors=True)
        (small_disk / "ballast").unlink(missing_ok=True)
        shutil.copytree(begun, run)
        before = (run / "checkpoint.pt").read_bytes()
        leave_free(small_disk, pages)
        capsys.readouterr()
        sentence = refusal(main(words(data, run)), capsys.readouterr().err)
        refused, _, why = sentence.partition(" cannot be ")
        assert name in refused and "No space left on device" in why
        assert (run / "checkpoint.pt").read_bytes() == before
        (small_disk / "ballast").unlink()
        assert main(words(data, run)) == 0
        assert outcome(run) == outcome(whole)


def test_a_program_ends_quietly_on_a_full_disk(
    data: Path, half: Path, small_disk: Path
) -> None:
    """Nothing is said by what runs when the interpreter ends, either."""
    run = Path(shutil.copytree(half, small_disk / "run"))
    leave_free(small_disk, 0)
    done = subprocess.run(
        [sys.executable, "-m", "o2cap", *words(data, run)],
        capture_output=True,
        text=True,
    )
    assert "No space left on device" in refusal(done.returncode, done.stderr)


# ----------------------------------------------------------------------- a power cut


def test_a_file_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, int]] = []
    sync, exchange = os.fsync, os.replace

    def fsync(handle: int) -> None:
        happened.append(("on the disk", os.fstat(handle).st_ino))
        sync(handle)

    def replace(source: str, target: Path) -> None:
        happened.append(("in its place", os.stat(source).st_ino))
        exchange(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with replacing(tmp_path / "file") as path:
        path.write_text("new")
    file = (tmp_path / "file").stat().st_ino
    assert happened == [("on the disk", file), ("in its place", file)]


def test_a_disk_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("old")

    def fsync(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with (
        pytest.raises(InputError, match=r"cannot be written \(Input/output error\)"),
        replacing(tmp_path / "file") as path,
    ):
        path.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"
