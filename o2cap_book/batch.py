"""The batch: what its grid declares, its jobs' records, and the engine's call.

``reproduce/grid.yaml`` declares, ``reproduce/Snakefile`` runs (each job a papermill run
of ``reproduce/job.ipynb``), and ``reproduce/records/`` keeps what came out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, TypeAdapter, ValidationError

from o2cap.config import PRESETS, Config, preset
from o2cap.errors import InputError, TrainingError, unknown
from o2cap.files import read_json, replacing

if TYPE_CHECKING:  # what takes long to import, only where it is needed
    import pandas as pd

    from o2cap.run import RunResult

logger = logging.getLogger("o2cap")

FOLDER = Path(__file__).resolve().parent.parent / "reproduce"
GRID, NOTEBOOK, SNAKEFILE = (
    FOLDER / name for name in ("grid.yaml", "job.ipynb", "Snakefile")
)
RECORDS = FOLDER / "records"
OUTPUT = Path("runs/reproduce")

Row = dict[str, Any]

OF_FILE = ("commit", "versions", "python", "platform", "device")

# How far a number may lie from the committed one. The same machine, versions and
# number of threads give the same digits. Another processor rounds sums differently;
# that grows over the iterations, and turns near-tied neighbours, so that a few
# pictures change their cluster and all that follows differs. Seen between AVX-512 and
# SSE4.1, in the target check: 0.0001 before training, 0.033 in mAP and ARI after it.
TOLERANCES = {
    "before.mAP": 0.02,
    "history.0.ari": 0.05,  # of clusters found before any training on clusters
    "metrics.mAP": 0.1,
    "clusters.ari": 0.1,
}


# ------------------------------------------------------------------------ the grid


class Block(BaseModel, extra="forbid", strict=True):
    """Jobs of one preset: every method with every seed, for every value of a study."""

    methods: list[str]
    seeds: list[int]
    preset: str | None = None
    settings: dict[str, Any] = {}
    study: str | None = None
    setting: str | None = None
    values: list[int | float | None] = [None]
    threads: int = 1
    mem_mb: int = 4000
    minutes: int = 60
    core_seconds: int = 0  # of a job on a CPU, as measured


class Target(BaseModel, extra="forbid", strict=True):
    """What `o2cap reproduce` runs under one name."""

    what: str
    blocks: list[Block]


class Grid(BaseModel, extra="forbid", strict=True):
    """A file like ``reproduce/grid.yaml``; a method is a name for some settings."""

    methods: dict[str, dict[str, Any]]
    targets: dict[str, Target]


@dataclass(frozen=True)
class Job:
    """One training run of the grid.

    Parameters
    ----------
    method : str
        Its name in the tables, such as ``both+gem``.
    preset, dataset, settings
        See :func:`configure`.
    root : str
        Where the data set lies; empty for the rendered ones.
    block : Block
        Where it is declared: its study, and the cores (``threads``), the memory and
        the minutes that it asks of a cluster's node.
    value : number, optional
        Of the setting that the study varies.
    """

    method: str
    preset: str
    dataset: str
    settings: Mapping[str, Any]
    root: str
    block: Block
    value: float | None = None

    @property
    def study(self) -> str | None:
        """The study that varies one setting, if it is of one."""
        return None if self.value is None else self.block.study

    @cached_property
    def config(self) -> Config:
        """All settings that decide the result, but for where files lie."""
        return configure(self.preset, self.dataset, self.settings)

    @cached_property
    def name(self) -> str:
        """The job's folder, with a hash, since other settings are another job."""
        study = f"-{self.study}-{self.value:g}" if self.study else ""
        seed, key = self.config.seed, self.config.hash()
        return f"{self.dataset}-{self.method}-seed{seed}{study}-{key}"

    @property
    def key(self) -> Row:
        """What tells the rows of a record apart."""
        seed, data_seed = self.config.seed, self.config.synthetic.seed
        if not self.dataset.startswith("synthetic"):
            data_seed = None
        elif data_seed is None:
            data_seed = seed
        return {
            "dataset": self.dataset,
            "method": self.method,
            "seed": seed,
            "data_seed": data_seed,
            "study": self.study,
            "value": self.value,
        }

    def parameters(self, threads: int) -> dict[str, Any]:
        """Return the parameters of the job's notebook."""
        return {
            "preset": self.preset,
            "dataset": self.dataset,
            "root": self.root,
            "method": self.method,
            "settings": dict(self.settings),
            "output": f"jobs/{self.name}/run",
            "threads": threads,
        }


def configure(name: str, dataset: str, settings: Mapping[str, Any]) -> Config:
    """Return the settings of preset `name` on `dataset`, some of them changed.

    Parameters
    ----------
    name, dataset : str
        As in :class:`o2cap.config.Config`.
    settings : mapping
        Values by name, those of a group with a dot: ``{"clustering.k1": 10}``.

    Raises
    ------
    InputError
        For a name that is no setting, or a value that cannot work.
    """
    plain = preset(name, dataset=dataset).to_dict()
    for path, value in settings.items():
        group, _, setting = path.rpartition(".")
        place = plain.setdefault(group, {}) if group else plain
        if not isinstance(place, dict):
            raise InputError(f"The setting {path} does not exist.")
        place[setting] = value
    return TypeAdapter(Config).validate_json(json.dumps(plain))


def read_grid(
    grid: str | Path, target: str, *, dataset: str | None = None, root: str = ""
) -> list[Job]:
    """Return the jobs of a target.

    Parameters
    ----------
    grid : path
        A file like ``reproduce/grid.yaml``.
    target : str
        A name under its ``targets``.
    dataset, root : str, optional
        The data set of the blocks that name no preset, and where it lies.

    Raises
    ------
    InputError
        When the file, the target, a method or a setting cannot be used.
    """
    methods, wanted = _read(grid, target)
    jobs = [
        j for block in wanted.blocks for j in _expand(block, methods, dataset, root)
    ]
    return list({job.name: job for job in jobs}.values())


def _read(grid: str | Path, target: str) -> tuple[dict[str, Row], Target]:
    """Return the methods of a grid, and one of its targets."""
    try:
        found = Grid.model_validate(yaml.safe_load(Path(grid).read_text("utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{grid} cannot be read as a grid: {reason}") from error
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"])) or "the whole"
        raise InputError(f"{grid}, {place}: {wrong['msg']}.") from error
    if target not in found.targets:
        raise InputError(unknown("The target", target, found.targets))
    return found.methods, found.targets[target]


def _expand(
    block: Block, methods: Mapping[str, Row], dataset: str | None, root: str
) -> Iterator[Job]:
    if block.preset is None:
        if dataset is None or dataset.startswith("synthetic"):
            raise InputError(
                "This target runs on real pictures; say which with --dataset and --root"
                " (such as --dataset market1501 --root DIR)."
            )
        name = dataset if dataset in PRESETS else "own"
    elif dataset is not None:
        raise InputError(
            f"This target's pictures are rendered; leave --dataset {dataset} out, or "
            "run the target paper on it."
        )
    else:
        name, dataset, root = block.preset, preset(block.preset).dataset, ""
    for method in block.methods:
        if method not in methods:
            raise InputError(unknown("The method", method, methods))
    if not bool(block.study) == bool(block.setting) == (block.values != [None]):
        raise InputError(f"A study needs study, setting and values: {block!r}")
    make = partial(Job, preset=name, dataset=dataset, root=root, block=block)
    for value, seed in product(block.values, block.seeds):
        if block.setting == "synthetic.seed" and value == seed:
            continue  # the default, which another target holds
        varied = {**block.settings, "seed": seed}
        if block.setting:
            varied[block.setting] = value
        for method in block.methods:
            yield make(method, settings=varied | methods[method], value=value)


# ------------------------------------------------------------------------ the records


def make_record(run: RunResult, config: Config, cpu: float | None) -> Row:
    """Return what the batch keeps of a finished run.

    Parameters
    ----------
    run : RunResult
        The run.
    config : Config
        Its settings without names of folders, for a hash that does not hold them.
    cpu : float or None
        Processor seconds of the job; None when an earlier attempt did a part.
    """
    curve = ("epoch", "mAP", "ari", "cameras_per_cluster", "clusters", "outliers")
    quality = (
        *("ari", "nmi", "purity", "clusters", "outliers"),
        *("cameras_per_cluster", "proxies", "proxies_visited"),
    )
    seconds: Counter[str] = sum((Counter(e["seconds"]) for e in run.history), Counter())
    facts = ("fingerprint", "device", "precision", *OF_FILE)
    return {
        "metrics": _rounded(run.final, run.before),
        "before": _rounded(run.before, run.before),
        "clusters": _rounded(run.final, quality),
        "history": [_rounded(epoch, curve) for epoch in run.history],
        "seconds": {**_rounded(seconds, seconds), "cpu": cpu and round(cpu, 1)},
        "config_hash": config.hash(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **{name: run.environment[name] for name in facts},
    }


def _rounded(record: Row, names: Iterable[str]) -> Row:
    found = {name: record[name] for name in names if name in record}
    return {k: v if v is None else round(v, 6) for k, v in found.items()}


def collect(
    jobs: Sequence[Job], folder: Path, due: Iterable[Job] = ()
) -> dict[str, Any]:
    """Return what came out of a target: a row for each finished job, and the failures.

    Parameters
    ----------
    jobs : sequence of Job
        Those of the target; jobs that were never begun are left out.
    folder : Path
        Where the batch worked.
    due : iterable of Job
        Those that should have ended, begun or not.
    """
    expected = {job.name for job in due}
    rows, failures = [], []
    for job in jobs:
        place = folder / "jobs" / job.name
        try:
            rows.append(job.key | read_json(place / "record.json"))
        except InputError:
            if place.is_dir() or job.name in expected:
                failures.append({"job": job.name, "error": _reason(place)})
    head = {name: rows[-1][name] if rows else None for name in OF_FILE}
    for name in OF_FILE:
        if any(row[name] != head[name] for row in rows):
            logger.warning("The rows differ in their %s; the record names one.", name)
    for row, name in product(rows, ("versions", "python", "platform")):
        del row[name]
    return {**head, "failures": failures, "rows": rows}


def _reason(place: Path) -> str:
    """Return why a job has no record: the last line of its log names the error."""
    if not place.is_dir():
        return "It was not begun."
    with contextlib.suppress(OSError, IndexError):
        text = (place / "log.txt").read_text(encoding="utf-8", errors="replace")
        return text.strip().splitlines()[-1].replace(str(Path.home()), "~")[:300]
    return "It did not end."


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Write a record, a row a line, so that a difference is readable."""
    head = json.dumps({k: v for k, v in record.items() if k != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in record["rows"])
    with replacing(path) as temporary:
        text = f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'
        temporary.write_text(text, encoding="utf-8")


def compare(committed: Sequence[Row], found: Sequence[Row]) -> pd.DataFrame:
    """Return the numbers of two records side by side, for the rows that were found.

    Returns
    -------
    DataFrame
        ``job``, ``number``, ``committed``, ``found``, ``allowed``, and ``moved``:
        whether they differ by more than is allowed. A fingerprint tells whether the
        pictures are the same; of rendered ones it may differ between machines.

    Raises
    ------
    InputError
        When a row has no committed counterpart.
    """
    import pandas as pd

    known = {_label(row): row for row in committed}
    lines = []
    for row in found:
        job = _label(row)
        if job not in known:
            raise InputError(f"No committed record tells of {job}.")
        old, new = _numbers(known[job]), _numbers(row)
        for number, allowed in {"fingerprint": None, **TOLERANCES}.items():
            a, b = old[number], new[number]
            if allowed is None:
                moved = a != b and row["data_seed"] is None
            elif a is None or b is None:
                moved = a is not b
            else:
                moved = abs(a - b) > allowed
            lines.append((job, number, a, b, allowed, moved))
    columns = ["job", "number", "committed", "found", "allowed", "moved"]
    return pd.DataFrame(lines, columns=columns)


def _label(row: Row) -> str:
    names = ("dataset", "method", "seed", "data_seed", "study", "value")
    return " ".join(str(row[name]) for name in names if row.get(name) is not None)


def _numbers(row: Row) -> Row:
    return {
        "fingerprint": row["fingerprint"],
        "before.mAP": row["before"].get("mAP"),
        "history.0.ari": row["history"][0].get("ari"),
        "metrics.mAP": row["metrics"].get("mAP"),
        "clusters.ari": row["clusters"].get("ari"),
    }


# ------------------------------------------------------------------------ the engine


@dataclass(frozen=True)
class Batch:
    """What to run.

    Parameters
    ----------
    target : str
        A name under ``targets`` of the grid.
    dataset, root : str and Path, optional
        The data set of the blocks that name no preset, and where it lies.
    grid : Path
        A file like ``reproduce/grid.yaml``.
    only : str
        Pattern of the names of the jobs to run, such as ``*-both-seed1[01]-*``.
    cores : int
        Processor cores to use; 0: all.
    """

    target: str
    dataset: str | None = None
    root: Path | None = None
    grid: Path = GRID
    only: str = "*"
    cores: int = 0

    @property
    def record(self) -> str:
        """The name of the record, that of the target, or of real pictures."""
        paper = self.target == "paper" and self.dataset
        return f"{self.dataset if paper else self.target}.json"

    @cached_property
    def jobs(self) -> list[Job]:
        """All jobs of the target."""
        place = str(self.root.resolve()) if self.root else ""
        return read_grid(self.grid, self.target, dataset=self.dataset, root=place)

    @cached_property
    def chosen(self) -> list[Job]:
        """The jobs that `only` means."""
        found = [job for job in self.jobs if fnmatchcase(job.name, self.only)]
        if not found:
            names = "\n".join(job.name for job in self.jobs)
            raise InputError(f"--only {self.only} names none of the jobs:\n{names}")
        return found


def reproduce(
    batch: Batch,
    output: Path = OUTPUT,
    *,
    dry_run: bool = False,
    profile: Path | None = None,
) -> Path | None:
    """Run jobs of the grid, and write a record; finished jobs are not repeated.

    Parameters
    ----------
    batch : Batch
        What to run.
    output : Path
        Where the jobs work; below it the record is ``records/TARGET.json``, and
        ``tables/`` holds tables and figures of all records there.
    dry_run : bool
        Only say what would run.
    profile : Path, optional
        A Snakemake profile, for a cluster.

    Returns
    -------
    Path or None
        The record; None after a dry run.

    Raises
    ------
    InputError
        When the engine is not installed, `output` is in use, or no job is meant.
    TrainingError
        When jobs failed; the others have run, and the record tells of both. When the
        engine fails at a dry run.
    """
    if find_spec("snakemake") is None or not SNAKEFILE.is_file():
        raise InputError(
            "o2cap reproduce needs a checkout of the project and its batch engine: "
            "pip install -e '.[reproduce]'."
        )
    for option, place in {"--root": batch.root, "--profile": profile}.items():
        if place is not None and not place.exists():
            raise InputError(f"{option} {place} does not exist.")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE)]
    command += ["--directory", str(output), "--nolock", "--keep-going"]
    command += ["--rerun-incomplete", "--rerun-triggers", "mtime"]
    command += ["--dry-run"] * dry_run
    given = {"grid": batch.grid.resolve(), "target": batch.target}
    if batch.dataset is not None:
        given |= {"dataset": batch.dataset, "root": batch.jobs[0].root}
    if profile is not None:
        command += ["--profile", str(profile.resolve())]
        gpus = int(batch.dataset is not None)
    else:
        gpus = _gpus()
        command += ["--cores", str(batch.cores or os.cpu_count() or 1)]
        command += ["--resources", f"gpu={gpus}"]
    given |= {"gpu": min(gpus, 1)}  # of each job
    command += ["--config", *(f"{name}={value}" for name, value in given.items())]
    command += ["--", *(f"jobs/{job.name}/record.json" for job in batch.chosen)]
    code = _call(command, output)
    if dry_run:
        if code:
            raise TrainingError("The batch engine cannot plan the jobs; see above.")
        jobs, cores = batch.chosen, batch.cores or os.cpu_count() or 1
        minutes = sum(job.block.core_seconds for job in jobs) / cores / 60
        if minutes and not gpus:
            logger.info("%d jobs: %.0f minutes on %d cores", len(jobs), minutes, cores)
        return None
    if not any((output / "jobs" / job.name).exists() for job in batch.jobs):
        raise TrainingError("The batch engine failed before any job began; see above.")
    head = {
        "target": Path(batch.record).stem,
        "what": " ".join(_read(batch.grid, batch.target)[1].what.split()),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    found = collect(batch.jobs, output, batch.chosen)
    path = output / "records" / batch.record
    write_record({**head, **found}, path)
    if batch.target != "check":  # whose numbers say nothing about the methods
        from o2cap_book.records import write_tables

        write_tables(path.parent, output / "tables")
    failed = {failure["job"] for failure in found["failures"]}
    lacking = [job.name for job in batch.chosen if job.name in failed]
    if lacking or code:
        raise TrainingError(
            f"{len(lacking)} of {len(batch.chosen)} jobs have no result: "
            f"{', '.join(lacking)}. The notebook of a failed job, with its traceback, "
            f"is {output}/jobs/NAME/notebook.ipynb; the others are in {path}."
        )
    return path


def check(batch: Batch) -> str:
    """Run committed jobs anew, and compare the numbers with their records.

    Returns
    -------
    str
        The table of all numbers.

    Raises
    ------
    InputError
        When a job that is meant has no committed row; nothing has run then.
    TrainingError
        When a number lies outside :data:`TOLERANCES`; shows the table. The runs stay,
        as after a job that failed, and the message says where.
    """
    committed = read_json(RECORDS / batch.record, "rows")[0]
    known = {row["config_hash"] for row in committed}
    for job in batch.chosen:
        if job.config.hash() not in known:
            raise InputError(
                f"No committed record tells of {job.name}; choose with --only jobs "
                f"that {RECORDS / batch.record} has."
            )
    folder = Path(tempfile.mkdtemp(prefix="o2cap-check-"))
    try:
        reproduce(batch, folder)
    except (InputError, KeyboardInterrupt, SystemExit):  # nothing there to look at
        shutil.rmtree(folder, ignore_errors=True)
        raise
    found = read_json(folder / "records" / batch.record, "rows")[0]
    lines = compare(committed, found)
    table = lines.to_string(index=False, na_rep="")
    if lines.moved.any():
        raise TrainingError(
            f"{lines.moved.sum()} of {len(lines)} numbers are not what the records "
            f"say; the runs are in {folder}.\n{table}"
        )
    shutil.rmtree(folder)
    return table


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _call(command: Sequence[str], output: Path) -> int:
    """Run the engine, alone in the folder `output`; return its exit code.

    Snakemake's own lock outlives a killed process; the system's does not.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            # what people read goes to standard error
            process = subprocess.Popen(command, stdout=2)
            try:
                return process.wait()
            except BaseException:  # Ctrl-C, or a request to end: let it end in order
                process.terminate()
                process.wait()
                raise
    except Timeout:
        raise InputError(
            f"Another batch is at work in {output}; wait for it, or choose another "
            "--output."
        ) from None


_held: list[FileLock] = []  # until the process ends


def free_gpu() -> str:
    """Return the device of a job: a GPU that no other job holds, or ``auto``.

    The engine starts as many jobs as there are GPUs, but does not tell a job which
    is its own. A lock that ends with the process does.
    """
    import torch

    for index in range(torch.cuda.device_count()):
        uuid = torch.cuda.get_device_properties(index).uuid
        name = f"o2cap-{os.getuid()}-gpu-{uuid}.lock"
        lock = FileLock(Path(tempfile.gettempdir()) / name)
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            _held.append(lock)
            return f"cuda:{index}"
    return "auto"
