"""Tables and figures from the committed records, without running anything.

`o2cap reproduce` writes them after its jobs, too.

    python reproduce/tables.py --output runs/tables
"""

import sys
from pathlib import Path

import tyro

from o2cap.errors import InputError
from o2cap_book.records import write_tables


def main(
    records: Path = Path(__file__).parent / "records",
    output: Path = Path("runs/tables"),
) -> None:
    """Write the tables (Markdown, CSV) and figures (SVG, PNG) of the records.

    Parameters
    ----------
    records
        Folder of the records.
    output
        Folder to write to.
    """
    try:
        index, *files = write_tables(records, output)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{index} and {len(files)} files beside it")


if __name__ == "__main__":
    tyro.cli(main)
