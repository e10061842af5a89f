"""Data sets: where pictures come from, by name."""

from __future__ import annotations

import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from o2cap.config import Config, SyntheticConfig
from o2cap.data.images import ImageSet, ReIDDataset
from o2cap.data.readers import READERS, read_dataset
from o2cap.errors import InputError, unknown

__all__ = ["ImageSet", "ReIDDataset", "load_configured", "load_dataset"]

logger = logging.getLogger("o2cap")

# The embedded data sets: what they render, and the size they are rendered at.
EMBEDDED = {"synthetic": ("person", 64, 32), "synthetic-vehicles": ("vehicle", 64, 64)}


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
        Leave pictures out that a manifest names and that do not exist, with a
        warning, instead of stopping.
    **options
        For msmt17 `val` (bool, True): train on the pictures of list_val.txt too. For
        the rendered sets the fields of `SyntheticConfig`, and `height`, `width`,
        `workers` and `cache` of `render_dataset`.

    Returns
    -------
    ReIDDataset
        `query` and `gallery` are empty where the data have none.

    Raises
    ------
    InputError
        When the name or an option is unknown, `root` does not hold the layout, files
        are missing or misnamed, or counts differ under `strict`.
    """
    if name in EMBEDDED:
        return _render(name, root, options)
    if name not in READERS:
        raise InputError(unknown("The data set", name, [*EMBEDDED, *READERS]))
    reading = read_dataset(name, root, **options)
    problems = reading.problems + ([] if skip_missing else reading.missing)
    if problems:
        more = len(problems) - 1
        rest = f" There are {more} more problems: o2cap data verify." if more else ""
        raise InputError(problems[0] + rest)
    for note in reading.notes + reading.missing:
        logger.warning("%s", note)
    if differences := reading.differences():
        sentence = (
            f"{name} in {root} is not as published: {'; '.join(differences)}. "
            "Results cannot be compared with published ones."
        )
        if strict:
            raise InputError(sentence)
        logger.warning("%s", sentence)
    return reading.dataset


def _render(name: str, root: Path | None, options: dict[str, Any]) -> ReIDDataset:
    kind, height, width = EMBEDDED[name]
    if root is not None:
        raise InputError(
            f"The data set {name} is rendered, not read: leave --root out."
        )
    # Here, because the renderer compiles kernels that real data never need.
    from o2cap.data.synthetic import render_dataset

    size = {"height": height, "width": width}
    known = [field.name for field in fields(SyntheticConfig)]
    how = {k: options.pop(k) for k in (*size, "workers", "cache") if k in options}
    for option in options:
        if option not in known:
            raise InputError(unknown(f"The option of {name}", option, known))
    config = SyntheticConfig(**({"kind": kind} | options))
    if config.kind != kind:
        right = next(n for n, how in EMBEDDED.items() if how[0] == config.kind)
        raise InputError(
            f"The data set {name} shows {kind}s, but synthetic.kind is {config.kind}; "
            f"use --dataset {right}."
        )
    return render_dataset(config, **(size | how))


def load_configured(config: Config) -> ReIDDataset:
    """Return the data set that the settings name, the embedded one rendered."""
    if not config.dataset.startswith("synthetic"):
        return load_dataset(
            config.dataset,
            config.root,
            strict=config.strict,
            skip_missing=config.skip_unreadable,
        )
    options = asdict(config.synthetic)
    if options["seed"] is None:
        options["seed"] = config.seed
    if options["kind"] == SyntheticConfig().kind:  # which nobody need have said
        del options["kind"]
    return load_dataset(
        config.dataset,
        config.root,
        **options,
        height=config.height,
        width=config.width,
    )
