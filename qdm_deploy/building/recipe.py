"""Recipes as TOML: by name or from a file, over a base, and written out whole."""

import json
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from qdm_deploy.artifacts.recipe import Recipe
from qdm_deploy.errors import InputError

__all__ = ["list_recipes", "read_recipe", "recipe_of", "write_recipe"]

_FOLDER = Path(__file__).parents[1] / "data" / "recipes"
_SHIPPED = ("default", "fast", "best", "w4a8", "ptq4dm", "q-diffusion", "modelopt-int8")
_WIDTH = 118


def list_recipes() -> dict[str, str]:
    """What each shipped recipe is for, by its name."""
    return {name: str(_content(_FOLDER / f"{name}.toml")["description"]) for name in _SHIPPED}


def read_recipe(source: str | Path) -> Recipe:
    """A shipped recipe by its name, or the one in a TOML file.

    A file may say ``base = "NAME"`` (or another file's path, relative to its own folder): what it leaves out is then as
    in that recipe, and its layer rules stand behind that recipe's. Without a base, it is as in the recipe "default".

    Raises:
        InputError: no such recipe or file, no TOML, or a key or value that is not known.
    """
    path = _path_of(str(source), Path())
    return recipe_of(_document(path, ()), _shown(path))


def recipe_of(document: Mapping[str, Any], where: str = "the recipe") -> Recipe:
    """A recipe from the content of a TOML file.

    Raises:
        InputError: a key or value that is not known, with what is.
    """
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{where}: {_problem(error)}") from error


def write_recipe(recipe: Recipe) -> str:
    """A recipe as TOML, every key with what it means; ``read_recipe`` reads the same recipe back."""
    lines: list[str] = []
    sections: list[tuple[str, BaseModel]] = []
    for key, field in Recipe.model_fields.items():
        value = getattr(recipe, key)
        if isinstance(value, BaseModel):
            sections.append((f"[{key}]", value))
        elif isinstance(value, tuple):
            sections += [(f"[[{key}]]", rule) for rule in value]
        else:
            lines += _line(key, field, value)
    for heading, section in sections:
        lines += ["", heading]
        for key, field in type(section).model_fields.items():
            value = getattr(section, key)
            if value is not None:
                lines += _line(key, field, value)
    return "\n".join(lines) + "\n"


def _line(key: str, field: FieldInfo, value: object) -> Iterator[str]:
    # The strings, numbers and booleans of JSON are those of TOML.
    line, meaning = f"{key} = {json.dumps(value, ensure_ascii=False)}", field.description or ""
    if len(line) + 4 + len(meaning) <= _WIDTH:
        yield f"{line}  # {meaning}"
    else:
        yield from textwrap.wrap(meaning, _WIDTH - 2, initial_indent="# ", subsequent_indent="# ")
        yield line


def _path_of(source: str, folder: Path) -> Path:
    if source in _SHIPPED:
        return _FOLDER / f"{source}.toml"
    path = folder / source
    if path.is_file():
        return path
    close = get_close_matches(source.lower(), _SHIPPED, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise InputError(
        f"there is no recipe {source!r}{hint}, and no file of that name; choose one of {', '.join(_SHIPPED)}, or give "
        "the path of a TOML file"
    )


def _shown(path: Path) -> str:
    return f"the recipe {path.stem}" if path.parent == _FOLDER else str(path)


def _document(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a file over that of its base, without what is no choice: its description."""
    content = _content(path)
    content.pop("description", None)
    base = content.pop("base", None)
    modelopt = content.get("from_modelopt")
    if isinstance(modelopt, str) and (path.parent / modelopt).is_file():
        content["from_modelopt"] = str(path.parent / modelopt)
    if base is None:
        return content
    if not isinstance(base, str):
        raise InputError(f"{_shown(path)}: base is {base!r}; give the name of a recipe, or the path of a TOML file")
    below = _path_of(base, path.parent)
    if any(below.samefile(other) for other in (path, *above)):
        raise InputError(f"{_shown(path)}: its base {base} leads back to it; end the chain with a shipped recipe")
    found = _document(below, (path, *above))
    for key, value in content.items():
        under = found.get(key)
        if isinstance(value, dict) and isinstance(under, dict):
            found[key] = {**under, **value}
        elif isinstance(value, list) and isinstance(under, list):
            found[key] = [*under, *value]
        else:
            found[key] = value
    return found


def _content(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{_shown(path)} cannot be read as TOML: {error}") from error


def _problem(error: ValidationError) -> str:
    """The first thing that is wrong: which key, what was given, what is allowed."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    place, model = "", Recipe
    field: FieldInfo | None = None
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
            continue
        if part not in model.model_fields:
            break
        field = model.model_fields[part]
        place += f".{part}" if place else part
        model = _section_of(field.annotation) or model
    if first["type"] == "extra_forbidden":
        return _unknown_key(place, str(first["loc"][-1]), model)
    if first["type"] == "missing":
        return f"{place} is missing; give {_allowed(field)}"
    return f"{place} is {json.dumps(first['input'], default=str)}; allowed: {_allowed(field)}"


def _unknown_key(place: str, key: str, model: type[BaseModel]) -> str:
    keys = list(model.model_fields)
    close = get_close_matches(key, keys, n=1) or [
        f"{name}.{key}"
        for name, field in model.model_fields.items()
        if key in getattr(_section_of(field.annotation), "model_fields", ())
    ]
    hint = f" (did you mean {close[0]}?)" if close else ""
    known = ", ".join(["base", "description", *keys] if model is Recipe else keys)
    return f"{place}.{key} is no key{hint}; known there: {known}" if place else f"{key} is no key{hint}; known: {known}"


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, or holds many of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [item for item in get_args(annotation) if item is not Ellipsis]
    return _section_of(inner[0]) if get_origin(annotation) is tuple else None


def _allowed(field: FieldInfo | None) -> str:
    """The values of a field, in words."""
    return "another value" if field is None else _values(field.annotation, tuple(field.metadata))


def _values(annotation: Any, bounds: tuple[Any, ...]) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if origin in (Union, UnionType):
        return " or ".join(_values(item, bounds) for item in get_args(annotation) if item is not NoneType)
    if hasattr(annotation, "__metadata__"):
        constraints = [item for each in annotation.__metadata__ for item in getattr(each, "metadata", [each])]
        return _values(annotation.__origin__, tuple(constraints))
    if annotation in (int, float):
        ends = {name: getattr(item, name) for item in bounds for name in ("ge", "gt", "le") if hasattr(item, name)}
        what = "a whole number" if annotation is int else "a number"
        low = f" from {ends['ge']:g}" if "ge" in ends else f" above {ends['gt']:g}" if "gt" in ends else ""
        return what + low + (f" to {ends['le']:g}" if "le" in ends else "")
    if annotation is bool:
        return "true, false"
    if annotation is str:
        return "text, not empty"
    return "a table" if _section_of(annotation) and get_origin(annotation) is not tuple else "tables"
