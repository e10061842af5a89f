"""The two records that carry pictures through the package: ImageSet and ReIDDataset."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from o2cap.errors import InputError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

# What a file may hold, whatever its suffix. Pillow knows forty more formats: parsers
# of long-forgotten ones, and PostScript, for which it starts another program.
PICTURE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")


def is_picture(name: str) -> bool:
    """Whether a file name is a picture's: known suffix, not hidden.

    Thumbs.db fails the first test, .DS_Store and the ._ doubles of macOS the second.
    """
    return name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")


def list_pictures(folder: Path) -> list[Path]:
    """Return the pictures in `folder` and below, sorted by path.

    Hidden folders and links to folders are not entered.
    """
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, name) for name in names if is_picture(name)]
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
        with Image.open(path, formats=PICTURE_FORMATS) as picture:
            most = Image.MAX_IMAGE_PIXELS  # Pillow itself stops at twice as many
            if most and picture.width * picture.height > most:
                size = f"{picture.width} × {picture.height}"
                raise ValueError(f"it has {size} pixels")
            yield picture
    except Exception as error:  # Pillow's plug-ins raise many kinds on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path} cannot be read as a picture ({reason}); repair or remove it, or "
            "leave such pictures out with --skip-unreadable True."
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

    Raises
    ------
    ValueError
        When the columns differ in length or are not int64.
    """

    paths: Sequence[Path]
    camids: Tensor
    pids: Tensor | None = None

    def __post_init__(self) -> None:
        for name, column in (("camids", self.camids), ("pids", self.pids)):
            if column is None:
                continue
            if column.dtype != torch.int64 or column.shape != (len(self.paths),):
                raise ValueError(
                    f"{name} must be int64 of shape [{len(self.paths)}], "
                    f"not {column.dtype} {list(column.shape)}"
                )

    def __len__(self) -> int:
        return len(self.paths)

    def without_identities(self) -> ImageSet:
        """Return the same pictures with no identity column: what training sees."""
        return replace(self, pids=None)

    def select(self, index: Tensor) -> ImageSet:
        """Return the pictures at `index` (LongTensor [M] or boolean mask [N])."""
        if index.dtype == torch.bool:
            index = index.nonzero().flatten()
        return ImageSet(
            paths=[self.paths[i] for i in index.tolist()],
            camids=self.camids[index],
            pids=None if self.pids is None else self.pids[index],
        )


@dataclass(frozen=True)
class ReIDDataset:
    """A data set: pictures to train on, and a query and a gallery to evaluate with.

    `query` and `gallery` are empty when there is nothing to evaluate with.
    """

    name: str
    train: ImageSet
    query: ImageSet
    gallery: ImageSet

    def splits(self) -> dict[str, ImageSet]:
        """Return the three parts by name: train, query, gallery."""
        return {"train": self.train, "query": self.query, "gallery": self.gallery}

    def counts(self) -> dict[str, dict[str, int]]:
        """Return, for each split, its numbers of images, identities and cameras.

        Unknown identities (−1) are not counted; 0 identities means unknown.
        """
        table = {}
        for split, images in self.splits().items():
            known = images.pids[images.pids >= 0] if images.pids is not None else None
            table[split] = {
                "images": len(images),
                "identities": 0 if known is None else int(known.unique().numel()),
                "cameras": int(images.camids.unique().numel()),
            }
        return table

    def fingerprint(self) -> str:
        """Return a hash of the file names, sizes, cameras and identities.

        Two runs with the same fingerprint saw the same pictures, wherever these
        lie: only the last two parts of a path enter, not the folder above.
        """
        digest = hashlib.sha256()
        for split, images in self.splits().items():
            digest.update(split.encode())
            for path in images.paths:
                name = "/".join(path.parts[-2:])
                try:
                    size = str(path.stat().st_size)
                except OSError:  # a link to nowhere, which training may leave out
                    size = "missing"
                digest.update(f"{name}:{size}\n".encode("utf-8", "surrogateescape"))
            digest.update(images.camids.numpy().tobytes())
            if images.pids is not None:
                digest.update(images.pids.numpy().tobytes())
        return digest.hexdigest()[:16]
