"""Frozen, strict settings, and one clear line for whatever is wrong in them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

Rate = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=4096)]
"""Pixels of an image's side."""


class Settings(BaseModel):
    """Base of every settings value: frozen, keyword-only, without NaN, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=False)


S = TypeVar("S", bound=Settings)
_UNION_MEMBER = re.compile(r"(constrained-)?(int|float|str|bool)$|(tuple|list|function-\w+)\[")
"""What pydantic puts into the path of a value that may be of several types."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?``, or the list of what there is when nothing is near."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"there is: {', '.join(names) or 'nothing'}"


def parse(cls: type[S], data: Mapping[str, Any], *, where: str = "") -> S:
    """Build settings from plain data, e.g. a YAML section.

    Args:
        cls: The settings class.
        data: Keys and values, nested as the class is.
        where: Prefix of the key path in messages, e.g. ``search.controller``.

    Raises:
        ValueError: One line: the key, the rule, the value received, and for an unknown key the nearest valid one.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where or cls.__name__}: expected keys and values, got {data!r}")
    try:
        return cls.model_validate(dict(data))
    except pydantic.ValidationError as error:
        raise ValueError(first_problem(error, cls, where)) from None


def first_problem(error: pydantic.ValidationError, cls: type[BaseModel], where: str = "") -> str:
    """Tell the first problem of a validation error in one line."""
    problems = error.errors(include_url=False)
    problem = problems[0]
    if problem["type"] == "missing":  # where a key beside it is misspelt, that is what is wrong
        near = (p for p in problems if p["type"] == "extra_forbidden" and p["loc"][:-1] == problem["loc"][:-1])
        problem = next(near, problem)
    location = [str(part) for part in problem["loc"] if not _UNION_MEMBER.match(str(part))]
    path = ".".join([*([where] if where else []), *location])
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown key; {did_you_mean(location[-1], _fields_at(cls, location[:-1]))}"
    if problem["type"] == "missing":
        return f"{path}: required, and not given"
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):  # which of several classes
        context = problem["ctx"]
        path = f"{path}.{_unquoted(context['discriminator'])}"
        if "tag" not in context:
            return f"{path}: required, and not given"
        known = [_unquoted(name) for name in context["expected_tags"].split(", ")]
        return f"{path}: unknown {context['tag']!r}; {did_you_mean(context['tag'], known)}"
    message = problem["msg"].removeprefix("Value error, ").replace("\n", " ")
    message = message[:1].lower() + message[1:]
    value = problem["input"]
    told = isinstance(value, (dict, BaseModel)) or (isinstance(value, str) and repr(value) in message)
    shown = "" if told else f", got {_short(value)}"
    named = not path or message.startswith((f"{path}.", f"{path}:"))  # of rules about several keys
    return f"{message}{shown}" if named else f"{path}: {message}{shown}"


def _unquoted(text: str) -> str:
    return text.strip("'")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(cls: type[BaseModel], location: list[str]) -> list[str]:
    """Return the valid keys of the nested settings class at a key path."""
    for part in location:
        field = cls.model_fields.get(part)
        nested = _nested_class(field.annotation) if field is not None else None
        if nested is not None:
            cls = nested
    return list(cls.model_fields)


def _nested_class(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _nested_class(argument)
        if found is not None:
            return found
    return None
