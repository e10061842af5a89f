"""Readers of real data: the four benchmarks of the paper, a manifest, camera folders.

Every reader takes the layout in which the data come from their owners; nothing has
to be renamed. Cameras count from 0 (`camid`), whatever a file name counts from.
"""

from __future__ import annotations

import csv
import inspect
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from o2cap.data.images import (
    ImageSet,
    ReIDDataset,
    is_picture,
    list_pictures,
    open_picture,
)
from o2cap.errors import InputError, unknown

# Published counts (the data sets' own pages and papers; MSMT17's pictures without
# val from its list files). Distractors and junk are no identities.
PUBLISHED: dict[str, dict[str, dict[str, int]]] = {
    "market1501": {
        "train": {"images": 12_936, "identities": 751, "cameras": 6},
        "query": {"images": 3_368, "identities": 750},
        "gallery": {"images": 15_913, "identities": 750, "junk": 3_819},
    },
    "dukemtmcreid": {
        "train": {"images": 16_522, "identities": 702, "cameras": 8},
        "query": {"images": 2_228, "identities": 702},
        "gallery": {"images": 17_661, "identities": 702 + 408},
    },
    "msmt17": {
        "train": {"images": 32_621, "identities": 1_041, "cameras": 15},
        "query": {"images": 11_659, "identities": 3_060},
        "gallery": {"images": 82_161, "identities": 3_060},
    },
    "veri776": {
        "train": {"images": 37_778, "identities": 576, "cameras": 20},
        "query": {"images": 1_678, "identities": 200},
        "gallery": {"images": 11_579, "identities": 200},
    },
}
MSMT17_TRAIN_WITHOUT_VAL = 30_248

ROOT_MEANS = {
    "market1501": "the folder with bounding_box_train, query and bounding_box_test",
    "dukemtmcreid": "the folder with bounding_box_train, query and bounding_box_test",
    "msmt17": "the folder MSMT17_V1 or MSMT17_V2, with its four list files",
    "veri776": "the folder with image_train, image_query and image_test",
    "manifest": "a CSV file with the columns split,path,pid,camid",
    "folders": "a folder that holds one folder of pictures for each camera",
}


class Count(NamedTuple):
    """One line of the table of counts; `expected` is None where nothing is known."""

    split: str
    what: str
    expected: int | None
    found: int


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
        Counts found, under the same keys and some more.
    problems : list of str
        Sentences, each a reason not to use the data as they are.
    missing : list of str
        A sentence on the pictures named that do not exist, which `dataset` leaves out;
        a problem, unless they are to be skipped.
    notes : list of str
        Sentences on oddities that do not stand in the way.
    """

    dataset: ReIDDataset
    expected: dict[str, dict[str, int]] = field(default_factory=dict)
    found: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for split, counts in self.dataset.counts().items():
            self.found[split] = counts | self.found.get(split, {})

    def table(self) -> list[Count]:
        """Return all counts, published and found."""
        return [
            Count(split, what, self.expected.get(split, {}).get(what), number)
            for split, counts in self.found.items()
            for what, number in counts.items()
        ]

    def differences(self) -> list[str]:
        """Return a phrase for each count that is not the published one."""
        return [
            f"{row.split}: {row.expected:,} {row.what} expected, {row.found:,} found"
            for row in self.table()
            if row.expected is not None and row.expected != row.found
        ]


def read_dataset(name: str, root: Path | None, **options: Any) -> Reading:
    """Read the real data set `name` and say what was found.

    Parameters
    ----------
    name : str
        market1501, dukemtmcreid, msmt17, veri776, manifest or folders.
    root : Path
        The data set's folder; for manifest, the CSV file.
    **options
        For msmt17 `val` (bool, True): train on the pictures of list_val.txt too.

    Raises
    ------
    InputError
        When the name or an option is unknown, or `root` does not hold the layout.
    """
    if name not in READERS:
        raise InputError(unknown("The data set", name, READERS))
    reader = READERS[name]
    known = list(inspect.signature(reader).parameters)[1:]
    for option in options:
        if option not in known:
            what = f"The option of {name}"
            raise InputError(unknown(what, option, known or ["none"]))
    if root is None:
        raise InputError(f"--dataset {name} needs --root: {ROOT_MEANS[name]}.")
    root = Path(root).expanduser()
    if not root.exists():
        raise InputError(
            f"--root {root} does not exist; for {name} it is {ROOT_MEANS[name]}."
        )
    if root.is_dir() == (name == "manifest"):
        kind = "folder" if root.is_dir() else "file"
        hint = f"; data_scripts/{name}.py unpacks an archive" if name in SCRIPTS else ""
        raise InputError(
            f"--root {root} is a {kind}; for {name} it is {ROOT_MEANS[name]}{hint}."
        )
    try:
        return reader(root.absolute(), **options)
    except OSError as error:  # no permission, a disk that fails
        raise InputError(
            f"{error.filename} cannot be read: {error.strerror}."
        ) from error


@dataclass(frozen=True)
class Verification:
    """What `verify_dataset` found: the table of counts, and sentences."""

    rows: list[Count]
    problems: list[str]
    notes: list[str]


def verify_dataset(
    name: str, root: Path | None, *, pictures: bool = False, **options: Any
) -> Verification:
    """Count a real data set, compare with the published counts, list what is wrong.

    Parameters
    ----------
    name, root, **options
        As for :func:`read_dataset`.
    pictures : bool
        Decode every picture too, and list those that cannot be read.

    Returns
    -------
    Verification
        Its `problems` are those of the layout and names, differing counts, and
        unreadable pictures; none means that the data are as published.

    Raises
    ------
    InputError
        When the name or an option is unknown, or `root` does not hold the layout.
    """
    reading = read_dataset(name, root, **options)
    problems = reading.problems + reading.missing + reading.differences()
    if pictures:
        parts = reading.dataset.splits().values()
        paths = list(dict.fromkeys(chain.from_iterable(part.paths for part in parts)))
        with ThreadPoolExecutor() as pool:
            problems += filter(None, pool.map(_unreadable, paths))
    return Verification(reading.table(), problems, reading.notes)


def _unreadable(path: Path) -> str | None:
    """Return why a picture cannot be decoded, or None."""
    try:
        with open_picture(path) as image:
            image.draft("RGB", (16, 16))  # JPEG: reads every byte, decodes 1/8 size
            image.load()
    except InputError as error:
        return str(error)
    return None


# ---------------------------------------------------------------- the benchmarks

_SPLITS = ("train", "query", "gallery")
_PERSON_FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
_VEHICLE_FOLDERS = ("image_train", "image_query", "image_test")
_MSMT17_FOLDERS = {
    "V1": ("train", "test"),
    "V2": ("mask_train_v2", "mask_test_v2"),
}
_MSMT17_LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")


def _pattern(expression: str) -> re.Pattern[str]:
    return re.compile(expression + r"\.(jpg|jpeg|png)", re.ASCII | re.IGNORECASE)


# identity, camera (from 1) of a file name
_MARKET1501_NAME = _pattern(r"(-1|\d{1,9})_c([1-9]\d{0,3})s\d+_\d+_\d+")
_DUKEMTMC_NAME = _pattern(r"(\d{1,9})_c([1-9]\d{0,3})_f\d+")
_VERI776_NAME = _pattern(r"(\d{1,9})_c(\d{3})_\d+_\d+")
# path (without ..), camera, identity of a line in a list file
_MSMT17_LINE = re.compile(
    r"((?:\w+/)*\d+_\d+_(\d{1,4})_\w+\.(?:jpg|jpeg|png)) (\d{1,9})", re.ASCII
)


def _market1501(root: Path) -> Reading:
    """Zheng et al., ICCV 2015. Identity −1 (junk) is left out, 0 (distractor) stays."""
    (base, _) = _layout(root, [_PERSON_FOLDERS])
    reading = _named("market1501", base, _PERSON_FOLDERS, _MARKET1501_NAME)
    pids = reading.dataset.gallery.pids
    assert pids is not None
    reading.found["gallery"]["identities"] = int(pids[pids > 0].unique().numel())
    reading.found["gallery"]["distractors"] = int((pids == 0).sum())
    return reading


def _dukemtmcreid(root: Path) -> Reading:
    """Zheng et al., ICCV 2017, from Ristani et al., 2016: withdrawn in 2019."""
    (base, _) = _layout(root, [_PERSON_FOLDERS])
    return _named("dukemtmcreid", base, _PERSON_FOLDERS, _DUKEMTMC_NAME)


def _veri776(root: Path) -> Reading:
    """Liu et al., ICME 2016. Image-to-image protocol: queries stay in the gallery.

    File names suffice. name_*.txt, where present, says which pictures belong to a
    split; *_label.xml is compared with the names.
    """
    (base, _) = _layout(root, [_VEHICLE_FOLDERS])
    reading = _named(
        "veri776",
        base,
        _VEHICLE_FOLDERS,
        _VERI776_NAME,
        lists=("name_train.txt", "name_query.txt", "name_test.txt"),
    )
    for split, labels in (("train", "train_label.xml"), ("gallery", "test_label.xml")):
        if (base / labels).is_file():
            images = reading.dataset.splits()[split]
            reading.notes += _label_conflicts(base / labels, images)
    return reading


def _msmt17(root: Path, val: bool = True) -> Reading:
    """Wei et al., CVPR 2018; V1 and V2 (masked faces), by their list files.

    The camera is the third field of a file name, the identity stands in the list.
    Test numbering starts again at 0: test identities are shifted past the training
    ones, so that equal numbers are equal persons.
    """
    base, folders = _layout(root, list(_MSMT17_FOLDERS.values()))
    missing = [name for name in _MSMT17_LISTS if not (base / name).is_file()]
    if missing:
        raise InputError(
            f"{base} has no {', '.join(missing)}; the list files come with MSMT17 "
            "and say which pictures belong to which split."
        )
    version = next(v for v, names in _MSMT17_FOLDERS.items() if names == folders)
    problems: list[str] = []
    train, more, query, gallery = (
        _msmt17_list(base / name, base / folders[index // 2], problems)
        for index, name in enumerate(_MSMT17_LISTS)
    )
    shift = max([*train.pids, *more.pids], default=-1) + 1
    for part in (query, gallery):
        part.pids = [pid + shift for pid in part.pids]
    expected = PUBLISHED["msmt17"]
    if val:
        train.paths += more.paths
        train.camids += more.camids
        train.pids += more.pids
    else:
        without = expected["train"] | {"images": MSMT17_TRAIN_WITHOUT_VAL}
        expected = expected | {"train": without}
    parts = [part.images() for part in (train, query, gallery)]
    dataset = ReIDDataset(f"msmt17-{version.lower()}", *parts)
    return Reading(dataset, expected, problems=problems)


def _msmt17_list(path: Path, folder: Path, problems: list[str]) -> _Columns:
    """Read a list file of lines 0000/0000_000_01_0303morning_0008_0.jpg 0."""
    columns = _Columns()
    files = _Files(folder)
    missing = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        match = _MSMT17_LINE.fullmatch(line.strip())
        if match is None or int(match[2]) == 0:
            raise InputError(
                f"{path}, line {number}: {line.strip()[:80]!r} is not a picture and "
                "an identity, as in 0000/0000_000_01_0303morning_0008_0.jpg 0."
            )
        file = files.find(match[1])
        if not file.exists:
            missing.append(match[1])
        columns.add(Path(file.path), int(match[2]) - 1, int(match[3]))
    defect = f"Pictures named in {path} do not exist"
    problems += _sentence(defect, missing, "unpack the archive again")
    return columns


def _named(
    name: str,
    base: Path,
    folders: Sequence[str],
    pattern: re.Pattern[str],
    lists: Sequence[str] = (),
) -> Reading:
    """Read the layout in which file names hold identity and camera."""
    problems: list[str] = []
    notes: list[str] = []
    found: dict[str, dict[str, int]] = {}
    parts = []
    for index, split in enumerate(_SPLITS):
        folder = base / folders[index]
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if is_picture(entry.name))
        if lists and (base / lists[index]).is_file():
            lines = _read_text(base / lists[index]).splitlines()
            listed = {line.strip() for line in lines} - {""}
            problems += _sentence(
                f"Pictures named in {base / lists[index]} do not exist",
                sorted(listed.difference(names)),
                "unpack the archive again",
            )
            notes += _sentence(
                f"Pictures in {folder} are not in {lists[index]}",
                sorted(set(names).difference(listed)),
                "they are left out",
            )
            names = [file for file in names if file in listed]
        columns, broken, junk = _Columns(), [], 0
        for file in names:
            match = pattern.fullmatch(file)
            if match is None or int(match[2]) == 0:
                broken.append(file)
            elif match[1] == "-1":
                junk += 1
            else:
                columns.add(folder / file, int(match[2]) - 1, int(match[1]))
        problems += _sentence(
            f"Pictures in {folder} are not named as {name}'s are",
            broken,
            "move them out of the folder",
        )
        parts.append(columns.images())
        if name == "market1501":
            found[split] = {"junk": junk}
    return Reading(ReIDDataset(name, *parts), PUBLISHED[name], found, problems, notes)


def _label_conflicts(path: Path, images: ImageSet) -> list[str]:
    """Compare VeRi-776's label file with identity and camera of the file names."""
    # The files declare gb2312, which Python's XML parser does not know: decode first.
    raw = path.read_bytes()
    declared = re.match(rb"\s*<\?xml[^>]*encoding=[\"']([\w-]+)", raw)
    if b"<!DOCTYPE" in raw or b"<!ENTITY" in raw:
        raise InputError(
            f"{path} declares XML entities; VeRi-776's label files do not."
        )
    try:
        text = raw.decode(declared[1].decode() if declared else "utf-8-sig")
        tree = ElementTree.fromstring(re.sub(r"^\s*<\?xml.*?\?>", "", text))
        labels = {
            item.attrib["imageName"]: (
                int(item.attrib["vehicleID"]),
                int(item.attrib["cameraID"].lstrip("cC")) - 1,
            )
            for item in tree.iter("Item")
        }
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise InputError(
            f"{path} is not a label file of VeRi-776 ({error!r}); take it from the "
            "archive again or remove it: file names suffice."
        ) from error
    assert images.pids is not None
    named = zip(images.pids.tolist(), images.camids.tolist(), strict=True)
    conflicts = [
        file.name
        for file, read in zip(images.paths, named, strict=True)
        if labels.get(file.name, read) != read
    ]
    defect = f"{path} contradicts the identity or camera in file names"
    return _sentence(defect, conflicts, "the file names are used")


def _layout(
    root: Path, variants: Sequence[tuple[str, ...]]
) -> tuple[Path, tuple[str, ...]]:
    """Find the folders of a layout in `root`, or in one folder directly below it.

    The archives differ in the name of their top folder, and people point at either.
    """
    below = [
        Path(entry)
        for entry in os.scandir(root)
        if entry.is_dir() and not entry.name.startswith(".")
    ]
    candidates = [
        (place, folders, [name for name in folders if not (place / name).is_dir()])
        for place in (root, *sorted(below))
        for folders in variants
    ]
    complete = [
        (place, folders) for place, folders, missing in candidates if not missing
    ]
    complete = [one for one in complete if one[0] == root] or complete
    if len(complete) > 1:
        places = "; ".join(f"{place}: {' + '.join(names)}" for place, names in complete)
        raise InputError(
            f"{root} holds several data sets ({places}); give one of them."
        )
    if complete:
        return complete[0]
    place, _, missing = min(candidates, key=lambda c: len(c[2]) - len(c[1]))
    layouts = ", or ".join(" + ".join(names) for names in variants)
    raise InputError(
        f"{place} has no folder {' and no '.join(missing)}; expected {layouts}, "
        "directly in --root or in one folder below it."
    )


# ------------------------------------------------------------------- own pictures

_COLUMNS = ("split", "path", "pid", "camid")


def _manifest(path: Path) -> Reading:
    """A CSV file with the header split,path,pid,camid, in any order.

    Further columns are ignored. UTF-8, with or without byte order mark; fields may be
    quoted. Relative paths start from the file's folder and may not leave it (nor by a
    link); absolute ones are taken as they are. pid may be empty in train. A picture may
    stand once in train, or once in query and once in gallery (VeRi-776's protocol).
    """
    columns = {split: _Columns() for split in _SPLITS}
    seen: dict[str, tuple[str, int, int, int]] = {}
    files = _Files(path.parent)
    missing: list[str] = []
    line = 0

    def fail(what: str) -> NoReturn:
        raise InputError(f"{path}, line {line}: {what}")

    with open(path, "rb") as binary:
        if binary.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{path} is UTF-16; save it as «CSV UTF-8».")
    try:
        with open(path, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, skipinitialspace=True, strict=True)
            header = [name.strip() for name in next(reader, [])]
            line = reader.line_num
            if any(header.count(name) != 1 for name in _COLUMNS):
                raise InputError(
                    f"{path}: the first line must be {','.join(_COLUMNS)}, with "
                    f"commas, in any order, not {','.join(header)[:80]!r}."
                )
            place = [header.index(name) for name in _COLUMNS]
            for row in reader:
                line = reader.line_num
                if not row:
                    continue
                if len(row) != len(header):
                    fail(f"{len(row)} fields where the header has {len(header)}.")
                split, written, pid_text, camid_text = (row[i] for i in place)
                split = split.strip()
                if split not in columns:
                    fail(unknown("the split", split, _SPLITS))
                camid = _whole(camid_text, "camid", fail)
                pid = -1
                if pid_text.strip() not in ("", "-1"):
                    pid = _whole(pid_text, "pid", fail)
                elif split != "train":
                    fail(
                        f"the pid is unknown; only train may leave it out, not {split}."
                    )
                if not written or "\0" in written:
                    fail("the path is empty or holds a NUL character.")
                file = files.find(written)
                if not file.inside and not os.path.isabs(written):
                    fail(
                        f"{written} leads out of {path.parent}; write the absolute "
                        "path of a picture that lies elsewhere."
                    )
                if file.key in seen:
                    before, where, *labels = seen[file.key]
                    if split == before or "train" in (split, before):
                        fail(
                            f"{written} stands in line {where} already, in {before}; "
                            "a picture belongs to one split, once."
                        )
                    if labels != [pid, camid]:
                        fail(f"{written} has another pid or camid in line {where}.")
                seen[file.key] = (split, line, pid, camid)
                if not file.exists:
                    missing.append(written)
                    continue
                columns[split].add(Path(file.path), camid, pid)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text; save it as «CSV UTF-8»."
        ) from error
    except csv.Error as error:
        raise InputError(f"{path}, after line {line}: {error}.") from error
    if not seen:
        raise InputError(f"{path} holds no pictures, only a header.")
    absent = _sentence(
        f"Pictures named in {path} do not exist",
        missing,
        f"relative paths start from {path.parent}, with / between folders (train "
        "leaves them out with --skip-unreadable True)",
    )
    parts = [columns[split].images() for split in _SPLITS]
    return Reading(ReIDDataset("manifest", *parts), missing=absent)


def _whole(text: str, column: str, fail: Callable[[str], NoReturn]) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        fail(f"the {column} {text[:40]!r} is not a whole number of 0 or more.")
    return int(text)


def _folders(root: Path) -> Reading:
    """One folder a camera, pictures anywhere below it; identities are not known."""

    def natural(path: Path) -> list[str | int]:  # cam2 before cam10
        parts = re.split(r"([0-9]+)", path.name)
        return [int(p) if i % 2 else p for i, p in enumerate(parts)]

    entries = [Path(e) for e in os.scandir(root) if not e.name.startswith(".")]
    loose = sorted(p.name for p in entries if p.is_file() and is_picture(p.name))
    if loose:
        defect = f"Pictures in {root} lie beside the camera folders"
        remedy = "move each into the folder of its camera"
        raise InputError(*_sentence(defect, loose, remedy))
    train = _Columns()
    cameras: dict[str, int] = {}
    notes = []
    for folder in sorted((p for p in entries if p.is_dir()), key=natural):
        pictures = list_pictures(folder)
        if not pictures:
            notes.append(f"{folder} holds no picture and is no camera.")
            continue
        for picture in pictures:
            train.add(picture, len(cameras), -1)
        cameras[f"images of camera {len(cameras)}, {folder.name}"] = len(pictures)
    if not cameras:
        raise InputError(
            f"{root} holds no pictures; it must be {ROOT_MEANS['folders']}."
        )
    empty = _Columns().images()
    dataset = ReIDDataset("folders", train.images(), empty, empty)
    return Reading(dataset, found={"train": cameras}, notes=notes)


# ------------------------------------------------------------------------- helpers


class _File(NamedTuple):
    path: str
    key: str
    """The same for two spellings of one path."""
    exists: bool
    inside: bool
    """Whether it lies in the base folder, links followed."""


class _Files:
    """Finds many files with one listing of each folder, not a look-up of each file.

    Matters on network drives, where a look-up costs as much as a listing.
    """

    def __init__(self, base: Path) -> None:
        self._base = os.path.abspath(base)
        self._real_base = os.path.realpath(base)
        self._folders: dict[str, tuple[str, bool, dict[str, bool]]] = {}

    def _inside(self, real: str) -> bool:
        return real == self._real_base or real.startswith(
            self._real_base.rstrip(os.sep) + os.sep
        )

    def find(self, written: str) -> _File:
        path = os.path.join(self._base, written)
        parent, name = os.path.split(path)
        if parent not in self._folders:
            real = os.path.realpath(parent)
            links = {}
            try:
                with os.scandir(parent) as entries:
                    links = {e.name: e.is_symlink() for e in entries if e.is_file()}
            except OSError:
                pass  # a folder that cannot be listed has none of the files
            self._folders[parent] = real, self._inside(real), links
        real, inside, links = self._folders[parent]
        # A file system that ignores case may know a name that its listing spells
        # otherwise; so ask it before calling a file missing.
        exists = name in links or os.path.isfile(path)
        # (Of a million missing files, none is asked where it would lie.)
        if links.get(name, exists or name == ".."):
            inside = self._inside(os.path.realpath(path))
        return _File(path, real + os.sep + name, exists, inside)


def _sentence(defect: str, names: Sequence[str], remedy: str) -> list[str]:
    """Return one sentence on the files that share a defect, or nothing if none does."""
    if not names:
        return []
    first = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return [f"{defect}: {len(names):,} ({first}); {remedy}."]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not text; take it from the archive again."
        ) from error


@dataclass
class _Columns:
    """An `ImageSet` that grows."""

    paths: list[Path] = field(default_factory=list)
    camids: list[int] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)

    def add(self, path: Path, camid: int, pid: int) -> None:
        self.paths.append(path)
        self.camids.append(camid)
        self.pids.append(pid)

    def images(self) -> ImageSet:
        """Return the pictures; without identities when every one is unknown."""
        known = not self.pids or max(self.pids) >= 0
        return ImageSet(
            self.paths,
            torch.tensor(self.camids, dtype=torch.int64),
            torch.tensor(self.pids, dtype=torch.int64) if known else None,
        )


READERS: dict[str, Callable[..., Reading]] = {
    "market1501": _market1501,
    "dukemtmcreid": _dukemtmcreid,
    "msmt17": _msmt17,
    "veri776": _veri776,
    "manifest": _manifest,
    "folders": _folders,
}
SCRIPTS = tuple(PUBLISHED)  # those with a command in data_scripts/
