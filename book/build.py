"""Run the notebooks and build the book: ``make book``.

Papermill executes a copy of every chapter into ``_build/executed``, unless
one is there that the same notebook, package, records and parameters gave.
The copies are laid beside the book's other sources in ``_build/stage``, and
jupyter-book turns those into pages, warnings being errors.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import yaml
from filelock import FileLock, Timeout
from o2cap.errors import InputError
from o2cap.files import replacing

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
PACKAGES = (ROOT / "o2cap", ROOT / "o2cap_book")
CORES = os.cpu_count() or 1
PARAMETERS = {"profile", "dataset", "root", "seed", "output"}
MATHJAX = "mathjax@3.2.2"
MATHJAX_SHA256 = (
    "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09"
)
MATHJAX_CDN = f"https://cdn.jsdelivr.net/npm/{MATHJAX}/es5/tex-chtml.js"
# What a fold holds, by a part of the cell's id.
FOLDS = {
    "parameters": "the parameters",
    "imports": "the imports",
    "check": "the check",
    "solution": "the solution",
}
Record = dict[str, Any]  # what the status page tells about one execution


class BookError(Exception):
    """Something the author or the reader can mend."""


def digest(*parts: str | Path) -> str:
    """Return SHA-256 over strings, files, and folders with all below them."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            total.update(part.encode() + b"\0")
            continue
        for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
            if file.is_file() and "__pycache__" not in file.parts:
                name = str(file.relative_to(part)).encode()
                total.update(name + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


def chapters(root: Path = ROOT) -> list[str]:
    """Return the pages of ``_toc.yml`` in their order, without suffix."""
    toc = (root / "_toc.yml").read_text()
    return re.findall(r"^[\s-]*(?:root|file): *(\S+)", toc, re.MULTILINE)


def check_parameters(notebook: Path, given: Mapping[str, str]) -> None:
    """Refuse unknown parameters, which papermill only warns about."""
    known = set(papermill.inspect_notebook(str(notebook)))
    if missing := sorted(PARAMETERS - known):
        raise BookError(
            f"{notebook.name} must assign {', '.join(missing)} in its cell "
            "tagged 'parameters'."
        )
    if unknown := sorted(set(given) - known):
        raise BookError(
            f"{notebook.name} has no parameter {', '.join(unknown)}; "
            f"it has {', '.join(sorted(known))}."
        )


def read_stamp(stamp: Path) -> Record:
    """Return what a finished execution left; nothing, if it is damaged."""
    try:
        record: Record = json.loads(stamp.read_text())
        return record if "digest" in record else {}
    except (OSError, ValueError, TypeError):
        return {}


def execute(
    notebook: Path, folder: Path, given: Mapping[str, str], sources: str = ""
) -> Record:
    """Execute a copy of a notebook, unless an up-to-date one is there.

    The copy is written to `folder`; the notebook's parameter ``output`` is a
    folder of its own below, emptied first, so that no earlier run is resumed.
    `sources` is the digest of all else that the result depends on. Raises
    BookError if a parameter is unknown or a cell fails, and keeps the copy.
    """
    check_parameters(notebook, given)
    copy = folder / notebook.name
    output, stamp = copy.with_suffix(""), copy.with_suffix(".json")
    # Relative, so that no page shows where on whose machine it was made.
    relative = os.path.relpath(output, notebook.parent)
    parameters = {**given, "output": relative}
    key = digest(notebook, sources, json.dumps(parameters, sort_keys=True))
    record = read_stamp(stamp)
    if copy.exists() and record.get("digest") == key:
        seconds = record["seconds"]
        print(f"{notebook.stem}: unchanged since it ran in {seconds} s")
        return record
    stamp.unlink(missing_ok=True)
    shutil.rmtree(output, ignore_errors=True)
    # Neither a kernel 'python3' nor start-up files in the person's home may
    # take part.
    private = folder / ".ipython"
    settings = private / "profile_default" / "ipython_kernel_config.py"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text("c.IPKernelApp.log_level = 50\n")
    kernels = str(Path(sys.prefix, "share", "jupyter"))
    places = {"JUPYTER_PATH": kernels, "IPYTHONDIR": str(private)}
    half = {"OMP_NUM_THREADS": str(max(1, CORES // 2))}  # two run at a time
    output.mkdir()

    print(f"{notebook.stem}: running ...", flush=True)
    command = [sys.executable, "-m", "papermill", str(notebook), str(copy)]
    command += ["-k", "python3", "--cwd", str(notebook.parent)]
    command += ["--log-level", "ERROR", "--no-progress-bar"]
    for name, value in parameters.items():
        command += ["-p", name, value]
    start = time.monotonic()
    environment = {**half, **os.environ, **places}
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)  # the kernel's memory too
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BookError(f"{notebook.name} failed; see its copy, {copy}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes in ru_maxrss
    record = {
        "digest": key,
        "seconds": round(time.monotonic() - start),
        "memory": round(usage.ru_maxrss * unit / 2**30, 1),
        "profile": given["profile"],
        "date": date.today().isoformat(),
        "machine": f"{platform.system()}, {CORES} cores",
    }
    with replacing(stamp) as temporary:
        temporary.write_text(json.dumps(record))
    print(f"{notebook.stem}: {record['seconds']} s, {record['memory']} GiB")
    return record


def end_children() -> None:
    """End what this process has started, with all that these have started.

    A kernel outlives the papermill that started it, so both must go. Halted
    first, papermill cannot start one meanwhile.
    """
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.suspend()
            for process in [*child.children(recursive=True), child]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def execute_all(
    notebooks: Mapping[str, Path],
    folder: Path,
    given: Mapping[str, str],
    sources: str = "",
) -> dict[str, Record]:
    """Execute copies of notebooks, two at a time, each with half the cores.

    The first that trains makes the runs that others share and would only wait
    for: they begin when it has ended. Arguments as in :func:`execute`. Raises
    BookError, when all have ended, if some failed.
    """
    trains = [
        name
        for name, notebook in notebooks.items()
        if "chapter.train(" in notebook.read_text()
    ]
    rest = [name for name in notebooks if name not in trains]

    def run(name: str) -> Record:
        return execute(notebooks[name], folder, given, sources)

    pool = ThreadPoolExecutor(min(2, CORES))
    found: dict[str, Future[Record]] = {}
    try:
        for name in [*trains[:1], *rest]:
            found[name] = pool.submit(run, name)
        for name in trains[:1]:
            found[name].exception()  # wait
        for name in trains[1:]:
            found[name] = pool.submit(run, name)
        errors = {name: found[name].exception() for name in notebooks}
    except BaseException:  # Ctrl-C, or a request to end
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(chapter.done() for chapter in found.values()):
            end_children()  # again: one may just have been about to start
            time.sleep(0.1)
        raise
    finally:
        pool.shutdown()
    for error in errors.values():
        if error is not None and not isinstance(error, BookError):
            raise error
    if failures := [str(error) for error in errors.values() if error]:
        raise BookError("\n".join(failures))
    return {name: found[name].result() for name in notebooks}


def fetch_mathjax(folder: Path) -> bool:
    """Put MathJax into `folder`, by npm; return False if that cannot be."""
    if folder.exists():
        return True
    cache = folder.with_name("mathjax-download")
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    command = ["npm", "pack", MATHJAX, "--silent"]
    try:
        subprocess.run(
            command, cwd=cache, check=True, capture_output=True, timeout=120
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"MathJax: not from npm ({error}); pages load it from its CDN")
        return False
    archive = next(cache.glob("*.tgz"))
    if hashlib.sha256(archive.read_bytes()).hexdigest() != MATHJAX_SHA256:
        raise BookError(f"{archive} is not the {MATHJAX} that is known here.")
    # Python 3.11.0-3.11.3 has no filter; the checksum vouches for the archive.
    safe: dict[str, Any] = (
        {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    )
    with tarfile.open(archive) as tar:
        tar.extractall(cache, **safe)
    source, wanted = cache / "package" / "es5", cache / "wanted"
    for part in ("output/chtml/fonts/woff-v2", "input/tex/extensions"):
        shutil.copytree(source / part, wanted / part)
    shutil.copy(source / "tex-chtml.js", wanted)
    wanted.replace(folder)
    shutil.rmtree(cache)
    return True


def status_page(records: Mapping[str, Record]) -> str:
    """Return Markdown: when, where and for how long each chapter ran."""
    places = {
        (r["profile"], r["machine"], r["date"]) for r in records.values()
    }
    where = [
        f"- profile {profile}, on {machine}, {day}"
        for profile, machine, day in sorted(places)
    ]
    rows = [
        f"| [](/{name}) | {record['seconds']} | {record['memory']} |"
        for name, record in records.items()
    ]
    seconds = [record["seconds"] for record in records.values()]
    most = max((record["memory"] for record in records.values()), default=0)
    rows.append(f"| **sum, and peak** | **{sum(seconds)}** | **{most}** |")
    return (
        "# Status of the chapters\n\n"
        "Every chapter ran without an error before these pages were made. "
        "Two chapters ran at a time, each with half the cores. A chapter "
        "that trains the run shared by others takes longer than they do.\n\n"
        "Where and when:\n\n" + "\n".join(where) + "\n\n"
        "| chapter | run time (s) | peak memory (GiB) |\n|---|---:|---:|\n"
        + "\n".join(rows)
    )


def with_head(copy: Path, record: Record) -> str:
    """Return an executed notebook's text as its page shall have it.

    The head tells the times and, where the drawing of the method names the
    chapter, shows it with the chapter's box marked; folds say what they hold.
    """
    notebook = nbformat.read(copy, as_version=4)
    # What papermill put in; the head tells the profile.
    notebook.cells = [
        cell
        for cell in notebook.cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    prose = [c.source for c in notebook.cells if c.cell_type == "markdown"]
    minutes = 5 * math.ceil(len(" ".join(prose).split()) / 180 / 5)
    title = notebook.cells[0]
    line = (
        f"**Time.** About {minutes} minutes to read. To run: "
        f"{record['seconds']} s and {record['memory']} GiB on this machine "
        f"({record['machine']}, profile {record['profile']}), with the runs "
        "of earlier chapters reused; see {doc}`status`."
    )
    end = re.compile(r"\n:::$", re.MULTILINE)
    title.source, ends = end.subn(f"\n\n{line}\n:::", title.source, count=1)
    if not ends:
        raise BookError(f"{copy.name}: its first cell has no admonition")
    drawing = (ROOT / "book/_static/pipeline.svg").read_text()
    here = f'<a href="{copy.stem}.html"'
    if here in drawing:
        drawing = drawing.replace(here, f'{here} aria-current="page"')
        drawing = f"\n\n```{{raw}} html\n{drawing}```\n"
        title.source = title.source.replace("\n\n", drawing + "\n", 1)
    for cell in notebook.cells:
        if cell.id == "parameters":
            cell.metadata["tags"] = ["parameters", "hide-input"]
        held = [what for part, what in FOLDS.items() if part in cell.id]
        tags = {"hide-input", "hide-cell"}.intersection(
            cell.metadata.get("tags", [])
        )
        if tags and not held:
            held = ["the code"]
        if held and cell.cell_type == "code":
            cell.metadata.setdefault("mystnb", {}).update(
                code_prompt_show=f"Show {held[0]}",
                code_prompt_hide=f"Hide {held[0]}",
            )
    return nbformat.writes(notebook)


def exercises_page() -> str:
    """Return Markdown: a link to every exercise, by chapter and title."""
    lines = [
        "# Exercises\n",
        "Below each exercise are two folds: a check of your answer, and a "
        "solution. The check says *Not yet solved* until you change the cell.",
    ]
    exercise = re.compile(
        r"^\((\S+-exercise-\d+)\)=\n+\*\*(?:\d+\. )?(.+?)\.?\*\*", re.MULTILINE
    )
    for name in chapters():
        notebook = ROOT / f"{name}.ipynb"
        if not notebook.exists():
            continue
        cells = nbformat.read(notebook, as_version=4).cells
        text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
        if found := exercise.findall(text):
            lines.append(f"\n**{{doc}}`/{name}`**\n")
        lines += [f"- [{title}](#{label})" for label, title in found]
    return "\n".join(lines)


def forget_runs(executed: Path, sources: str) -> None:
    """Delete the runs that chapters share if what made them has changed."""
    stamp = executed / "runs.digest"
    if not stamp.exists() or stamp.read_text() != sources:
        for settings in executed.glob("*/config.yaml"):
            shutil.rmtree(settings.parent)
        executed.mkdir(parents=True, exist_ok=True)
        stamp.write_text(sources)


def stage(records: Mapping[str, Record]) -> Path:
    """Lay the sources of all pages into ``_build/stage``."""
    folder = BUILD / "stage"
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.ipynb", "*.py", "*.toml", "_*_", ".*")
    shutil.copytree(ROOT / "book", folder / "book", ignore=ignored)
    for name in chapters():
        if name in records:
            copy = BUILD / "executed" / f"{Path(name).name}.ipynb"
            text = with_head(copy, records[name])
            (folder / f"{name}.ipynb").write_text(text)
        elif "/" not in name:  # CHANGELOG and the like
            shutil.copy(ROOT / f"{name}.md", folder)
    (folder / "book" / "status.md").write_text(status_page(records))
    (folder / "book" / "exercises.md").write_text(exercises_page())
    shutil.copy(ROOT / "_toc.yml", folder)

    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    if fetch_mathjax(BUILD / "mathjax"):
        static = folder / "book" / "_static"
        shutil.copytree(BUILD / "mathjax", static / "mathjax")
    else:
        config["sphinx"]["config"]["mathjax_path"] = MATHJAX_CDN
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    address = project["urls"]["Repository"]
    config["repository"] = {"url": address, "branch": "main"}
    (folder / "_config.yml").write_text(yaml.safe_dump(config))
    return folder


def outside_requests(html: Path) -> list[str]:
    """Return what the pages would load from the net."""
    tag = re.compile(r"<(?:script|link|img|iframe|source|video)\b[^>]*>")
    address = re.compile(r"""\b(?:src|href)=["']((?:https?:)?//[^"']+)""")
    found = set()
    for page in html.rglob("*.html"):
        for element in tag.findall(page.read_text()):
            if 'rel="canonical"' not in element:
                found.update(address.findall(element))
    return sorted(found - {MATHJAX_CDN})


def build_pages(folder: Path) -> Path:
    """Build the pages, unless the same sources have given those there."""
    html, stamp = BUILD / "html", BUILD / "html.digest"
    key = digest(folder, *PACKAGES, sys.version)
    if html.exists() and stamp.exists() and stamp.read_text() == key:
        return html
    # From scratch: sphinx tells the warnings of a changed page only.
    stamp.unlink(missing_ok=True)
    shutil.rmtree(html, ignore_errors=True)
    shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)
    print("pages: building ...", flush=True)
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build"]
    command += [str(folder), "--path-output", str(ROOT)]
    command += ["-W", "-n", "--keep-going", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")
        raise BookError("The pages have warnings or errors; see above.")
    if found := outside_requests(html):
        raise BookError(f"Pages must load nothing from the net: {found}")
    stamp.write_text(key)
    return html


def main() -> None:
    """Execute the chapters, build the pages, say where they are."""
    parser = argparse.ArgumentParser(description="Build the book.")
    parser.add_argument(
        "--profile", default="cpu", choices=["smoke", "cpu", "gpu"]
    )
    given = {"profile": parser.parse_args().profile}
    BUILD.mkdir(exist_ok=True)
    try:
        with FileLock(BUILD / ".lock", timeout=0):
            build(given)
    except Timeout:
        raise BookError(
            f"Another run is building the book in {BUILD}; wait for it."
        ) from None


def build(given: Mapping[str, str]) -> None:
    """Do what :func:`main` says, alone in ``_build``."""
    records_of_results = ROOT / "reproduce" / "records"
    lock = ROOT / "requirements.lock"
    sources = digest(*PACKAGES, records_of_results, lock, sys.version)
    executed = BUILD / "executed"
    forget_runs(executed, sources)
    sources_of = {name: ROOT / f"{name}.ipynb" for name in chapters()}
    notebooks = {
        name: path for name, path in sources_of.items() if path.exists()
    }
    records = execute_all(notebooks, executed, given, sources)
    tables = [executed / Path(name).name / "results.md" for name in records]
    results = "\n".join(
        f"From the chapter {table.parent.name}:\n\n{table.read_text()}"
        for table in tables
        if table.exists()
    )
    (executed / "results.md").write_text(results)
    html = build_pages(stage(records))
    print(f"\n{results}\nThe book: {html / 'index.html'}")
    if not (BUILD / "mathjax").exists():
        print(
            "Its formulas need a connection: MathJax did not come by npm. "
            "With npm (Node.js) there, run the same command again."
        )


def terminated(signum: int, frame: object) -> None:
    """Leave as after Ctrl-C, ending what was started."""
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminated)
    try:
        main()
    except (BookError, InputError) as error:
        sys.exit(f"book: {error}")
    except OSError as error:  # a full disk, or one that is read-only
        what, why = error.filename or BUILD, error.strerror or error
        sys.exit(f"book: {what} cannot be used ({why}).")
    except KeyboardInterrupt:
        print("book: interrupted; the same command goes on.", file=sys.stderr)
        sys.exit(130)
