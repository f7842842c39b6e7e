"""Names for classes: what a config may call by name, and how a user adds to it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from ftnas.settings import did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from name to class or function, for one kind of thing.

    A name that holds a colon, ``package.module:Name``, is imported instead of looked up. Pass
    ``allow_import=True`` only for names that come from the user's own config, as a run folder records it, never for
    one that was read from a genotype, a checkpoint or a file of plans.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds its argument under ``name``; a name taken already is a ValueError."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered already, as {self._entries[name]!r}")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str, *, allow_import: bool = False) -> T:
        """Return the entry of that name.

        Raises:
            ValueError: No such name (the message tells the nearest), or nothing can be imported under it.
        """
        if name in self._entries:
            return self._entries[name]
        if ":" in name:
            if not allow_import:
                raise ValueError(f"{self.kind} {name!r}: names to import are accepted from a config only")
            return import_name(name, self.kind)
        raise ValueError(f"unknown {self.kind} {name!r}; {did_you_mean(name, self._entries)}")

    def names(self) -> list[str]:
        """Return all registered names, in order of registration."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def import_name(name: str, kind: str = "object") -> Any:
    """Import ``package.module:Name`` and return it; from the current folder too, as in ``python -m``.

    What is installed comes before the current folder.

    Raises:
        ValueError: One line: which half is missing, or what the module raised when it was imported.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or module_name.startswith("."):
        raise ValueError(f"{kind} {name!r}: write package.module:Name, with the whole name of the module")
    here = os.path.abspath(os.curdir)
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{kind} {name!r}: cannot import module {module_name!r} ({error}); start in the folder that holds it, or "
            "install it"
        ) from None
    except (Exception, SystemExit) as error:  # the user's own code
        raise ValueError(
            f"{kind} {name!r}: importing module {module_name!r} raised {type(error).__name__}: {error} "
            "(FTNAS_DEBUG=1 shows where)"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"{kind} {name!r}: module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)


def check_class(found: Any, base: type, *, where: str, needs: Sequence[str] = ()) -> None:
    """Refuse what a config names, unless it is a subclass of ``base`` with all methods.

    Args:
        found: What was imported.
        base: The contract.
        where: Prefix of messages.
        needs: Attributes that the class must have too.

    Raises:
        ValueError: It is something else, or the class lacks a method or an attribute.
    """
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{where}: expected a subclass of {base.__module__}.{base.__name__}, got {found!r}")
    missing = [
        *sorted(getattr(found, "__abstractmethods__", ())),
        *(name for name in needs if not hasattr(found, name)),
    ]
    if missing:
        raise ValueError(f"{where}: {found.__name__} lacks {', '.join(missing)}; define what {base.__name__} asks for")


def import_path(found: type) -> str | None:
    """Return the ``package.module:Name`` that `import_name` finds a class under; None where it finds none."""
    at_top = getattr(sys.modules.get(found.__module__), found.__qualname__, None) is found
    return f"{found.__module__}:{found.__qualname__}" if at_top else None
