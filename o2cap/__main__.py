"""The program: how it ends, and how text leaves it. Also under torchrun."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from o2cap import cli
from o2cap.errors import InputError, TrainingError


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 2 the user's input, 1 a fault of ours, 130 and 143 interrupted, 141 nobody
    reads the output.
    """
    args = sys.argv[1:] if args is None else list(args)
    goes_on = args[:1] in (["train"], ["reproduce"]) and "--check" not in args
    again = "; the same command goes on" if goes_on else ""
    _prepare()
    try:
        try:
            cli.run(args)
        finally:
            sys.stdout.flush()
        return 0
    except (InputError, TrainingError) as error:
        code, said = 2 if isinstance(error, InputError) else 1, str(error)
    except KeyboardInterrupt as error:
        code, word = (143, "terminated") if error.args else (130, "interrupted")
        said = f"{word}{again}."
    except BrokenPipeError:  # as in o2cap train --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # what nobody closer to the file has put into words
        name, reason = error.filename or "A file", error.strerror or error
        code, said = 2, f"{name} cannot be used ({reason})."
    if cli.speaks():
        print(f"o2cap: {said}", file=sys.stderr)
    return code


def _prepare() -> None:
    """Decide how text and signals leave the program; nothing of it ever fails."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or Path(os.devnull).open("w")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            # a file name that is no text goes out as the bytes that it is
            utf8 = stream.encoding.lower() == "utf-8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
        setattr(sys, name, stream)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("o2cap").setLevel("INFO" if cli.speaks() else "ERROR")
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(signum: int, frame: object) -> None:
    raise KeyboardInterrupt(signum)


if __name__ == "__main__":
    raise SystemExit(main())
