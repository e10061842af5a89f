"""Files: written so that nobody ever finds half of one, read with care, and a cache."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from o2cap.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a new file beside `path`, which takes its place at the end.

    When the block fails or the program dies, `path` is as it was before. When the power
    is cut, it is that or the new file, whole.

    Raises
    ------
    InputError
        When the system refuses to write (full disk, no permission); says where.
    """
    path = path.expanduser()
    part = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        # On the disk first, and the exchange after it: a system may do them in the
        # other order, and a power cut between the two would leave an empty file.
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path} cannot be written ({reason}).") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Any]) -> None:
    """Write a table; a file name that is no text goes out as the bytes that it is."""
    import pandas as pd

    table = pd.DataFrame(rows, columns=columns, dtype=object)  # nothing is converted
    with replacing(path) as part:
        table.to_csv(part, index=False, errors="surrogateescape")


def check_writable(path: Path) -> None:
    """Look whether a file could be written, before the work is done that it will hold.

    Raises
    ------
    InputError
        When it could not: it is a folder, or may not be made where it is to be.
    """
    path = path.expanduser()
    place = next(p for p in path.absolute().parents if p.exists())
    if path.is_dir() or not (place.is_dir() and os.access(place, os.W_OK)):
        reason = f"it is a folder, or {place} is none that may be written to"
        raise InputError(f"{path} cannot be written: {reason}.")


def read_json(path: Path, *names: str) -> Any:
    """Return the JSON object that a file holds, or the list of its entries `names`.

    Of a .jsonl file, the list of its objects, one a line.

    Raises
    ------
    InputError
        When the file cannot be read, or holds no such entries.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [dict(json.loads(line)) for line in text.splitlines()]
        plain = json.loads(text)
        return [plain[name] for name in names] if names else dict(plain)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is missing or damaged ({error}).") from error


def cache_folder() -> Path:
    """Return where rendered pictures and compiled code are kept.

    That is what O2CAP_CACHE names, else the system's own place for such files. Where it
    cannot be written (a container without a home), it is a folder for temporary files
    that only this user can write.
    """
    usual = {"win32": "~/AppData/Local", "darwin": "~/Library/Caches"}
    usual_here = os.environ.get("XDG_CACHE_HOME") or usual.get(sys.platform, "~/.cache")
    folder = Path(os.environ.get("O2CAP_CACHE") or f"{usual_here}/o2cap")
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return _private_folder(folder)


@functools.cache
def _private_folder(instead_of: Path) -> Path:
    folder = Path(tempfile.gettempdir(), f"o2cap-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # somebody else's trap
        folder = Path(tempfile.mkdtemp(prefix="o2cap-"))
    said = "%s cannot be written; the cache is %s (O2CAP_CACHE may name another folder)"
    logging.getLogger("o2cap").warning(said, instead_of, folder)
    return folder
