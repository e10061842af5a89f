"""The batch: its grid, its records, and the engine, killed, broken and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from filelock import FileLock

from o2cap.config import preset
from o2cap.errors import InputError, TrainingError
from o2cap_book import batch
from o2cap_book.batch import GRID, RECORDS, Batch, Job, compare, configure, read_grid
from o2cap_book.records import default_value

EMBEDDED = ("ablation", "vehicles", "studies")
KEY = ("dataset", "method", "seed", "data_seed", "study", "value")


def jobs_of(target: str) -> list[Job]:
    return read_grid(GRID, target, dataset="market1501" if target == "paper" else None)


# ------------------------------------------------------------------------ the grid


def test_the_ablation_has_ten_fresh_seeds_of_all_methods() -> None:
    jobs = jobs_of("ablation")
    methods = {"baseline", "intra", "offline", "online", "both", "both+ca"}
    for method in methods | {"supervised"}:
        seeds = {job.config.seed for job in jobs if job.method == method}
        assert seeds == set(range(20, 30)), method


@pytest.mark.parametrize("target", EMBEDDED)
def test_no_embedded_result_uses_a_seed_of_the_tuning(target: str) -> None:
    for job in jobs_of(target):
        assert min(job.key["seed"], job.key["data_seed"]) >= 20, job.name


def test_the_paper_grid_has_every_method_of_the_paper() -> None:
    jobs = jobs_of("paper")
    by_method = {job.method: job.config for job in jobs if job.key["seed"] == 0}
    assert by_method["both+ibn+gem"].backbone == "resnet50_ibn_a"
    assert by_method["both+ibn+gem"].pooling == "gem"
    assert by_method["both"] == preset("market1501")
    assert {job.key["data_seed"] for job in jobs} == {None}


def test_another_data_set_takes_its_own_preset() -> None:
    vehicles = read_grid(GRID, "paper", dataset="veri776")[0].config
    assert (vehicles.height, vehicles.width) == (256, 256)
    own = read_grid(GRID, "paper", dataset="manifest")[0].config
    assert (own.preset, own.dataset) == ("own", "manifest")


def test_names_are_unique_and_change_with_the_settings() -> None:
    jobs = [job for target in EMBEDDED for job in jobs_of(target)]
    assert len({job.name for job in jobs}) == len(jobs)
    job = jobs[0]
    assert replace(job, settings={**job.settings, "epochs": 3}).name != job.name


def test_a_row_is_told_apart_by_its_key() -> None:
    for target in (*EMBEDDED, "check", "paper"):
        keys = [tuple(job.key.values()) for job in jobs_of(target)]
        assert len(set(keys)) == len(keys), target


def test_whole_and_broken_numbers_of_one_value_are_one_setting() -> None:
    one, other = ({"synthetic.strength": value} for value in (1, 1.0))
    a = configure("synthetic", "synthetic", one)
    assert a.hash() == configure("synthetic", "synthetic", other).hash()
    assert a == preset("synthetic")


def test_studies_change_one_setting() -> None:
    for job in [*jobs_of("studies"), *jobs_of("settings")]:
        plain, usual = job.config.to_dict(), preset("synthetic").to_dict()
        for config in (plain, usual):
            for name in ("seed", "method"):
                del config[name]
        differing = [
            (group, name)
            for group in plain
            if isinstance(plain[group], dict)
            for name in plain[group]
            if plain[group][name] != usual[group][name]
        ]
        if job.value == default_value(job.study):
            assert not differing, job.name
            continue
        assert len(differing) == 1, job.name


def test_the_crossed_design_leaves_out_what_the_ablation_holds() -> None:
    pairs = {
        (job.key["data_seed"], job.key["seed"])
        for job in jobs_of("settings")
        if job.study == "data_seed"
    }
    assert pairs == {(d, s) for d in (20, 21, 22) for s in (20, 21, 22) if d != s}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": ["bth"]}, "Did you mean both"),
        ({"settings": {"clustering.epps": 3}}, "Did you mean clustering.eps"),
        ({"settings": {"epochs.k1": 3}}, "epochs.k1 does not exist"),
        ({"settings": {"clustering.k1": 0}}, "greater than or equal to 1"),
        ({"settings": {"epochs": "many"}}, "--epochs is many"),
        ({"preset": "smok"}, "Did you mean smoke"),
        ({"preset": None}, "--dataset market1501 --root DIR"),
        ({"seed": [1]}, r"targets\.it\.blocks\.0\.seed: Extra inputs"),
        ({"study": "eps"}, "needs study, setting and values"),
        ({"study": "eps", "values": [0.4]}, "needs study, setting and values"),
        ({"seeds": 3}, r"seeds: Input should be a valid list"),
        ({"seeds": None}, r"seeds: Input should be a valid list"),
        ({"methods": [["both"]]}, r"methods\.0: Input should be a valid string"),
        ({"threads": "many"}, r"threads: Input should be a valid integer"),
        ({"study": "m", "setting": "method", "values": ["intra"]}, r"values\.0"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    block = {"preset": "smoke", "methods": ["both"], "seeds": [0]} | change
    grid = {
        "methods": {"both": {"method": "both"}},
        "targets": {"it": {"what": "", "blocks": [block]}},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    with pytest.raises(InputError, match=said):
        read_grid(tmp_path / "grid.yaml", "it")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methods: [", "cannot be read as a grid"),
        ("", "the whole: Input should be"),
        ("methods: {}", "targets: Field required"),
        ("{methods: {}, targets: {it: {what: no blocks}}}", "targets.it.blocks: Field"),
        ("{methods: {}, targets: {it: }}", "targets.it: Input should be"),
    ],
)
def test_a_file_that_is_no_grid_is_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"g\.yaml.* {said}"):
        read_grid(tmp_path / "g.yaml", "it")


def test_what_cannot_be_found_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean ablation"):
        read_grid(GRID, "ablations")
    with pytest.raises(InputError, match="leave --dataset market1501 out"):
        read_grid(GRID, "ablation", dataset="market1501")
    away = tmp_path / "away"
    with pytest.raises(InputError, match=r"--root .*away does not exist"):
        batch.reproduce(Batch("paper", "market1501", away))
    with pytest.raises(InputError, match=r"--only nothing names none of the jobs"):
        batch.reproduce(Batch("check", only="nothing"), tmp_path)
    with pytest.raises(InputError, match=r"--profile .*away does not exist"):
        batch.reproduce(Batch("check"), tmp_path, profile=away)


# ------------------------------------------------------------------------ the records


def row(mAP: float = 0.5, **changes: Any) -> dict[str, Any]:
    return {
        "dataset": "synthetic",
        "method": "both",
        "seed": 10,
        "data_seed": 10,
        "study": None,
        "value": None,
        "metrics": {"mAP": mAP},
        "before": {"mAP": 0.2},
        "clusters": {"ari": 0.4},
        "history": [{"ari": 0.3}, {"ari": 0.4}],
        "fingerprint": "a",
        **changes,
    }


def test_numbers_within_the_tolerances_have_not_moved() -> None:
    lines = compare([row(0.5), row(0.9, seed=11)], [row(0.59)])
    assert list(lines.number) == ["fingerprint", *batch.TOLERANCES]
    assert not lines.moved.any()


@pytest.mark.parametrize(
    ("found", "number"),
    [
        (row(0.61), "metrics.mAP"),
        (row(0.39), "metrics.mAP"),
        (row(before={"mAP": 0.23}), "before.mAP"),
        (row(before={}), "before.mAP"),
        (row(history=[{"ari": 0.2}]), "history.0.ari"),
        (row(clusters={"ari": 0.2}), "clusters.ari"),
    ],
)
def test_a_number_that_moved_is_found(found: dict[str, Any], number: str) -> None:
    lines = compare([row()], [found])
    assert list(lines.number[lines.moved]) == [number]


def test_other_pictures_count_unless_they_were_rendered() -> None:
    """JPEG and the processor may change a rendered pixel; a file must not change."""
    for seed, moved in ((10, False), (None, True)):
        lines = compare([row(data_seed=seed)], [row(data_seed=seed, fingerprint="b")])
        assert list(lines.moved) == [moved, *[False] * 4]


@pytest.mark.parametrize("change", [{"seed": 11}, {"study": "eps", "value": 0.4}])
def test_a_row_without_counterpart_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="No committed record tells of synthetic both"):
        compare([row()], [row(**change)])


COMMITTED = [t for t in (*EMBEDDED, "check") if (RECORDS / f"{t}.json").is_file()]


@pytest.mark.parametrize("target", COMMITTED)
def test_committed_rows_are_jobs_of_the_grid(target: str) -> None:
    """Same settings, by their hash: no row is of an earlier grid."""
    record = json.loads((RECORDS / f"{target}.json").read_text())
    known = {tuple(job.key.values()): job.config.hash() for job in jobs_of(target)}
    assert record["rows"], target
    seen = set()
    for found in record["rows"]:
        key = tuple(found[name] for name in KEY)
        assert known[key] == found["config_hash"], key
        assert len(found["history"]) > 1 and found["commit"]
        assert found["history"][-1]["mAP"] == found["metrics"]["mAP"]  # last, not best
        assert key not in seen
        seen.add(key)


def test_every_job_without_result_is_counted_with_its_reason(tmp_path: Path) -> None:
    """An error in a cell, a start that never came, a record that was torn."""
    jobs = [job for job in jobs_of("ablation") if job.key["seed"] == 20]
    done, raised, waiting, begun, _, torn, *_ = jobs  # others neither begun nor due

    def write(job: Job, name: str, text: str) -> None:
        place = tmp_path / "jobs" / job.name
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)

    write(done, "record.json", json.dumps(dict.fromkeys(batch.OF_FILE) | {"x": 1}))
    write(raised, "log.txt", f"Traceback\nInputError: no {Path.home()}/such\n\n")
    write(begun, "log.txt", "")
    write(torn, "record.json", '{"metrics": {')
    found = batch.collect(jobs, tmp_path, due=[done, raised, waiting])
    assert [row["method"] for row in found["rows"]] == [done.method]
    assert {failure["job"]: failure["error"] for failure in found["failures"]} == {
        raised.name: "InputError: no ~/such",
        waiting.name: "It was not begun.",
        begun.name: "It did not end.",
        torn.name: "It did not end.",
    }


# ------------------------------------------------------------------------ the engine


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """The committed grid, with one more job in `check`, which cannot work."""
    plain = yaml.safe_load(GRID.read_text())
    plain["methods"]["broken"] = {"method": "offline", "optim.lr": 1e30}
    block = plain["targets"]["check"]["blocks"][0]
    block["methods"].append("broken")
    block["core_seconds"] = 360
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(plain))
    return tmp_path / "grid.yaml"


def test_a_check_that_moved_fails_with_the_table_and_keeps_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = Batch("check", only="*-both-*")
    name = which.chosen[0].name
    committed = row(0.5) | {"config_hash": name.rpartition("-")[2]}
    record = tmp_path / "check.json"
    record.write_text(json.dumps({"rows": [committed]}))
    monkeypatch.setattr(batch, "RECORDS", tmp_path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    ends: list[BaseException | float] = [0.7, 0.5, KeyboardInterrupt(), SystemExit(143)]

    def pretend(which: Batch, output: Path) -> None:
        end = ends.pop(0)
        if isinstance(end, BaseException):
            raise end
        record = {"target": "check", "rows": [row(end)]}
        batch.write_record(record, output / "records/check.json")

    monkeypatch.setattr(batch, "reproduce", pretend)
    said = r"1 of 5 numbers .*\n(.*\n)*.*0\.7 .*True"
    with pytest.raises(TrainingError, match=said) as moved:
        batch.check(which)
    (kept,) = temporary.iterdir()
    assert (kept / "records/check.json").is_file() and str(kept) in str(moved.value)
    assert "True" not in batch.check(which)
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop):
            batch.check(which)
    assert [*temporary.iterdir()] == [kept]

    record.write_text(json.dumps({"rows": [committed | {"config_hash": "0" * 8}]}))
    monkeypatch.delattr(batch, "reproduce")  # nothing runs
    with pytest.raises(InputError, match=f"No committed record tells of {name}"):
        batch.check(which)


def command(grid: Path, *more: str) -> list[str]:
    output = str(grid.parent / "out")
    start = [sys.executable, "-m", "o2cap", "reproduce", "check", "--cores", "1"]
    return [*start, "--grid", str(grid), "--output", output, *more]


def kill_tree(pid: int) -> None:
    """Kill a process and all below it at once, as a power cut does.

    Each is halted before any is killed, so that none starts another meanwhile, nor
    hears of another's death. One that ends by itself needs no killing.
    """
    halted: set[psutil.Process] = set()
    tree = psutil.Process(pid)
    while fresh := {tree, *tree.children(recursive=True)} - halted:
        for victim in fresh:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.suspend()
        halted |= fresh
    for victim in halted:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    for victim in halted:  # until it holds no file any more
        with contextlib.suppress(psutil.NoSuchProcess):
            while victim.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)


def test_a_dry_run_says_what_would_run_and_runs_nothing(grid: Path, root: Path) -> None:
    dry = command(grid, "--dry-run", "--only", "*-baseline-*")
    done = subprocess.run(dry, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planned = [
        method
        for method in ("baseline", "both", "broken", "supervised")
        if f"output: jobs/synthetic-{method}-" in done.stderr
    ]
    assert planned == ["baseline"]
    assert "1 jobs: 6 minutes on 1 cores" in done.stderr
    assert done.stdout == ""
    assert not (grid.parent / "out" / "jobs").exists()


def test_a_dry_run_that_fails_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Snakefile").write_text("rule all: input: nowhere\n")
    monkeypatch.setattr(batch, "SNAKEFILE", tmp_path / "Snakefile")
    with pytest.raises(TrainingError, match="cannot plan the jobs"):
        batch.reproduce(Batch("check"), tmp_path / "out", dry_run=True)


def test_the_committed_check_killed_and_resumed_beside_a_broken_job(
    grid: Path, root: Path
) -> None:
    """The whole way: engine, notebooks, training, a power cut, record, comparison."""
    jobs = {job.method: job for job in read_grid(grid, "check")}
    place = {m: grid.parent / "out" / "jobs" / job.name for m, job in jobs.items()}

    # -- killed as by a power cut, with a job done and another at work
    def done_jobs() -> set[str]:
        return {m for m in place if (place[m] / "record.json").exists()}

    def at_work() -> bool:
        begun = {m for m in place if (place[m] / "run/config.yaml").exists()}
        return bool(done_jobs() and begun - done_jobs() - {"broken"})

    process = subprocess.Popen(command(grid), cwd=root, stderr=subprocess.DEVNULL)
    while not at_work():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    kill_tree(process.pid)
    process.wait()
    then = {m: (place[m] / "record.json").stat().st_mtime_ns for m in done_jobs()}
    assert then and len(then) < 3

    # -- the same command does what is missing, and stops at no broken job
    done = subprocess.run(command(grid), cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"1 of 4 jobs have no result: {jobs['broken'].name}" in done.stderr
    for method, before in then.items():
        assert (place[method] / "record.json").stat().st_mtime_ns == before
        assert f"output: jobs/{jobs[method].name}/" not in done.stderr
    record = json.loads((grid.parent / "out/records/check.json").read_text())
    assert {found["method"] for found in record["rows"]} == {*place} - {"broken"}
    (failure,) = record["failures"]
    assert failure["job"] == jobs["broken"].name
    assert failure["error"].startswith("TrainingError: Losses or weights are not")
    notebook = (place["broken"] / "notebook.ipynb").read_text()
    assert "Traceback" in notebook and "TrainingError" in notebook
    assert not (place["broken"] / "record.json").exists()

    # -- the numbers are the committed ones; the bound is told apart
    committed = json.loads((RECORDS / "check.json").read_text())["rows"]
    lines = compare(committed, record["rows"])
    assert len(lines) == 15 and not lines.moved.any(), lines.to_string()
    for method in ("supervised", "both"):
        facts = json.loads((place[method] / "run/environment.json").read_text())
        assert (facts["pseudo_labels"] is None) == (method == "both")

    # -- without the broken job, nothing is left to do
    rest = command(grid, "--only", "*-[bs][aou][tsp]*")
    again = subprocess.run(rest, cwd=root, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "Nothing to be done" in again.stderr
    assert again.stdout.strip() == str(grid.parent / "out/records/check.json")


def test_two_batches_do_not_work_in_one_place(tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(InputError, match="Another batch is at work"),
    ):
        batch.reproduce(Batch("check"), tmp_path)


def test_each_job_takes_a_gpu_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"u{i}")
    )
    monkeypatch.setattr(batch, "_held", [])
    assert [batch.free_gpu() for _ in range(3)] == ["cuda:0", "cuda:1", "auto"]
    batch._held.pop(0).release()  # that job has ended
    assert batch.free_gpu() == "cuda:0"
    for lock in batch._held:
        lock.release()


def test_slurm_runs_the_same_batch(root: Path) -> None:
    """On a real Slurm of one node; see tests/slurm/trial.sh."""
    if os.geteuid() != 0 or not shutil.which("slurmctld"):
        pytest.skip("needs root and Debian's slurmctld, slurmd, slurm-client, munge")
    done = subprocess.run(
        [root / "tests" / "slurm" / "trial.sh"],
        env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("JobState=COMPLETED") == 3, done.stdout
    assert "records: 3 of 3" in done.stdout
