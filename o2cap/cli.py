"""The commands.

What people read goes to standard error; standard output holds what a script wants:
the run directory, a path, or JSON. Of several processes that torchrun starts, the first
speaks.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import o2cap
from o2cap.config import STYLE, Config, SyntheticConfig, load, starting_point
from o2cap.errors import InputError
from o2cap.files import check_writable, read_json, write_csv


def speaks() -> bool:
    """Say whether this process, of those that torchrun starts, speaks for all."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def run(args: Sequence[str]) -> None:
    """Run one command."""
    if args == ["--version"]:
        print(f"o2cap {o2cap.__version__}")
        return
    default = starting_point(args[1:] if args[:1] == ["train"] else [])

    # torch, and what stands on it, is imported inside the commands: --help and a
    # misspelt option answer at once.
    def train(config: Annotated[Config, tyro.conf.arg(name="")] = default) -> None:
        """Train on several cameras' pictures without identity labels.

        Without options: the embedded data set, on whatever this machine has. The
        same command again goes on where it was interrupted. Prints the run directory.
        """
        from o2cap.trainer import train as run_training

        result = run_training(config)
        if speaks():
            print(result.directory)

    model = (train, evaluate, embed, search, cluster, export)
    tyro.extras.subcommand_cli_from_dict(
        {command.__name__: command for command in (*model, report, data, reproduce)},
        prog="o2cap",
        description=o2cap.__doc__,
        args=args,
        console_outputs=speaks(),
        config=STYLE,
    )


_SHORT = tyro.conf.arg(aliases=("-o",))
Run = tyro.conf.Positional[Path]
Pictures = tyro.conf.Positional[tuple[Path, ...]]
Name = tyro.conf.Positional[str]
Place = Path | None
Out = Annotated[Path, _SHORT]
Maybe = Annotated[Path | None, _SHORT]
Split = Literal["train", "query", "gallery"]
_Flag = tyro.conf.UseCounterAction[int]  # given or not


@dataclass(frozen=True)
class How:
    """What embed, search and cluster have in common."""

    device: str = "auto"
    """auto, cpu, cuda, mps."""
    skip_unreadable: bool = False
    """Leave unreadable pictures out, with a warning."""


_How = Annotated[How, tyro.conf.arg(name="")]


def evaluate(
    run: Run,
    dataset: str | None = None,
    root: Place = None,
    same_camera: Literal["drop", "keep"] = "drop",
    rerank: _Flag = 0,
    standardise: _Flag = 0,
    device: str = "auto",
    workers: int = 0,
) -> None:
    """Evaluate a trained run, as JSON: mAP, CMC, mINP, and how well pairs are told.

    Args:
        run: Run directory.
        dataset: Another data set than the one the run was trained on.
        root: Where that data set lies, or where the run's own lies now.
        same_camera: drop is the standard rule: no picture of the query's identity and
            camera counts; keep is for one camera.
        rerank: Also score the ranking by neighbourhoods (k-reciprocal re-ranking).
        standardise: Also score features standardised by camera, over the whole test set
            (transductive).
        device: auto, cpu, cuda, mps.
        workers: Threads that decode pictures; 0 means one a core.
    """
    from o2cap.data import load_configured
    from o2cap.device import Hardware
    from o2cap.evaluation import Evaluator, assess, check_parts
    from o2cap.run import load_model

    config, model = load_model(run)
    config = replace(config, device=device, workers=workers)
    if dataset or root:
        config = replace(config, dataset=dataset or config.dataset, root=root)
    hardware = Hardware.choose(config)
    with hardware.in_force(config):
        found = load_configured(config)
        (known,) = read_json(run / "environment.json", "fingerprint")
        if dataset is None and root is None and found.fingerprint() != known:
            raise InputError(f"{run} saw other pictures: give --dataset and --root.")
        check_parts(found, train=False)
        evaluator = Evaluator(config, found, hardware)
        features = evaluator.features(model)
        (_, query), (_, gallery) = evaluator.decoded
        rule: dict[str, Any] = {"rerank": rerank, "standardise": standardise}
        rule["same_camera"] = same_camera
        print(json.dumps(assess(query, gallery, *features, **rule)))


def embed(
    run: Run,
    pictures: Pictures,
    output: Out,
    standardise: _Flag = 0,
    how: _How = How(),
) -> None:
    """Compute features of pictures, for search and cluster. Prints the file.

    Args:
        run: Run directory.
        pictures: Files and folders, or one manifest (.csv).
        output: The .npz file to write: paths, features, camids, cameras, identities.
        standardise: Standardise the features by camera, over all these pictures
            (transductive), for other programs: search and cluster take plain ones.
    """
    from o2cap import inference

    _check(output, ".npz")
    chosen: dict[str, Any] = {"standardise": standardise, **asdict(how)}
    inference.embed(run, pictures, **chosen).save(output)
    print(output)


def search(
    run: Run,
    queries: Pictures,
    gallery: Path,
    output: Maybe = None,
    root: Place = None,
    top: int = 10,
    max_distance: float = 2.0,
    same_camera: Literal["keep", "drop"] = "keep",
    rerank: _Flag = 0,
    standardise: _Flag = 0,
    how: _How = How(),
) -> None:
    """Find the pictures most like others. Prints a JSON line for each query.

    Args:
        run: Run directory.
        queries: Pictures, folders of them, or one manifest (.csv).
        gallery: Where to search: a folder, a manifest (.csv), or the .npz file of o2cap
            embed.
        output: Also draw the first 20 ranked lists (.png), or write all (.json, .csv).
        root: Where the pictures of an .npz file lie now.
        top: Matches of a query at most.
        max_distance: Largest cosine distance of a match, from 0 to 2.
        same_camera: drop leaves out what the query's own camera saw.
        rerank: Rank by neighbourhoods (k-reciprocal re-ranking).
        standardise: Rank by features standardised by camera, over queries and gallery
            (transductive); the distances stay the plain ones.
    """
    from o2cap import inference

    _check(output, ".png", ".json", ".csv")
    chosen: dict[str, Any] = {"rerank": rerank, "standardise": standardise, "top": top}
    chosen |= {"max_distance": max_distance, "same_camera": same_camera, **asdict(how)}
    there = inference.load_embedding(gallery).moved(root) if root else gallery
    found = inference.search(run, queries, there, **chosen)
    if output is not None and output.suffix.lower() == ".png":
        from o2cap_book.sheets import ranked_lists, write_sheet

        drawn = ranked_lists(found.query, found.gallery, found.index, found.distance)
        write_sheet(drawn, output)
    elif output is not None:
        found.save(output)
    for record in found.records():
        print(json.dumps(record))


def cluster(
    run: Run,
    pictures: Pictures,
    output: Out,
    sheets: Place = None,
    eps: float | None = None,
    how: _How = How(),
) -> None:
    """Group pictures into pseudo identities. Prints the counts as JSON.

    Args:
        run: Run directory.
        pictures: Files and folders, or one manifest (.csv) or .npz file of o2cap embed.
        output: The .csv or .json file to write: path, camid, camera, cluster (-1: an
            outlier).
        sheets: Also draw a contact sheet per cluster, into this new folder.
        eps: Another radius of DBSCAN than the run's: smaller ones, smaller clusters.
    """
    from o2cap import inference

    _check(output, ".csv", ".json")
    if sheets is not None:
        if sheets.exists():
            raise InputError(f"--sheets {sheets} exists; name a new folder.")
        check_writable(sheets / "cluster_0000.png")
    source = pictures[0] if len(pictures) == 1 else pictures
    found = inference.cluster(run, source, eps=eps, **asdict(how))
    if sheets is not None:
        from o2cap_book.sheets import cluster_sheets

        cluster_sheets(found.images, found.clusters, sheets)
    found.save(output)
    left = found.clusters < 0
    counts = {"pictures": len(left), "clusters": len(found.clusters[~left].unique())}
    print(json.dumps(counts | {"outliers": int(left.sum())}))


def export(run: Run, output: Out) -> None:
    """Write the model of a run as an ONNX file, for use without o2cap. Prints it.

    Args:
        run: Run directory.
        output: The .onnx file to write.
    """
    from o2cap import inference

    _check(output, ".onnx")
    inference.export(run, output)
    print(output)


def _check(path: Path | None, *suffixes: str, option: str = "--output") -> None:
    """Refuse a file before the work is done that it was to hold."""
    if path is not None:
        if path.suffix.lower() not in suffixes:
            raise InputError(f"{option} {path} must end in {' or '.join(suffixes)}.")
        check_writable(path)


def report(run: Run, root: Place = None, device: str = "auto") -> None:
    """Write one page about a run, RUN/report.html. Prints its path.

    Args:
        run: Run directory.
        root: Where the run's data set lies now.
        device: auto, cpu, cuda, mps.
    """
    from o2cap.data import load_configured
    from o2cap_book.report import report as write_report

    moved = None
    if root is not None:
        moved = load_configured(replace(load(run / "config.yaml"), root=root))
    print(write_report(run, moved, device=device))


def sheet(name: Name, output: Out, root: Place = None, split: Split = "train") -> None:
    """Draw a contact sheet of a data set: a row an identity, columns by camera.

    Args:
        name: A data set, such as synthetic or market1501.
        output: The .png file to write.
        root: Its folder; for manifest, the CSV file.
        split: Which part.
    """
    from o2cap.data import load_dataset
    from o2cap_book.sheets import contact_sheet, write_sheet

    _check(output, ".png")
    images = load_dataset(name, root).splits()[split]
    if not len(images):
        raise InputError(f"The data set {name} has no {split} pictures.")
    known = images.pids is not None and bool((images.pids >= 0).any())
    rows = images.pids if known else images.camids * 0
    drawn = contact_sheet(images, rows, name="identity" if known else "unknown")
    write_sheet(drawn, output)
    print(output)


def verify(
    name: Name, root: Place = None, pictures: bool = False, list: Place = None
) -> None:
    """Compare a data set with what was published of it; exit code 2 if it differs.

    Args:
        name: market1501, dukemtmcreid, msmt17, veri776, manifest or folders.
        root: Its folder; for manifest, the CSV file.
        pictures: Decode every picture, too.
        list: Also write all problems, not the first ten, into this CSV file: path (of a
            picture that cannot be read), problem.
    """
    from o2cap.data.readers import verify_dataset

    _check(list, ".csv", option="--list")
    found = verify_dataset(name, root, pictures=pictures)
    print(f"{'split':<10}{'':<12}{'published':>12}{'found':>12}")
    for split, what, published, counted in found.rows:
        expected = "" if published is None else f"{published:,}"
        print(f"{split:<10}{what:<12}{expected:>12}{counted:>12,}")
    for sentence in found.notes + found.problems[:10]:
        print(sentence)
    if list is not None:
        rows = ((p.rpartition(" cannot be read as a")[0], p) for p in found.problems)
        write_csv(list, ["path", "problem"], rows)
    if number := len(found.problems):
        raise InputError(f"{name} in {root}: {number} differences or problems.")


def manifest(folder: Run, pattern: str, output: Out) -> None:
    """Write a manifest from what the paths of pictures say. Prints the file.

    Args:
        folder: Where the pictures lie.
        pattern: Their paths below it, such as '{camid}/{pid}_{frame}.jpg'; pid and
            split (train, query or gallery) may be missing, other names are columns.
        output: The CSV file to write.
    """
    from o2cap.data.readers import manifest_from_pattern

    _check(output, ".csv")
    rows, others = manifest_from_pattern(folder, pattern)
    base = Path(os.path.abspath(output.parent))
    for row in rows:  # a relative path may not leave the folder of the file
        if row["path"].resolve().is_relative_to(base.resolve()):
            row["path"] = os.path.relpath(row["path"], base).replace(os.sep, "/")
    if others:
        said = "%d pictures do not fit the pattern and are left out, such as %s"
        logging.getLogger("o2cap").warning(said, len(others), others[0])
    write_csv(output, [*rows[0]], rows)
    print(output)


def render(
    folder: Run,
    synthetic: SyntheticConfig = SyntheticConfig(),  # noqa: B008 (frozen)
    height: int = 64,
    width: int | None = None,
    workers: int = 0,
) -> None:
    """Render the embedded data set into the layout of Market-1501.

    Args:
        folder: A new or empty folder.
        synthetic: What to render.
        height: Height of the pictures in pixels.
        width: Their width; by default half the height for persons, else the height.
        workers: Processes that render; 0 renders in this one.
    """
    from o2cap.data.synthetic import export_market1501, render_dataset

    rendered = render_dataset(synthetic, height, width, workers=workers)
    export_market1501(rendered, folder)
    print(folder)


def data(
    action: Annotated[
        Annotated[None, tyro.conf.subcommand("verify", constructor=verify)]
        | Annotated[None, tyro.conf.subcommand("sheet", constructor=sheet)]
        | Annotated[None, tyro.conf.subcommand("manifest", constructor=manifest)]
        | Annotated[None, tyro.conf.subcommand("export", constructor=render)],
        tyro.conf.arg(name=""),
    ],
) -> None:
    """Verify or draw a data set, write a manifest, or export the embedded set."""


def reproduce(
    target: tyro.conf.Positional[str | None] = None,
    dataset: str | None = None,
    root: Place = None,
    output: Maybe = None,
    cores: int = 0,
    only: str = "*",
    dry_run: _Flag = 0,
    check: _Flag = 0,
    profile: Place = None,
    grid: Place = None,
) -> None:
    """Run a grid of trainings as a batch, and write its record.

    The same command again goes on where it was interrupted. Prints the record's path;
    with --check, the numbers beside the committed ones.

    Args:
        target: What to run, by its name in the grid; ablation, vehicles,
            studies, or, with --check, check. With --dataset it is paper, the grid on
            real pictures.
        dataset: Real pictures, such as market1501.
        root: Where they lie.
        output: Where the jobs work, by default runs/reproduce; the record goes to
            records/ in it.
        cores: Processor cores to use; 0 is all.
        only: Pattern of the names of the jobs to run, such as '*-both-seed1[01]-*'.
        dry_run: Say what would run, and why.
        check: Repeat jobs in a place of their own, and compare the numbers with the
            committed records.
        profile: A Snakemake profile, such as reproduce/profiles/slurm.
        grid: Another grid than reproduce/grid.yaml.
    """
    from o2cap_book import batch

    usual = "check" if check else "paper" if dataset else "ablation"
    what = batch.Batch(target or usual, dataset, root, grid or batch.GRID, only, cores)
    how: dict[str, Any] = {"dry_run": bool(dry_run), "profile": profile}
    if check and (dry_run or output or profile):
        raise InputError("Leave --dry-run, --output and --profile out with --check.")
    if check:
        print(batch.check(what))
    elif record := batch.reproduce(what, output or batch.OUTPUT, **how):
        print(record)
