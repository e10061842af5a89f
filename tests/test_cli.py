"""The command line: what it prints, what it writes, and with which code it ends."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_trainer import lines, outcome, snapshot

import o2cap
from o2cap import inference, trainer
from o2cap.__main__ import main
from o2cap.config import PRESETS, load


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and their manifest; see :mod:`tiny`."""
    folder = tmp_path_factory.mktemp("pictures") / "data"
    tiny.write_pictures(folder)
    return folder


@pytest.fixture(scope="session")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    output = tmp_path_factory.mktemp("run") / "run"
    assert main(training(folder / "manifest.csv", output)) == 0
    return output


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def training(manifest: Path, output: Path, **changes: Any) -> list[str]:
    given = ["train", "--dataset", "manifest", "--root", str(manifest)]
    return [*given, "--output", str(output), *tiny.options(**changes)]


Said = tuple[int, str, str]
Command = Callable[..., Said]


@pytest.fixture
def o2cap_(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process; return its code and what it said."""

    def command(*words: object) -> Said:
        capsys.readouterr()
        try:
            code: Any = main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return int(code), out, err

    return command


def one_sentence(err: str) -> str:
    """Return the message, which is all that was said to the person."""
    (message,) = err.strip().splitlines()
    assert message.startswith("o2cap: ") and message.endswith(".")
    assert "Traceback" not in message
    return message


# ------------------------------------------------------------------------ help, presets


def test_the_program_answers_at_once(o2cap_: Command) -> None:
    """As it is installed: help and refusals wait for no import of torch."""
    program = Path(sys.executable).with_name("o2cap")
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    words = [program, "train", "--help"]
    said = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert said.returncode == 0 and "usage: o2cap train" in said.stdout
    imported = {line.rpartition("|")[2].strip() for line in said.stderr.splitlines()}
    assert "tyro" in imported and not imported & {"torch", "pandas", "o2cap_book"}
    assert o2cap_("--version") == (0, f"o2cap {o2cap.__version__}\n", "")


def test_every_command_explains_itself(o2cap_: Command) -> None:
    code, out, _ = o2cap_("--help")
    commands = ("train", "evaluate", "embed", "search", "cluster", "export")
    commands += ("report", "data")
    assert code == 0 and all(f"• {name} " in out for name in commands)
    for words in (*commands, "reproduce", "data verify", "data sheet", "data export"):
        code, out, _ = o2cap_(*words.split(), "--help")
        assert code == 0 and f"usage: o2cap {words}" in out
    code, out, _ = o2cap_("train", "--help")
    options = ("preset", "dataset", "root", "output", "seed", "epochs", "iterations")
    options += ("weights", "backbone", "height", "width", "device", "workers")
    for name in (*options, "method", "clustering.eps", "loss.temperature"):
        assert f"--{name} " in out


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_shown_with_its_values(name: str, o2cap_: Command) -> None:
    code, out, _ = o2cap_("train", "--preset", name, "--help")
    assert code == 0
    assert f"(default: {PRESETS[name].backbone})" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (("train", "--sede", "3"), "--seed"),
        (("train", "--clustering.espilon", "1"), "--clustering.eps"),
        (("train", "--optim.lr", "fast"), "--optim.lr"),
        (("train", "--method", "onlin"), "online"),
        (("search", "run", "a.png", "--gallery", "b", "--topp", "3"), "--top"),
        (("trian",), "train"),
        (("data", "shet"), "sheet"),
    ],
)
def test_a_misspelt_word_is_refused_with_the_nearest(
    words: tuple[str, ...], near: str, o2cap_: Command
) -> None:
    code, out, err = o2cap_(*words)
    assert code == 2 and out == ""
    assert near in err


# ------------------------------------------------------------------------------ train


def test_training_prints_the_run_directory(
    run: Path, folder: Path, o2cap_: Command
) -> None:
    """And a finished run is not done again."""
    before = snapshot(run)
    code, out, _ = o2cap_(*training(folder / "manifest.csv", run))
    assert (code, out) == (0, f"{run}\n")
    assert snapshot(run) == before
    assert (run / "model.safetensors").is_file()


def test_options_and_python_are_one(
    run: Path, folder: Path, tmp_path: Path, o2cap_: Command
) -> None:
    config = load(run / "config.yaml")
    mine = tiny.config(run, preset="own", dataset="manifest", root=config.root)
    assert config == mine


def test_a_folder_per_camera_is_trained_on_without_identities(
    folder: Path, tmp_path: Path, o2cap_: Command
) -> None:
    with (folder / "manifest.csv").open() as file:
        for row in csv.DictReader(file):
            if row["split"] == "train":
                camera = tmp_path / f"cameras/cam{row['camid']}"
                camera.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / row["path"], camera)
    words = training(tmp_path / "cameras", tmp_path / "run", epochs=1)
    words[words.index("manifest")] = "folders"
    code, out, _ = o2cap_(*words)
    assert (code, out) == (0, f"{tmp_path / 'run'}\n")
    (record,) = lines(tmp_path / "run")
    assert record["clusters"] > 1 and "mAP" not in record and "ari" not in record
    code, out, err = o2cap_("evaluate", tmp_path / "run")
    assert (code, out) == (2, "") and "has 0 query and 0 gallery" in one_sentence(err)


def test_the_embedded_data_end_to_end(tmp_path: Path, o2cap_: Command) -> None:
    """The smoke preset, shortened: renders, starts warm, trains, evaluates."""
    output = tmp_path / "run"
    short = "--weights none --warm-start.epochs 2 --warm-start.iterations 4"
    short += " --epochs 2 --iterations 3"
    short += " --synthetic.identities 12 --synthetic.test-identities 6"
    words = ("train", "--preset", "smoke", "--output", output, *short.split())
    assert o2cap_(*words)[:2] == (0, f"{output}\n")
    losses = [record["loss"] for record in lines(output, "warm_start.jsonl")]
    assert len(losses) == 2 and losses[-1] < losses[0]
    history = lines(output)
    assert [record["epoch"] for record in history] == [0, 1]
    assert all(np.isfinite(r["loss"]) and r["clusters"] > 1 for r in history)
    assert 0 < history[-1]["mAP"] <= 1
    assert (output / "model.safetensors").is_file()


# ---------------------------------------------------------------------------- bad input


def rows_of(folder: Path) -> list[dict[str, Any]]:
    with (folder / "manifest.csv").open() as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row["path"] = str(folder / row["path"])
    return rows


def missing(rows: list[dict[str, Any]], place: Path) -> None:
    rows[7]["path"] = str(place / "nowhere.png")


def unreadable(rows: list[dict[str, Any]], place: Path) -> None:
    (place / "torn.png").write_bytes(Path(rows[7]["path"]).read_bytes()[:50])
    rows[7]["path"] = str(place / "torn.png")


def duplicate(rows: list[dict[str, Any]], place: Path) -> None:
    rows.append(rows[0])


def no_number(rows: list[dict[str, Any]], place: Path) -> None:
    rows[4]["camid"] = "north gate"


def leaving(rows: list[dict[str, Any]], place: Path) -> None:
    (place.parent / "outside.png").write_bytes(Path(rows[0]["path"]).read_bytes())
    rows[4]["path"] = "../outside.png"


def no_query(rows: list[dict[str, Any]], place: Path) -> None:
    rows[:] = [row for row in rows if row["split"] != "query"]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (missing, "nowhere.png"),
        (unreadable, "torn.png"),
        (duplicate, "line 80"),
        (no_number, "line 6: the camid 'north gate'"),
        (leaving, "../outside.png leads out"),
        (no_query, "has 0 query and 12 gallery"),
    ],
)
def test_a_bad_manifest_is_refused(
    spoil: Callable[[list[dict[str, Any]], Path], None],
    named: str,
    folder: Path,
    tmp_path: Path,
    o2cap_: Command,
) -> None:
    place = tmp_path / "data"
    place.mkdir()
    rows = rows_of(folder)
    spoil(rows, place)
    manifest = tiny.write_manifest(place / "manifest.csv", rows)
    code, out, err = o2cap_(*training(manifest, tmp_path / "run"))
    assert (code, out) == (2, "")
    assert named in one_sentence(err)
    assert not (tmp_path / "run").exists()


def test_a_wrong_header_is_refused(tmp_path: Path, o2cap_: Command) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("file,person,camera\na.png,1,2\n")
    code, out, err = o2cap_(*training(manifest, tmp_path / "run"))
    assert (code, out) == (2, "")
    assert "split,path,pid,camid" in one_sentence(err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--preset", "marke1501"), "Did you mean market1501?"),
        (("--dataset", "veri77"), "Did you mean veri776?"),
        (("--dataset", "market1501", "--weights", "none"), "needs --root"),
        (("--dataset", "msmt17", "--root", "/nowhere"), "it is /nowhere"),
        (("--backbone", "resnet55"), "Did you mean resnet"),
        (("--weights", "nowhere.pt"), "weights file nowhere.pt"),
        (("--epochs", "0"), "--epochs is 0"),
        (("--clustering.eps", "nan"), "--clustering.eps is nan; it should be a finite"),
        (("--device", "abacus"), "--device abacus"),
        (("--root", "/tmp"), "leave --root out"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    words: tuple[str, ...],
    named: str,
    folder: Path,
    tmp_path: Path,
    o2cap_: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tiny.as_dataset(folder, rows_of(folder))
    monkeypatch.setattr("o2cap.data.synthetic.render_dataset", lambda *_, **__: data)
    code, out, err = o2cap_("train", *words, "--output", tmp_path / "run")
    assert (code, out) == (2, "")
    assert named in one_sentence(err)
    assert not (tmp_path / "run").exists()


def test_a_fault_of_training_is_code_1(
    folder: Path, tmp_path: Path, o2cap_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def instance_loss(features: torch.Tensor, **_: Any) -> torch.Tensor:
        return features.sum() * float("nan")

    monkeypatch.setattr(trainer.losses, "instance_loss", instance_loss)
    words = training(folder / "manifest.csv", tmp_path / "run")
    code, out, err = o2cap_(*words)
    assert (code, out) == (1, "")
    assert "--warm-start.lr" in one_sentence(err.splitlines()[-1])


# ------------------------------------------------------------------------- interruption


def in_a_process(words: list[str], said: Path) -> None:
    """Run a command as ``python -m o2cap`` does, from imports done once."""
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # A shell starts background jobs, and so these tests there, deaf to SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise SystemExit(main(words))


def test_a_run_survives_kill_term_and_interrupt(folder: Path, tmp_path: Path) -> None:
    """One run, stopped three times at moments of chance, equals one left alone."""
    manifest, output, said = folder / "manifest.csv", tmp_path / "run", tmp_path / "s"
    longer: dict[str, Any] = {"epochs": 4, "iterations": 12}
    longer |= {"warm-start.iterations": 12}
    words = training(manifest, output, **longer)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["o2cap.trainer", "sklearn.metrics", "numba.np"])
    pause = random.Random(0)
    for name, length, how, code, says in (
        ("warm_start.jsonl", 1, signal.SIGKILL, -9, ""),
        ("metrics.jsonl", 1, signal.SIGTERM, 143, "o2cap: terminated"),
        ("metrics.jsonl", 2, signal.SIGINT, 130, "o2cap: interrupted"),
    ):
        process = processes.Process(target=in_a_process, args=(words, said))
        process.start()
        assert process.pid is not None
        # A whole line is in place, since files are replaced, never written to.
        while not (output / name).is_file() or len(lines(output, name)) < length:
            assert process.exitcode is None, said.read_text()
            time.sleep(0.01)
        time.sleep(pause.uniform(0, 0.1))
        os.kill(process.pid, how)
        process.join()
        assert process.exitcode == code, said.read_text()
        assert says in said.read_text() and "Traceback" not in said.read_text()
        assert not (output / "summary.json").exists()
    assert main(words) == 0
    assert main(training(manifest, tmp_path / "whole", **longer)) == 0
    assert outcome(output) == outcome(tmp_path / "whole")


# --------------------------------------------------------------------- using the model


def test_evaluate_repeats_the_last_epoch_exactly(run: Path, o2cap_: Command) -> None:
    code, out, _ = o2cap_("evaluate", run, "--device", "cpu")
    assert code == 0
    final = lines(run)[-1]
    names = ("mAP", "rank1", "rank5", "rank10", "mINP")
    said = json.loads(out)
    assert {name: said.pop(name) for name in names} == {n: final[n] for n in names}
    assert said.pop("same_camera") == "drop"
    assert 0 < said.pop("verification")["auc"] < 1 and not said
    words = ("--rerank", "--standardise", "--same-camera", "keep")
    code, out, _ = o2cap_("evaluate", run, *words)
    said = json.loads(out)
    assert code == 0 and said["same_camera"] == "keep"
    scores = [{name: said[name] for name in names}]  # each under its own name
    scores += [said["reranked"], said["standardised_transductive"]]
    assert all(set(score) == set(names) for score in scores)
    assert len({score["mAP"] for score in scores}) == 3


def test_evaluate_on_another_data_set(
    run: Path, folder: Path, tmp_path: Path, o2cap_: Command
) -> None:
    """The same pictures elsewhere; then fewer of them."""
    rows = rows_of(folder)
    moved = tiny.write_manifest(tmp_path / "moved.csv", rows)
    code, out, _ = o2cap_("evaluate", run, "--root", moved)
    assert code == 0 and json.loads(out)["mAP"] == lines(run)[-1]["mAP"]
    fewer = [r for r in rows if not (r["split"] == "gallery" and r["pid"] == "6")]
    other = tiny.write_manifest(tmp_path / "fewer.csv", fewer)
    code, out, _ = o2cap_("evaluate", run, "--dataset", "manifest", "--root", other)
    assert code == 0 and json.loads(out)["mAP"] != lines(run)[-1]["mAP"]


def test_evaluate_refuses_what_is_not_the_runs(
    run: Path, folder: Path, tmp_path: Path, o2cap_: Command
) -> None:
    for where, named in (
        (tmp_path, "cannot be read as settings"),
        (tmp_path / "nowhere", "cannot be read as settings"),
    ):
        code, out, err = o2cap_("evaluate", where)
        assert (code, out) == (2, "") and named in one_sentence(err)
    # Trained from Python on pictures that its settings do not name.
    data = tiny.as_dataset(folder, rows_of(folder))
    other = tiny.as_dataset(folder, rows_of(folder)[:-1])
    assert data.fingerprint() != other.fingerprint()
    manifest = tiny.write_manifest(tmp_path / "m.csv", rows_of(folder)[:-1])
    config = tiny.config(tmp_path / "run", dataset="manifest", root=manifest, epochs=1)
    trainer.train(config, data)
    code, out, err = o2cap_("evaluate", tmp_path / "run")
    assert (code, out) == (2, "") and "other pictures" in one_sentence(err)


def test_a_new_schedule_sets_out_from_a_finished_run(
    run: Path, tmp_path: Path, o2cap_: Command
) -> None:
    new = tmp_path / "new"
    code, _, _ = o2cap_("train", "--from", run, "--epochs", 1, "--output", new)
    assert code == 0
    before, after = (load(path / "config.yaml") for path in (run, new))
    changed = {"epochs": 1, "weights": str(run), "output": new}
    assert after == replace(before, **changed)
    start, model = new / "start.safetensors", run / "model.safetensors"
    assert start.read_bytes() == model.read_bytes()


def test_moved_pictures_are_found_where_they_lie_now(
    run: Path, folder: Path, tmp_path: Path, o2cap_: Command
) -> None:
    old, new, features = tmp_path / "old", tmp_path / "new", tmp_path / "f.npz"
    shutil.copytree(folder, old)
    assert o2cap_("embed", run, old / "pictures", "-o", features)[0] == 0
    old.rename(new)
    words = ("search", run, new / "pictures/007.png", "--gallery", features)
    words = (*words, "-o", tmp_path / "ranked.png")
    code, _, err = o2cap_(*words)
    assert code == 2 and str(old) in one_sentence(err)
    code, out, _ = o2cap_(*words, "--root", new / "pictures")
    assert code == 0 and str(new / "pictures") in out and str(old) not in out

    mine = Path(shutil.copytree(run, tmp_path / "run"))
    text = (mine / "config.yaml").read_text()
    (mine / "config.yaml").write_text(text.replace(str(folder), str(old)))
    pages = []
    for more in ((), ("--root", new / "manifest.csv")):
        assert o2cap_("report", mine, *more)[0] == 0
        pages.append((mine / "report.html").read_text())
    assert str(old / "manifest.csv") in pages[0] and len(pages[1]) > 2 * len(pages[0])


def test_a_process_speaks_unless_it_is_another_of_several(
    o2cap_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert "cannot be read as settings" in o2cap_("evaluate", "nowhere")[2]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert o2cap_("evaluate", "nowhere") == (2, "", "")


def test_embed_then_search_and_cluster(
    run: Path, folder: Path, tmp_path: Path, o2cap_: Command
) -> None:
    """Each equals the Python call of its name, and features serve as a gallery."""
    pictures, features = folder / "pictures", tmp_path / "features.npz"
    code, out, _ = o2cap_("embed", run, pictures, "-o", features)
    assert (code, out) == (0, f"{features}\n")
    embedding = inference.embed(run, pictures)
    with np.load(features, allow_pickle=False) as kept:
        assert len(kept["paths"]) == 78
        assert np.array_equal(kept["features"], embedding.features.numpy())

    changed = tmp_path / "changed.npz"
    table = folder / "manifest.csv"  # says the cameras, which the folder does not
    assert o2cap_("embed", run, table, "-o", changed, "--standardise")[0] == 0
    one = inference.embed(run, table, standardise=True)
    with np.load(changed, allow_pickle=False) as kept:
        assert np.array_equal(kept["features"], one.features.numpy())
        assert str(kept["model"]) == one.model != embedding.model

    query = pictures / "007.png"
    drawn = tmp_path / "ranked.png"
    words = ("search", run, query, "--top", 5, "--gallery")
    code, out, _ = o2cap_(*words, features, "-o", drawn)
    assert code == 0
    found = json.loads(out)
    assert found["query"] == str(query)
    assert [match["rank"] for match in found["matches"]] == [1, 2, 3, 4, 5]
    matches = inference.search(run, query, embedding, top=5).matches()
    assert [m["path"] for m in found["matches"]] == [m.path for m in matches]
    with Image.open(drawn) as picture:
        assert picture.format == "PNG" and picture.width > 300
    words = ("search", run, query, pictures / "011.png", "--top", 5, "--gallery")
    code, out, _ = o2cap_(*words, pictures)  # the folder itself, nothing drawn
    one, other = map(json.loads, out.splitlines())  # a line a query
    assert code == 0 and other["query"] == str(pictures / "011.png")
    assert [m["path"] for m in one["matches"]] == [m["path"] for m in found["matches"]]

    table, sheets = tmp_path / "clusters.csv", tmp_path / "sheets"
    words = ("cluster", run, features, "--output", table, "--sheets", sheets)
    code, out, _ = o2cap_(*words)
    counts = json.loads(out)
    with table.open() as file:
        clusters = [int(row["cluster"]) for row in csv.DictReader(file)]
    assert code == 0 and clusters == inference.cluster(run, pictures).clusters.tolist()
    assert counts == {
        "pictures": 78,
        "clusters": max(clusters) + 1,
        "outliers": clusters.count(-1),
    }
    assert len(list(sheets.iterdir())) == counts["clusters"]
    code, out, _ = o2cap_("cluster", run, features, "-o", table, "--eps", 0)
    assert code == 0 and json.loads(out)["outliers"] == 78


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("embed", "{run}", "{pictures}", "-o", "{new}/f.txt"), "must end in .npz"),
        (("embed", "{run}", "{new}/a.png", "-o", "{new}/f.npz"), "a.png"),
        (
            ("embed", "{new}", "{pictures}", "-o", "{new}/f.npz"),
            "cannot be read as settings",
        ),
        (
            ("search", "{run}", "{one}", "--gallery", "{pictures}", "--top", "0"),
            "--top is 0",
        ),
        (("search", "{run}", "{one}", "--gallery", "{new}/f.npz"), "f.npz"),
        (
            ("search", "{run}", "{one}", "--gallery", "{pictures}", "--standardise"),
            "--standardise needs the camera of",
        ),
        (
            ("search", "{run}", "{one}", "--gallery", "{new}", "-o", "{new}/r.gif"),
            "must end in .png or .json or .csv",
        ),
        (
            ("embed", "{run}", "{pictures}", "-o", "{one}/f.npz"),
            "001.png is none that may",
        ),
        (("cluster", "{run}", "{pictures}", "-o", "{new}/c.png"), "must end in .csv"),
        (
            ("cluster", "{run}", "{one}", "-o", "{new}/c.csv", "--eps", "2"),
            "eps is 2.0",
        ),
        (("export", "{run}", "-o", "{new}/model.pt"), "must end in .onnx"),
        (("report", "{new}"), "cannot be read as settings"),
        (("data", "sheet", "synthetik", "-o", "{new}/s.png"), "Did you mean synthetic"),
        (
            ("data", "export", "{new}", "--synthetic.presence", "2"),
            "presence is 2.0; it",
        ),
        (("data", "verify", "manifest"), "needs --root"),
    ],
)
def test_what_cannot_be_used_is_refused(
    words: tuple[str, ...],
    named: str,
    run: Path,
    folder: Path,
    tmp_path: Path,
    o2cap_: Command,
) -> None:
    pictures, new = folder / "pictures", tmp_path / "new"
    known = {"run": run, "pictures": pictures, "one": pictures / "001.png", "new": new}
    before = snapshot(run)
    code, out, err = o2cap_(*(word.format(**known) for word in words))
    assert (code, out) == (2, "")
    assert named in one_sentence(err)
    assert not new.exists() and snapshot(run) == before


def test_report_is_the_python_call(
    run: Path, o2cap_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, str]] = []

    def report(run: Path, dataset: None, *, device: str) -> Path:
        asked.append((run, device))
        return run / "report.html"

    monkeypatch.setattr("o2cap_book.report.report", report)
    code, out, _ = o2cap_("report", run, "--device", "cpu")
    assert (code, out) == (0, f"{run / 'report.html'}\n")
    assert asked == [(run, "cpu")]


def test_a_sheet_of_a_data_set(folder: Path, tmp_path: Path, o2cap_: Command) -> None:
    drawn = tmp_path / "sheet.png"
    words = ("data", "sheet", "manifest", "--root", folder / "manifest.csv")
    code, out, _ = o2cap_(*words, "-o", drawn, "--split", "gallery")
    assert (code, out) == (0, f"{drawn}\n")
    with Image.open(drawn) as picture:
        assert picture.format == "PNG"
    anonymous = rows_of(folder)[:30]
    for row in anonymous:
        row |= {"pid": "", "split": "train"}
    manifest = tiny.write_manifest(tmp_path / "m.csv", anonymous)
    words = ("data", "sheet", "manifest", "--root", manifest)
    code, out, _ = o2cap_(*words, "-o", drawn)
    assert (code, out) == (0, f"{drawn}\n")
    code, out, err = o2cap_(*words, "-o", drawn, "--split", "query")
    assert (code, out) == (2, "") and "no query pictures" in one_sentence(err)


def test_verify_counts_and_lists_all_problems(
    folder: Path, tmp_path: Path, o2cap_: Command
) -> None:
    words = ("data", "verify", "manifest", "--root")
    code, out, _ = o2cap_(*words, folder / "manifest.csv")
    assert code == 0 and "54" in out
    rows = rows_of(folder)
    for i in range(12):
        torn = tmp_path / f"törn {i}, x.png"
        torn.write_bytes(Path(rows[i]["path"]).read_bytes()[:50])
        rows[i]["path"] = str(torn)
    rows[20]["path"] = "nowhere.png"
    spoilt = tiny.write_manifest(tmp_path / "m.csv", rows)
    words = (*words, spoilt, "--pictures", "True")
    table = tmp_path / "new/problems.csv"
    code, out, err = o2cap_(*words, "--list", table)
    assert code == 2 and "13 differences or problems." in err
    with table.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    named = {row["path"] for row in rows[:12]}
    assert [row["path"] for row in found].count("") == 1
    assert {row["path"] for row in found} == {"", *named}
    assert all(row["path"] in row["problem"] and row["problem"] for row in found)
    code, out, err = o2cap_(*words, "--list", tmp_path / "problems.txt")
    assert (code, out) == (2, "") and "--list" in one_sentence(err)


@pytest.mark.parametrize("given", ["--dry-run", "--output=x", "--profile=p"])
def test_a_check_does_not_take_what_it_would_ignore(
    given: str, o2cap_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("o2cap_book.batch.check", None)  # nothing runs
    code, out, err = o2cap_("reproduce", "--check", given)
    assert (code, out) == (2, "") and given[:5] in one_sentence(err)


def test_a_path_that_the_system_refuses_is_named(
    run: Path, folder: Path, tmp_path: Path, o2cap_: Command
) -> None:
    long = tmp_path / ("x" * 300)
    for words in (
        ("data", "verify", "market1501", "--root", long),
        ("evaluate", long),
        ("evaluate", run, "--root", long),
        tuple(training(folder / "manifest.csv", long)),
    ):
        code, out, err = o2cap_(*words)
        assert (code, out) == (2, ""), words
        assert str(long) in one_sentence(err)


def test_a_fault_of_the_system_is_one_sentence(
    run: Path, o2cap_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder that one may not read, and of a fault that names no file."""
    for error, said in (
        (PermissionError(13, "Permission denied", "/x y"), "/x y cannot be used (Perm"),
        (OSError(28, "No space left on device"), "cannot be used (No space left"),
    ):

        def fail(*_: Any, error: OSError = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr("o2cap_book.report.report", fail)
        code, out, err = o2cap_("report", run)
        assert (code, out) == (2, "") and said in one_sentence(err)


def test_only_what_goes_on_says_so(
    run: Path, o2cap_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("o2cap_book.report.report", interrupt)
    monkeypatch.setattr("o2cap_book.batch.check", interrupt)
    monkeypatch.setattr("o2cap_book.batch.reproduce", interrupt)
    again = "o2cap: interrupted; the same command goes on.\n"
    for words, said in (
        (("report", run), "o2cap: interrupted.\n"),
        (("reproduce", "--check"), "o2cap: interrupted.\n"),
        (("reproduce",), again),
    ):
        assert o2cap_(*words) == (130, "", said)


@pytest.mark.parametrize(
    ("alphabet", "written"),
    [("utf-8", b"r\xff \xe2\x86\x92.html\n"), ("latin-1", b"r\\udcff \\u2192.html\n")],
)
def test_any_text_leaves_the_program(
    alphabet: str, written: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is no text as its bytes; what a terminal lacks as an escape."""
    path = Path(os.fsdecode(b"r\xff \xe2\x86\x92.html"))
    monkeypatch.setattr("o2cap_book.report.report", lambda *_, **__: path)
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), alphabet))
    assert main(["report", "run"]) == 0
    assert sys.stdout.buffer.getvalue() == written  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0


def test_closed_streams_are_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stderr", "stdout"):
        monkeypatch.setattr(sys, name, None)
        assert main(["evaluate", str(tmp_path)]) == 2
    assert capsys.readouterr() == ("", "")
