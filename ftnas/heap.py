"""The heap of the C library: memory that tensors free stays with the process instead of being mapped anew."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_ of malloc.h of glibc
_NEVER = 2**31 - 1
_LARGEST = 32 * 2**20
"""Bytes that glibc's heap takes at most; larger blocks would leave holes in it."""


def keep_memory() -> bool:
    """Let glibc serve tensors up to 32 MB from its heap, and never give the heap back; return whether it does.

    By default glibc maps each larger block and unmaps it when it is freed, until one of 32 MB was freed: every forward
    meets fresh pages, and the kernel fills each of them with zeros. Without gradients that was a third of the time at
    16x16 pixels. Elsewhere than on glibc, nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
