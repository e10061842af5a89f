"""Other places and machines: odd paths, no network, spawned processes, old versions."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_trainer import outcome

from o2cap.__main__ import main
from o2cap.config import SyntheticConfig
from o2cap.data import load_dataset
from o2cap.data.synthetic import render_dataset
from o2cap.files import replacing
from o2cap.inference import cluster, embed, load_embedding, search
from o2cap.trainer import train

ODD = "Bilder – Läufe (2) 'été' 映像"

# -------------------------------------------------------------------------------- paths


def test_spaces_and_letters_of_any_language_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All commands, from a relative path to a relative path."""
    place = tmp_path / ODD
    place.mkdir()
    monkeypatch.chdir(place)
    tiny.write_pictures(Path("data ü"))
    words = ["--dataset", "manifest", "--root", "data ü/manifest.csv"]
    assert main(["train", *words, "--output", "läuft so", *tiny.options()]) == 0
    assert capsys.readouterr().out.strip() == "läuft so"
    assert main(["embed", "läuft so", "data ü/pictures", "-o", "f ü.npz"]) == 0
    query = "data ü/pictures/000.png"
    assert main(["search", "läuft so", query, "--gallery", "f ü.npz"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["query"] == str(place / query)
    assert {Path(match["path"]).parent for match in found["matches"]} == {
        place / "data ü/pictures"
    }
    assert main(["cluster", "läuft so", "f ü.npz", "-o", "c ü.csv"]) == 0
    assert (place / "c ü.csv").read_text("utf-8").count("\n") == 79


def other_file_system(here: Path) -> Path | None:
    """Return a folder that lies on another file system than `here`."""
    for place in (Path("/dev/shm"), Path("/run/shm"), Path.home()):
        writable = place.is_dir() and os.access(place, os.W_OK)
        if writable and place.stat().st_dev != here.stat().st_dev:
            return place
    return None


def test_a_run_on_another_file_system_than_the_temporary_folder(
    tmp_path: Path,
) -> None:
    """A file is never renamed from one file system to another, which would fail."""
    elsewhere = other_file_system(tmp_path)
    if elsewhere is None:
        pytest.skip("this machine has one writable file system only")
    data = tiny.as_dataset(tmp_path, tiny.write_pictures(tmp_path))
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        here = train(tiny.config(tmp_path / "run"), data).directory
        there = train(tiny.config(Path(folder) / "run"), data).directory
        assert outcome(here) == outcome(there)
        with replacing(Path(folder) / "x") as temporary:
            assert temporary.parent == Path(folder)
            temporary.touch()
        moved = Path(shutil.move(there, tmp_path / "moved"))  # and used from there
        assert len(embed(moved, tmp_path / "pictures").features) == 78


# ------------------------------------------------------------------------- no network


WITHOUT_NETWORK = """
import json, sys
tried = []
def note(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo",
                 "socket.gethostbyname", "urllib.Request"):
        tried.append((event, str(args)))
sys.addaudithook(note)
from o2cap.__main__ import main
for words in json.loads(sys.argv[1]):
    assert main(words) == 0
print("TRIED", tried)
"""


def cut_off() -> list[str]:
    """Return what starts a program without any network, where the system lets us."""
    command = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None:
        return []
    allowed = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


def test_no_request_is_made_and_none_is_needed(tmp_path: Path) -> None:
    """Rendering, training, clustering: nothing is asked of, or sent to, anybody."""
    output, pictures = tmp_path / "run", tmp_path / "pictures"
    small = {"synthetic.identities": 12, "synthetic.test-identities": 6}
    commands = [
        ["train", "--preset", "smoke", "--output", str(output), *tiny.options(**small)],
        ["data", "export", str(pictures), "--synthetic.identities", "4"],
        ["cluster", str(output), str(pictures), "-o", str(tmp_path / "c.csv")],
    ]
    done = subprocess.run(
        [*cut_off(), sys.executable, "-c", WITHOUT_NETWORK, json.dumps(commands)],
        env={**os.environ, "O2CAP_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "TRIED []"


def test_the_watch_on_the_network_bites() -> None:
    """A request that is made would be noticed."""
    code = WITHOUT_NETWORK.replace(
        "from o2cap.__main__ import main\n",
        "import urllib.request\n"
        "try: urllib.request.urlopen('http://localhost:9/')\n"
        "except OSError: pass\n",
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "[]"], capture_output=True, text=True, check=True
    )
    assert "socket.connect" in done.stdout


# ------------------------------------------------------------------ processes, threads


@pytest.fixture
def spawn() -> Iterator[None]:
    """Start processes as macOS and Windows do: anew, with nothing inherited."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def contents(images: Any) -> list[bytes]:
    return [path.read_bytes() for path in images.paths]


@pytest.mark.usefixtures("spawn")
def test_workers_that_are_spawned_render_the_same(tmp_path: Path) -> None:
    assert multiprocessing.get_start_method() == "spawn"
    small = SyntheticConfig(identities=3, test_identities=2, cameras=2)
    alone = render_dataset(small, 32, 16, cache=tmp_path / "0")
    spawned = render_dataset(small, 32, 16, workers=2, cache=tmp_path / "2")
    for name, part in alone.splits().items():
        assert contents(part) == contents(spawned.splits()[name])


@pytest.mark.parametrize("method", ["baseline", "both"])
def test_a_deterministic_run_is_the_same_twice_with_two_threads(
    method: Any, tmp_path: Path
) -> None:
    data = tiny.as_dataset(tmp_path, tiny.write_pictures(tmp_path))
    strict = tiny.config(tmp_path, method=method, deterministic=True, threads=2)
    runs = [
        train(replace(strict, output=tmp_path / f"{i}", workers=i), data).directory
        for i in (1, 2)
    ]
    assert outcome(runs[0]) == outcome(runs[1])


def test_one_thread_and_two_find_the_same_clusters(tmp_path: Path) -> None:
    """Rounding may differ; what is decided in the first epoch may not."""
    data = tiny.as_dataset(tmp_path, tiny.write_pictures(tmp_path))
    labels = []
    for threads in (1, 2):
        config = tiny.config(tmp_path / f"{threads}", threads=threads, precision="off")
        run = train(config, data).directory
        labels.append(np.load(run / "pseudo_labels/epoch_000.npz")["clusters"])
    assert np.array_equal(*labels)


# ------------------------------------------------------------------------ many pictures


def test_a_manifest_of_many_rows(tmp_path: Path) -> None:
    """Its missing pictures are left out, as told; ``large.py`` has a million."""
    rows = (f"train,cam{i % 9}/{i}.jpg,{i % 4000},{i % 9}\n" for i in range(10**5))
    (tmp_path / "own.csv").write_text("split,path,pid,camid\n" + "".join(rows))
    (tmp_path / "cam8").mkdir()
    (tmp_path / "cam8/8.jpg").write_bytes(b"x")
    found = load_dataset("manifest", tmp_path / "own.csv", skip_missing=True)
    assert [path.name for path in found.train.paths] == ["8.jpg"]


def test_thousands_of_copies_of_one_picture(tmp_path: Path) -> None:
    """Duplicates fill every neighbour list: one cluster, and outliers, no crash."""
    data = tiny.as_dataset(tmp_path, tiny.write_pictures(tmp_path))
    run = train(tiny.config(tmp_path / "run"), data).directory
    known = embed(run, data.train)
    copies = replace(
        known,
        images=data.train.select(torch.zeros(3000, dtype=torch.int64)),
        features=known.features[:1].repeat(3000, 1),
    )
    copies.save(tmp_path / "copies.npz")
    again = load_embedding(tmp_path / "copies.npz")
    assert set(cluster(run, again).clusters.tolist()) <= {-1, 0}
    found = search(run, data.train.paths[1], again, top=5)
    assert len(found.matches()) == 5


# ----------------------------------------------------------------------- dependencies


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_dependencies_resolve(python: str, root: Path) -> None:
    """Newest versions, and the lowest that are declared."""
    for resolution in ("highest", "lowest-direct"):
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml"]
        command += ["--python-version", python, "--all-extras", "--quiet"]
        command += ["--resolution", resolution, "--output-file", os.devnull]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if "Request failed" in done.stderr or "Failed to fetch" in done.stderr:
            pytest.skip("the package index cannot be reached")
        assert done.returncode == 0, done.stderr
