"""Data sets: where pictures come from, by name."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from o2cap.config import Config, SyntheticConfig
from o2cap.data.images import ImageSet, ReIDDataset
from o2cap.data.readers import READERS, read_dataset
from o2cap.errors import InputError, unknown

__all__ = ["ImageSet", "ReIDDataset", "load_configured", "load_dataset"]

logger = logging.getLogger("o2cap")

# The rendered sets, and what they fix: `synthetic` shows what synthetic.kind says.
EMBEDDED: dict[str, Any] = {"synthetic": {}, "synthetic-vehicles": {"kind": "vehicle"}}


def load_dataset(
    name: str,
    root: Path | None = None,
    *,
    strict: bool = False,
    skip_missing: bool = False,
    **options: Any,
) -> ReIDDataset:
    """Load a data set by its name.

    Parameters
    ----------
    name : str
        synthetic or synthetic-vehicles (rendered), market1501, dukemtmcreid, msmt17,
        veri776, manifest (a CSV file) or folders (one folder a camera).
    root : Path, optional
        Where the data lie; for manifest, the CSV file. The rendered sets take none.
    strict : bool
        Whether a count of images, identities or cameras that differs from the
        published one is an error; it is a warning otherwise.
    skip_missing : bool
        Leave out, with a warning, pictures that a manifest names and that do not
        exist, and folders that cannot be read, instead of stopping.
    **options
        For the rendered sets: the fields of `SyntheticConfig`, and `height`, `width`
        and `workers` of `render_dataset`.

    Returns
    -------
    ReIDDataset
        `query` and `gallery` are empty where the data have none.

    Raises
    ------
    InputError
        When the name is unknown, `root` does not hold the layout, files are missing
        or misnamed, or counts differ under `strict`.
    """
    if name in EMBEDDED:
        if root is not None:
            raise InputError(f"The data set {name} is rendered: leave --root out.")
        # Here, because the renderer compiles kernels that real data never need.
        from o2cap.data.synthetic import render_dataset

        sizes = ("height", "width", "workers")
        how = {key: options.pop(key) for key in sizes if key in options}
        return render_dataset(SyntheticConfig(**(options | EMBEDDED[name])), **how)
    if name not in READERS:
        raise InputError(unknown("The data set", name, [*EMBEDDED, *READERS]))
    reading = read_dataset(name, root, skip_missing, **options)
    if reading.problems:
        raise InputError(" ".join(reading.problems))
    if differences := reading.differences():
        reading.notes.append(
            f"{name} in {root} is not as published: {'; '.join(differences)}. "
            "Results cannot be compared with published ones."
        )
        if strict:
            raise InputError(reading.notes[-1])
    for note in reading.notes:
        logger.warning("%s", note)
    return reading.dataset


def load_configured(config: Config) -> ReIDDataset:
    """Return the data set that the settings name, the embedded one rendered."""
    options: dict[str, Any] = {"skip_missing": config.skip_unreadable}
    options["strict"] = config.strict
    if config.dataset in EMBEDDED:
        size = {"height": config.height, "width": config.width}
        seed = config.seed if config.synthetic.seed is None else config.synthetic.seed
        options = asdict(config.synthetic) | size | {"seed": seed}
    return load_dataset(config.dataset, config.root, **options)
