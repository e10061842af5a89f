"""Every chapter has what a chapter of this book must have, and its links lead on."""

import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import pytest

import o2cap
import o2cap_book

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
CHAPTERS = [p for p in NOTEBOOKS if p.stem not in ("index", "quickstart")]
PAGES = [*NOTEBOOKS, *(ROOT / "book").glob("*.md")]
LABEL = re.compile(r"\$\$ *\((\w+)\)$", re.MULTILINE)
CHAPTER = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)


def cells(path: Path) -> list[Any]:
    return nbformat.read(path, as_version=4).cells


def markdown(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(c.source for c in cells(path) if c.cell_type == "markdown")


def public_objects() -> dict[str, Any]:
    """Functions and classes of both packages, by their full names."""
    found = {}
    modules = [
        *pkgutil.walk_packages(o2cap.__path__, "o2cap."),
        *pkgutil.walk_packages(o2cap_book.__path__, "o2cap_book."),
    ]
    for module in modules:
        if module.name.endswith("__main__"):
            continue
        loaded = importlib.import_module(module.name)
        for name, value in inspect.getmembers(loaded):
            own = getattr(value, "__module__", None) == module.name
            public = own and not name.startswith("_")
            if public and (inspect.isfunction(value) or inspect.isclass(value)):
                found[f"{module.name}.{name}"] = value
    return found


OBJECTS = public_objects()


def labels() -> dict[str, Path]:
    """Labels of formulas, and the notebook that each stands in."""
    return {label: p for p in NOTEBOOKS for label in LABEL.findall(markdown(p))}


def homes(label: str) -> list[str]:
    """Names of what a formula says: a function, a class, or the class of a field."""
    named = [name for name in OBJECTS if name.rpartition(".")[2] == label]
    fields = [
        name
        for name, value in OBJECTS.items()
        if label in getattr(value, "__dataclass_fields__", ())
    ]
    return named or fields


@pytest.mark.parametrize("label", sorted(labels()))
def test_a_formula_its_cell_and_its_function_share_a_name_and_link(label: str) -> None:
    page = labels()[label]
    found = cells(page)
    code = [i for i, c in enumerate(found) if c.id == label and c.cell_type == "code"]
    assert code, f"{page.name} has the formula {label}, but no code cell of that id"
    formula = [i for i, c in enumerate(found) if label in LABEL.findall(c.source)]
    assert formula[0] < code[0], f"{page.name}: {label}: code before the formula"
    assert len(homes(label)) == 1, f"{label} is no function or class of the package"
    (home,) = homes(label)
    assert f":eq:`{label}`" in (OBJECTS[home].__doc__ or ""), f"{home} has no link"
    link = re.compile(rf"\{{py:\w+\}}`~?{re.escape(home)}`")
    assert link.search(markdown(page)), f"{page.name} does not link to {home}"
    assert label in found[code[0]].source, f"cell {label} does not use {label}"
    assert "assert" in found[code[0]].source, f"cell {label} asserts nothing"


def test_links_from_the_docstrings_lead_to_formulas() -> None:
    linked = {
        label
        for value in OBJECTS.values()
        for label in re.findall(r":eq:`(\w+)`", value.__doc__ or "")
    }
    assert linked == set(labels())


def test_the_appendix_lists_every_formula() -> None:
    table = re.findall(
        r"^\| \{eq\}`(\w+)` \| \{py:\w+\}`([\w.]+)` \| \{doc\}`(\w+)` \|$",
        (ROOT / "book/notation.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert {label: home for label, home, _ in table} == {
        label: homes(label)[0] for label in labels()
    }
    assert {label: page for label, _, page in table} == {
        label: page.stem for label, page in labels().items()
    }


def test_the_package_page_lists_every_module() -> None:
    page = (ROOT / "book/api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"(?:automodule|autofunction):: (\S+)", page))
    listed |= {name.rpartition(".")[0] for name in listed}
    unlisted = {name.rpartition(".")[0] for name in OBJECTS} - listed
    assert unlisted <= {"o2cap.cli"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_to_functions_lead_somewhere(page: Path) -> None:
    for role, name in re.findall(r"\{py:(\w+)\}`~?([\w.]+)`", markdown(page)):
        if role in ("func", "class"):
            assert name in OBJECTS, f"{page.name} links to {name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_begins_as_all_do(path: Path) -> None:
    spec = importlib.util.spec_from_file_location("heads", ROOT / "book/heads.py")
    heads = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(heads)
    wanted = heads.with_head(nbformat.read(path, as_version=4), path.stem)
    assert path.read_text() == wanted, "run 'make format'"
    first = cells(path)[0]
    assert first.id == "title" and first.source.startswith("# ")
    assert "**What you will learn.**" in first.source
    assert "**What you need.**" in first.source
    names = re.findall(r"^(\w+) = ", cells(path)[1].source, re.MULTILINE)
    assert cells(path)[1].id == "parameters"
    assert names == ["profile", "dataset", "root", "seed", "output"]
    assert f'output = "../runs/{path.stem}"' in cells(path)[1].source


@CHAPTER
def test_a_chapter_has_exercises_with_checks_and_solutions(path: Path) -> None:
    text, found = markdown(path), {c.id: c for c in cells(path)}
    count = len(re.findall(rf"^\({path.stem}-exercise-\d\)=$", text, re.MULTILINE))
    assert 2 <= count <= 4
    for n in range(1, count + 1):
        assert f"({path.stem}-exercise-{n})=" in text
        assert "check" in found[f"exercise-{n}"].source
        solution = found[f"solution-{n}"]
        assert solution.source.startswith(f"# Solution {n}")
        assert "hide-cell" in solution.metadata.tags, "the solution is not folded"
        assert "assert" in solution.source
    assert "## What to take away" in text
    assert "**Read next.**" in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_figure_has_a_caption_and_is_named_after_its_cell(path: Path) -> None:
    for cell in cells(path):
        shown = cell.metadata.get("mystnb", {})
        if "alt" in shown.get("image", {}):
            assert shown.get("figure", {}).get("caption"), f"{cell.id}: no caption"
            name = f"fig-{path.stem}-{cell.id.removesuffix('-figure')}"
            assert shown["figure"].get("name") == name, cell.id


def test_glued_names_are_the_books_own() -> None:
    made = Counter(
        name
        for path in NOTEBOOKS
        for cell in cells(path)
        if cell.cell_type == "code"
        for name in set(re.findall(r"\bglue\(\s*f?\"([^\"]+)\"", cell.source))
    )
    assert [name for name, count in made.items() if count > 1] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_prose_holds_no_measurement_typed_by_hand(path: Path) -> None:
    text = re.sub(
        r"```.*?```|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`", "", markdown(path), flags=re.S
    )
    typed = re.findall(
        r".{30}\b\d+(?:\.\d+)? ?(?:%|points\b|mAP\b|GiB\b|seconds\b).*", text
    )
    assert typed == []
