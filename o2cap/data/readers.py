"""Readers of real data: the four benchmarks of the paper, a manifest, camera folders.

Every reader takes the layout in which the data come from their owners; nothing has
to be renamed. Cameras count from 0 (`camid`), whatever a file name counts from.
"""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from o2cap.data.images import ImageSet, ReIDDataset, list_pictures, readable
from o2cap.data.loading import find_grey_range, read_pictures
from o2cap.errors import InputError, unknown

# By data set, split and what is counted; the file says where the numbers come from.
PUBLISHED: dict[str, dict[str, dict[str, int]]] = yaml.safe_load(
    Path(__file__).with_name("counts.yaml").read_text("utf-8")
)
SPLITS = ("train", "query", "gallery")


@dataclass
class Reading:
    """A data set as read, and what a person should know of it.

    Parameters
    ----------
    dataset : ReIDDataset
        What was read.
    expected : dict
        Published counts, by split and by what is counted.
    found : dict
        Counts that replace, or add to, those of :meth:`ReIDDataset.counts`.
    problems : list of str
        Sentences, each a reason not to use the data as they are.
    notes : list of str
        Sentences on what was assumed or left out.
    """

    dataset: ReIDDataset
    expected: dict[str, dict[str, int]] = field(default_factory=dict)
    found: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[tuple[str, str, int | None, int]]:
        """All counts, as split, what is counted, published (or None), found."""
        return [
            (split, what, self.expected.get(split, {}).get(what), number)
            for split, counts in self.dataset.counts().items()
            for what, number in (counts | self.found.get(split, {})).items()
        ]

    def differences(self) -> list[str]:
        """Return a phrase for each count that is not the published one."""
        return [
            f"{split}: {published:,} {what} expected, {found:,} found"
            for split, what, published, found in self.rows
            if published not in (None, found)
        ]


def read_dataset(name: str, root: Path | None, skip_unreadable: bool) -> Reading:
    """Read the real data set `name` and say what was found.

    Parameters
    ----------
    name : str
        market1501, dukemtmcreid, msmt17, veri776, manifest or folders.
    root : Path
        The data set's folder; for manifest, the CSV file.
    skip_unreadable : bool
        Leave out folders that cannot be read, with a warning, and pictures that a
        manifest names and that do not exist, with a note.

    Raises
    ------
    InputError
        When the name is unknown, or `root` does not hold the layout.
    """
    if name not in READERS:
        raise InputError(unknown("The data set", name, READERS))
    means = "the CSV file" if name == "manifest" else "the folder of the data set"
    place = Path(root or "").expanduser().absolute()
    with readable(place):
        if root is None or place.is_dir() == (name == "manifest"):
            raise InputError(
                f"--dataset {name} needs --root: {means}; it is {root}. Archives of "
                "the benchmarks are unpacked by the programs in data_scripts/."
            )
        reading = READERS[name](place, skip_unreadable)
    if grey := reading.dataset.train.grey_range:
        reading.notes.append(
            f"{place} holds pictures with more than 8 bits of grey; in all of them "
            f"{grey[0]:g} is black and {grey[1]:g} is white."
        )
    return reading


def verify_dataset(name: str, root: Path | None, *, pictures: bool = False) -> Reading:
    """Count a real data set, compare with the published counts, list what is wrong.

    Parameters
    ----------
    name, root
        As for :func:`read_dataset`.
    pictures : bool
        Read every picture too, as training does, and list those that cannot be.

    Returns
    -------
    Reading
        Its `problems` are those of the layout and names, missing pictures, differing
        counts, and unreadable pictures; none means that the data are as published.

    Raises
    ------
    InputError
        When the name is unknown, or `root` does not hold the layout.
    """
    reading = read_dataset(name, root, skip_unreadable=False)
    reading.problems += reading.differences()
    if pictures:
        parts = reading.dataset.splits().values()
        room = [np.empty((len(part), 16, 16, 3), np.uint8) for part in parts]
        faults = chain(*(f.values() for f in map(read_pictures, parts, room)))
        reading.problems += dict.fromkeys(map(str, faults))
    return reading


# ---------------------------------------------------------------- the benchmarks

Folders = tuple[str, ...]
_PERSONS: Folders = ("bounding_box_train", "query", "bounding_box_test")
_VEHICLES = ("image_train", "image_query", "image_test")

# Folders of the three splits; identity and camera (from 1) in a name; such a name.
LAYOUTS = {
    # Zheng et al., ICCV 2015. Identity −1 (junk) is left out, 0 (distractor) stays.
    "market1501": (
        *(_PERSONS, r"(-1|\d{1,9})_c([1-9]\d{0,3})s\d+_\d+_\d+"),
        "0002_c1s1_000451_03.jpg",
    ),
    # Zheng et al., ICCV 2017, from Ristani et al., 2016: withdrawn in 2019.
    "dukemtmcreid": (
        *(_PERSONS, r"(\d{1,9})_c([1-9]\d{0,3})_f\d+"),
        "0001_c2_f0046182.jpg",
    ),
    # Liu et al., ICME 2016. Image-to-image protocol: queries stay in the gallery.
    "veri776": (
        *(_VEHICLES, r"(\d{1,9})_c(?!000)(\d{3})_\d+_\d+"),
        "0001_c001_00016450_0.jpg",
    ),
}


def name_layout(paths: Sequence[Path]) -> tuple[Tensor, Tensor] | None:
    """Return cameras and identities that names say, if all are in one known layout.

    The layouts are those of Market-1501, DukeMTMC-reID and VeRi-776, to the digit: a
    name that only resembles one holds a date, the number of a track, or anything else.

    Parameters
    ----------
    paths : sequence of Path
        N pictures: the whole set.

    Returns
    -------
    camids, pids : LongTensor [N], or None
        Cameras as the names count them; identities, −1 for junk and distractors.
    """

    def shape(stem: str) -> str:  # cameras have one digit, or more
        plain = re.sub(r"_c\d+", "_c", re.sub("^-1", "0000", stem))
        return re.sub(r"\d", "0", plain)

    for _, pattern, example in LAYOUTS.values():
        right = shape(Path(example).stem)
        named = [re.fullmatch(pattern, path.stem, re.ASCII) for path in paths]
        found = [(int(m[2]), int(m[1])) for m in named if m and shape(m[0]) == right]
        if found and len(found) == len(paths):
            camids, pids = torch.tensor(found).T
            return camids, pids.where(pids > 0, -1)
    return None


def _named(name: str, root: Path, skip_unreadable: bool) -> Reading:
    """Read a layout in which file names hold identity and camera."""
    folders, pattern, example = LAYOUTS[name]
    base, _ = _base(root, [folders])
    parts, problems, found = [], [], {}
    for folder in folders:
        pictures, strange, junk = [], [], 0
        for path in list_pictures(base / folder, skip_unreadable):
            match = re.fullmatch(pattern, path.stem, re.ASCII)
            if match is None:
                strange.append(path.name)
            elif match[1] == "-1":
                junk += 1
            else:
                camera, pid = int(match[2]), int(match[1])
                names = (f"c{camera}", match[1].lstrip("0"))  # distractors have none
                pictures.append((path, camera - 1, pid, *names))
        remedy = f"move them out; if this is no {name}, see --dataset manifest, folders"
        defect = f"Pictures in {base / folder} are not named like {example}"
        problems += _sentence(defect, strange, remedy)
        parts.append(pictures)
    if name == "market1501":  # of the gallery, which came last
        pids = [picture[2] for picture in pictures]
        counts = {"identities": len({*pids} - {0}), "distractors": pids.count(0)}
        found["gallery"] = counts | {"junk": junk}
    return Reading(_dataset(name, *parts), PUBLISHED[name], found, problems)


# folders of V1 and V2
_MSMT17: list[Folders] = [("train", "test"), ("mask_train_v2", "mask_test_v2")]
# path (without ..), camera, identity of a line in a list file
_MSMT17_LINE = re.compile(
    r"((?:\w+/)*\d+_\d+_(?!0+_)(\d{1,4})_\w+\.(?:jpg|jpeg|png)) (\d{1,9})", re.ASCII
)


def _msmt17(root: Path, skip_unreadable: bool) -> Reading:
    """Wei et al., CVPR 2018; V1 and V2 (masked faces), by their list files.

    The camera is the third field of a file name, the identity stands in the list.
    Validation pictures are trained on, as everywhere. Test numbering starts again at 0:
    test identities are shifted past the training ones, so that equal numbers are equal
    persons.
    """
    base, folders = _base(root, _MSMT17)
    parts: dict[str, Pictures] = {}
    problems, shift = [], 0
    for part in ("train", "val", "query", "gallery"):
        place = base / f"list_{part}.txt"
        folder = base / folders[part in ("query", "gallery")]
        pictures = parts.setdefault(part, [])
        lines = place.read_text("utf-8-sig", "replace").splitlines()
        for number, line in enumerate(lines, start=1):
            match = _MSMT17_LINE.fullmatch(line.strip())
            if match is None:
                raise InputError(
                    f"{place}, line {number}: {line[:80]!r} is not a picture and an "
                    "identity, as in 0000/0000_000_01_0303morning_0008_0.jpg 0."
                )
            path, camid, pid = folder / match[1], int(match[2]) - 1, int(match[3])
            pictures.append((path, camid, pid + shift, "", ""))
        missing = [str(path) for path, *_ in pictures if not path.is_file()]
        defect = f"Pictures named in {place} do not exist"
        problems += _sentence(defect, missing, "unpack the archive again")
        if part == "val":
            train = parts["train"] + pictures
            shift = 1 + max((pid for _, _, pid, *_ in train), default=-1)
    name = f"msmt17-v{1 + _MSMT17.index(folders)}"
    dataset = _dataset(name, train, parts["query"], parts["gallery"])
    return Reading(dataset, PUBLISHED["msmt17"], problems=problems)


def _base(root: Path, variants: list[Folders]) -> tuple[Path, Folders]:
    """Find the folders of a layout in `root`, or in one folder directly below it.

    The archives differ in the name of their top folder, and people point at either.
    """
    below = sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
    complete = [
        (place, folders)
        for place in (root, *below)
        for folders in variants
        if all((place / folder).is_dir() for folder in folders)
    ]
    complete = [found for found in complete if found[0] == root] or complete
    if len(complete) == 1:
        return complete[0]
    layouts = ", or ".join(" + ".join(folders) for folders in variants)
    places = ", ".join(str(place) for place, _ in complete) or "none"
    raise InputError(f"{root} or a folder in it must hold {layouts}; found: {places}.")


# ------------------------------------------------------------------- own pictures

COLUMNS = ("split", "path", "pid", "camid")


def _manifest(path: Path, skip_unreadable: bool) -> Reading:
    """A CSV file with the header split,path,pid,camid, in any order.

    Columns called camera and identity hold the names of camid and pid; others are
    ignored. UTF-8, with or without byte order mark; fields may be quoted. Relative
    paths start from the file's folder and may not leave it (nor by a link); absolute
    ones are taken as they are. pid may be empty in train. A picture may stand once in
    train, or once in query and once in gallery (VeRi-776's protocol).
    """
    parts: dict[str, Pictures] = {split: [] for split in SPLITS}
    seen: dict[str, tuple[int, list[str], int, int]] = {}  # line, splits, pid, camid
    missing = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, skipinitialspace=True, strict=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            known = [name for name in reader.fieldnames if name in COLUMNS]
            if sorted(known) != sorted(COLUMNS):
                raise ValueError(f"it must be {','.join(COLUMNS)}, with commas, once")
            for row in reader:
                split, written, pid, camid = _entry(row)
                if (place := _find(path.parent, written)) is None:
                    missing.append(written)
                    continue
                file, key = place
                first = seen.setdefault(key, (reader.line_num, [], pid, camid))
                line, splits, *labels = first
                splits.append(split)
                both = sorted(splits) == ["gallery", "query"] and labels == [pid, camid]
                if len(splits) > 1 and not both:
                    raise ValueError(
                        f"{written} stands in line {line} already; only in query and "
                        "gallery, with one pid and camid, it may be both"
                    )
                camera = row.get("camera") or str(camid)
                identity = row.get("identity") or str(pid) * (pid >= 0)
                parts[split].append((file, camid, pid, camera, identity))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; save it as CSV UTF-8.") from error
    except (csv.Error, ValueError) as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}.") from error
    defect = f"Pictures named in {path} do not exist, or may not be read"
    where = f"relative paths start from {path.parent} (--skip-unreadable True skips)"
    absent = _sentence(defect, missing, where)
    reading = Reading(_dataset("manifest", *parts.values(), root=path.parent))
    (reading.notes if skip_unreadable else reading.problems).extend(absent)
    return reading


def _entry(row: dict[str, str]) -> tuple[str, str, int, int]:
    """Return split, path, identity and camera of a row; ValueError says what is odd."""
    if None in row or None in row.values():
        raise ValueError("it has more or fewer fields than the header")
    split, path, pid, camid = (row[name].strip() for name in COLUMNS)
    if split not in SPLITS:
        raise ValueError(f"the split {split!r} is none of {', '.join(SPLITS)}")
    unknown = split == "train" and pid in ("", "-1")
    pid = "0" if unknown else pid.removesuffix(".0")  # as tables with gaps write 7
    for name, number in (("pid", pid), ("camid", camid := camid.removesuffix(".0"))):
        if not _is_number(number):
            raise ValueError(
                f"the {name} {number[:40]!r} is no whole number from 0 on (only the "
                "pid of a train picture may be empty)"
            )
    return split, path, -1 if unknown else int(pid), int(camid)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 18


def _find(base: Path, written: str) -> tuple[Path, str] | None:
    """Return the file that a manifest names, and its one true name, or None.

    Raises ValueError when a relative path leads out of `base`.
    """
    # Windows writes a backslash between folders, and macOS an ü as two characters.
    forms = [written, written.replace("\\", "/")]
    forms += [unicodedata.normalize(form, forms[1]) for form in ("NFC", "NFD")]
    paths = (os.path.join(base, form) for form in forms)
    if (path := next(filter(os.path.isfile, paths), None)) is None:
        return None
    real = os.path.realpath(path)
    inside = real.startswith(os.path.join(os.path.realpath(base), ""))
    if not (inside or os.path.isabs(written)):
        raise ValueError(
            f"{written} leads out of {base}, by .. or a link, to {real}; write the "
            "absolute path of a picture that lies elsewhere"
        )
    return Path(path), real


def _folders(root: Path, skip_unreadable: bool) -> Reading:
    """One folder a camera, pictures anywhere below it; identities are not known."""
    cameras: dict[str, list[Path]] = {}
    for path in list_pictures(root, skip_unreadable):
        cameras.setdefault(path.relative_to(root).parts[0], []).append(path)
    if not cameras:
        raise InputError(f"{root} holds no folder with pictures, one for each camera.")
    if loose := [name for name, paths in cameras.items() if paths == [root / name]]:
        defect = f"Pictures in {root} lie beside the camera folders"
        remedy = "move each into the folder of its camera, or see o2cap data manifest"
        raise InputError(*_sentence(defect, loose, remedy))
    pictures, found, names = [], {}, sorted(cameras, key=_natural)
    for camid, name in enumerate(names):
        pictures += [(path, camid, -1, name, "") for path in cameras[name]]
        found[f"images of camera {camid}, {name}"] = len(cameras[name])
    sizes = f"{min(found.values()):,} to {max(found.values()):,} pictures"
    taken = f"Each folder in {root} is taken for a camera, of {sizes}"
    remedy = "if they are persons or splits, see o2cap data manifest"
    notes = _sentence(taken, names, remedy)
    dataset = _dataset("folders", pictures, [], [])
    return Reading(dataset, found={"train": found}, notes=notes)


def _natural(text: str) -> list[str | int]:
    """Return a key by which cam2 comes before cam10."""
    parts = re.split(r"([0-9]+)", text)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def manifest_from_pattern(
    folder: Path, pattern: str
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Make the rows of a manifest from what paths say.

    Parameters
    ----------
    folder : Path
        Where the pictures lie.
    pattern : str
        Their paths below the folder, such as ``{camid}/{pid}_{frame}.jpg``. It must
        hold camid; pid, and split (train, query or gallery), mean something too, and
        any other name is a further column. A name stands for a part of a folder's or
        file's name, as short as will do, and ``{camid:2}`` for two folders with the /
        between them. Upper and lower case are the same.

    Returns
    -------
    rows : list of dict
        With split, path (absolute), pid (may be empty) and camid, for
        :class:`csv.DictWriter`. Where these are not all numbers, they are numbered in
        sorted order, and the columns camera and identity keep the names.
    others : list of Path
        The pictures whose path does not fit.

    Raises
    ------
    InputError
        For a pattern without camid, and when no picture fits.
    """
    names = set[str]()

    def part(field: re.Match[str]) -> str:
        name, folders = field[1], int(field[2] or 1)
        if name in names:
            return f"(?P={name})"
        names.add(name)
        return f"(?P<{name}>{'/'.join(['[^/]+?'] * folders)})"

    expression = re.sub(r"\\{([a-z]\w*)(?::(\d))?\\}", part, re.escape(pattern))
    if "camid" not in names:
        raise InputError(f"--pattern {pattern} has no {{camid}}; write one, too.")
    folder = Path(os.path.abspath(folder))
    rows: list[dict[str, Any]] = []
    others = []
    for path in list_pictures(folder):
        name = path.relative_to(folder).as_posix()
        if match := re.fullmatch(expression, name, re.IGNORECASE):
            said = {"split": "train", "pid": ""} | match.groupdict()
            rows.append(said | {"path": path})
        else:
            others.append(path)
    if not rows:
        what = f", such as {others[0]}" if others else ""
        raise InputError(f"No picture in {folder} fits --pattern {pattern}{what}.")
    for column, kept in (("camid", "camera"), ("pid", "identity")):
        texts = sorted({row[column] for row in rows} - {""}, key=_natural)
        number = {"": ""} | {text: i for i, text in enumerate(texts)}
        if all(map(_is_number, texts)) and len(set(map(int, texts))) == len(texts):
            continue
        for row in rows:
            row[kept], row[column] = row[column], number[row[column]]
    return rows, others


# ------------------------------------------------------------------------- helpers

# path, camera, identity; names of both
Pictures = list[tuple[Path, int, int, str, str]]


def _dataset(name: str, *splits: Pictures, root: Path | None = None) -> ReIDDataset:
    """Make a set of each split; without identities where every one is unknown."""
    grey = find_grey_range(path for pictures in splits for path, *_ in pictures)
    parts = []
    for pictures in splits:
        paths, *columns = zip(*pictures, strict=True) if pictures else [()] * 5
        camids, pids = (torch.tensor(column).long() for column in columns[:2])
        cameras, names = (c if any(c) else None for c in columns[2:])
        known = pids if {*columns[1]} != {-1} else None
        parts.append(ImageSet([*paths], camids, known, cameras, names, grey))
    return ReIDDataset(name, *parts, root=root)


def _sentence(defect: str, names: Sequence[str], remedy: str) -> list[str]:
    """Return one sentence on the files that share a defect, or nothing if none does."""
    if not names:
        return []
    first = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return [f"{defect}: {len(names):,} ({first}); {remedy}."]


READERS: dict[str, Callable[..., Reading]] = {
    **{name: partial(_named, name) for name in LAYOUTS},
    "msmt17": _msmt17,
    "manifest": _manifest,
    "folders": _folders,
}
