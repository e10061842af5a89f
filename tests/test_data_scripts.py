"""The commands that bring in a benchmark: honest, broken and hostile archives."""

from __future__ import annotations

import io
import os
import runpy
import stat
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from o2cap.data.readers import PUBLISHED
from o2cap.errors import InputError

SCRIPTS = Path(__file__).parents[1] / "data_scripts"
sys.path.insert(0, str(SCRIPTS))

import unpacking  # noqa: E402
from unpacking import Benchmark, Limits, main, unpack  # noqa: E402

MARKET = Benchmark("market1501", "ask its owners")


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = _jpeg()
TOP = "Market-1501-v15.09.15"
FILES = {
    f"{TOP}/bounding_box_train/0002_c1s1_000451_03.jpg": JPEG,
    f"{TOP}/bounding_box_train/0007_c3s3_077419_03.jpg": JPEG,
    f"{TOP}/bounding_box_train/Thumbs.db": b"thumbs",
    f"{TOP}/query/0001_c1s1_001051_00.jpg": JPEG,
    f"{TOP}/bounding_box_test/0001_c2s1_000301_00.jpg": JPEG,
    f"{TOP}/bounding_box_test/-1_c2s1_000301_00.jpg": JPEG,
    f"{TOP}/readme.txt": b"read me",
    f"__MACOSX/{TOP}/._readme.txt": b"double",
    f"{TOP}/.DS_Store": b"store",
}
KEPT = {
    name.removeprefix(f"{TOP}/")
    for name in FILES
    if "/." not in name and "__" not in name
}


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of the small tree, in place of the real ones."""
    counts = {
        "train": {"images": 2, "identities": 2, "cameras": 2},
        "query": {"images": 1, "identities": 1},
        "gallery": {"images": 1, "identities": 1, "junk": 1},
    }
    monkeypatch.setitem(PUBLISHED, "market1501", counts)


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir(TOP)
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def make_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


SOURCES: list[tuple[Callable[[Path, dict[str, bytes]], Path], str]] = [
    (make_zip, "market.zip"),
    (make_tar, "market.tar"),
    (make_tar, "market.tar.gz"),
    (make_folder, "market"),
]
each_source = pytest.mark.parametrize(
    ("make", "name"), SOURCES, ids=[name for _, name in SOURCES]
)


def tree(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir()
    }


def assert_refused(source: Path, message: str, **options: object) -> None:
    """Refused, and neither the destination nor anything else is left behind."""
    folder = source.parent
    before = tree(folder)
    with pytest.raises(InputError, match=message):
        unpack(MARKET, source, folder / "data/market1501", **options)  # type: ignore[arg-type]
    assert tree(folder) == before
    assert not (folder / "data").exists() or not os.listdir(folder / "data")


@each_source
def test_unpack(
    make: Callable[[Path, dict[str, bytes]], Path], name: str, tmp_path: Path
) -> None:
    source = make(tmp_path / name, FILES)
    destination = tmp_path / "data/market1501"
    verification = unpack(MARKET, source, destination)
    assert verification.problems == []
    assert tree(destination) == KEPT
    assert os.listdir(destination.parent) == ["market1501"]
    for path in tree(destination):
        assert (destination / path).read_bytes() == FILES[f"{TOP}/{path}"]


def test_a_second_run_changes_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_zip(tmp_path / "market.zip", FILES)
    arguments = [str(source), str(tmp_path / "market1501")]
    assert main(MARKET, arguments) == 0
    output = capsys.readouterr().out
    assert "already" not in output
    assert "train   images              2 (published: 2)" in output
    assert f"--root {tmp_path / 'market1501'}" in output
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "market1501").rglob("*")}
    source.unlink()  # no longer needed
    assert main(MARKET, arguments) == 0
    assert "is already there" in capsys.readouterr().out
    assert stamps == {
        p: p.stat().st_mtime_ns for p in (tmp_path / "market1501").rglob("*")
    }
    (tmp_path / "market1501/query/0001_c1s1_001051_00.jpg").unlink()
    assert main(MARKET, arguments) == 2
    error = capsys.readouterr().err
    assert "query: 1 images expected, 0 found" in error
    assert "remove it to start again" in error


def test_an_empty_destination_is_filled(tmp_path: Path) -> None:
    (tmp_path / "market1501").mkdir()
    unpack(MARKET, make_zip(tmp_path / "m.zip", FILES), tmp_path / "market1501")
    assert tree(tmp_path / "market1501") == KEPT


def test_differing_counts_are_refused_or_kept_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = FILES | {f"{TOP}/query/0001_c4s1_001051_00.jpg": JPEG}
    source = make_zip(tmp_path / "market.zip", extra)
    assert_refused(source, "query: 1 images expected, 2 found")
    arguments = [str(source), str(tmp_path / "m"), "--allow-differences"]
    assert main(MARKET, arguments) == 0
    assert "note: query: 1 images expected, 2 found" in capsys.readouterr().out
    assert (tmp_path / "m/query/0001_c4s1_001051_00.jpg").exists()


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    assert_refused(
        make_zip(tmp_path / "x.zip", {"a/b.jpg": JPEG}),
        "a folder in it must hold bounding_",
    )
    assert_refused(
        make_zip(tmp_path / "empty.zip", {}),
        "a folder in it must hold bounding_",
    )


def test_a_known_checksum_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_zip(tmp_path / "market.zip", FILES)
    unpack(Benchmark("market1501", "", md5="0" * 32), source, tmp_path / "m")
    assert "owners' archive " + "0" * 32 in capsys.readouterr().out


# -------------------------------------------------------------------- interruption


@each_source
def test_an_interrupted_run_is_gone_on_with(
    make: Callable[[Path, dict[str, bytes]], Path],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = make(tmp_path / name, FILES)
    arguments = [str(source), str(tmp_path / "data/market1501")]
    written: list[str] = []
    copy = unpacking.shutil.copyfileobj

    def interrupted(stream: io.BytesIO, file: io.BufferedWriter, size: int) -> None:
        file.write(b"half")
        if len(written) == 3:
            raise KeyboardInterrupt
        file.seek(0)
        copy(stream, file, size)
        written.append(file.name)

    monkeypatch.setattr(unpacking.shutil, "copyfileobj", interrupted)
    assert main(MARKET, arguments) == 130
    assert "run the same command to go on" in capsys.readouterr().err
    assert not (tmp_path / "data/market1501").exists()

    def counted(stream: io.BytesIO, file: io.BufferedWriter, size: int) -> None:
        copy(stream, file, size)
        written.append(file.name)

    monkeypatch.setattr(unpacking.shutil, "copyfileobj", counted)
    assert main(MARKET, arguments) == 0
    assert len(written) == len(set(written)) == len(KEPT)  # no file twice
    assert tree(tmp_path / "data/market1501") == KEPT
    assert os.listdir(tmp_path / "data") == ["market1501"]


def test_what_another_archive_left_is_thrown_away(tmp_path: Path) -> None:
    stale = tmp_path / ".market1501.00000000.partial/query/0099_c1s1_001051_00.jpg"
    stale.parent.mkdir(parents=True)
    stale.touch()
    (tmp_path / ".other.00000000.partial").mkdir()
    unpack(MARKET, make_zip(tmp_path / "m.zip", FILES), tmp_path / "market1501")
    left = sorted(os.listdir(tmp_path))
    assert left == [".other.00000000.partial", "m.zip", "market1501"]


def test_what_is_no_folder_is_not_thrown_away(tmp_path: Path) -> None:
    """A file, or a link to somebody's folder, by the name of a half-done one."""
    source = make_zip(tmp_path / "market.zip", FILES)
    (tmp_path / "data").mkdir()
    name = tmp_path / "data/.market1501.00000000.partial"
    name.write_text("mine")
    with pytest.raises(InputError, match=f"{name} is in the way"):
        unpack(MARKET, source, tmp_path / "data/market1501")
    assert name.read_text() == "mine"
    name.unlink()
    name.symlink_to(tmp_path)
    with pytest.raises(InputError, match=f"{name} is in the way"):
        unpack(MARKET, source, tmp_path / "data/market1501")
    assert source.exists()


def test_a_path_that_the_system_refuses_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, long = make_zip(tmp_path / "market.zip", FILES), tmp_path / ("x" * 300)
    for words in ([source, long], [long, tmp_path / "m"]):
        assert main(MARKET, [str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert str(long) in said and said.count("\n") == 1

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", "/x y")

    monkeypatch.setattr(unpacking, "unpack", refuse)
    assert main(MARKET, [str(source), str(tmp_path / "m")]) == 2
    said = capsys.readouterr().err
    assert said == "error: /x y cannot be used (Permission denied).\n"


# ------------------------------------------------------------------ hostile archives

OUTSIDE = [
    "../evil.jpg",
    f"{TOP}/../../evil.jpg",
    "/tmp/o2cap-evil.jpg",
    "..\\evil.jpg",
    "C:\\evil.jpg",
    "C:evil.jpg",
    "a//b.jpg",
    "a/./b.jpg",
    "a\x07.jpg",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_zip_with_a_path_outside(path: str, tmp_path: Path) -> None:
    source = tmp_path / "market.zip"
    with zipfile.ZipFile(source, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
        info = zipfile.ZipInfo("x")
        info.filename = path  # as is: ZipInfo would tidy it
        archive.writestr(info, b"evil")
    assert_refused(source, "not safe to unpack")


@pytest.mark.parametrize("path", [p for p in OUTSIDE if "\\" not in p])
def test_tar_with_a_path_outside(path: str, tmp_path: Path) -> None:
    source = make_tar(tmp_path / "market.tar", FILES | {path: b"evil"})
    assert_refused(source, "not safe to unpack")


def test_zip_with_a_link(tmp_path: Path) -> None:
    source = make_zip(tmp_path / "market.zip", FILES)
    with zipfile.ZipFile(source, "a") as archive:
        info = zipfile.ZipInfo(f"{TOP}/query/link.jpg")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    assert_refused(source, "link.jpg' is a link or device")


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
        tarfile.GNUTYPE_SPARSE,  # claims any size for no bytes
    ],
)
def test_tar_with_a_link_or_device(kind: bytes, tmp_path: Path) -> None:
    source = make_tar(tmp_path / "market.tar", FILES)
    with tarfile.open(source, "a") as archive:
        member = tarfile.TarInfo(f"{TOP}/query/thing.jpg")
        member.type = kind
        member.linkname = "../../../etc/passwd"
        archive.addfile(member)
    assert_refused(source, "thing.jpg' is a link or device")


def test_folder_with_a_link(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "market", FILES)
    (source / TOP / "link").symlink_to("/etc", target_is_directory=True)
    assert_refused(source, "link' is a link or device")
    (source / TOP / "link").unlink()
    (source / TOP / "query/link.jpg").symlink_to("/etc/passwd")
    assert_refused(source, r"link.jpg' is a link or device")


@pytest.mark.parametrize("name", ["bomb.zip", "bomb.tar.gz"])
def test_bomb(name: str, tmp_path: Path) -> None:
    zeros = FILES | {f"{TOP}/query/zeros.jpg": bytes(3_000_000)}
    source = (make_zip if name.endswith("zip") else make_tar)(tmp_path / name, zeros)
    small = Limits(harmless=1_000_000)
    assert_refused(source, "grows more than 20 times when unpacked", limits=small)
    assert_refused(
        source, "more than 500,000 files or 0.002 GB", limits=Limits(size=10**6 * 2)
    )
    assert_refused(source, "more than 5 files", limits=Limits(files=5))


def test_a_tar_that_announces_more_than_it_holds(tmp_path: Path) -> None:
    member = tarfile.TarInfo(f"{TOP}/query/0001_c1s1_001051_00.jpg")
    member.size = 10**12
    (tmp_path / "huge.tar").write_bytes(member.tobuf() + bytes(1024))
    assert_refused(tmp_path / "huge.tar", "500,000 files or 20 GB")


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = unpacking.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(unpacking.shutil, "disk_usage", lambda path: usage)
    source = make_zip(tmp_path / "market.zip", FILES)
    assert_refused(source, "GB free; 0.0 GB are needed")


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unpacking.shutil, "copyfileobj", full)
    source = make_zip(tmp_path / "market.zip", FILES)
    assert_refused(source, "cannot be unpacked: .*No space left")


# ------------------------------------------------------------------- broken archives


def test_damaged_zip(tmp_path: Path) -> None:
    source = make_zip(tmp_path / "market.zip", {f"{TOP}/a.bin": os.urandom(5000)})
    content = bytearray(source.read_bytes())
    content[1000] ^= 0xFF
    source.write_bytes(content)
    assert_refused(source, "is damaged")


def test_zip_whose_file_is_larger_than_announced(tmp_path: Path) -> None:
    source = make_zip(tmp_path / "market.zip", {f"{TOP}/a.bin": bytes(50_000)})
    content = source.read_bytes()
    real, lie = (size.to_bytes(4, "little") for size in (50_000, 10))
    start = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)  # after the folder's
    assert content.count(real, start) == 1
    source.write_bytes(content[:start] + content[start:].replace(real, lie))
    assert_refused(source, "is damaged")


@pytest.mark.parametrize("name", ["market.tar", "market.tar.gz", "market.zip"])
def test_cut_off(name: str, tmp_path: Path) -> None:
    make = make_zip if name.endswith("zip") else make_tar
    source = make(tmp_path / name, {f"{TOP}/a.bin": os.urandom(50_000)})
    source.write_bytes(source.read_bytes()[:20_000])
    assert_refused(source, "is damaged|or it is cut off")


def test_encrypted_zip(tmp_path: Path) -> None:
    source = make_zip(tmp_path / "market.zip", FILES)
    content = bytearray(source.read_bytes())
    place = content.rindex(b"PK\1\2")  # the last entry's flags
    content[place + 8] |= 1
    source.write_bytes(content)
    assert_refused(source, "is encrypted; unpack it with its password")


def test_no_archive_at_all(tmp_path: Path) -> None:
    (tmp_path / "page.zip").write_text("<html>Please log in</html>")
    assert_refused(tmp_path / "page.zip", "neither a folder nor a zip or tar")
    with pytest.raises(InputError, match="does not exist; give the archive"):
        unpack(MARKET, tmp_path / "nothing.zip", tmp_path / "m")
    source = make_folder(tmp_path / "market", FILES)
    with pytest.raises(InputError, match="choose a place beside it"):
        unpack(MARKET, source, source / "data")


# ------------------------------------------------------------------------ commands


@pytest.mark.parametrize("name", [*PUBLISHED])
def test_every_benchmark_has_a_command(name: str) -> None:
    module = __import__(name)
    assert module.BENCHMARK.name == name
    assert "Where to get it" in module.ACCESS or "WITHDRAWN in 2019" in module.ACCESS
    assert max(map(len, module.ACCESS.splitlines())) <= 88


def test_no_link_to_a_copy_of_the_withdrawn_data() -> None:
    text = (SCRIPTS / "dukemtmcreid.py").read_text(encoding="utf-8")
    assert "http" not in text and "consent" in text


def run(script: str, *arguments: object) -> int:
    """Run a script as `python data_scripts/x.py` does; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    return int(caught.value.code or 0)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_zip(tmp_path / "market.zip", FILES)
    assert run("market1501.py", source, tmp_path / "m") == 0
    assert "note: " + str(source) in capsys.readouterr().out  # not the owners' archive
    assert run("veri776.py", source, tmp_path / "v") == 2
    error = capsys.readouterr().err
    assert f"{source}" in error and "partial" not in error
    assert run("msmt17.py") == 2
    assert run("dukemtmcreid.py", "--help") == 0
    assert sorted(os.listdir(tmp_path)) == ["m", "market.zip"]
