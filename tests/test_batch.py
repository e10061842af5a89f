"""The batch: its grid, its records, and the engine, killed, broken and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tiny
import torch
import yaml

from o2cap.config import WarmStartConfig, preset
from o2cap.errors import InputError, TrainingError
from o2cap.trainer import train
from o2cap_book import batch
from o2cap_book.batch import GRID, RECORDS, Job, compare, configure, read_grid
from o2cap_book.records import default_value

EMBEDDED = ("ablation", "vehicles", "studies")
KEY = ("dataset", "method", "seed", "data_seed", "study", "value")


def jobs_of(target: str) -> list[Job]:
    return read_grid(GRID, target, dataset="market1501" if target == "paper" else None)


# ------------------------------------------------------------------------ the grid


def test_the_ablation_has_five_fresh_seeds_of_all_methods() -> None:
    jobs = jobs_of("ablation")
    methods = {"baseline", "intra", "offline", "online", "both", "both+gem"}
    for method in methods | {"supervised"}:
        seeds = {job.config.seed for job in jobs if job.method == method}
        assert seeds == {10, 11, 12, 13, 14}, method


@pytest.mark.parametrize("target", EMBEDDED)
def test_no_embedded_result_uses_a_seed_of_the_tuning(target: str) -> None:
    for job in jobs_of(target):
        assert min(job.key["seed"], job.key["data_seed"]) >= 10, job.name


def test_the_paper_grid_has_every_method_of_the_paper() -> None:
    jobs = jobs_of("paper")
    by_method = {job.method: job.config for job in jobs if job.key["seed"] == 0}
    assert by_method["both+ibn+gem"].backbone == "resnet50_ibn_a"
    assert by_method["both+ibn+gem"].pooling == "gem"
    assert by_method["both"] == preset("market1501")
    assert all(job.start is None for job in jobs)  # ImageNet weights: no warm start
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
    changed = Job(job.method, job.preset, job.dataset, {**job.settings, "epochs": 3})
    assert changed.name != job.name


def test_a_row_is_told_apart_by_its_key() -> None:
    for target in (*EMBEDDED, "check", "paper"):
        keys = [tuple(job.key.values()) for job in jobs_of(target)]
        assert len(set(keys)) == len(keys), target


def test_whole_and_broken_numbers_of_one_value_are_one_setting() -> None:
    one, other = ({"synthetic.strength": value} for value in (1, 1.0))
    a = configure("synthetic", "synthetic", one)
    assert a.hash() == configure("synthetic", "synthetic", other).hash()
    assert a == preset("synthetic")


def test_every_method_of_a_seed_starts_where_both_does() -> None:
    """And `both` itself, GeM and the supervised bound as the definition says."""
    for job in jobs_of("ablation") + jobs_of("vehicles"):
        if job.method in ("both", "both+gem"):  # another pooling is another network
            assert job.start is None, job.name
        else:
            assert job.start is not None
            assert job.start.method == "both"
            assert job.start.key["seed"] == job.key["seed"]
            assert job.start.key["data_seed"] == job.key["data_seed"]


def test_studies_change_one_setting_and_start_from_the_same_data() -> None:
    ablation = {job.name for job in jobs_of("ablation")}
    for job in jobs_of("studies"):
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
        if differing[0][0] in ("loss", "clustering"):  # decided after the warm start
            assert job.start is not None and job.start.name in ablation
        elif job.method != "both":
            assert job.start is not None
            assert job.start.config.synthetic == job.config.synthetic


def test_the_crossed_design_leaves_out_what_the_ablation_holds() -> None:
    pairs = {
        (job.key["data_seed"], job.key["seed"])
        for job in jobs_of("studies")
        if job.study == "data_seed"
    }
    assert pairs == {(d, s) for d in (10, 11, 12) for s in (10, 11, 12) if d != s}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": ["bth"]}, "Did you mean both"),
        ({"settings": {"clustering.epps": 3}}, "Did you mean eps"),
        ({"settings": {"epochs.k1": 3}}, "'k1' does not exist"),
        ({"settings": {"clustering.k1": 0}}, "greater than or equal to 1"),
        ({"preset": "smok"}, "Did you mean smoke"),
        ({"preset": None}, "--dataset market1501 --root DIR"),
        ({"seed": [1]}, "Did you mean seeds"),
        ({"study": "eps"}, "no setting"),
        ({"seeds": 3}, "seeds must be a list"),
        ({"seeds": None}, "has no seeds"),
        ({"methods": "both"}, "methods must be a list"),
        ({"threads": "many"}, "threads must be a whole number"),
        ({"settings": {"epochs": "many"}}, "--epochs is many"),
        ({"settings": {"optim.lr": "fast"}}, "setting optim.lr cannot be 'fast'"),
        ({"methods": [["both"]]}, "this block of it cannot be used"),
        ({"study": "method", "setting": "method", "values": ["intra"]}, "this block"),
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


def test_what_cannot_be_read_or_found_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean ablation"):
        read_grid(GRID, "ablations")
    for text in ("methods: [", "a: 1", ""):
        (tmp_path / "g.yaml").write_text(text)
        with pytest.raises(InputError, match=r"g\.yaml cannot be read as a grid"):
            read_grid(tmp_path / "g.yaml", "ablation")
    for text, said in (
        ("{what: no blocks}", "blocks must be a list"),
        ("{blocks: []}", "what must be text"),
        ("", "what must be text"),
    ):
        (tmp_path / "g.yaml").write_text(
            f"{{methods: {{both: }}, targets: {{it: {text}}}}}"
        )
        with pytest.raises(InputError, match=rf"g\.yaml, target it: {said}"):
            read_grid(tmp_path / "g.yaml", "it")
    with pytest.raises(InputError, match="leave --dataset market1501 out"):
        read_grid(GRID, "ablation", dataset="market1501")
    with pytest.raises(InputError, match=r"--root .*away does not exist"):
        batch.reproduce("paper", dataset="market1501", root=tmp_path / "away")
    with pytest.raises(InputError, match=r"--only nothing names none of the jobs"):
        batch.reproduce("check", output=tmp_path, only="nothing")
    with pytest.raises(InputError, match=r"--profile .*away is no folder"):
        batch.reproduce("check", output=tmp_path, profile=tmp_path / "away")


def test_an_output_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=rf"--output {output} cannot be used as a"):
            batch.reproduce("check", output=output, dry_run=True)


def test_a_borrowed_warm_start_gives_what_the_own_one_gives(tmp_path: Path) -> None:
    """So a method's result does not depend on which job made the warm start."""
    pictures = tmp_path / "pictures"
    data = tiny.as_dataset(pictures, tiny.write_pictures(pictures))
    both = train(tiny.config(tmp_path / "both"), data)
    start = str(both.directory / "start.safetensors")
    warm = WarmStartConfig(epochs=2, iterations=3, images=16)
    own = tiny.config(tmp_path / "own", method="online", warm_start=warm)
    borrowed = tiny.config(tmp_path / "borrowed", method="online", weights=start)
    a, b = (train(config, data) for config in (own, borrowed))
    assert a.before == b.before
    for name, tensor in a.model.state_dict().items():
        assert torch.equal(tensor, b.model.state_dict()[name]), name


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
    assert [line["number"] for line in lines] == [
        "fingerprint",
        "before.mAP",
        "history.0.ari",
        "metrics.mAP",
        "clusters.ari",
    ]
    assert not any(line["moved"] for line in lines)


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
    assert [line["number"] for line in lines if line["moved"]] == [number]


def test_other_pictures_count_unless_they_were_rendered() -> None:
    """JPEG and the processor may change a rendered pixel; a file must not change."""
    for seed, moved in ((10, False), (None, True)):
        lines = compare([row(data_seed=seed)], [row(data_seed=seed, fingerprint="b")])
        assert [line["moved"] for line in lines] == [moved, *[False] * 4]


@pytest.mark.parametrize("change", [{"seed": 11}, {"study": "eps", "value": 0.4}])
def test_a_row_without_counterpart_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="No committed record tells of synthetic both"):
        compare([row()], [row(**change)])


@pytest.mark.parametrize("target", [*EMBEDDED, "check"])
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


def finish(job: Job, folder: Path, notebook: str | None, log: str = "") -> None:
    place = folder / "jobs" / job.name
    place.mkdir(parents=True)
    (place / "log.txt").write_text(log)
    if notebook is None:
        facts = dict.fromkeys(("commit", "versions", "python", "platform", "device"))
        (place / "record.json").write_text(json.dumps(facts | {"metrics": {}}))
        return
    (place / "notebook.ipynb").write_text(notebook)


def test_every_job_without_result_is_counted_with_its_reason(tmp_path: Path) -> None:
    """An error in a cell, a kernel that died, a start that never came, a failed one."""
    jobs = [job for job in jobs_of("ablation") if job.key["seed"] == 10]
    done, raised, died, waiting, _, other, torn = jobs  # one neither begun nor due
    finish(done, tmp_path, None)
    error = {"output_type": "error", "ename": "InputError", "evalue": "no such file"}
    cells = {"cells": [{"source": ""}, {"outputs": [error]}]}
    finish(raised, tmp_path, json.dumps(cells))
    finish(
        died, tmp_path, '{"cells": []}', "Traceback\nDeadKernelError: Kernel died\n\n"
    )
    finish(other, tmp_path, "", "")
    finish(torn, tmp_path, None)
    (tmp_path / "jobs" / torn.name / "record.json").write_text('{"metrics": {')
    found = batch.collect(jobs, tmp_path, due=[done, raised, died, waiting])
    assert [row["method"] for row in found["rows"]] == [done.method]
    reasons = {failure["job"]: failure["error"] for failure in found["failures"]}
    names = [job.name for job in (raised, died, waiting, other, torn)]
    assert list(reasons) == names
    assert reasons[torn.name].startswith("record.json is damaged")
    assert reasons[raised.name] == "InputError: no such file"
    assert reasons[died.name] == "DeadKernelError: Kernel died"
    assert reasons[other.name] == "It did not end."
    assert waiting.start is not None
    assert reasons[waiting.name] == f"It was not begun; it needs {waiting.start.name}."


# ------------------------------------------------------------------------ the engine


def test_the_committed_check_still_gives_its_numbers() -> None:
    """The whole way: engine, notebooks, training, record, comparison."""
    table = batch.check("check", cores=2)
    assert table.count("metrics.mAP") == 3
    assert "moved" not in table


def test_a_check_that_moved_fails_with_the_table_and_keeps_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "methods: {both: {method: both}}\n"
        "targets: {it: {what: One job., blocks: "
        "[{preset: smoke, methods: [both], seeds: [3]}]}}\n"
    )
    (job,) = batch.read_grid(grid, "it")
    committed = row(0.5) | {"config_hash": job.name.rpartition("-")[2]}
    (tmp_path / "it.json").write_text(json.dumps({"rows": [committed]}))
    monkeypatch.setattr(batch, "RECORDS", tmp_path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    ends: list[BaseException | float] = [0.7, 0.5, KeyboardInterrupt(), SystemExit(143)]

    def pretend(target: str, *, output: Path, **rest: Any) -> Path:
        end = ends.pop(0)
        if isinstance(end, BaseException):
            raise end
        record = {"target": target, "rows": [row(end)]}
        batch.write_record(record, output / "records" / "it.json")
        return output

    monkeypatch.setattr(batch, "reproduce", pretend)
    said = r"1 of 5 numbers .*\n(.*\n)*.*0\.7.*moved"
    with pytest.raises(TrainingError, match=said) as moved:
        batch.check("it", grid=grid)
    (kept,) = temporary.iterdir()
    assert (kept / "records/it.json").is_file() and str(kept) in str(moved.value)
    assert "moved" not in batch.check("it", grid=grid)
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop):
            batch.check("it", grid=grid)
    assert [*temporary.iterdir()] == [kept]

    (tmp_path / "it.json").write_text(
        json.dumps({"rows": [committed | {"config_hash": "0" * 8}]})
    )
    monkeypatch.delattr(batch, "reproduce")  # nothing runs
    with pytest.raises(InputError, match=f"No committed record tells of {job.name}"):
        batch.check("it", grid=grid)


TINY = """
methods:
  both: {method: both}
  online: {method: online}
  broken: {method: offline, optim.lr: 1.0e+30}
  supervised: {method: both}
targets:
  tiny:
    what: Four jobs of a second, one of which cannot work.
    blocks:
      - preset: smoke
        settings:
          {epochs: 2, iterations: 3, warm_start.epochs: 1, warm_start.iterations: 3,
           synthetic.identities: 8, synthetic.test_identities: 4, clustering.k1: 8}
        methods: [broken, online, both, supervised]
        seeds: [0]
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    (tmp_path / "grid.yaml").write_text(TINY)
    return tmp_path / "grid.yaml"


def command(grid: Path, *more: str) -> list[str]:
    output = str(grid.parent / "out")
    start = [sys.executable, "-m", "o2cap", "reproduce", "tiny", "--cores", "1"]
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
    dry = command(grid, "--dry-run", "--only", "*-online-*")
    done = subprocess.run(dry, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {
        name: sum(f"output: jobs/{name}" in line for line in done.stderr.splitlines())
        for name in (
            "synthetic-online",
            "synthetic-both",  # for its warm start
            "synthetic-broken",
            "synthetic-supervised",
        )
    }
    assert list(names.values()) == [1, 1, 0, 0]
    assert done.stdout == ""
    assert not (grid.parent / "out" / "jobs").exists()


def test_a_dry_run_that_fails_says_so(
    grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (grid.parent / "Snakefile").write_text("rule all: input: nowhere\n")
    monkeypatch.setattr(batch, "SNAKEFILE", grid.parent / "Snakefile")
    output = grid.parent / "out"
    with pytest.raises(TrainingError, match="cannot plan the jobs"):
        batch.reproduce("tiny", grid=grid, output=output, dry_run=True)


def test_killed_broken_and_resumed(grid: Path, root: Path) -> None:
    jobs = {job.method: job for job in read_grid(grid, "tiny")}
    place = {m: grid.parent / "out" / "jobs" / job.name for m, job in jobs.items()}

    # -- killed as by a power cut, with `both` done and another job at work
    others = [place[m] / "run" / "config.yaml" for m in ("online", "supervised")]
    others.append(place["broken"] / "run" / "config.yaml")
    process = subprocess.Popen(command(grid), cwd=root, stderr=subprocess.DEVNULL)
    while not any(path.exists() for path in others):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    kill_tree(process.pid)
    process.wait()
    finished = [m for m in place if (place[m] / "record.json").exists()]
    assert "both" in finished and len(finished) < 4
    kept = {m: (place[m] / "record.json").stat().st_mtime_ns for m in finished}

    # -- the same command does what is missing, and stops at no broken job
    done = subprocess.run(command(grid), cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"1 of 4 jobs have no result: {jobs['broken'].name}" in done.stderr
    for method, then in kept.items():
        assert (place[method] / "record.json").stat().st_mtime_ns == then, method
        assert f"output: jobs/{jobs[method].name}/" not in done.stderr
    record = json.loads((grid.parent / "out/records/tiny.json").read_text())
    assert {found["method"] for found in record["rows"]} == {
        "both",
        "online",
        "supervised",
    }
    (failure,) = record["failures"]
    assert failure["job"] == jobs["broken"].name
    assert failure["error"].startswith("TrainingError: The loss is nan")
    notebook = (place["broken"] / "notebook.ipynb").read_text()
    assert "Traceback" in notebook and "TrainingError" in notebook
    assert not (place["broken"] / "record.json").exists()

    # -- with the cause removed, the rest is all that runs; the bound is told apart
    online = command(grid, "--only", "*-[os][nu]*")
    again = subprocess.run(online, cwd=root, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "Nothing to be done" in again.stderr
    assert again.stdout.strip() == str(grid.parent / "out/records/tiny.json")
    facts = json.loads((place["supervised"] / "run/environment.json").read_text())
    assert facts["pseudo_labels"] is not None
    facts = json.loads((place["both"] / "run/environment.json").read_text())
    assert facts["pseudo_labels"] is None


def test_two_batches_do_not_work_in_one_place(tmp_path: Path) -> None:
    with (
        batch._alone(tmp_path),
        pytest.raises(InputError, match="Another batch is at work"),
    ):
        batch.reproduce("check", output=tmp_path)
    with batch._alone(tmp_path):  # free again
        pass


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
    batch._held.pop(0).close()  # that job has ended
    assert batch.free_gpu() == "cuda:0"
    for file in batch._held:
        file.close()


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
