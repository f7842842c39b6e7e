"""A user's mistake on the command line of a script: one line, exit code 2, and before the work where it can be."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def told() -> Iterator[None]:
    """Turn a ValueError or an OSError of the body into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def positive(text: str) -> int:
    """Read a number of 1 or more, for the ``type`` of an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a number of 1 or more, got {number}")
    return number


def to_write(text: str) -> Path:
    """Read the path of a file that can be written, for the ``type`` of an argument; a new one lies in a folder."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot be written, give a file in a folder that exists, got {text!r}")
    return path
