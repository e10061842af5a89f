"""Files: written so that nobody ever finds half of one, read with care, and a cache."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from o2cap.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, which takes its place at the end.

    When the block fails or the program dies, `path` is as it was before. When the power
    is cut, it is that or the new file, whole.

    Raises
    ------
    InputError
        When the system refuses to write (full disk, no permission); says where.
    """
    name, path = None, path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
        os.close(handle)
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())
        # On the disk first, and the exchange after it: a system may do them in the
        # other order, and a power cut between the two would leave an empty file.
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}); what was there "
            "before is untouched."
        ) from error
    finally:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)


def check_writable(path: Path) -> None:
    """Look whether a file could be written, before the work is done that it will hold.

    Raises
    ------
    InputError
        When it could not: it is a folder, or may not be made where it is to be.
    """
    path = path.expanduser()
    with usable(path):
        place = next(p for p in path.absolute().parents if p.exists())
        if path.is_dir():
            reason = "it is a folder"
        elif not place.is_dir():
            reason = f"{place} is no folder"
        elif not os.access(place, os.W_OK):
            reason = f"{place} may not be written to"
        else:
            return
    raise InputError(f"{path} cannot be written: {reason}.")


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system opens a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def usable(path: Path) -> Iterator[None]:
    """Look at `path` in the block: a question that the system may refuse to answer.

    Raises
    ------
    InputError
        When it does (no permission, too long a name).
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be used ({error.strerror or error})."
        ) from error


def read_json(path: Path, *names: str) -> Any:
    """Return the JSON object that a file holds, or the list of its entries `names`.

    Raises
    ------
    InputError
        When the file cannot be read, or holds no such entries.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
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
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return _private_folder(folder)
    return folder if os.access(folder, os.W_OK) else _private_folder(folder)


@functools.cache
def _private_folder(instead_of: Path) -> Path:
    folder = Path(tempfile.gettempdir(), f"o2cap-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # somebody else's trap
        folder = Path(tempfile.mkdtemp(prefix="o2cap-"))
    logging.getLogger("o2cap").warning(
        "%s cannot be written; rendered pictures and compiled code are kept in %s "
        "(O2CAP_CACHE may name another folder)",
        instead_of,
        folder,
    )
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
