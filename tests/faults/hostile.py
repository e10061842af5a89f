"""Broken and hostile input: thousands of generated cases.

    python tests/faults/hostile.py [--cases 2400] [--seed 0] [FAMILY ...]

Each case makes a file, or a command, that somebody could be handed, and uses it as a
person would. The package must take it, and then with the right result, or refuse it by
InputError in one sentence; it must run nothing, and write nothing outside the folder
of the case. The last line is a summary of counts.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data_scripts"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import safetensors.torch
import tiny
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from unpacking import Benchmark, Limits, unpack

from o2cap import __main__ as program
from o2cap import config as configuration
from o2cap.backbone import build_model, read_state_dict
from o2cap.clustering import dbscan, jaccard_distance
from o2cap.data import load_dataset
from o2cap.data.images import ImageSet
from o2cap.data.loading import decode, read_picture
from o2cap.errors import InputError, TrainingError
from o2cap.evaluation import evaluate_retrieval
from o2cap.inference import Embedding, load_embedding, search
from o2cap.neighbours import nearest_neighbours
from o2cap.trainer import train

Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass
class Case:
    """Where a case may write, what it must not touch, and what became of it."""

    folder: Path
    outside: Path
    draw: Draw
    tally: Counter[str] = field(default_factory=Counter)

    def attempt(self, use: Callable[[], Any], *named: str) -> Any:
        """Return what `use` returns, or None where it refuses as it should."""
        try:
            found = use()
        except InputError as error:
            sentence = str(error)
            assert sentence and "\n" not in sentence, repr(sentence)
            for word in named:
                assert word in sentence, f"{sentence!r} does not name {word}"
            self.tally["refused"] += 1
            return None
        self.tally["taken"] += 1
        return found


def one_of(draw: Draw, *choices: Any) -> Any:
    return draw(st.sampled_from(choices))


def whole(draw: Draw, low: int, high: int) -> int:
    return int(draw(st.integers(low, high)))


def damaged(draw: Draw, content: bytes) -> tuple[str, bytes]:
    """Return how a file was damaged, and what is left of it."""
    how = one_of(draw, "not", "cut off", "flipped", "emptied", "grown", "noise")
    place = whole(draw, 0, 2**30)  # not by the length, which times and paths may change
    if how == "cut off":
        content = content[: place % len(content)]
    elif how == "flipped":
        changed = bytearray(content)
        for _ in range(whole(draw, 1, 4)):
            changed[place % len(content)] ^= whole(draw, 1, 255)
            place = place * 31 + 7
        content = bytes(changed)
    elif how == "emptied":
        content = b""
    elif how == "grown":
        content += draw(st.binary(min_size=1, max_size=40))
    elif how == "noise":
        content = draw(st.binary(max_size=200))
    return how, content


class Trap:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return open, (str(self.target), "w")


# ---------------------------------------------------------------------------- pictures

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 3),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


KINDS = ("RGB", "L", "1", "RGBA", "LA", "P", "I;16")
KINDS += ("CMYK", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def healthy(draw: Draw) -> tuple[bytes, np.ndarray | None]:
    """Return a readable picture and, where the format keeps it, how it must look."""
    height, width = whole(draw, 1, 24), whole(draw, 1, 24)
    noise = np.random.default_rng(whole(draw, 0, 99)).integers
    kind = one_of(draw, *KINDS)
    rgb = noise(0, 256, (height, width, 3), dtype=np.uint8)
    grey = rgb[..., 0]
    expected: np.ndarray | None = rgb
    how: dict[str, Any] = {"format": "PNG"}
    if kind in ("RGB", "BMP", "TIFF"):
        picture = Image.fromarray(rgb)
        how["format"] = "PNG" if kind == "RGB" else kind
    elif kind == "L":
        picture, expected = Image.fromarray(grey), np.stack([grey] * 3, 2)
    elif kind == "1":
        picture = Image.fromarray(grey > 127)
        expected = np.stack([np.where(grey > 127, 255, 0).astype(np.uint8)] * 3, 2)
    elif kind == "RGBA":
        alpha = noise(0, 256, (height, width, 1), dtype=np.uint8)
        picture = Image.fromarray(np.concatenate([rgb, alpha], 2))
    elif kind == "LA":
        picture = Image.fromarray(np.stack([grey, rgb[..., 1]], 2))
        expected = np.stack([grey] * 3, 2)
    elif kind == "I;16":
        deep = noise(0, 65536, (height, width), dtype=np.uint16)
        picture = Image.fromarray(deep)
        grey = np.round(deep / 257.0).astype(np.uint8)  # by the range in `pictures`
        expected = np.stack([grey] * 3, 2)
    else:
        picture, expected = Image.fromarray(rgb), None
        if kind == "P":
            picture = picture.quantize(16)
        elif kind == "CMYK":
            picture, how = picture.convert("CMYK"), {"format": "JPEG"}
        else:
            how["format"] = kind
        if kind in ("GIF", "WEBP") and one_of(draw, True, False):
            how |= {"save_all": True, "append_images": [picture.rotate(180)]}
    if how["format"] in ("PNG", "JPEG", "TIFF", "WEBP") and "save_all" not in how:
        turned = whole(draw, 1, 8)
        exif = Image.Exif()
        exif[0x0112] = turned
        how["exif"] = exif
        if expected is not None:
            expected = UPRIGHT[turned](expected)
    file = io.BytesIO()
    picture.save(file, **how)
    return file.getvalue(), expected


def chunk(kind: bytes, content: bytes) -> bytes:
    size, code = struct.pack(">I", len(content)), zlib.crc32(kind + content)
    return size + kind + content + struct.pack(">I", code)


def bomb(draw: Draw) -> bytes:
    """Return a small PNG that announces, or unpacks to, many pixels."""
    width, height = one_of(
        draw, (10**5, 10**5), (2**31 - 1, 2**31 - 1), (9_500, 9_500), (1, 10**8)
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10**6))
    text = b"zTXtx" + zlib.compress(bytes(10**6))
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    if one_of(draw, True, False):
        parts.insert(1, chunk(b"zTXt", text[4:]))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def foreign(case: Case) -> bytes:
    """Return a file of a format that is no photograph's, or of none."""
    kind = one_of(case.draw, "EPS", "PPM", "TGA", "ICO", "PCX", "PDF", "SGI", "text")
    if kind == "text":
        return case.draw(st.text(max_size=60)).encode("utf-8", "surrogatepass")
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(file, kind)
    if kind == "EPS":  # a program: this one would write a file
        line = f"({case.outside / 'executed'}) (w) file closefile\n".encode()
        return file.getvalue().replace(b"%%EndProlog", line + b"%%EndProlog")
    return file.getvalue()


def pictures(case: Case) -> None:
    """One picture, whole or not, under any suffix."""
    draw = case.draw
    name = f"a b-ü{one_of(draw, '.jpg', '.png', '.JPEG', '.bmp', '.webp', '.tif')}"
    path = case.folder / name
    kind = one_of(draw, "picture", "picture", "picture", "bomb", "foreign")
    if kind == "picture":
        content, expected = healthy(draw)
        how, left = damaged(draw, content)
    else:
        how, expected = kind, None
        left = bomb(draw) if kind == "bomb" else foreign(case)
    path.write_bytes(left)
    height, width = whole(draw, 1, 24), whole(draw, 1, 24)
    if expected is not None:
        height, width = expected.shape[:2]
    deep = (0, 65535)
    found = case.attempt(lambda: read_picture(path, height, width, deep), name)
    if found is None:
        assert how != "not", "a whole picture is refused"
        return
    assert found.dtype == np.uint8 and found.shape == (height, width, 3)
    assert how not in ("bomb", "foreign", "emptied"), f"{how} is taken"
    if how in ("not", "grown", "cut off") and expected is not None:
        assert np.array_equal(found, expected), f"{how}, and changed"


def batches(case: Case) -> None:
    """Several pictures, some of them damaged, are decoded together."""
    draw, paths, good = case.draw, [], []
    for i in range(whole(draw, 1, 6)):
        path = case.folder / f"{i}.png"
        content, _ = healthy(draw)
        if one_of(draw, True, False):
            content = content[: len(content) // 2]
        path.write_bytes(content)
        with contextlib.suppress(InputError):
            good.append((path, read_picture(path, 8, 4)))
        paths.append(path)
    images = ImageSet(paths, torch.arange(len(paths)))
    workers = whole(draw, 1, 3)
    skip = one_of(draw, True, False)
    found = case.attempt(
        lambda: decode(images, 8, 4, workers=workers, skip_unreadable=skip)
    )
    if found is None:
        assert not good or (not skip and len(good) < len(paths))
        return
    pixels, kept = found
    assert list(kept.paths) == [path for path, _ in good]
    assert kept.camids.tolist() == [int(path.stem) for path, _ in good]
    assert np.array_equal(pixels.numpy(), np.stack([one for _, one in good]))


# --------------------------------------------------------------------------- manifests


def manifests(case: Case) -> None:
    """A table of pictures, in any encoding, with any paths."""
    draw, folder = case.draw, case.folder
    for camera in range(3):
        (folder / f"cam{camera}").mkdir()
        (folder / f"cam{camera}/{camera} ü.png").write_bytes(b"x")
    (folder / "out").symlink_to(case.outside, target_is_directory=True)
    (folder / "link.png").symlink_to(case.outside / "secret.png")
    (folder / "own.png").symlink_to(folder / "cam1/1 ü.png")
    (folder / "loop").symlink_to(folder / "loop")
    known = [f"cam{i}/{i} ü.png" for i in range(3)]
    wild = [
        *("../secret.png", f"{case.outside}/secret.png", "out/secret.png"),
        *("link.png", "own.png", "loop", "cam0", "cam0//0 ü.png", "cam0/../link.png"),
        *("cam1\\1 ü.png", "~", "x" * 5000, "\0", "", ".", "file:///etc/passwd"),
    ]
    path = st.sampled_from(known) | st.sampled_from(known + wild) | st.text(max_size=6)
    number = st.integers(0, 9).map(str)
    odd = st.sampled_from(["", "-1", "1.0", "٣", "9" * 30, " 4 ", "1e3", "0x1"])
    if one_of(draw, True, False):
        path, odd = st.sampled_from([*known, "own.png"]), number
    row = st.tuples(
        st.sampled_from(["train"] * 6 + ["query", "gallery", "Train"]),
        path,
        number | number | odd,
        number | number | odd,
    )
    rows = draw(st.lists(row, max_size=4, unique_by=lambda row: row[1]))
    text = io.StringIO()
    quoting = one_of(draw, csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    writer = csv.writer(
        text, quoting=quoting, lineterminator=one_of(draw, "\n", "\r\n")
    )
    writer.writerow(["split", "path", "pid", "camid"])
    writer.writerows(rows)
    coding = one_of(draw, *["utf-8", "utf-8-sig"] * 3, "latin-1", "utf-16", "utf-32")
    content = text.getvalue().encode(coding, "replace")
    how, content = (
        damaged(draw, content) if one_of(draw, *"01234") == "0" else ("not", content)
    )
    (folder / "own.csv").write_bytes(content)
    skip = one_of(draw, True, False)
    found = case.attempt(
        lambda: load_dataset("manifest", folder / "own.csv", skip_missing=skip),
        "own.csv",
    )
    if found is None:
        return
    written = {
        (s, str(folder / p), int(c)) for s, p, _, c in rows if c.strip().isdecimal()
    }
    for split, part in found.splits().items():
        for where, camid in zip(part.paths, part.camids.tolist(), strict=True):
            assert where.is_file()
            if how == "not" and coding.startswith("utf-8"):
                assert (split, str(where), camid) in written
            inside = where.resolve().is_relative_to(folder.resolve())
            assert inside or where == case.outside / "secret.png", where


# ---------------------------------------------------------------------------- archives

MARKET = [
    "bounding_box_train/0002_c1s1_000451_03.jpg",
    "bounding_box_train/0002_c2s1_000451_03.jpg",
    "query/0001_c1s1_001051_00.jpg",
    "bounding_box_test/0001_c2s1_001051_00.jpg",
]


def archives(case: Case) -> None:
    """An archive of a benchmark, with members that want to be elsewhere."""
    draw = case.draw
    source, goal = case.folder / "Market ü.dat", case.folder / "goal"
    before = {path.name for path in case.folder.iterdir()} | {source.name}
    plain = {f"Market/{name}": name[::-1].encode() for name in MARKET}
    outside = str(case.outside / "executed")
    names = [
        *("../executed", "/executed", outside, "Market/../../executed", "a:b", "C:/x"),
        *("..\\..\\executed", "Market/query", "Market/query/x/y", ".hidden", "a\nb"),
        *("Market/" + "d/" * 200 + "f", "n" * 300, "", ".", "Market//x", "ü.jpg"),
    ]
    extra = draw(st.just([]) | st.lists(st.sampled_from(names), max_size=2))
    members = list(plain.items()) + [(name, b"evil") for name in extra]
    if one_of(draw, True, False):
        members.reverse()
    bomb = one_of(draw, *[False] * 5, True)
    if bomb:
        members.append(("Market/query/0001_c3s1_001051_00.jpg", bytes(3 * 10**6)))
    link = one_of(draw, *[None] * 6, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)
    file = io.BytesIO()
    if one_of(draw, True, False):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of duplicate names
                for name, content in members:
                    archive.writestr(
                        zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED
                    )
            if link is not None:
                info = zipfile.ZipInfo("Market/query/link")
                info.external_attr = 0o120777 << 16
                archive.writestr(info, outside)
    else:
        mode = one_of(draw, "w", "w:gz", "w:bz2", "w:xz")
        with tarfile.open(fileobj=file, mode=mode) as tar:
            if link is not None:
                member = tarfile.TarInfo("Market/query/0009_c1s1_001051_00.jpg")
                member.type, member.linkname = link, outside
                tar.addfile(member)
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    packed = file.getvalue()
    bomb = bomb and len(packed) < 10**5  # a plain tar unpacks to what it is
    how, packed = (
        damaged(draw, packed) if one_of(draw, *"0123") == "0" else ("not", packed)
    )
    source.write_bytes(packed)
    benchmark = Benchmark("market1501", "ask its owners")
    limits = Limits(files=100, size=10**7, harmless=10**6)
    with contextlib.redirect_stdout(io.StringIO()):
        found = case.attempt(
            lambda: unpack(benchmark, source, goal, strict=False, limits=limits)
        )
    if found is None:
        assert {path.name for path in case.folder.iterdir()} == before, "left behind"
        assert how != "not" or extra or link is not None or bomb, (
            "a good one is refused"
        )
        return
    if how == "not":
        assert link is None and not bomb
    for path in goal.rglob("*"):
        assert not path.is_symlink() and (path.is_dir() or path.is_file())
        name = path.relative_to(goal).as_posix()
        if path.is_file() and how == "not" and f"Market/{name}" in plain:
            assert path.read_bytes() == plain[f"Market/{name}"]


# ----------------------------------------------------------------- weights, checkpoints


@cache
def model_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return build_model("tiny_resnet", "none", height=32, width=16).state_dict()


def weights(case: Case) -> None:
    """A weights file: of something else, with code in it, or with wrong entries."""
    draw = case.draw
    state: dict[Any, Any] = dict(model_state())
    name = one_of(draw, *list(state)[:6], "bottleneck.weight")
    change = one_of(
        draw, *["nothing"] * 3, "nan", "shape", "extra", "missing", "code", "number",
        "sparse", "complex", "half", "quantized", "nested", "list",
    )  # fmt: skip
    value = state[name]
    if change == "nan":
        state[name] = torch.full_like(value.float(), one_of(draw, np.nan, np.inf))
    elif change == "shape":
        state[name] = torch.zeros(whole(draw, 0, 3), whole(draw, 0, 3))
    elif change == "extra":
        state[draw(st.text(max_size=5)) + "x"] = torch.zeros(2)
    elif change == "missing":
        del state[name]
    elif change == "code":
        state[name] = Trap(case.outside / "executed")
    elif change == "number":
        state[whole(draw, 0, 9)] = torch.zeros(1)
    elif change == "sparse":
        state[name] = value.flatten()[None].to_sparse()
    elif change == "complex":
        state[name] = value.to(torch.complex64)
    elif change == "half":
        state[name] = value.half()
    elif change == "quantized":
        state[name] = torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)
    elif change == "nested":
        state = {one_of(draw, "state_dict", "model", "x"): state}
    elif change == "list":
        state[name] = [value]
    file, suffix = io.BytesIO(), ".pth"
    form = one_of(draw, "torch", "legacy", "pickle", "safetensors")
    if form == "safetensors" and change in ("nothing", "nan", "shape", "extra", "half"):
        suffix = ".safetensors"
        plain = {str(k): v.contiguous() for k, v in state.items()}
        file.write(safetensors.torch.save(plain))
    elif form == "pickle":
        pickle.dump(state, file)
        change = "code"
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form != "legacy")
    content = file.getvalue()
    how, content = (
        damaged(draw, content) if one_of(draw, True, False) else ("not", content)
    )
    path = case.folder / f"w{suffix}"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = case.attempt(lambda: read_state_dict(path), path.name)
    if read is None:
        assert how != "not" or change not in ("nothing", "half", "extra", "missing")
        return
    assert change not in ("code", "nan"), f"{change} is taken"
    assert all(v.float().isfinite().all() for v in read.values())
    model = case.attempt(
        lambda: build_model("tiny_resnet", str(path), height=32, width=16), path.name
    )
    if model is not None and how == "not" and change == "nothing":
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, model_state()[key]), key
    if how == "not" and change in ("missing", "shape"):
        assert model is None or model_state()[name].ndim == 0


@cache
def a_run() -> tuple[Path, Path, Any]:
    """Return a run that stopped after an epoch, the same one finished, and its data."""
    folder = Path(tempfile.mkdtemp(prefix="o2cap-run-"))
    data = tiny.as_dataset(folder, tiny.write_pictures(folder))

    class Stop(Exception):
        pass

    def stop(record: dict[str, Any]) -> None:
        raise Stop

    with contextlib.suppress(Stop):
        train(tiny.config(folder / "half"), data, on_epoch=stop)
    train(tiny.config(folder / "whole"), data)
    return folder / "half", folder / "whole", data


def result(folder: Path) -> tuple[Any, ...]:
    """Return what two equal runs have in common."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [
        {k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines
    ]
    return records, (folder / "model.safetensors").read_bytes()


def with_a_wrong_weight(draw: Draw, path: Path) -> bytes:
    """Return a checkpoint with one weight that is no number, or an infinite one."""
    state = torch.load(path, weights_only=True)
    weights = [x for x in state["model"].values() if x.is_floating_point()]
    weight = one_of(draw, *range(len(weights)))
    place = np.unravel_index(
        whole(draw, 0, weights[weight].numel() - 1), weights[weight].shape
    )
    weights[weight][place] = one_of(draw, np.nan, np.inf, -np.inf)
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def runs(case: Case) -> None:
    """A run directory in which one file is not what it was; training goes on in it."""
    draw = case.draw
    half, done, data = a_run()
    place = case.folder / "run"
    shutil.copytree(one_of(draw, half, half, done), place)
    names = [str(p.relative_to(place)) for p in sorted(place.rglob("*")) if p.is_file()]
    name = one_of(draw, *(n for n in names if not n.startswith("events")))
    path = place / name
    how, content = damaged(draw, path.read_bytes())
    if name == "checkpoint.pt":
        how = one_of(draw, how, "code", "not finite")
    if how == "code":
        content = pickle.dumps(Trap(case.outside / "executed"))
    elif how == "not finite":
        (place / "summary.json").unlink(missing_ok=True)  # else nothing goes on
        content = with_a_wrong_weight(draw, path)
    path.write_bytes(content)
    named = [name] if how in ("code", "not finite") else []
    try:
        found = case.attempt(lambda: train(tiny.config(place), data), *named)
    except TrainingError:
        case.tally["stopped"] += 1
        return
    assert found is None or how != "not finite", "weights that are no numbers are taken"
    if found is not None and not (place / "summary.json").samefile(path):
        same = result(place) == result(done)
        # Numbers in a text file, and weights, carry no checksum.
        unseen = name.endswith((".jsonl", ".safetensors", ".json", ".npz"))
        assert same or unseen, f"{name}, {how}: another result"
        case.tally["same result" if same else "changed where nothing can tell"] += 1


# ------------------------------------------------------------------------------- YAML


def settings_files(case: Case) -> None:
    """A config.yaml with tags, aliases, and values of other types."""
    draw = case.draw
    plain = tiny.config(Path("run ü")).to_dict()
    touch = f"touch {case.outside / 'executed'}"
    deep = "\n".join(
        ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 5)]
    )
    extra = one_of(
        draw, *[""] * 4, deep,
        f'epochs: !!python/object/apply:os.system ["{touch}"]',
        f"epochs: !!python/object/new:subprocess.Popen [[{touch}]]",
        "epochs: !!binary aGk=", "epochs: &e [*e]", "<<: {epochs: 3}", "? [a, b]\n: 3",
        "epochs: 2001-01-01", "epochs: .nan", "- list", "%YAML 9.9\n---", "\x00", "\t",
        "epochs: [[1, 2], [3]]", "epochs: {a: {b: {}}}", "--preset: smoke", "=: 3",
    )  # fmt: skip
    if one_of(draw, True, False):
        odd = st.one_of(
            st.none(), st.booleans(), st.text(max_size=8), st.integers(),
            st.floats(), st.lists(st.integers(0, 3), max_size=3),
            st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
            st.sampled_from(["--help", "-1", "none", "{}", "~", "$HOME", "smoke"]),
        )  # fmt: skip
        plain[one_of(draw, *plain)] = draw(odd)
    text = configuration.yaml.safe_dump(plain, allow_unicode=True) + extra
    _, content = damaged(draw, text.encode("utf-8", "surrogatepass"))
    path = case.folder / "config.yaml"
    path.write_bytes(content)
    begun = time.monotonic()
    found = case.attempt(lambda: configuration.load(path), "config.yaml")
    assert time.monotonic() - begun < 20, "a bomb"
    if found is not None:
        assert isinstance(found, configuration.Config)
        json.dumps(found.to_dict())


# --------------------------------------------------------------------------- features


def features(case: Case) -> None:
    """Features that are no unit vectors: clustered, compared, evaluated."""
    draw = case.draw
    random_ = torch.Generator().manual_seed(whole(draw, 0, 999))
    n, dim = one_of(draw, 1, 2, 9, 60, 300, 2000), one_of(draw, 1, 8, 48)
    found = torch.randn(n, dim, generator=random_)
    kind = one_of(draw, "random", "same", "few", "zero", "tiny", "huge", "nan", "inf")
    if kind == "same":
        found = found[:1].repeat(n, 1)
    elif kind == "few":
        found = found[: max(1, min(3, n))][torch.arange(n) % max(1, min(3, n))]
    elif kind == "huge":
        found *= 1e15
    if kind != "huge":
        found = torch.nn.functional.normalize(found)
    row = whole(draw, 0, n - 1)
    if kind in ("zero", "tiny"):
        found[row:] = 0 if kind == "zero" else 1e-30
    elif kind in ("nan", "inf"):
        found[row, whole(draw, 0, dim - 1)] = float(kind)
    k = min(n, one_of(draw, 1, 4, 20))

    def cluster() -> torch.Tensor:
        try:
            near = nearest_neighbours(found, k)
            distance = jaccard_distance(found, k, min(k, 3), neighbours=near)
        except ValueError as error:  # a caller's fault, which no file can cause
            assert kind in ("nan", "inf") and "finite" in str(error)
            raise InputError("refused") from error
        assert np.isfinite(distance.data).all()
        assert (distance.data >= 0).all() and (distance.data <= 1).all()
        return dbscan(distance, 0.5, 3)

    labels = case.attempt(cluster)
    if labels is None:
        assert kind in ("nan", "inf")
        return
    assert kind not in ("nan", "inf"), "not finite, and taken"
    assert labels.shape == (n,) and labels.dtype == torch.int64
    assert set(labels.tolist()) - {-1} == set(range(int(labels.max()) + 1))
    assert torch.equal(labels, cluster()), "not the same twice"
    pids, camids = torch.arange(n) % 3, torch.arange(n) % 2
    metrics = case.attempt(
        lambda: evaluate_retrieval(found, found, pids, pids, camids, camids)
    )
    assert metrics is None or 0 <= metrics.mAP <= 1


def embeddings(case: Case) -> None:
    """A file of saved features, damaged or with other columns, is searched."""
    draw, half = case.draw, a_run()
    n = whole(draw, 1, 5)
    values = torch.nn.functional.normalize(torch.ones(n, 96))
    images = ImageSet([Path(f"/x/{i}.png") for i in range(n)], torch.arange(n))
    path = case.folder / "f ü.npz"
    Embedding(images, values, "0" * 16).save(path)
    change = one_of(
        draw, "nothing", "nothing", "nan", "object", "shape", "dtype", "gone"
    )
    if change != "nothing":
        with np.load(path) as file:
            columns = dict(file)
        name = one_of(draw, *columns)
        if change == "nan":
            columns["features"] = columns["features"] * np.float32("nan")
        elif change == "object":
            columns[name] = np.array(
                [Trap(case.outside / "executed")] * n, dtype=object
            )
        elif change == "shape":
            columns[name] = np.zeros((n + 1, 2, 1), np.float32)
        elif change == "dtype":
            columns[name] = np.zeros(n, one_of(draw, np.int8, np.float64, "S3"))
        else:
            del columns[name]
        np.savez(path, **columns)
    how, content = "not", path.read_bytes()
    if change == "nothing":
        how, content = damaged(draw, content)
        path.write_bytes(content)
    found = case.attempt(lambda: load_embedding(path), "f ü.npz")
    if found is not None:
        assert change == "nothing", f"{change} is taken"
        assert torch.equal(found.features, values) and len(found.images) == n, how
        picture = next(iter(half[2].query.paths))
        searched = case.attempt(lambda: search(half[1], picture, path), "f ü.npz")
        assert searched is None, "features of another model are searched"


# ----------------------------------------------------------------------- command line


def with_a_bad_path(case: Case) -> list[str]:
    """Return a command whose path is too long, may not be read, or is of a file."""
    draw, (_, done, data) = case.draw, a_run()
    closed = case.folder / "closed"  # to root, an empty folder
    closed.mkdir()
    closed.chmod(0)
    bad = one_of(
        draw, closed, closed / "x", case.folder / ("x" * 300), "d/" * 3000,
        case.folder / "file/x", "file", "file/",
    )  # fmt: skip
    picture, name = data.query.paths[0], one_of(draw, "market1501", "folders")
    train = ["train", *tiny.options(), "--dataset", "folders"]
    words = one_of(
        draw,
        ["data", "verify", one_of(draw, name, "manifest"), "--root", bad],
        ["data", "sheet", name, "--root", bad, "-o", "sheet.png"],
        ["data", "sheet", "manifest", "--root", bad, "-o", "sheet.png"],
        [*train, "--root", bad, "--output", "new"],
        [*train, "--root", picture.parents[1], "--output", "d/" * 3000],
        ["train", *tiny.options(weights=bad), "--output", "new"],
        ["evaluate", bad],
        ["evaluate", done, "--root", bad],
        ["embed", bad, picture, "-o", "f.npz"],
        ["embed", done, bad, "-o", "f.npz"],
        ["search", done, bad, "--gallery", picture.parent],
        ["search", done, picture, "--gallery", bad],
        ["cluster", done, bad, "-o", "c.csv"],
        ["cluster", done, picture, "-o", "c.csv", "--sheets", bad],
        ["report", bad],
        ["reproduce", "--dry-run", "--output", case.folder / "file/x"],
        ["reproduce", "--dry-run", "--output", "d/" * 3000],
        ["reproduce", "--dry-run", "--grid", bad],
        ["reproduce", "--dry-run", "--profile", case.folder / "file"],
    )
    return [str(word) for word in words]


def commands(case: Case) -> None:
    """Words that somebody typed: code 0 or 2, and never a traceback."""
    draw = case.draw
    used = case.folder / "file"
    used.write_text("x")
    options = [
        *("--preset", "--dataset", "--root", "--output", "--seed", "--epochs"),
        *("--iterations", "--weights", "--backbone", "--height", "--device", "--top"),
        *("--workers", "--method", "--clustering.eps", "--loss.temperature", "--help"),
        *("--optim.milestones", "--skip-unreadable", "--gallery", "--epoch"),
    ]
    values = [
        *("0", "-1", "3", "nan", "1e9", "99999999999999999999", "", " ", "smoke", "ü"),
        *(
            "own",
            "manifest",
            "/nowhere",
            str(used),
            "--",
            "-",
            "=",
            "None",
            "True",
            "\x7f",
        ),
    ]
    word = st.sampled_from(options) | st.sampled_from(values) | st.text(max_size=5)
    name = one_of(
        draw,
        "train",
        "evaluate",
        "embed",
        "search",
        "cluster",
        "report",
        "data",
        "trian",
    )
    words = [name, *draw(st.lists(word, max_size=6))]
    if name == "train":
        words += ["--output", str(used)]  # a file: nothing is ever trained
    if one_of(draw, True, False):  # a command that is whole, with a path that is not
        words = with_a_bad_path(case)
    said, printed = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in "ab")
    before = Path.cwd()
    os.chdir(case.folder)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            code: Any = program.main(words)
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir(before)
    for stream in (said, printed):
        stream.seek(0)
    text = said.read() + printed.read()
    assert code in (0, 2), f"{words}: code {code}, {text}"
    assert "Traceback" not in text
    assert code == 0 or text.strip()
    case.tally["refused" if code else "taken"] += 1


# -------------------------------------------------------------------------- all of them

FAMILIES: dict[str, tuple[Callable[[Case], None], float]] = {
    "pictures": (pictures, 0.22),
    "batches": (batches, 0.05),
    "manifests": (manifests, 0.18),
    "archives": (archives, 0.14),
    "weights": (weights, 0.12),
    "runs": (runs, 0.05),
    "settings": (settings_files, 0.08),
    "features": (features, 0.05),
    "embeddings": (embeddings, 0.05),
    "commands": (commands, 0.06),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*"))}


def run_family(name: str, cases: int, chance: int) -> Counter[str]:
    """Run `cases` cases of a family; return what became of them."""
    family, _ = FAMILIES[name]
    tally: Counter[str] = Counter()

    @seed(chance)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.data())
    def every(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory(prefix="o2cap ü ") as top:
            folder, outside = Path(top, "case"), Path(top, "outside")
            folder.mkdir()
            outside.mkdir()
            (outside / "secret.png").write_bytes(b"not yours")
            (Path(top) / "secret.png").write_bytes(b"not yours")
            before = contents(outside)
            case = Case(folder, outside, data.draw)
            family(case)
            assert contents(outside) == before, "wrote outside"
            assert len(list(Path(top).iterdir())) == 3, "wrote outside"
            tally.update(case.tally)
            tally["cases"] += 1

    every()
    return tally


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the package's own messages away."""
    import logging

    logger = logging.getLogger("o2cap")
    level, logger.level = logger.level, logging.CRITICAL
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def main() -> int:
    """Run the campaign; exit code 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    args = parser.parse_args()
    if unknown := set(args.families) - FAMILIES.keys():
        parser.error(f"there is no family {', '.join(unknown)}: {', '.join(FAMILIES)}")
    failed, total = [], Counter[str]()
    shares = {name: share for name, (_, share) in FAMILIES.items()}
    for name in args.families or FAMILIES:
        cases = round(args.cases * shares[name])
        begun = time.monotonic()
        try:
            with quiet():
                tally = run_family(name, cases, args.seed)
        except BaseException:
            traceback.print_exc()
            failed.append(name)
            continue
        total += tally
        rest = ", ".join(f"{k} {v}" for k, v in tally.items() if k != "cases")
        seconds = time.monotonic() - begun
        print(f"{name}: {tally['cases']} cases, {rest} ({seconds:.0f} s)", flush=True)
    print(
        f"hostile: {total['cases']} cases, seed {args.seed}, "
        f"{total['taken']} taken, {total['refused']} refused, "
        f"{len(failed)} families failed {' '.join(failed)}".rstrip()
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
