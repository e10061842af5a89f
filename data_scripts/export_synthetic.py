"""Write the embedded (rendered) data set to disk in the Market-1501 layout.

For trying it with other code:

  python data_scripts/export_synthetic.py data/synthetic --identities 50 --strength 1.5
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import tyro
from unpacking import refusal

from o2cap.data import load_dataset
from o2cap.data.readers import read_dataset
from o2cap.data.synthetic import SyntheticConfig, export_market1501
from o2cap.errors import InputError


def export(
    folder: tyro.conf.Positional[Path],
    config: tyro.conf.OmitArgPrefixes[SyntheticConfig],
    height: int = 64,
    width: int | None = None,
) -> None:
    """Write the embedded data set to disk in the Market-1501 layout.

    Parameters
    ----------
    folder : Path
        Folder to make.
    config : SyntheticConfig
        What to render.
    height : int
        Height of a picture, in pixels.
    width : int, optional
        Width of a picture: half the height for persons, the height for vehicles.
    """
    name = "synthetic" if config.kind == "person" else "synthetic-vehicles"
    size = {
        "height": height,
        "width": width or height // (2 if name == "synthetic" else 1),
    }
    dataset = load_dataset(name, **size, **asdict(config))
    if folder.is_dir() and os.listdir(folder):
        there = read_dataset("market1501", folder).dataset
        if there.counts() != dataset.counts():
            raise InputError(f"{folder} holds something else; give another folder.")
        print(f"{folder} is already there.")
    else:
        export_market1501(dataset, folder)
    for split, counts in dataset.counts().items():
        print(split, *(f"{number:,} {what}" for what, number in counts.items()))
    print(f"Use it: o2cap train --dataset market1501 --root {folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code (0 done, 2 bad input)."""
    try:
        tyro.cli(export, args=argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {refusal(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
