"""Random numbers: every draw comes from a generator of a labelled stream, never from the global one."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Label = str | int


def seed_for(seed: int, *labels: Label) -> int:
    """Derive the seed of a labelled stream, uniform in [0, 2^63).

    The labels are joined unambiguously and hashed (BLAKE2b), so that streams of different labels are independent
    and the same labels give the same stream on every machine.

    Raises:
        ValueError: A seed or a label that is neither a string nor an integer.
    """
    text = "\x1f".join([str(integer(seed)), *(f"{type(label).__name__}:{label}" for label in map(_plain, labels))])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _plain(label: Label) -> Label:
    return label if isinstance(label, str) else integer(label)


def integer(value: int) -> int:
    """Return an integer of NumPy's or torch's as Python's own, so that the same number gives the same stream.

    Raises:
        ValueError: It is none.
    """
    try:
        return int(operator.index(value))
    except TypeError:
        raise ValueError(f"seeds and numbers of draws are integers, got {value!r}") from None


def generator(seed: int, *labels: Label, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator of the labelled stream, on the given device."""
    return torch.Generator(device=device).manual_seed(seed_for(seed, *labels))


@contextmanager
def isolated(seed: int, *labels: Label) -> Iterator[None]:
    """Give the body its own global random state, from a labelled stream, and put the caller's back afterwards.

    For code that can draw from the global generator only: layer initialisation, ``nn.Dropout``.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_for(seed, *labels))
        yield
