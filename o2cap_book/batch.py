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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from o2cap.config import PRESETS, Config, preset
from o2cap.errors import InputError, TrainingError, unknown
from o2cap.files import read_json, replacing
from o2cap_book.records import write_tables

if TYPE_CHECKING:  # torch only where a job runs
    from o2cap.run import RunResult

logger = logging.getLogger("o2cap")

FOLDER = Path(__file__).resolve().parent.parent / "reproduce"
GRID, NOTEBOOK, SNAKEFILE = (
    FOLDER / name for name in ("grid.yaml", "job.ipynb", "Snakefile")
)
RECORDS = FOLDER / "records"
OUTPUT = Path("runs/reproduce")

Row = dict[str, Any]

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
    study, value
        The study that varies one setting, and the setting's value; or None.
    threads, mem_mb, minutes : int
        What it asks of a cluster's node: cores, memory and time.
    start : Job, optional
        The job whose warm start it sets out from; without it, from its own.
    """

    method: str
    preset: str
    dataset: str
    settings: Mapping[str, Any]
    root: str = ""
    study: str | None = None
    value: float | None = None
    threads: int = 1
    mem_mb: int = 4000
    minutes: int = 60
    start: Job | None = None

    @cached_property
    def config(self) -> Config:
        """All settings that decide the result, but for where files lie."""
        return configure(self.preset, self.dataset, self.settings)

    @cached_property
    def name(self) -> str:
        """The job's folder, with a hash: other settings are another job."""
        study = f"-{self.study}-{self.value:g}" if self.value is not None else ""
        seed, key = self.config.seed, self.config.hash()
        return f"{self.dataset}-{self.method}-seed{seed}{study}-{key}"

    @property
    def key(self) -> Row:
        """What tells the rows of a record apart."""
        config = self.config
        data_seed = None
        if self.dataset.startswith("synthetic"):
            data_seed = config.synthetic.seed
            data_seed = config.seed if data_seed is None else data_seed
        return {
            "dataset": self.dataset,
            "method": self.method,
            "seed": config.seed,
            "data_seed": data_seed,
            "study": self.study,
            "value": self.value,
        }

    def parameters(self, threads: int) -> dict[str, Any]:
        """Return the parameters of the job's notebook."""
        start = f"jobs/{self.start.name}/run/start.safetensors" if self.start else ""
        return {
            "preset": self.preset,
            "dataset": self.dataset,
            "root": self.root,
            "method": self.method,
            "settings": dict(self.settings),
            "start": start,
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
    config = preset(name, dataset=dataset)
    for path, value in settings.items():
        try:
            config = _changed(config, path.split("."), value)
        except InputError:
            raise
        except (TypeError, ValueError) as error:  # many, where a number is compared
            raise InputError(f"The setting {path} cannot be {value!r}.") from error
    return config


def _changed(record: Any, path: Sequence[str], value: Any) -> Any:
    known = [field.name for field in fields(record)] if is_dataclass(record) else []
    if path[0] not in known:
        raise InputError(unknown("The setting", path[0], known))
    old = getattr(record, path[0])
    if path[1:]:
        value = _changed(old, path[1:], value)
    elif isinstance(old, float):
        value = float(value)  # 1 and 1.0 are one setting, and have one hash
    return replace(record, **{path[0]: value})


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
    plain = _grid(grid, target)
    jobs: dict[str, Job] = {}
    for block in plain["targets"][target]["blocks"]:
        try:
            for job in _jobs_of(block, plain["methods"], dataset, root):
                jobs[job.name] = job
        except InputError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{grid}: this block of {target} cannot be used ({error}): {block}"
            ) from error
    return list(jobs.values())


def _grid(grid: str | Path, target: str) -> dict[str, Any]:
    try:
        plain = yaml.safe_load(Path(grid).read_text(encoding="utf-8"))
        known = list(plain["targets"])
        plain["methods"]["both"]  # whose warm start the others take over
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError) as e:
        reason = " ".join(str(e).split())
        raise InputError(f"{grid} cannot be read as a grid: {reason}") from e
    if target not in known:
        raise InputError(unknown("The target", target, known))
    _check_kinds(f"{grid}, target {target}", plain["targets"][target], _TARGET)
    return plain


_TARGET = {"what": str, "blocks": list}
_BLOCK = {
    **{"preset": str, "settings": dict, "methods": list, "seeds": list},
    **{"study": str, "setting": str, "values": list},
    **{"threads": int, "mem_mb": int, "minutes": int},
}
_KINDS = {dict: "a mapping", list: "a list", str: "text", int: "a whole number"}


def _check_kinds(where: str, found: Any, kinds: Mapping[str, type]) -> None:
    """Refuse a mapping without these entries, or with entries of another kind."""
    for name, kind in kinds.items():
        if not isinstance(found, dict) or not isinstance(found.get(name), kind):
            raise InputError(f"{where}: {name} must be {_KINDS[kind]}.")


def _jobs_of(
    block: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    dataset: str | None,
    root: str | None,
) -> Iterator[Job]:
    block = {key: value for key, value in block.items() if value is not None}
    for key in block:
        if key not in _BLOCK:
            raise InputError(unknown("In a block of the grid,", key, _BLOCK))
    kinds = {key: _BLOCK[key] for key in block}
    _check_kinds(f"In the block {block} of the grid", block, kinds)
    needed = ["methods", "seeds"] + ["setting", "values"] * ("study" in block)
    for key in needed:
        if key not in block:
            raise InputError(f"A block of the grid has no {key}: {dict(block)}")
    name = block.get("preset")
    if name is None:
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
        dataset, root = preset(name).dataset, None
    resources = {k: block[k] for k in ("threads", "mem_mb", "minutes") if k in block}
    for value in block.get("values", [None]):
        for seed in block["seeds"]:
            shared = {**block.get("settings", {}), "seed": seed}
            if value is not None:
                shared[block["setting"]] = value
            if shared.get("synthetic.seed") == seed:
                continue  # the default, which another target holds
            both = Job(
                "both",
                name,
                dataset or "",
                {**shared, **methods["both"]},
                root or "",
                block.get("study"),
                value,
                **resources,
            )
            start = _default_start(both, block.get("setting"))
            for method in block["methods"]:
                if method not in methods:
                    raise InputError(unknown("The method", method, methods))
                settings = {**shared, **methods[method]}
                job = replace(both, method=method, settings=settings)
                yield replace(job, start=start if _shares(job, start) else None)


def _default_start(both: Job, setting: str | None) -> Job:
    """Return the job that makes the warm start: `both`, in a study of the loss too.

    What a study changes in clustering and loss comes after the warm start, so that
    the warm start is that of the ablation.
    """
    if setting is None or setting.startswith("synthetic."):
        return both
    settings = {k: v for k, v in both.settings.items() if k != setting}
    return replace(both, settings=settings, study=None, value=None)


def _shares(job: Job, both: Job) -> bool:
    """Say whether a job may take over the warm start of `both`."""
    mine, other = job.config, both.config
    made = mine.weights == "none" and mine.warm_start.epochs > 0
    same = all(
        getattr(mine, name) == getattr(other, name)
        for name in ("backbone", "weights", "pooling")
    )
    return made and same and job.name != both.name


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
    facts = json.loads((run.directory / "environment.json").read_text("utf-8"))
    seconds: dict[str, float | None] = {}
    for epoch in run.history:
        for stage, duration in epoch["seconds"].items():
            seconds[stage] = round((seconds.get(stage) or 0) + duration, 3)
    curve = ("epoch", "mAP", "ari", "cameras_per_cluster", "clusters", "outliers")
    retrieval = list(run.before)
    quality = ["ari", "nmi", "v_measure", "purity", "clusters", "outliers"]
    quality += ["cameras_per_cluster", "proxies", "proxies_visited"]
    return {
        "metrics": _rounded(run.final, retrieval),
        "before": _rounded(run.before, retrieval),
        "clusters": _rounded(run.final, quality),
        "history": [_rounded(epoch, curve) for epoch in run.history],
        "seconds": {**seconds, "cpu": None if cpu is None else round(cpu, 1)},
        "config_hash": config.hash(),
        "fingerprint": facts["fingerprint"],
        "device": facts["device"],
        "precision": facts["precision"],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": facts["commit"],
        "versions": facts["versions"],
        "python": facts["python"],
        "platform": facts["platform"],
    }


def _rounded(record: Row, names: Iterable[str]) -> Row:
    return {
        name: round(record[name], 6) if record[name] is not None else None
        for name in names
        if name in record
    }


_OF_FILE = ("commit", "versions", "python", "platform", "device")


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
    rows, failures, facts = [], [], []
    for job in jobs:
        place = folder / "jobs" / job.name
        if (place / "record.json").is_file():
            try:
                found = json.loads((place / "record.json").read_text("utf-8"))
                facts.append({name: found[name] for name in _OF_FILE})
            except (OSError, ValueError, LookupError, TypeError) as error:
                said = f"record.json is damaged ({error}); delete it, and run again."
                failures.append({"job": job.name, "error": said})
                continue
            left_out = ("versions", "python", "platform")
            kept = {k: v for k, v in found.items() if k not in left_out}
            rows.append(job.key | kept)
        elif place.is_dir() or job.name in expected:
            failures.append({"job": job.name, "error": _error(place, job.start)})
    head = facts[-1] if facts else dict.fromkeys(_OF_FILE)
    for name in _OF_FILE:
        if any(other[name] != head[name] for other in facts):
            logger.warning("The rows differ in their %s; the record names one.", name)
    return {**head, "failures": failures, "rows": rows}


def _error(place: Path, start: Job | None) -> str:
    """Return why a job has no record."""
    try:
        notebook = json.loads((place / "notebook.ipynb").read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                if output.get("output_type") == "error":
                    said = f"{output['ename']}: {output['evalue']}"
                    return said.replace(str(Path.home()), "~")[:300]
        lines = (place / "log.txt").read_text(encoding="utf-8").split("\n")
        return [line for line in lines if line.strip()][-1][:300]  # a kernel that died
    except (OSError, ValueError, LookupError):
        if place.is_dir():
            return "It did not end."
        needs = f"; it needs {start.name}" if start else ""
        return f"It was not begun{needs}."


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Write a record, a row a line, so that a difference is readable."""
    head = json.dumps({k: v for k, v in record.items() if k != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in record["rows"])
    with replacing(path) as temporary:
        text = f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'
        temporary.write_text(text, encoding="utf-8")


def compare(committed: Sequence[Row], found: Sequence[Row]) -> list[Row]:
    """Return the numbers of two records side by side, for the rows that were found.

    Returns
    -------
    list of dict
        ``job``, ``number``, ``committed``, ``found``, ``allowed``, and ``moved``:
        whether they differ by more than is allowed. A fingerprint tells whether the
        pictures are the same; of rendered ones it may differ between machines.

    Raises
    ------
    InputError
        When a row has no committed counterpart.
    """
    lines = []
    for row in found:
        same = [old for old in committed if _key(old) == _key(row)]
        job = " ".join(str(part) for part in _key(row) if part is not None)
        if not same:
            raise InputError(f"No committed record tells of {job}.")
        for name, allowed in {"fingerprint": None, **TOLERANCES}.items():
            old, new = _number(same[0], name), _number(row, name)
            if allowed is None:
                moved = old != new and row["data_seed"] is None
            elif old is None or new is None:
                moved = old is not new
            else:
                moved = abs(old - new) > allowed
            line = {"job": job, "number": name, "committed": old, "found": new}
            lines.append(line | {"allowed": allowed, "moved": moved})
    return lines


def _number(row: Row, name: str) -> Any:
    found: Any = row
    for part in name.split("."):
        try:
            found = found[int(part) if part.isdigit() else part]
        except LookupError:
            return None
    return found


def _key(row: Row) -> tuple[Any, ...]:
    names = ("dataset", "method", "seed", "data_seed", "study", "value")
    return tuple(row.get(name) for name in names)


# ------------------------------------------------------------------------ the engine


def reproduce(
    target: str,
    *,
    dataset: str | None = None,
    root: Path | None = None,
    output: Path = OUTPUT,
    grid: Path = GRID,
    only: str = "*",
    cores: int = 0,
    dry_run: bool = False,
    profile: Path | None = None,
) -> Path | None:
    """Run a target of the grid, and write its record; finished jobs are not repeated.

    Parameters
    ----------
    target, dataset, root, grid
        See :func:`read_grid`.
    output : Path
        Where the jobs work; below it the record is ``records/TARGET.json``, and
        ``tables/`` holds tables and figures of all records there.
    only : str
        Pattern of the names of the jobs to run, such as ``*-both-seed1[01]-*``.
    cores : int
        Processor cores to use; 0: all.
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
        When the engine is not installed, `output` is in use or no folder, or no job is
        meant.
    TrainingError
        When jobs failed; the others have run, and the record tells of both. When the
        engine fails at a dry run.
    """
    if find_spec("snakemake") is None or not SNAKEFILE.is_file():
        raise InputError(
            "o2cap reproduce needs a checkout of the project and its batch engine: "
            "pip install -e '.[reproduce]'."
        )
    if root is not None and not root.exists():
        raise InputError(f"--root {root} does not exist.")
    if profile is not None and not profile.is_dir():
        raise InputError(f"--profile {profile} is no folder with a Snakemake profile.")
    place = str(root.resolve()) if root else ""
    jobs = read_grid(grid, target, dataset=dataset, root=place)
    chosen = [job for job in jobs if fnmatchcase(job.name, only)]
    if not chosen:
        names = "\n".join(job.name for job in jobs)
        raise InputError(f"--only {only} names none of the jobs:\n{names}")
    options = ["--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime"]
    options += ["--dry-run"] if dry_run else []
    given = {"grid": str(Path(grid).resolve()), "target": target}
    if dataset:
        given |= {"dataset": dataset, "root": place}
    if profile is not None:
        options += ["--profile", str(profile.resolve())]
        given["gpu"] = str(int(dataset is not None))
    else:
        gpus = _gpus()
        given["gpu"] = str(int(gpus > 0))
        options += ["--cores", str(cores or os.cpu_count() or 1)]
        options += ["--resources", f"gpu={gpus}"]
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE)]
    command += ["--directory", str(output), "--nolock", *options, "--config"]
    command += [f"{name}={value}" for name, value in given.items()]
    command += ["--", *(f"jobs/{job.name}/record.json" for job in chosen)]
    with _alone(output) as handle:
        code = _call(command, handle)
    if dry_run:
        if code:
            raise TrainingError("The batch engine cannot plan the jobs; see above.")
        return None
    found = collect(jobs, output, chosen)
    if not any((output / "jobs" / job.name).exists() for job in jobs):
        raise TrainingError("The batch engine failed before any job began; see above.")
    name = _record_name(target, dataset)
    head = {
        "target": name,
        "what": " ".join(_grid(grid, target)["targets"][target]["what"].split()),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    path = output / "records" / f"{name}.json"
    write_record({**head, **found}, path)
    if target != "check":  # whose numbers say nothing about the methods
        write_tables(path.parent, output / "tables")
    due = {job.name for job in chosen}
    lacking = [f["job"] for f in found["failures"] if f["job"] in due]
    if lacking or code:
        raise TrainingError(
            f"{len(lacking)} of {len(chosen)} jobs have no result: "
            f"{', '.join(lacking)}. The notebook of a failed job, with its traceback, "
            f"is {output}/jobs/NAME/notebook.ipynb; the others are in {path}."
        )
    return path


def check(
    target: str,
    *,
    dataset: str | None = None,
    root: Path | None = None,
    only: str = "*",
    cores: int = 0,
    grid: Path = GRID,
) -> str:
    """Run committed jobs anew, and compare the numbers with their records.

    Parameters
    ----------
    target, dataset, root, only, cores, grid
        See :func:`reproduce`.

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
    name = f"{_record_name(target, dataset)}.json"
    (committed,) = read_json(RECORDS / name, "rows")
    place = str(root.resolve()) if root else ""
    known = {row["config_hash"] for row in committed}
    for job in read_grid(grid, target, dataset=dataset, root=place):
        if fnmatchcase(job.name, only) and job.name.rpartition("-")[2] not in known:
            raise InputError(
                f"No committed record tells of {job.name}; choose with --only jobs "
                f"that {RECORDS / name} has."
            )
    folder = Path(tempfile.mkdtemp(prefix="o2cap-check-"))
    try:
        reproduce(
            target,
            dataset=dataset,
            root=root,
            output=folder,
            grid=grid,
            only=only,
            cores=cores,
        )
    except (InputError, KeyboardInterrupt, SystemExit):  # nothing there to look at
        shutil.rmtree(folder, ignore_errors=True)
        raise
    (found,) = read_json(folder / "records" / name, "rows")
    lines = compare(committed, found)
    columns = ("job", "number", "committed", "found", "allowed")
    table = [[*columns]]
    for line in lines:
        table.append(["" if line[c] is None else str(line[c]) for c in columns])
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    shown = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        + ("  moved" if line["moved"] else "")
        for row, line in zip(table, [{"moved": False}, *lines], strict=True)
    ]
    moved = sum(line["moved"] for line in lines)
    text = "\n".join(line.rstrip() for line in shown)
    if moved:
        raise TrainingError(
            f"{moved} of {len(lines)} numbers are not what the records say; the runs "
            f"are in {folder}.\n{text}"
        )
    shutil.rmtree(folder)
    return text


def _record_name(target: str, dataset: str | None) -> str:
    return dataset if target == "paper" and dataset else target


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[int]:
    """Make the folder `output`, and hold it for one batch at a time.

    Snakemake's own lock outlives a killed process; the system's does not. The engine
    inherits it, so that it holds while anything of the batch is alive.
    """
    import fcntl  # not on Windows, and needed by nobody else

    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise InputError(
            f"--output {output} cannot be used as a folder ({error.strerror})."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    except BlockingIOError as error:
        raise InputError(
            f"Another batch is at work in {output}; wait for it, or choose another "
            "--output."
        ) from error
    finally:
        os.close(handle)


def _call(command: Sequence[str], handle: int) -> int:
    # what people read goes to standard error
    process = subprocess.Popen(command, pass_fds=[handle], stdout=2)
    try:
        return process.wait()
    except BaseException:  # Ctrl-C, or a request to end: let it end in order
        process.terminate()
        process.wait()
        raise


_held: list[Any] = []


def free_gpu() -> str:
    """Return the device of a job: a GPU that no other job holds, or ``auto``.

    The engine starts as many jobs as there are GPUs, but does not tell a job which
    is its own. A lock that ends with the process does.
    """
    import fcntl

    import torch

    for index in range(torch.cuda.device_count()):
        uuid = torch.cuda.get_device_properties(index).uuid
        name = f"o2cap-{os.getuid()}-gpu-{uuid}.lock"
        file = (Path(tempfile.gettempdir()) / name).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        _held.append(file)  # until the process ends
        return f"cuda:{index}"
    return "auto"
