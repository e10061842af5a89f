"""The command line. Each command is the Python call of the same name.

What people read goes to standard error; standard output holds what a script wants:
the run directory, a path, or JSON. Of several processes that torchrun starts, the first
speaks. Exit codes: 0 done, 2 the person's input, 1 a fault of ours, 130 and 143
interrupted, 141 nobody reads the output.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import o2cap
from o2cap.config import STYLE, Config, SyntheticConfig, starting_point
from o2cap.errors import InputError, TrainingError

logger = logging.getLogger("o2cap")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = sys.argv[1:] if args is None else list(args)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logger.setLevel(logging.INFO if _speaks() else logging.ERROR)
    signal.signal(signal.SIGTERM, partial(_terminated, args))
    if args == ["--version"]:
        print(f"o2cap {o2cap.__version__}")
        return 0
    try:
        default = starting_point(args[1:] if args[:1] == ["train"] else [])
        tyro.extras.subcommand_cli_from_dict(
            _commands(default),
            prog="o2cap",
            description=o2cap.__doc__,
            args=args,
            console_outputs=_speaks(),
            config=STYLE,
        )
    except InputError as error:
        _say(str(error))
        return 2
    except TrainingError as error:
        _say(str(error))
        return 1
    except BrokenPipeError:  # as in o2cap train --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # what nobody closer to the file has put into words
        _say(
            f"{error.filename or 'A file'} cannot be used ({error.strerror or error})."
        )
        return 2
    except KeyboardInterrupt:
        _say(f"interrupted{_way_on(args)}.")
        return 130
    return 0


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(sentence: str) -> None:
    if _speaks():
        print(f"o2cap: {sentence}", file=sys.stderr)


def _terminated(args: Sequence[str], signum: int, frame: object) -> None:
    _say(f"terminated{_way_on(args)}.")
    raise SystemExit(128 + signum)


def _way_on(args: Sequence[str]) -> str:
    goes_on = args[:1] in (["train"], ["reproduce"]) and "--check" not in args
    return "; the same command goes on" if goes_on else ""


# torch, and what stands on it, is imported inside the commands: --help and a misspelt
# option answer at once.


def _commands(default: Config) -> dict[str, Callable[..., Any]]:
    def train(config: Annotated[Config, tyro.conf.arg(name="")] = default) -> None:
        """Train on several cameras' pictures without identity labels.

        Without options: the embedded data set, on whatever this machine has. The
        same command again goes on where it was interrupted. Prints the run directory.
        """
        from o2cap.trainer import train as run_training

        result = run_training(config)
        if _speaks():
            print(result.directory)

    return {
        "train": train,
        "evaluate": evaluate,
        "embed": embed,
        "search": search,
        "cluster": cluster,
        "report": report,
        "data": data,
        "reproduce": reproduce,
    }


_O = tyro.conf.arg(aliases=("-o",))
Output = Annotated[Path, _O]


def evaluate(
    run: tyro.conf.Positional[Path],
    dataset: str | None = None,
    root: Path | None = None,
    device: str = "auto",
    workers: int = 0,
) -> None:
    """Evaluate a trained run: mAP, CMC and mINP as JSON.

    Args:
        run: Run directory.
        dataset: Another data set than the one the run was trained on.
        root: Where that data set lies, or where the run's own lies now.
        device: auto, cpu, cuda, mps.
        workers: Threads that decode pictures; 0 means one a core.
    """
    from o2cap.data import load_configured
    from o2cap.device import Hardware
    from o2cap.evaluation import Evaluator, check_parts
    from o2cap.files import read_json
    from o2cap.run import load_model

    config, model = load_model(run)
    config = replace(
        config,
        dataset=dataset or config.dataset,
        root=root or (None if dataset else config.root),
        device=device,
        workers=workers,
    )
    hardware = Hardware.choose(config)
    with hardware.in_force(config):
        found = load_configured(config)
        (known,) = read_json(run / "environment.json", "fingerprint")
        if dataset is None and root is None and found.fingerprint() != known:
            raise InputError(
                f"{run} was trained on other pictures than its settings name now; "
                "say what to evaluate on with --dataset and --root."
            )
        check_parts(found)
        metrics = Evaluator(config, found, hardware).record(model.to(hardware.device))
    if not metrics:
        raise InputError(
            f"The data set {found.name} has no query and no gallery, so there is "
            "nothing to evaluate; give another one with --dataset and --root."
        )
    print(json.dumps(metrics))


def embed(
    run: tyro.conf.Positional[Path],
    pictures: tyro.conf.Positional[tuple[Path, ...]],
    output: Output,
    device: str = "auto",
    skip_unreadable: bool = False,
) -> None:
    """Compute features of pictures, for search and cluster. Prints the file.

    Args:
        run: Run directory.
        pictures: Files and folders.
        output: The .npz file to write: paths, features, camids.
        device: auto, cpu, cuda, mps.
        skip_unreadable: Leave unreadable pictures out, with a warning.
    """
    from o2cap import inference

    _check_suffix(output, ".npz")
    found = inference.embed(
        run, pictures, device=device, skip_unreadable=skip_unreadable
    )
    found.save(output)
    print(output)


def search(
    run: tyro.conf.Positional[Path],
    query: tyro.conf.Positional[Path],
    gallery: Path,
    output: Annotated[Path | None, _O] = None,
    top: int = 10,
    device: str = "auto",
    skip_unreadable: bool = False,
) -> None:
    """Find the pictures most like one picture. Prints the matches as JSON.

    Args:
        run: Run directory.
        query: The picture.
        gallery: Where to search: a folder, or the .npz file of o2cap embed.
        output: Also draw the ranked list (.png), or write it (.json, .csv).
        top: Matches at most.
        device: auto, cpu, cuda, mps.
        skip_unreadable: Leave unreadable pictures out, with a warning.
    """
    from o2cap import inference

    if output is not None:
        _check_suffix(output, ".png", ".json", ".csv")
    found = inference.search(
        run, query, gallery, top=top, device=device, skip_unreadable=skip_unreadable
    )
    if output is not None:
        found.save(output)
    matches = [asdict(match) for match in found.matches()]
    print(json.dumps({"query": str(found.query.paths[0]), "matches": matches}))


def cluster(
    run: tyro.conf.Positional[Path],
    pictures: tyro.conf.Positional[tuple[Path, ...]],
    output: Output,
    sheets: Path | None = None,
    device: str = "auto",
    skip_unreadable: bool = False,
) -> None:
    """Group pictures into pseudo identities. Prints the counts as JSON.

    Args:
        run: Run directory.
        pictures: Files and folders, or one .npz file of o2cap embed.
        output: The CSV file to write: path, camid, cluster (-1: an outlier).
        sheets: Also draw a contact sheet per cluster, into this new folder.
        device: auto, cpu, cuda, mps.
        skip_unreadable: Leave unreadable pictures out, with a warning.
    """
    from o2cap import inference

    _check_suffix(output, ".csv")
    if sheets is not None:
        inference.refuse_occupied(sheets)
    source = pictures[0] if len(pictures) == 1 else pictures
    found = inference.cluster(
        run, source, device=device, skip_unreadable=skip_unreadable
    )
    if sheets is not None:
        found.save_sheets(sheets)
    found.save(output)
    counts = {
        "pictures": len(found.images),
        "clusters": int(found.clusters.max()) + 1,
        "outliers": int((found.clusters < 0).sum()),
    }
    print(json.dumps(counts))


def _check_suffix(path: Path, *suffixes: str, option: str = "--output") -> None:
    """Refuse a file name before the work is done that it was to hold."""
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{option} {path} must end in {' or '.join(suffixes)}.")


def report(run: tyro.conf.Positional[Path], device: str = "auto") -> None:
    """Write one page about a run, RUN/report.html. Prints its path.

    Args:
        run: Run directory.
        device: auto, cpu, cuda, mps.
    """
    from o2cap_book.report import report as write_report

    print(write_report(run, device=device))


def sheet(
    name: tyro.conf.Positional[str],
    output: Output,
    root: Path | None = None,
    split: Literal["train", "query", "gallery"] = "train",
) -> None:
    """Draw a contact sheet of a data set: a row an identity, columns by camera.

    Args:
        name: A data set, such as synthetic or market1501.
        output: The .png file to write.
        root: Its folder; for manifest, the CSV file.
        split: Which part.
    """
    import torch

    from o2cap.data import load_dataset
    from o2cap.files import replacing
    from o2cap.sheets import contact_sheet

    _check_suffix(output, ".png")
    images = load_dataset(name, root).splits()[split]
    if not len(images):
        raise InputError(f"The data set {name} has no {split} pictures.")
    known = images.pids is not None and bool((images.pids >= 0).any())
    rows = images.pids if known else torch.zeros(len(images), dtype=torch.int64)
    drawn = contact_sheet(images, rows, name="identity" if known else "unknown")
    with replacing(output) as path:
        drawn.save(path, "png")
    print(output)


def verify(
    name: tyro.conf.Positional[str],
    root: Path | None = None,
    pictures: bool = False,
    list: Path | None = None,
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
    from o2cap.files import replacing

    if list is not None:
        _check_suffix(list, ".csv", option="--list")
    found = verify_dataset(name, root, pictures=pictures)
    print(f"{'split':<10}{'':<12}{'published':>12}{'found':>12}")
    for row in found.rows:
        expected = "" if row.expected is None else f"{row.expected:,}"
        print(f"{row.split:<10}{row.what:<12}{expected:>12}{row.found:>12,}")
    for sentence in found.notes + found.problems[:10]:
        print(sentence)
    if list is not None:
        with replacing(list) as path, path.open("w", encoding="utf-8", newline="") as f:
            table = csv.writer(f)
            table.writerow(["path", "problem"])
            for sentence in found.problems:
                picture, of_one, _ = sentence.partition(" cannot be read as a picture")
                table.writerow([picture if of_one else "", sentence])
    if found.problems:
        where = "the first of them above" if list is None else f"all of them in {list}"
        raise InputError(
            f"{name} in {root}: {len(found.problems)} differences or problems, {where}."
        )


def export(
    folder: tyro.conf.Positional[Path],
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

    if width is None:
        width = height // 2 if synthetic.kind == "person" else height
    rendered = render_dataset(synthetic, height, width, workers=workers)
    export_market1501(rendered, folder)
    print(folder)


def data(
    action: Annotated[
        Annotated[None, tyro.conf.subcommand("verify", constructor=verify)]
        | Annotated[None, tyro.conf.subcommand("sheet", constructor=sheet)]
        | Annotated[None, tyro.conf.subcommand("export", constructor=export)],
        tyro.conf.arg(name=""),
    ],
) -> None:
    """Verify a data set, draw a contact sheet of it, or export the embedded one."""


_Flag = tyro.conf.UseCounterAction[int]  # given or not


def reproduce(
    target: tyro.conf.Positional[str | None] = None,
    dataset: str | None = None,
    root: Path | None = None,
    output: Annotated[Path | None, _O] = None,
    cores: int = 0,
    only: str = "*",
    dry_run: _Flag = 0,
    check: _Flag = 0,
    profile: Path | None = None,
    grid: Path | None = None,
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
    target, grid = target or usual, grid or batch.GRID
    what: dict[str, Any] = {"dataset": dataset, "root": root, "grid": grid}
    what |= {"only": only, "cores": cores}
    if check:
        others = {"--dry-run": dry_run, "--output": output, "--profile": profile}
        if given := [name for name, value in others.items() if value]:
            raise InputError(
                "--check trains, on this machine and in a place of its own; leave "
                f"{' and '.join(given)} out."
            )
        print(batch.check(target, **what))
        return
    how: dict[str, Any] = {"dry_run": bool(dry_run), "profile": profile}
    how |= {"output": output or batch.OUTPUT}
    record = batch.reproduce(target, **what, **how)
    if record is not None:
        print(record)
