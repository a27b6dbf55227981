"""Build frozen dataclasses from the plain containers of YAML; every error is one line that names the key.

Supported annotations: int, float, Number, bool, str, list[...] of these, `X | None`, and nested
dataclasses.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from typing import Any

from utils.errors import FieldError, UserError

LARGEST_INT = 2**63  # the libraries use 64-bit integers
MISSING = "???"  # OmegaConf's mark of a value that the user must give
Number = int | float  # keeps a whole number an int, so that 30 epochs are not printed as 30.0


def without_none(annotation: object) -> tuple[object, bool]:
    """(`X`, True) for `X | None`, else (annotation, False)."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation, False
    parts = typing.get_args(annotation)
    rest = [part for part in parts if part is not type(None)]
    if set(rest) == set(typing.get_args(Number)):
        return Number, len(rest) < len(parts)
    if len(rest) != 1:
        raise TypeError(f"{annotation}: a setting has one type, or one type and None")
    return rest[0], len(rest) < len(parts)


def leaf_types(sections: dict[str, object]) -> dict[str, object]:
    """Dotted key -> annotation of every value below `sections` (name -> annotation).

    An optional nested dataclass counts as a value too, since it can be set to null as a whole.
    """
    leaves = {}
    for key, annotation in sections.items():
        inner, optional = without_none(annotation)
        if not dataclasses.is_dataclass(inner):
            leaves[key] = annotation
            continue
        if optional:
            leaves[key] = annotation
        leaves.update(leaf_types({f"{key}.{name}": hint for name, hint in _field_types(inner).items()}))
    return leaves


def changeable() -> Any:
    """A field that may have another value when a run is resumed: it says how the work is done, not what is made."""
    return dataclasses.field(metadata={"changeable": True})


def changeable_keys(sections: dict[str, object]) -> list[str]:
    """The dotted keys of the `changeable` fields below `sections` (name -> annotation)."""
    found = []
    for key, annotation in sections.items():
        kind, _ = without_none(annotation)
        if dataclasses.is_dataclass(kind):
            found += [
                f"{key}.{field.name}" for field in dataclasses.fields(kind) if "changeable" in field.metadata
            ]
            found += changeable_keys({f"{key}.{name}": hint for name, hint in _field_types(kind).items()})
    return found


def unknown_key(key: str, known: Iterable[str], source: str = "") -> UserError:
    """The error for an unknown dotted key. Suggests the nearest key of the same section, else keys with the same last
    part, else the most similar key; lists the known keys if there is none."""
    known = sorted(known)
    parent, _, last = key.rpartition(".")
    siblings = {name: f"{parent}.{name}" for name in _children(parent, known)}
    near = [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1)]
    near = near or _same_last(key, known) or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    where = f" in {source}" if source else ""
    if near:
        return UserError(
            f"unknown key '{key}'{where}; did you mean {' or '.join(repr(name) for name in near)}?"
        )
    listed = sorted(siblings.values()) or sorted({name.split(".")[0] for name in known})
    return UserError(f"unknown key '{key}'{where}; known: {', '.join(listed)}")


def _same_last(key: str, known: list[str]) -> list[str]:
    """Settings of the same last name: of a key with a section the nearest in that section, or one of about its name, or
    right below another; of a key without one all of them, if they are few."""
    section, _, last = key.rpartition(".")
    found = [name for name in known if name.rpartition(".")[2] == last]
    if not section:
        return found if len(found) <= 4 else []
    alike = difflib.get_close_matches(
        section.split(".")[0], {name.split(".")[0] for name in found}, n=1, cutoff=0.75
    )
    inside = [name for name in found if name.split(".")[0] in alike]
    shallow = [name for name in found if name.count(".") == 1]
    deeper = [name for name in found if f".{section}." in name]  # such as model.network.nf for network.nf
    return difflib.get_close_matches(key, inside or shallow or deeper, n=1, cutoff=0.0)


def _children(parent: str, known: list[str]) -> set[str]:
    """Names of the values and sections directly below the section `parent`; none for the top level."""
    prefix = parent + "."
    return {name.removeprefix(prefix).split(".")[0] for name in known if parent and name.startswith(prefix)}


def build(annotation: object, value: object, key: str) -> object:
    """`value` as an instance of `annotation`; raises UserError naming the full dotted key.

    Converts int to float, and a whole float to int. A bool is never a number, and a text is never converted.
    """
    inner, optional = without_none(annotation)
    if value is None and optional:
        return None
    if value == MISSING:
        raise _no_value(key)
    if dataclasses.is_dataclass(inner):
        return _build_dataclass(inner, value, key)
    if typing.get_origin(inner) is list:
        if not isinstance(value, list):
            raise _wrong_type(annotation, value, key)
        (item,) = typing.get_args(inner)
        return [build(item, element, f"{key}[{index}]") for index, element in enumerate(value)]
    return _build_scalar(inner, annotation, value, key)


def _build_dataclass(kind: type, value: object, key: str) -> object:
    if not isinstance(value, dict):
        raise UserError(f"{key}: {value!r} is not allowed; it is a section, set one of its keys")
    hints = _field_types(kind)
    for name in value:
        if name not in hints:
            raise unknown_key(f"{key}.{name}", leaf_types({key: kind}), "the YAML files")
    arguments = {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            arguments[field.name] = build(hints[field.name], value[field.name], f"{key}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _no_value(f"{key}.{field.name}")
    try:
        return kind(**arguments)
    except FieldError as error:
        raise UserError(f"{key}.{error}") from error
    except UserError:
        raise
    except ValueError as error:  # raised by a class of a plugin
        raise UserError(f"{key}: {error}") from error


def _field_types(kind: type) -> dict[str, object]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _build_scalar(inner: object, annotation: object, value: object, key: str) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if inner is float and number and not math.isnan(value):
        return float(value)
    if inner in (int, Number) and number and math.isfinite(value) and value == int(value):
        if abs(value) >= LARGEST_INT:
            raise UserError(f"{key}: {value} is not allowed; it must be less than 2^63")
        return int(value)
    if inner == Number and number and math.isfinite(value):
        return float(value)
    if inner in (bool, str) and isinstance(value, inner):
        return value
    if inner not in (int, float, Number, bool, str):
        raise TypeError(f"{key}: settings cannot have the type {inner}")
    raise _wrong_type(annotation, value, key)


def _no_value(key: str) -> UserError:
    return UserError(f"{key} has no value: no YAML file sets it; give {key}=<value>")


def _wrong_type(annotation: object, value: object, key: str) -> UserError:
    hint = ""
    is_list = typing.get_origin(without_none(annotation)[0]) is list
    if is_list and re.fullmatch(r"[\w./, -]+", str(value)):  # the brackets were forgotten
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        hint = f"; write {key}=[{','.join(parts)}]"
    return UserError(f"{key}: {value!r} is not allowed; it must be {_describe(annotation)}{hint}")


def _describe(annotation: object) -> str:
    inner, optional = without_none(annotation)
    if typing.get_origin(inner) is list:
        text = f"a list of {_describe(typing.get_args(inner)[0])}, written [a,b]"
    else:
        text = "int or float" if inner == Number else getattr(inner, "__name__", str(inner))
    return f"{text} or null" if optional else text
