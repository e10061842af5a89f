"""The two records that carry pictures through the package: ImageSet and ReIDDataset."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from o2cap.errors import InputError

logger = logging.getLogger("o2cap")

_READ = ("jpg", "jpeg", "jpe", "jfif", "png", "bmp", "webp", "tif", "tiff", "gif")
PICTURE_SUFFIXES = tuple(f".{ending}" for ending in _READ)
# Not read, but counted, so that nobody misses them unawares.
OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".jp2", ".dng", ".mp4", ".avi", ".mov")

# What a file may hold, whatever its suffix. Pillow knows forty more formats: parsers
# of long-forgotten ones, and PostScript, for which it starts another program.
PICTURE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")

# Folders that disk stations, systems and archivers make: thumbnails, waste, copies.
LEFT_BEHIND = {
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
    *("$recycle.bin", "system volume information", "__macosx", "lost+found"),
}

LEAVE_OUT = " (train, embed, cluster and search can skip it: --skip-unreadable True)"


@contextmanager
def readable(folder: str | Path, skip_unreadable: bool = False) -> Iterator[None]:
    """Look into `folder` in the block; what the system refuses is never just empty.

    Raises
    ------
    InputError
        Names what cannot be read, unless it is to be skipped: that takes a warning.
    """
    try:
        yield
    except OSError as error:
        fault = f"{error.filename or folder} cannot be read ({error.strerror or error})"
        if not skip_unreadable:
            raise InputError(f"{fault}; mend that{LEAVE_OUT}.") from error
        logger.warning("%s and is left out.", fault)


def list_pictures(folder: Path, skip_unreadable: bool = False) -> list[Path]:
    """Return the pictures in `folder` and below, sorted by path.

    Links to folders are followed, and no folder is entered twice. Not entered are
    hidden folders (.ipynb_checkpoints) and those in `LEFT_BEHIND`; hidden files are
    no pictures. Pictures of a format that is not read are counted in a warning.

    Raises
    ------
    InputError
        When a folder cannot be read; with `skip_unreadable` that is a warning.
    """
    found, others, entered = [], Counter[str](), set()
    waiting = deque([os.fspath(folder)])
    while waiting:
        here = waiting.popleft()
        if (real := os.path.realpath(here)) in entered:
            continue
        entered.add(real)
        with readable(here, skip_unreadable), os.scandir(here) as entries:
            for entry in entries:
                name = entry.name.lower()
                if name.startswith(".") or name in LEFT_BEHIND:
                    continue
                is_folder = True  # where the system refuses to say: then it says why
                with suppress(OSError):
                    is_folder = entry.is_dir()
                if is_folder and entry.is_symlink():
                    waiting.append(entry.path)  # last: a picture has its own path
                elif is_folder:
                    waiting.appendleft(entry.path)
                elif name.endswith(PICTURE_SUFFIXES):
                    found.append(Path(entry.path))
                elif name.endswith(OTHER_SUFFIXES):
                    others[os.path.splitext(name)[1]] += 1
    if others:
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in others.items())
        logger.warning("%s: left out, as not read: %s; convert them.", folder, counts)
    return sorted(found)


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open a picture, of which nobody knows where it comes from.

    Raises
    ------
    InputError
        Names the file when it is missing, of no known format, damaged or absurdly
        large: here, or when the caller decodes it.
    """
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("there is no such file")
        with Image.open(path, formats=PICTURE_FORMATS) as picture:
            yield picture
    except Exception as error:  # Pillow's plug-ins raise many kinds on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path} cannot be read as a picture ({reason}); repair it{LEAVE_OUT}."
        ) from error


@dataclass(frozen=True)
class ImageSet:
    """Pictures and what is known of each: columns of equal length N.

    Parameters
    ----------
    paths : sequence of Path
        One file a picture.
    camids : LongTensor [N]
        The camera of each picture.
    pids : LongTensor [N] or None
        The identity of each picture, −1 where unknown; None when no identity is
        known. For evaluation and diagnosis only: training is handed sets that
        went through :meth:`without_identities`.
    cameras, identities : sequence of str, optional
        Their names, where they have others than their numbers; "" where unknown.
    grey_range : (float, float), optional
        The grey values that are black and white in pictures of more than 8 bits, see
        :func:`o2cap.data.loading.find_grey_range`.

    Raises
    ------
    ValueError
        When the columns differ in length.
    """

    paths: Sequence[Path]
    camids: Tensor
    pids: Tensor | None = None
    cameras: Sequence[str] | None = None
    identities: Sequence[str] | None = None
    grey_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        numbers = [c.shape for c in (self.camids, self.pids) if c is not None]
        names = [(len(c),) for c in (self.cameras, self.identities) if c is not None]
        if {*numbers, *names} != {(len(self.paths),)}:
            raise ValueError("every column must be as long as there are paths")

    def __len__(self) -> int:
        return len(self.paths)

    def without_identities(self) -> ImageSet:
        """Return the same pictures with no identity column: what training sees."""
        return replace(self, pids=None, identities=None)

    def camera(self, i: int) -> str:
        """Return the name of a picture's camera, or its number; "" if unknown."""
        return _name(i, self.cameras, self.camids)

    def identity(self, i: int) -> str:
        """Return the name of a picture's identity, or its number; "" if unknown."""
        return _name(i, self.identities, self.pids)

    def select(self, index: Tensor) -> ImageSet:
        """Return the pictures at `index` (LongTensor [M] or boolean mask [N])."""
        index = torch.arange(len(self))[index]  # numbers, whichever it was
        lists: dict[str, Any] = {
            name: [column[i] for i in index.tolist()]
            for name in ("paths", "cameras", "identities")
            if (column := getattr(self, name)) is not None
        }
        pids = None if self.pids is None else self.pids[index]
        return replace(self, camids=self.camids[index], pids=pids, **lists)


def _name(i: int, names: Sequence[str] | None, numbers: Tensor | None) -> str:
    if names is not None:
        return names[i]
    return "" if numbers is None or numbers[i] < 0 else str(int(numbers[i]))


@dataclass(frozen=True)
class ReIDDataset:
    """A data set: pictures to train on, and a query and a gallery to evaluate with.

    `query` and `gallery` are empty when there is nothing to evaluate with. `root` is
    the folder of which nothing, not even its name, is part of the data.
    """

    name: str
    train: ImageSet
    query: ImageSet
    gallery: ImageSet
    root: Path | None = field(default=None, kw_only=True)

    def splits(self) -> dict[str, ImageSet]:
        """Return the three parts by name: train, query, gallery."""
        return {"train": self.train, "query": self.query, "gallery": self.gallery}

    def counts(self) -> dict[str, dict[str, int]]:
        """Return, for each split, its numbers of images, identities and cameras.

        Unknown identities (−1) are not counted; 0 identities means unknown.
        """
        table = {}
        for split, images in self.splits().items():
            pids = torch.tensor([]) if images.pids is None else images.pids
            table[split] = {
                "images": len(images),
                "identities": len(pids[pids >= 0].unique()),
                "cameras": len(images.camids.unique()),
            }
        return table

    def fingerprint(self) -> str:
        """Return a hash of the file names, sizes, cameras and identities.

        Two runs with the same fingerprint saw the same pictures, wherever these
        lie: of a path only the last two parts enter, or one, directly in the root.
        """
        digest = hashlib.sha256()
        for split, images in self.splits().items():
            digest.update(split.encode())
            for path in images.paths:
                parts = path.parts[-1 if path.parent == self.root else -2 :]
                # macOS writes an ü as two characters, others as one.
                name = unicodedata.normalize("NFC", "/".join(parts))
                # A link to nowhere has no size; training may leave it out.
                size = os.path.getsize(path) if os.path.exists(path) else "missing"
                digest.update(f"{name}:{size}\n".encode("utf-8", "surrogateescape"))
            digest.update(images.camids.numpy().tobytes())
            if images.pids is not None:
                digest.update(images.pids.numpy().tobytes())
        return digest.hexdigest()[:16]
