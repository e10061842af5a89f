"""Write what all notebooks have in common: ``make format`` calls it.

That is the link to Colab in the title, the cell that installs the package
there, and the absence of outputs. The address is pyproject's.
"""

import re
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ADDRESS = PROJECT["urls"]["Repository"]
COLAB = "https://colab.research.google.com/github"
INSTALL = f"""\
import sys
from pathlib import Path

if "google.colab" in sys.modules and not Path("../o2cap").is_dir():
    # elsewhere, `make` has done it
    !git clone -q --depth 1 -b v{PROJECT["version"]} {ADDRESS}
    %cd {ADDRESS.rpartition("/")[2]}/book
    %pip install -q .. myst-nb"""
METADATA = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}


def run_it(name: str) -> str:
    """Return the line of the title that links a notebook to Colab."""
    place = f"{ADDRESS.removeprefix('https://github.com')}/blob/main/book"
    link = f"[Colab]({COLAB}{place}/{name}.ipynb)"
    return f"**Run it.** `make lab` on your machine, or on {link}."


def with_head(notebook: nbformat.NotebookNode, name: str) -> str:
    """Return the text of the notebook's file as it should be."""
    cells = {cell.id: cell for cell in notebook.cells}
    if lacking := {"title", "parameters", "install"} - set(cells):
        raise ValueError(f"{name}.ipynb has no cell {', '.join(lacking)}")
    title, line = cells["title"], run_it(name)
    title.source = re.sub(r"\n\*\*Run it\.\*\*.*\n", "\n", title.source)
    # as the last paragraph of the first admonition
    title.source = re.sub(
        r"\n:::$", f"\n\n{line}\n:::", title.source, count=1, flags=re.M
    )
    title.source = re.sub(r"\n{3,}", "\n\n", title.source)
    cells["install"].source = INSTALL
    cells["install"].metadata = {"tags": ["remove-cell"]}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = METADATA
    return nbformat.writes(notebook, version=4) + "\n"


if __name__ == "__main__":
    for path in sorted((ROOT / "book").glob("*.ipynb")):
        text = with_head(nbformat.read(path, as_version=4), path.stem)
        if text != path.read_text():
            path.write_text(text)
            print(f"{path.name}: head written")
