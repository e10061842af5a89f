"""Pictures to use a model on: files, folders, and what is known of their cameras."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from o2cap.data import load_dataset
from o2cap.data.images import ImageSet, list_pictures
from o2cap.data.readers import name_layout
from o2cap.errors import InputError

_CAMERA_FOLDER = re.compile(r"(?:camera|cam|c)[-_ ]?\d{1,9}", re.I | re.ASCII)


def find_pictures(
    where: Path | Sequence[Path],
    cameras: Iterable[tuple[int, str]] = (),
    *,
    skip_unreadable: bool = False,
) -> ImageSet:
    """Return the pictures that files and folders (with all below them) hold.

    A manifest (.csv, as for training), named alone, says cameras and identities.
    Otherwise identities are not known. The camera is that of the names, if all are as
    in one benchmark (``0002_c1s1_000451_03.jpg``); else the nearest folder called like
    one of `cameras`, or like ``cam3``, ``camera_3`` or ``c3``, not above the folder
    given, or above the file's own. Paths are absolute, and a picture named twice is
    taken once.

    Parameters
    ----------
    where : Path or sequence of Path
        Files and folders, or one manifest.
    cameras : iterable of (int, str)
        Numbers and names of cameras that are known; a mere number is no name. Another
        camera gets the number that its name ends in, or the next.
    skip_unreadable : bool
        Leave out what cannot be read, with a warning.

    Raises
    ------
    InputError
        When something does not exist, or there are no pictures.
    """
    # A folder called 7 may be anything.
    numbers = {name: number for number, name in cameras if not name.isdecimal()}
    found: dict[Path, str] = {}
    where = [where] if isinstance(where, Path) else where
    for given in where:
        place = Path(os.path.abspath(given.expanduser()))
        paths, top = [place], place.parent.parent
        if not place.is_file():
            paths, top = list_pictures(place, skip_unreadable), place.parent
        elif len(where) == 1 and place.suffix.lower() == ".csv":
            return _listed(place, skip_unreadable)
        if not paths:
            raise InputError(f"The folder {given} holds no picture.")
        for path in paths:
            folders = reversed(path.parent.relative_to(top).parts)
            like = (f for f in folders if f in numbers or _CAMERA_FOLDER.fullmatch(f))
            found.setdefault(path, next(like, ""))
    names = list(found.values())
    if layout := name_layout(list(found)):
        names = [f"c{camid}" for camid in layout[0].tolist()]
    for name in sorted({*names} - {"", *numbers}):
        end, taken = re.search(r"\d+$", name), {*numbers.values()}
        free = max(taken, default=-1) + 1
        numbers[name] = free if end is None or int(end[0]) in taken else int(end[0])
    camids = torch.tensor([numbers.get(n, -1) for n in names], dtype=torch.int64)
    return ImageSet(list(found), camids, cameras=names)


def _listed(manifest: Path, skip_unreadable: bool) -> ImageSet:
    parts = load_dataset("manifest", manifest, skip_missing=skip_unreadable).splits()
    known = {p: (part, i) for part in parts.values() for i, p in enumerate(part.paths)}
    camids = torch.tensor([int(part.camids[i]) for part, i in known.values()])
    cameras = [part.camera(i) for part, i in known.values()]
    identities = [part.identity(i) for part, i in known.values()]
    return ImageSet(list(known), camids, None, cameras, identities)
