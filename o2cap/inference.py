"""Using a trained model on new pictures: embed, search, cluster."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from o2cap.data.images import ImageSet, list_pictures
from o2cap.data.loading import decode
from o2cap.device import Hardware
from o2cap.errors import InputError
from o2cap.features import extract_all
from o2cap.files import read_json, replacing, usable
from o2cap.neighbours import nearest_neighbours
from o2cap.run import load_model
from o2cap.sheets import contact_sheet, ranked_lists
from o2cap.trainer import find_clusters

# 0002_c1s1_000451_03.jpg, as in Market-1501, DukeMTMC-reID and VeRi-776
_NAME = re.compile(r"(-1|\d{1,9})_c(\d{1,9})", re.ASCII)
_CAMERA_FOLDER = re.compile(r"(?:camera|cam|c)[-_ ]?(\d{1,9})", re.I | re.ASCII)


# What numpy raises for a file that is empty, cut off, damaged, or something else.
UNREADABLE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError),
    *(zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class Embedding:
    """Features of pictures, and which model they come from.

    Parameters
    ----------
    images : ImageSet
        The N pictures, by absolute path.
    features : FloatTensor [N, D]
        L2-normalised, on the CPU.
    model : str
        Fingerprint of the weights: features of two models cannot be compared.
    """

    images: ImageSet
    features: Tensor
    model: str

    def save(self, path: Path) -> None:
        """Write ``paths``, ``features``, ``camids`` and ``model`` to an .npz file.

        Raises
        ------
        InputError
            When the file cannot be written.
        """
        columns: dict[str, Any] = {
            "paths": np.array([str(p) for p in self.images.paths], dtype=np.str_),
            "features": self.features.numpy(),
            "camids": self.images.camids.numpy(),
            "model": np.array(self.model),
        }
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **columns)


def load_embedding(path: Path) -> Embedding:
    """Return what :meth:`Embedding.save` wrote.

    Raises
    ------
    InputError
        When the file is missing, damaged, or holds something else.
    """
    fault = f"{path} holds no features written by o2cap embed"
    try:
        with np.load(path, allow_pickle=False) as file:
            paths, features, camids, model = (
                file[name] for name in ("paths", "features", "camids", "model")
            )
    except FileNotFoundError as error:
        raise InputError(f"The file {path} does not exist.") from error
    except UNREADABLE as error:
        raise InputError(f"{fault} ({error}).") from error
    n = len(paths) if paths.ndim == 1 else 0
    shapes = n and features.shape[:1] == camids.shape == (n,) and features.ndim == 2
    types = (paths.dtype.kind, features.dtype, camids.dtype, model.dtype.kind)
    if not shapes or types != ("U", np.float32, np.int64, "U"):
        raise InputError(f"{fault}: its columns have other shapes or types.")
    if not np.isfinite(features).all():
        raise InputError(f"{fault}: some are no finite numbers.")
    where = [Path(p) for p in paths.tolist()]
    pids = _identities([_read_name(p, p.parent)[1] for p in where])
    images = ImageSet(where, torch.from_numpy(camids), pids)
    return Embedding(images, torch.from_numpy(features), str(model))


def find_pictures(where: Path | Sequence[Path]) -> ImageSet:
    """Return the pictures that files and folders (with all below them) hold.

    A name as in Market-1501 (``0002_c1s1_000451_03.jpg``) says identity and camera.
    Otherwise the camera is the number of the nearest folder called like ``cam3``,
    ``camera_3`` or ``c3``, not above the folder given, or above the file's own. What
    is not known is −1. Paths are absolute, and a picture named twice is taken once.

    Raises
    ------
    InputError
        When something does not exist, or a folder holds no picture.
    """
    known: dict[Path, tuple[int, int]] = {}
    for given in [where] if isinstance(where, Path) else where:
        place = Path(os.path.abspath(given))
        with usable(place):
            is_folder, is_file = place.is_dir(), place.is_file()
        if is_folder:
            paths, top = list_pictures(place), place.parent
        elif is_file:
            paths, top = [place], place.parent.parent
        else:
            raise InputError(f"{given} does not exist; name a picture or a folder.")
        if not paths:
            raise InputError(f"The folder {given} holds no picture.")
        for path in paths:
            known.setdefault(path, _read_name(path, top))
    if not known:
        raise InputError("No pictures were named; name files or folders.")
    camids, pids = zip(*known.values(), strict=True)
    return ImageSet(list(known), torch.tensor(camids), _identities(pids))


def _read_name(path: Path, top: Path) -> tuple[int, int]:
    """Return the camera and the identity that a path below `top` names, or −1."""
    if named := _NAME.match(path.name):
        return int(named[2]), int(named[1])
    for folder in reversed(path.relative_to(top).parts[:-1]):
        if camera := _CAMERA_FOLDER.fullmatch(folder):
            return int(camera[1]), -1
    return -1, -1


def _identities(pids: Sequence[int]) -> Tensor | None:
    return torch.tensor(pids) if any(pid >= 0 for pid in pids) else None


Pictures = Path | Sequence[Path] | ImageSet


def embed(
    run: Path,
    pictures: Pictures,
    *,
    device: str = "auto",
    skip_unreadable: bool = False,
) -> Embedding:
    """Compute the features of pictures with the model of a run.

    Parameters
    ----------
    run : Path
        Directory of a finished run.
    pictures : Path, sequence of Path, or ImageSet
        Files and folders, see :func:`find_pictures`, or a set of pictures.
    device : str
        As the setting of the same name.
    skip_unreadable : bool
        Leave unreadable pictures out, with a warning, instead of stopping.

    Raises
    ------
    InputError
        For a directory that is no finished run, pictures that do not exist or cannot
        be read, or a device that is not here.
    """
    config, model = load_model(run)
    images = pictures if isinstance(pictures, ImageSet) else find_pictures(pictures)
    if not len(images):
        raise InputError("There are no pictures to embed.")
    images = _as_trained(run, images)
    hardware = Hardware.choose(replace(config, device=device))
    with hardware.in_force(config):
        pixels, images = decode(
            images,
            config.height,
            config.width,
            workers=config.workers,
            skip_unreadable=skip_unreadable,
        )
        model = model.to(hardware.device)
        features = extract_all(model, pixels, config, hardware, progress=True)
    return Embedding(images, features.cpu(), _fingerprint(run))


def _as_trained(run: Path, images: ImageSet) -> ImageSet:
    """Return the pictures with the run's range of grey, if it has one."""
    known = read_json(run / "environment.json").get("grey_range")
    return replace(images, grey_range=tuple(known)) if known else images


def _fingerprint(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()[:16]


def _embedded(
    run: Path, source: Pictures | Embedding, device: str, skip_unreadable: bool
) -> Embedding:
    """Return `source` embedded, by the run, or before and read from a file."""
    name = "the features given"
    if isinstance(source, Path) and source.suffix.lower() == ".npz":
        source, name = load_embedding(source), str(source)
    if not isinstance(source, Embedding):
        return embed(run, source, device=device, skip_unreadable=skip_unreadable)
    if source.model != _fingerprint(run):
        raise InputError(
            f"{name} were made by another model than that of {run}; features of two "
            "models cannot be compared, so embed the pictures again."
        )
    return replace(source, images=_as_trained(run, source.images))


@dataclass(frozen=True)
class Match:
    """One picture found: rank from 1, cosine distance 0 to 2, −1 for no camera.

    `same_identity` is None where an identity is not known.
    """

    rank: int
    path: str
    camid: int
    distance: float
    same_identity: bool | None


@dataclass(frozen=True)
class Ranking:
    """What a search found: the query (one picture), and the matches, best first."""

    query: ImageSet
    found: ImageSet
    similarity: Tensor

    def matches(self) -> list[Match]:
        """Return the matches as plain records."""
        mine, theirs = self.query.pids, self.found.pids
        matches = []
        for i, path in enumerate(self.found.paths):
            same = None
            if mine is not None and theirs is not None and mine[0] >= 0 <= theirs[i]:
                same = bool(mine[0] == theirs[i])
            distance = round(max(1 - float(self.similarity[i]), 0), 6)
            camid = int(self.found.camids[i])
            matches.append(Match(i + 1, str(path), camid, distance, same))
        return matches

    def figure(self) -> Image:
        """Draw the ranked list; see :func:`o2cap.sheets.ranked_lists`."""
        return ranked_lists(
            self.query,
            self.found,
            self.similarity[None],
            top=len(self.found),
            same_camera=True,
        )

    def save(self, path: Path) -> None:
        """Write the picture (.png) or the records (.json, .csv), by the suffix.

        Raises
        ------
        InputError
            For another suffix, a file that cannot be written, or, for the picture,
            a match that is no longer where it was.
        """
        rows = [asdict(match) for match in self.matches()]
        match path.suffix.lower():
            case ".png":
                content = self.figure()._repr_png_() or b""
            case ".json":
                whole = {"query": str(self.query.paths[0]), "matches": rows}
                content = json.dumps(whole, indent=2).encode()
            case ".csv":
                content = _as_csv(
                    list(Match.__annotations__), [r.values() for r in rows]
                )
            case _:
                raise InputError(f"{path} must end in .png, .json or .csv.")
        _write(path, content)


def search(
    run: Path,
    query: Path | ImageSet,
    gallery: Pictures | Embedding,
    *,
    top: int = 10,
    device: str = "auto",
    skip_unreadable: bool = False,
) -> Ranking:
    """Find the pictures most like one picture.

    Parameters
    ----------
    run : Path
        Directory of a finished run.
    query : Path or ImageSet
        One picture. Where the gallery holds that file too, it is not a match.
    gallery : Path, sequence of Path, ImageSet or Embedding
        Where to search: files and folders, an .npz file of :meth:`Embedding.save`
        (the model must be the same), or what these stand for.
    top : int
        Matches at most.
    device, skip_unreadable
        As in :func:`embed`.

    Raises
    ------
    InputError
        As :func:`embed`; for a query that is not one picture, a `top` below 1, and
        features of another model.
    """
    if top < 1:
        raise InputError(f"--top is {top}; it must be at least 1.")
    one = query if isinstance(query, ImageSet) else find_pictures(query)
    if len(one) != 1 or (isinstance(query, Path) and query.is_dir()):
        raise InputError(f"The query must be one picture, not {query}.")
    asked = embed(run, one, device=device)
    there = _embedded(run, gallery, device, skip_unreadable)
    own = os.path.abspath(one.paths[0])
    others = [i for i, p in enumerate(there.images.paths) if os.path.abspath(p) != own]
    if not others:
        raise InputError("The gallery holds no picture but the query itself.")
    searched = there.features[others]
    similarity, index = nearest_neighbours(
        searched, min(top, len(others)), queries=asked.features
    )
    found = there.images.select(torch.tensor(others)[index[0]])
    return Ranking(one, found, similarity[0])


@dataclass(frozen=True)
class Clustering:
    """Pseudo identities: the N pictures, and the cluster of each, −1 for outliers."""

    images: ImageSet
    clusters: Tensor

    def save(self, path: Path) -> None:
        """Write a CSV file with the columns path, camid, cluster.

        Raises
        ------
        InputError
            When the file cannot be written.
        """
        columns = (self.images.paths, self.images.camids, self.clusters)
        rows = [(p, int(c), int(k)) for p, c, k in zip(*columns, strict=True)]
        _write(path, _as_csv(["path", "camid", "cluster"], rows))

    def save_sheets(self, folder: Path, per_camera: int = 8) -> int:
        """Write a contact sheet per cluster, ``cluster_0000.png`` on; say how many.

        Raises
        ------
        InputError
            When the folder holds something already, or cannot be written.
        """
        refuse_occupied(folder)
        number = int(self.clusters.max()) + 1
        for cluster in range(number):
            labels = torch.where(self.clusters == cluster, self.clusters, -1)
            sheet = contact_sheet(
                self.images, labels, per_camera=per_camera, name="cluster"
            )
            _write(folder / f"cluster_{cluster:04d}.png", sheet._repr_png_() or b"")
        return number


def cluster(
    run: Path,
    pictures: Pictures | Embedding,
    *,
    device: str = "auto",
    skip_unreadable: bool = False,
) -> Clustering:
    """Group pictures into pseudo identities, with the run's clustering settings.

    Parameters
    ----------
    run : Path
        Directory of a finished run.
    pictures : Path, sequence of Path, ImageSet or Embedding
        As the gallery of :func:`search`.
    device, skip_unreadable
        As in :func:`embed`.

    Raises
    ------
    InputError
        As :func:`embed`, and for features of another model.
    """
    config, _ = load_model(run)  # first, as it refuses a directory that is no run
    embedding = _embedded(run, pictures, device, skip_unreadable)
    return Clustering(embedding.images, find_clusters(embedding.features, config))


def refuse_occupied(folder: Path) -> None:
    """Raise InputError when `folder` holds something already."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; name a new folder for the sheets.")


def _as_csv(header: Sequence[str], rows: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    # A file name that is no valid UTF-8 goes out as the bytes it is.
    return text.getvalue().encode("utf-8", "surrogateescape")


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)
