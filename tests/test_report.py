"""The page about a run: what it says, that it is safe, and that it opens offline."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from o2cap.config import ClusteringConfig
from o2cap.errors import InputError
from o2cap.trainer import train
from o2cap_book.report import report

TINY = tiny.config(
    Path("run"),
    clustering=ClusteringConfig(k1=6, k2=2, eps=0.7, min_samples=2),
)
HOSTILE = "<script>alert(1)</script>&\"'"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a camera; 8 identities as coloured stripes, 2 cameras, 3 of each."""
    folder = tmp_path_factory.mktemp("data") / "<b>pictures"
    for camid in range(2):
        (folder / f"cam{camid}").mkdir(parents=True)
        for pid in range(8):
            for k in range(3):
                rng = np.random.default_rng(pid)
                stripes = rng.integers(40, 200, (4, 1, 3)).repeat(8, 0).repeat(16, 1)
                noise = np.random.default_rng([pid, camid, k]).integers(
                    0, 12, (32, 16, 3)
                )
                picture = stripes + noise + 20 * np.eye(3, dtype=int)[camid]
                path = folder / f"cam{camid}/p{pid}-{k}.png"
                Image.fromarray(picture.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with identities, a query and a gallery, from a manifest."""
    manifest = pictures / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "path", "pid", "camid"])
        for path in sorted(pictures.glob("cam*/*.png")):
            pid, k = map(int, path.stem[1:].split("-"))
            split = "train" if pid < 4 else "query" if k == 0 else "gallery"
            writer.writerow(
                [split, path.relative_to(pictures), pid, path.parts[-2][3:]]
            )
    output = tmp_path_factory.mktemp("runs") / HOSTILE.replace("/", "|")
    config = replace(TINY, dataset="manifest", root=manifest, output=output)
    return train(config).directory


@pytest.fixture(scope="module")
def blind(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without identities, from a folder a camera, with a broken picture."""
    folder = tmp_path_factory.mktemp("runs")
    own = Path(shutil.copytree(pictures, folder / "own"))
    broken = next(own.glob("cam1/*.png"))
    broken.write_bytes(b"x" * broken.stat().st_size)
    config = replace(TINY, dataset="folders", root=own, output=folder / "blind")
    return train(replace(config, skip_unreadable=True)).directory


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


class Page(HTMLParser):
    """What a browser would make of the page."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # well nested

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.texts.setdefault(tag, []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts["body"]).split())


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    path = report(whole)
    assert path == whole / "report.html"
    return Page(path)


def test_the_page_of_a_whole_run(page: Page, whole: Path) -> None:
    history = records(whole)
    before = json.loads((whole / "summary.json").read_text())["before"]
    assert f"{history[-1]['mAP']:.1%} before training {before['mAP']:.1%}" in page.text
    assert f"{history[-1]['clusters']} for 4 identities" in page.text
    assert page.texts["h2"][-6:] == [
        *("Curves", "Clusters", "Search in the gallery, and its map", "Time"),
        *("Configuration", "Data and environment"),
    ]
    # curves, flow, spread, contact sheet, best, worst, map
    assert len(page.all("img")) == 7
    environment = json.loads((whole / "environment.json").read_text())
    for fact in (
        environment["fingerprint"],
        environment["versions"]["torch"],
        "clustering.k1 6 10",  # 10 is the preset's
        "train 24 4 2",
    ):
        assert fact in page.text
    seconds = sum(record["seconds"]["train"] for record in history)
    assert f"train {seconds:,.1f}" in page.text


def test_the_page_opens_offline_and_runs_nothing(page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "a", "form"} & {
        tag for tag, _ in page.tags
    }
    assert not re.search(
        r"url\(|@import|https?:|\bon\w+=", re.sub(r"base64,\S+", "", page.source)
    )
    policy = next(m for m in page.all("meta") if "http-equiv" in m)
    assert str(policy["content"]).startswith("default-src 'none'; img-src data:;")
    for image in page.all("img"):
        kind, data = str(image["src"]).split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")


def test_the_page_can_be_read_by_everyone(page: Page) -> None:
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1 and not page.all("h3")
    order = [tag for tag, _ in page.tags if tag in ("h1", "h2")]
    assert order[0] == "h1"
    alts = [str(image["alt"]) for image in page.all("img")]
    assert all(len(alt) > 30 for alt in alts) and len(set(alts)) == len(alts)
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert "prefers-color-scheme: dark" in page.source
    assert any(m.get("name") == "viewport" for m in page.all("meta"))


def test_hostile_names_are_only_text_and_what_went_wrong_is_said(copy: Path) -> None:
    """The paths of run and pictures, and whatever stands in the files of a run."""
    environment = json.loads((copy / "environment.json").read_text())
    environment |= {"dataset": HOSTILE, "command": HOSTILE, "started": HOSTILE}
    environment["versions"] = {HOSTILE: HOSTILE}
    environment["fingerprint"] = "another"
    (copy / "environment.json").write_text(json.dumps(environment))
    history = records(copy)
    for key in ("loss", "proxies", "proxies_visited"):
        history[0].pop(key, None)
    history[0]["skipped"] = True
    history[1] |= {"proxies": 90, "proxies_visited": 70}
    text = "".join(json.dumps(record) + "\n" for record in history)
    (copy / "metrics.jsonl").write_text(text)
    page = Page(report(copy))
    assert not page.all("script")
    assert page.text.count("<script>alert(1)") >= 4
    assert "<b>pictures" in page.text
    assert "not the one the run was trained on" in page.text
    assert len(page.all("img")) == 2  # nothing that needs the pictures
    assert "No training took place in epoch 0" in page.text
    assert (
        "In 1 of 2 epochs not every proxy was visited (epoch 1: 70 of 90)" in page.text
    )


def test_a_run_without_identities_that_left_a_picture_out(blind: Path) -> None:
    page = Page(report(blind))
    assert "left out" not in page.text.partition("Configuration")[0]
    assert "There is no mAP: the data have no query and gallery" in page.text
    assert "identities unknown" in page.text
    assert "Map of the training pictures" in page.texts["h2"]
    alts = [str(image["alt"]) for image in page.all("img")]
    assert not any("Ranked" in alt for alt in alts)
    assert any("Map of 47 pictures by cluster and by camera" in alt for alt in alts)


def test_a_run_that_goes_on(copy: Path) -> None:
    (copy / "summary.json").unlink()
    (copy / "model.safetensors").unlink()
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text(lines[0])
    page = Page(report(copy))
    assert "not finished: 1 of 2 epochs are done" in page.text
    assert "before training" not in page.text
    assert len(page.all("img")) == 4  # no search, no map


def test_pictures_that_moved_or_went(
    copy: Path, pictures: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(pictures), str(moved)))
    assert len(Page(report(copy)).all("img")) == 7
    (moved / "cam0/p0-0.png").unlink()
    page = Page(report(copy))
    assert "p0-0.png" in page.text and len(page.all("img")) == 2


def test_no_cluster_at_all(copy: Path) -> None:
    for path in (copy / "pseudo_labels").iterdir():
        with np.load(path) as file:
            clusters = np.full_like(file["clusters"], -1)
        np.savez(path, clusters=clusters)
    kept = ("epoch", "outliers", "seconds", "mAP", "rank1")
    bare = [
        {k: r[k] for k in kept} | {"clusters": 0, "skipped": True}
        for r in records(copy)
    ]
    text = "".join(json.dumps(record) + "\n" for record in bare)
    (copy / "metrics.jsonl").write_text(text)
    page = Page(report(copy))
    assert "The last epoch has no cluster" in page.text
    assert "No training took place in epoch 0, 1" in page.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", None, "cannot be read as settings"),
        ("metrics.jsonl", None, "has no metrics.jsonl"),
        ("metrics.jsonl", "", "no finished epoch"),
        ("metrics.jsonl", '{"epoch": 0}\n{"epo', "damaged"),
        ("environment.json", "", "damaged"),
        ("pseudo_labels/epoch_001.npz", "no archive", "is damaged"),
        ("pseudo_labels/epoch_001.npz", None, "is damaged"),
    ],
)
def test_what_is_no_run_is_refused_and_the_old_page_stays(
    copy: Path, name: str, content: str | None, message: str
) -> None:
    (copy / "report.html").write_text("old")
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(content)
    with pytest.raises(InputError, match=message):
        report(copy)
    assert (copy / "report.html").read_text() == "old"
