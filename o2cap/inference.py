"""Using a trained model on new pictures: embed, search, cluster, export."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import Normalize

from o2cap import reranking
from o2cap.data.finding import find_pictures
from o2cap.data.images import ImageSet
from o2cap.data.loading import decode
from o2cap.data.readers import name_layout
from o2cap.data.transforms import MEAN, STD
from o2cap.device import Hardware
from o2cap.errors import InputError
from o2cap.features import extract_all, standardise_by_camera
from o2cap.files import read_json, replacing, write_csv
from o2cap.run import load_model
from o2cap.trainer import advise, find_clusters

logger = logging.getLogger("o2cap")
_BLOCK_ELEMENTS = 2**24  # distances held at once (64 MiB)

# ------------------------------------------------------------------------------- embed


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

    def moved(self, root: Path) -> Embedding:
        """Return the same features of pictures that lie below `root` now."""
        old = os.path.commonpath([path.parent for path in self.images.paths])
        paths = [root / path.relative_to(old) for path in self.images.paths]
        return replace(self, images=replace(self.images, paths=paths))

    def save(self, path: Path) -> None:
        """Write an .npz file: a row a picture, and the fingerprint ``model``.

        Its columns are ``paths``, ``features``, ``camids``, and the names ``cameras``
        and ``identities``; −1 or empty where unknown.
        """
        images, each = self.images, range(len(self.images))
        with replacing(path) as part, part.open("wb") as file:
            np.savez(
                file,
                paths=[str(path) for path in images.paths],
                features=self.features.numpy(),
                camids=images.camids.numpy(),
                cameras=[images.camera(i) for i in each],
                identities=[images.identity(i) for i in each],
                model=self.model,
            )


def load_embedding(path: Path) -> Embedding:
    """Return what :meth:`Embedding.save` wrote.

    Raises
    ------
    InputError
        When the file is missing, damaged, or holds something else.
    """
    try:
        with np.load(path.expanduser(), allow_pickle=False) as file:
            columns = dict(file)
        texts = [columns[n] for n in ("paths", "cameras", "identities", "model")]
        paths, *names = (text.tolist() for text in texts[:3])
        features = torch.from_numpy(columns["features"]).float()
        camids = torch.from_numpy(columns["camids"])
        images = ImageSet([Path(path) for path in paths], camids, None, *names)
        length = features.norm(dim=-1)  # standardised ones may be 0
        right = ((length - 1).abs() < 1e-3) | (length == 0)  # False where not finite
        plain = all(text.dtype.kind == "U" for text in texts) and not texts[3].ndim
        whole = camids.dtype == torch.int64 and features.shape[:-1] == camids.shape
        if not (plain and whole and right.all()):
            raise ValueError("its columns have other types, shapes or values")
    except Exception as error:  # numpy raises many kinds on damaged files
        raise InputError(
            f"{path} holds no features of o2cap embed ({error})."
        ) from error
    return Embedding(images, features, str(columns["model"]))


Pictures = Path | Sequence[Path]


def embed(
    run: Path,
    pictures: Pictures | ImageSet | Embedding,
    *,
    standardise: bool = False,
    device: str = "auto",
    skip_unreadable: bool = False,
) -> Embedding:
    """Compute the features of pictures with the model of a run.

    Parameters
    ----------
    run : Path
        Directory of a finished run.
    pictures : Path, sequence of Path, ImageSet or Embedding
        Files and folders, see :func:`find_pictures`, or a set of pictures. Cameras that
        the run was trained on keep their numbers. An .npz file of
        :meth:`Embedding.save`, or what that stands for, is embedded already, and only
        has to be of this model.
    standardise : bool
        Change the features by :func:`o2cap.features.standardise_by_camera`, for other
        programs. They know all these pictures and their cameras (they are
        transductive), can be compared with no others, and say so in `model`.
    device : str
        As the setting of the same name.
    skip_unreadable : bool
        Leave unreadable pictures out, with a warning, instead of stopping.

    Raises
    ------
    InputError
        For a directory that is no finished run, pictures that do not exist or cannot
        be read, features of another model, cameras that are not known where they are
        needed, or a device that is not here.
    """
    config, model = load_model(run)
    config = replace(config, device=device, skip_unreadable=skip_unreadable)
    cameras, grey = read_json(run / "environment.json", "cameras", "grey_range")
    made_by = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()[:16]
    source, name = pictures, "the features given"
    if isinstance(source, Path) and source.suffix.lower() == ".npz":
        source, name = load_embedding(source), str(source)
    if isinstance(source, Embedding):
        images = source.images
        if source.model != made_by:
            said = f"{name} were made by another model than that of {run}, or changed"
            raise InputError(f"{said} by --standardise; embed the pictures again.")
    elif isinstance(source, ImageSet):
        images = source
    else:
        images = find_pictures(source, cameras, skip_unreadable=skip_unreadable)
    if grey:
        images = replace(images, grey_range=tuple(grey))
    if isinstance(source, Embedding):
        features = source.features
    elif not len(images):
        raise InputError("There are no pictures to embed.")
    else:
        hardware = Hardware.choose(config)
        with hardware.in_force(config):
            pixels, images = decode(images, **config.reading)
            features = extract_all(model, pixels, config, hardware)
    if standardise:
        features = standardise_by_camera(features, _cameras("--standardise", images))
        made_by += ", standardised by camera (transductive)"
    return Embedding(images, features.cpu(), made_by)


def _cameras(needed_by: str, *sets: ImageSet) -> Tensor:
    """Number all pictures' cameras by name, LongTensor; refuse unknown ones if needed.

    `needed_by` is the option that needs them, or nothing.
    """
    names = [images.camera(i) for images in sets for i in range(len(images))]
    if needed_by and "" in names:
        path = [path for images in sets for path in images.paths][names.index("")]
        said = f"{needed_by} needs the camera of {path}, which is unknown"
        raise InputError(f"{said}; use folders like cam3, or a manifest (.csv).")
    return torch.from_numpy(np.unique(names, return_inverse=True)[1])


# ------------------------------------------------------------------------------ search


@dataclass(frozen=True)
class Match:
    """One picture found: rank from 1, cosine distance 0 to 2.

    Camera and identity are −1 and "" where not known, and `same_identity` is None where
    that of the query or of the match is not known.
    """

    rank: int
    path: str
    camid: int
    camera: str
    identity: str
    distance: float
    same_identity: bool | None


@dataclass(frozen=True)
class Ranking:
    """What a search found.

    Parameters
    ----------
    query, gallery : ImageSet
        Q and G pictures.
    index : LongTensor [Q, K]
        The matches of each query in the gallery, best first; −1 where there are fewer.
    distance : FloatTensor [Q, K]
        Their cosine distance.
    """

    query: ImageSet
    gallery: ImageSet
    index: Tensor
    distance: Tensor

    def matches(self, query: int = 0) -> list[Match]:
        """Return the matches of a query as plain records."""
        mine, there, found = self.query.identity(query), self.gallery, []
        index, distances = self.index[query].tolist(), self.distance[query].tolist()
        for rank, (j, distance) in enumerate(zip(index, distances, strict=True), 1):
            if j >= 0:
                theirs, camid = there.identity(j), int(there.camids[j])
                place = (rank, str(there.paths[j]), camid, there.camera(j))
                same = mine == theirs if mine and theirs else None
                found.append(Match(*place, theirs, round(max(distance, 0), 6), same))
        return found

    def records(self) -> list[dict[str, Any]]:
        """Return the path and the matches of each query, as JSON has them."""
        return [
            {"query": str(path), "matches": [asdict(m) for m in self.matches(i)]}
            for i, path in enumerate(self.query.paths)
        ]

    def save(self, path: Path) -> None:
        """Write the records, as .json or .csv."""
        records = self.records()
        rows = [{"query": r["query"]} | m for r in records for m in r["matches"]]
        _write(path, ["query", *Match.__annotations__], rows, records)


def search(
    run: Path,
    queries: Pictures | ImageSet,
    gallery: Pictures | ImageSet | Embedding,
    *,
    top: int = 10,
    max_distance: float = 2.0,
    same_camera: Literal["keep", "drop"] = "keep",
    rerank: bool = False,
    standardise: bool = False,
    device: str = "auto",
    skip_unreadable: bool = False,
) -> Ranking:
    """Find the pictures most like each of some pictures.

    Parameters
    ----------
    run : Path
        Directory of a finished run.
    queries : Path, sequence of Path, or ImageSet
        Q pictures: files, folders, manifests. None of them is a match of itself.
    gallery : Path, sequence of Path, ImageSet or Embedding
        Where to search: as the queries, or an .npz file of :meth:`Embedding.save`
        (the model must be the same), or what that stands for.
    top : int
        Matches of a query at most.
    max_distance : float
        Largest cosine distance of a match.
    same_camera : "keep" or "drop"
        Whether pictures of the query's own camera can be matches.
    rerank : bool
        Rank by :func:`o2cap.reranking.rerank`, which looks at neighbourhoods; the
        distance of a match stays the cosine distance.
    standardise : bool
        Rank by features that :func:`o2cap.features.standardise_by_camera` changed,
        over queries and gallery together: transductive, the ranks depend on all other
        pictures. The distance of a match stays that of the plain features.
    device, skip_unreadable
        As in :func:`embed`.

    Raises
    ------
    InputError
        As :func:`embed`; for a `top` below 1, and with `standardise` for a query that
        is the only picture of its camera.
    """
    if top < 1:
        raise InputError(f"--top is {top}; it must be at least 1.")
    how: dict[str, Any] = {"device": device, "skip_unreadable": skip_unreadable}
    there, asked = embed(run, gallery, **how), embed(run, queries, **how)
    query, found, own = _labelled(asked.images, there.images)
    needed_by = "--same-camera drop" if same_camera == "drop" else ""
    camera = _cameras("--standardise" if standardise else needed_by, query, found)
    x, y = asked.features, there.features
    if standardise:
        both = standardise_by_camera(torch.cat([x, y]), camera)
        x, y = both[: len(query)], both[len(query) :]
        if len(alone := torch.where(~x.any(1))[0]):
            said = f"--standardise needs more than {query.paths[int(alone[0])]}"
            raise InputError(f"{said} of its camera.")
    if rerank:
        blocks = reranking.rerank(x, y)
    else:
        blocks = (1 - p @ y.T for p in x.split(max(1, _BLOCK_ELEMENTS // len(y))))
    index, distance, start = [], [], 0
    for block in blocks:
        rows = slice(start, start + len(block))
        start += len(block)
        cosine = block
        if rerank or standardise:
            cosine = 1 - asked.features[rows] @ there.features.T
        hidden = (cosine > max_distance) | (torch.arange(len(found)) == own[rows, None])
        if same_camera == "drop":
            hidden |= camera[rows, None] == camera[len(query) :]
        block = block.masked_fill(hidden, torch.inf)
        best = block.topk(min(top, len(found)), largest=False)
        index.append(best.indices.where(best.values.isfinite(), -1))
        distance.append(cosine.gather(1, best.indices))
    return Ranking(query, found, torch.cat(index), torch.cat(distance))


def _labelled(query: ImageSet, gallery: ImageSet) -> tuple[ImageSet, ImageSet, Tensor]:
    """Say of queries what the gallery knows of them, and where they are in it.

    Names of files say identities only if all are in one layout, and nothing else does.
    """
    paths = [os.path.abspath(p) for p in (*query.paths, *gallery.paths)]
    n, known = len(query), any(map(gallery.identity, range(len(gallery))))
    if not known and (layout := name_layout([Path(path) for path in paths])):
        query = replace(query, pids=layout[1][:n], identities=None)
        gallery = replace(gallery, pids=layout[1][n:], identities=None)
    place = {path: j for j, path in enumerate(paths[n:])}
    own = [place.get(path, -1) for path in paths[:n]]
    sources = [(gallery, j) if j >= 0 else (query, i) for i, j in enumerate(own)]
    cameras = [part.camera(i) for part, i in sources]
    identities = [part.identity(i) for part, i in sources]
    query = replace(query, cameras=cameras, identities=identities)
    return query, gallery, torch.tensor(own)


# ----------------------------------------------------------------------------- cluster


@dataclass(frozen=True)
class Clustering:
    """Pseudo identities: the N pictures, and the cluster of each, −1 for outliers."""

    images: ImageSet
    clusters: Tensor

    def save(self, path: Path) -> None:
        """Write path, camid, camera and cluster of each picture, as .json or .csv."""
        rows = [
            {"path": str(path), "camid": int(self.images.camids[i])}
            | {"camera": self.images.camera(i), "cluster": int(self.clusters[i])}
            for i, path in enumerate(self.images.paths)
        ]
        _write(path, ["path", "camid", "camera", "cluster"], rows, rows)


def cluster(
    run: Path,
    pictures: Pictures | ImageSet | Embedding,
    *,
    eps: float | None = None,
    device: str = "auto",
    skip_unreadable: bool = False,
) -> Clustering:
    """Group pictures into pseudo identities, with the run's clustering settings.

    A warning says which `eps` to try where most pictures are left over, or together,
    and where the run's settings use cameras that are not known here.

    Parameters
    ----------
    run : Path
        Directory of a finished run.
    pictures : Path, sequence of Path, ImageSet or Embedding
        As the gallery of :func:`search`.
    eps : float, optional
        Another radius of DBSCAN than the run's: smaller ones make smaller clusters.
    device, skip_unreadable
        As in :func:`embed`.

    Raises
    ------
    InputError
        As :func:`embed`, and for features of another model.
    """
    config, _ = load_model(run)
    if eps is not None:
        config = replace(config, clustering=replace(config.clustering, eps=eps))
    found = embed(run, pictures, device=device, skip_unreadable=skip_unreadable)
    images, camids = found.images, found.images.camids
    if not all(images.camera(i) for i in range(len(images))):
        logger.warning("some cameras are not known: clustered as if all were one")
        camids = torch.zeros_like(camids)
    clusters = find_clusters(found.features, camids, config)
    advise(found.features, camids, config, clusters)
    return Clustering(images, clusters)


def _write(path: Path, columns: list[str], rows: list[Any], records: list[Any]) -> None:
    """Write rows as CSV, or records as JSON, by the suffix."""
    if path.suffix.lower() != ".json":
        return write_csv(path, columns, rows)
    with replacing(path) as part:
        part.write_text(json.dumps(records, indent=2) + "\n")


# ------------------------------------------------------------------------------ export


def export(run: Path, output: Path) -> None:
    """Write the model of a run as an ONNX file (opset 18), for use without o2cap.

    Its input ``pictures`` is float32 [B, 3, height, width], RGB in 0..1, of the run's
    height and width and of any B; its output ``features`` is float32 [B, D], of length
    1, what :func:`embed` computes.

    Parameters
    ----------
    run : Path
        Directory of a finished run.
    output : Path
        The .onnx file to write.

    Raises
    ------
    InputError
        For a directory that is no finished run, and without the packages of the
        extra ``onnx``.
    """
    config, model = load_model(run)
    if not all(map(find_spec, ("onnx", "onnxscript"))):
        raise InputError("Export needs more packages: pip install 'o2cap[onnx]'.")
    with replacing(output) as temporary:
        torch.onnx.export(
            nn.Sequential(Normalize(MEAN, STD), model).eval(),
            (torch.zeros(2, 3, config.height, config.width),),
            temporary,
            input_names=["pictures"],
            output_names=["features"],
            opset_version=18,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
