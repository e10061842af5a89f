"""Bring a benchmark from its owners' archive to a folder that o2cap reads.

The archive (zip, tar, tar.gz, tar.bz2, tar.xz) or folder comes from elsewhere, so it is
not trusted: every name and size is checked before the first byte is written, and only
plain files are. Files go into a hidden folder beside the destination, which is renamed
once the counts are right; interrupted, the next run goes on where this one stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import escape
from io import FileIO
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from o2cap.data.images import LEFT_BEHIND
from o2cap.data.readers import Reading, verify_dataset
from o2cap.errors import InputError


@dataclass(frozen=True)
class Limits:
    """What an archive may hold; several times what the largest benchmark does."""

    files: int = 500_000
    size: int = 20 * 10**9
    """Bytes, unpacked."""
    ratio: float = 20.0
    """Unpacked over packed size: pictures hardly shrink, bombs do."""
    harmless: int = 100 * 10**6
    """Bytes up to which the ratio does not matter."""


@dataclass(frozen=True)
class Benchmark:
    """A data set, and what to tell a person about it."""

    name: str
    """Its name in o2cap."""
    access: str
    """Where to ask for it, and on which terms."""
    md5: str | None = None
    """Checksum of the owners' archive, where it is public."""


class Entry(NamedTuple):
    """A plain file in an archive or folder."""

    path: str
    """Relative, with / between folders."""
    size: int
    open: Callable[[], IO[bytes]]


def main(benchmark: Benchmark, argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code (0 done, 2 bad input, 130 interrupted)."""
    parser = argparse.ArgumentParser(
        description=benchmark.access,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="archive or folder from the owners")
    parser.add_argument("destination", type=Path, help="folder to make, for --root")
    parser.add_argument(
        "--allow-differences",
        action="store_true",
        help="keep the data when their counts are not the published ones",
    )
    args = parser.parse_args(argv)
    try:
        verification = unpack(
            benchmark, args.source, args.destination, strict=not args.allow_differences
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {refusal(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130
    for split, what, expected, found in verification.rows:
        published = "" if expected is None else f" (published: {expected:,})"
        print(f"{split:8}{what:12}{found:>9,}{published}")
    for sentence in verification.problems + verification.notes:
        print(f"note: {sentence}")
    print(f"Use it: o2cap train --preset {benchmark.name} --root {args.destination}")
    return 0


def refusal(error: OSError) -> str:
    """Return what the system refuses, in a sentence."""
    what = error.filename or "A file"
    return f"{what} cannot be used ({error.strerror or error})."


def unpack(
    benchmark: Benchmark,
    source: Path,
    destination: Path,
    *,
    strict: bool = True,
    limits: Limits | None = None,
) -> Reading:
    """Unpack and verify `source` into `destination`, or verify what is there already.

    Parameters
    ----------
    benchmark : Benchmark
        What the source should be.
    source : Path
        The owners' archive, or a folder with its contents.
    destination : Path
        The folder to make. Nothing is changed when it exists.
    strict : bool
        Whether problems and differing counts are an error.
    limits : Limits, optional
        What the source may hold.

    Returns
    -------
    Reading
        Counts of what lies in `destination`.

    Raises
    ------
    InputError
        When the source is unsafe, damaged, or not the benchmark; nothing stays behind.
    """
    destination = destination.absolute()
    if destination.is_file() or (destination.exists() and os.listdir(destination)):
        verification = _verify(
            benchmark, destination, strict, "remove it to start again"
        )
        print(f"{destination} is already there.")
        return verification
    if not source.exists():
        raise InputError(f"{source} does not exist; give the archive or a folder.")
    if destination.is_relative_to(source.absolute()):
        raise InputError(f"{destination} lies in {source}; choose a place beside it.")
    info = source.stat()
    origin = f"{source.absolute()}|{info.st_size}|{info.st_mtime_ns}"
    mark = hashlib.sha256(origin.encode()).hexdigest()[:8]
    growing = destination.with_name(f".{destination.name}.{mark}.partial")
    for stale in destination.parent.glob(f".{escape(destination.name)}.*.partial"):
        if stale.is_symlink() or not stale.is_dir():
            raise InputError(
                f"{stale} is in the way, where unpacking makes a folder; move it."
            )
        if stale != growing:  # of another archive: nothing to go on from
            shutil.rmtree(stale)
    try:
        _compare_checksum(benchmark, source)
        _copy(source, growing, limits or Limits())
        top = growing
        while len(inner := list(top.iterdir())) == 1 and inner[0].is_dir():
            top = inner[0]  # archives wrap everything in a folder of varying name
        way_out = "keep it nevertheless with --allow-differences"
        verification = _verify(benchmark, top, strict, way_out)
        if destination.exists():
            destination.rmdir()  # empty, as seen above
        os.replace(top, destination)
    except KeyboardInterrupt:
        raise  # what was unpacked is whole: the next run goes on from it
    except BaseException as error:
        shutil.rmtree(growing, ignore_errors=True)
        if isinstance(error, _DAMAGE):
            raise InputError(f"{source} is damaged ({error}); get it again.") from error
        if isinstance(error, OSError):
            raise InputError(f"{source} cannot be unpacked: {error}.") from error
        if isinstance(error, InputError):  # of the readers, about the hidden folder
            raise InputError(str(error).replace(str(growing), str(source))) from error
        raise
    shutil.rmtree(growing, ignore_errors=True)
    return verification


_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    LZMAError,
    EOFError,
    NotImplementedError,  # zipfile's, for compression methods that it does not know
)


def _verify(benchmark: Benchmark, folder: Path, strict: bool, way_out: str) -> Reading:
    verification = verify_dataset(benchmark.name, folder)
    if verification.problems and strict:
        wrong = "; ".join(verification.problems)
        raise InputError(f"{folder} is not {benchmark.name}: {wrong}. Or {way_out}.")
    return verification


def _compare_checksum(benchmark: Benchmark, source: Path) -> None:
    if benchmark.md5 is None or source.is_dir():
        return
    with open(source, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != benchmark.md5:  # repacked archives are common: the counts decide
        print(
            f"note: {source} has the MD5 {found}, the owners' archive {benchmark.md5}"
        )


def _copy(source: Path, folder: Path, limits: Limits) -> None:
    """Check all entries, then write the files that `folder` does not hold yet."""
    with _opened(source) as entries:
        total = files = 0
        packed = max(1, source.stat().st_size) if source.is_file() else None
        for entry in entries():
            _check_name(entry.path, source)
            total += entry.size
            files += 1
            if files > limits.files or total > limits.size:
                raise InputError(
                    f"{source} holds more than {limits.files:,} files or "
                    f"{limits.size / 1e9:g} GB: more than any of these data sets."
                )
            if packed and total > max(limits.harmless, limits.ratio * packed):
                raise InputError(
                    f"{source} grows more than {limits.ratio:g} times when unpacked; "
                    "pictures do not, so it is not what it says."
                )
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if total > free:
            raise InputError(
                f"{folder.parent} has {free / 1e9:.1f} GB free; {total / 1e9:.1f} GB "
                "are needed."
            )
        folder.mkdir(exist_ok=True)
        for entry in tqdm(entries(), total=files, unit=" files", disable=None):
            parts = entry.path.split("/")
            if any(p.startswith(".") or p.lower() in LEFT_BEHIND for p in parts):
                continue
            target = folder.joinpath(*parts)
            if target.is_file() and target.stat().st_size == entry.size:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            with entry.open() as stream, open(part, "wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
            if part.stat().st_size != entry.size:
                raise InputError(f"{source} is damaged at {entry.path}; get it again.")
            os.replace(part, target)


def _check_name(path: str, source: Path) -> None:
    parts = path.split("/")
    # ':' is a drive or a hidden stream on Windows
    if {"", ".", ".."} & set(parts) or ":" in path or not path.isprintable():
        raise InputError(
            f"{source} is not safe to unpack: the file name {path!r} is absolute, "
            "leads out of the folder, or holds characters that no picture's name does."
        )


@contextmanager
def _opened(source: Path) -> Iterator[Callable[[], Iterator[Entry]]]:
    """Give a function that lists the plain files of an archive or folder.

    Raises InputError at anything else: links, devices, encrypted files. That is
    stricter than `tarfile.data_filter`, which lets links inside the folder pass.
    """

    def refuse(path: str, what: str) -> InputError:
        return InputError(f"{source} is not safe to unpack: {path!r} is {what}.")

    if source.is_dir():

        def from_folder() -> Iterator[Entry]:
            for where, folders, names in os.walk(source):
                folders.sort()
                for name in sorted(names) + folders:
                    path = Path(where, name)
                    mode = path.lstat().st_mode
                    relative = path.relative_to(source).as_posix()
                    if stat.S_ISREG(mode):
                        size = path.stat().st_size
                        yield Entry(relative, size, partial(FileIO, path))
                    elif not stat.S_ISDIR(mode):
                        raise refuse(relative, "a link or device, not a file")

        yield from_folder
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:

            def from_zip() -> Iterator[Entry]:
                for info in archive.infolist():
                    if info.filename.endswith("/"):  # is_dir() fails on no name
                        continue
                    path = info.filename.replace("\\", "/")  # zips made on Windows
                    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                        raise refuse(path, "a link or device, not a file")
                    if info.flag_bits & 1:
                        raise InputError(
                            f"{source} is encrypted; unpack it with its password and "
                            "give the folder."
                        )
                    yield Entry(path, info.file_size, partial(archive.open, info))

            yield from_zip
    elif tarfile.is_tarfile(source):

        def from_tar() -> Iterator[Entry]:
            with tarfile.open(source) as archive:
                for member in archive:
                    if member.isdir():
                        continue
                    path = member.name.removeprefix("./")
                    if not member.isreg() or member.issparse():
                        raise refuse(path, "a link or device, not a file")
                    # a plain file always has contents to extract, so never None
                    content: Any = partial(archive.extractfile, member)
                    yield Entry(path, member.size, content)

        yield from_tar
    else:
        raise InputError(
            f"{source} is neither a folder nor a zip or tar archive, or it is cut off; "
            "get it again."
        )
