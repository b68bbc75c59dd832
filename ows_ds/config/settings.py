"""The base of all settings: strict, frozen pydantic models, read by `parse`, which names every mistake at once.

A model states each key's type, range and default, and below it its meaning. `Settings.contradictions` holds the checks
across keys.
"""

import copy
import difflib
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import annotated_types as limits
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from ows_ds.errors import UserError, raise_all

MOST = 2**31 - 1  # of any number of things
K = TypeVar("K")
MayChange = Annotated[K, Field(json_schema_extra={"may_change_on_resume": True})]
"""A key whose value may be another one when a run is resumed."""


def as_number(value: object) -> object:
    """A number that is text, as YAML 1.1 reads 3e-4."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@dataclass(frozen=True)
class Expected:
    """What a key expects, in words, where its type does not say it well. Stands in `Annotated`."""

    words: str


@dataclass(frozen=True)
class Planned:
    """Stands in `Annotated` of a key that may be ``auto``, and is where it is absent: it is chosen for the machine and
    the run (`ows_ds.planner.fit`). The field's default is what counts until then; see `Recipe.auto`.
    """


Number = Annotated[float, BeforeValidator(as_number)]
# the ranges first: after a validator they would not be in the JSON schema
Positive = Annotated[float, Field(gt=0), BeforeValidator(as_number)]
NotNegative = Annotated[float, Field(ge=0), BeforeValidator(as_number)]
Share = Annotated[float, Field(ge=0, lt=1), BeforeValidator(as_number)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


class Wrong(NamedTuple):
    """A value that does not go with others. key: relative to the model. compared: the keys it was compared with."""

    key: str
    right: str
    compared: tuple[str, ...] = ()


class Settings(BaseModel):
    """Settings of one thing. Unknown keys, wrong types and NaN are refused; `parse` says so in our words."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_by_name=True,
        use_attribute_docstrings=True,
    )
    renamed: ClassVar[Mapping[str, str]] = {}
    """Former names of keys -> what to say instead."""
    meanings: ClassVar[Mapping[str, str]] = {}
    """Names by which other tools mean a key, of this section or another -> the key."""

    def contradictions(self) -> Iterator[Wrong]:
        """Values that are right alone but not together."""
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _at_home(cls, tree: Any) -> Any:
        """Paths that begin with ~, which shells leave as they are in many places."""
        if not isinstance(tree, Mapping):
            return tree
        return {k: os.path.expanduser(v) if isinstance(v, str) and v.startswith("~") else v for k, v in tree.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if found := list(self.contradictions()):
            text = "; ".join(f"{wrong.key}: {wrong.right}" for wrong in found)
            raise PydanticCustomError("contradictions", "{text}", {"text": text, "found": found, "made": self})
        return self


T = TypeVar("T", bound=Settings)
Also = Callable[[T], Iterable[Wrong]]


def parse(kind: type[T], tree: Mapping[str, Any], prefix: str = "", also: Also[T] | None = None) -> T:
    """The settings that ``tree`` describes; what is absent takes its default.

    prefix: before each key in messages; ``--`` also writes keys as options. also: further checks, such as of files.

    Raises UserError with every mistake: also those across keys, unless a key they compare is wrong already.
    """
    errors: dict[str, UserError] = {}

    def add(key: str, value: object, right: str) -> None:
        shown = f"--{key.replace('_', '-')}" if prefix == "--" else f"{prefix}{key}"
        if not any(_related(known, key) for known in errors):
            errors[key] = UserError(shown, value, right)

    def add_wrong(wrong: Wrong, made: Settings, section: str = "") -> list[str]:
        key, *others = (f"{section}{name}" for name in (wrong.key, *wrong.compared))
        if any(_related(known, name) for known in errors for name in (key, *others)):
            return [key, *others]
        add(key, _value(made, wrong.key), wrong.right)
        return [key]

    made: T | None = None
    rest: Any = tree
    for _ in range(5):  # what is wrong is taken out, until the checks across keys have something to look at
        try:
            made = kind.model_validate(rest)
            break
        except ValidationError as error:
            dropped: list[str] = []
            for one in error.errors(include_url=False):
                if one["type"] == "contradictions":
                    section = "".join(f"{part}." for part in one["loc"])
                    found = one["ctx"]
                    for wrong in found["found"]:
                        dropped += add_wrong(wrong, found["made"], section)
                else:
                    key, right, value = _explain(kind, rest, one, prefix)
                    add(key, value, right)
                    dropped.append(key)
            rest = copy.deepcopy(rest) if isinstance(rest, Mapping) else {}
            for key in dropped:
                _drop(kind, rest, key)
    if made is not None and also is not None:
        for wrong in also(made):
            add_wrong(wrong, made)
    raise_all(errors.values())
    assert made is not None
    return made


def _related(known: str, key: str) -> bool:
    """Whether a key is ``known``, or a part of it or the whole."""
    return known == key or known.startswith((f"{key}.", f"{key}[")) or key.startswith((f"{known}.", f"{known}["))


def _explain(kind: type[Settings], tree: Any, error: Any, prefix: str) -> tuple[str, str, object]:
    """Key, what would be right, and value of one of pydantic's errors."""
    key, value, field = "", tree, None
    for part in error["loc"]:
        fields = fields_of(kind)
        if error["type"] in ("extra_forbidden", "invalid_key") and part is error["loc"][-1]:
            near = meant(str(part), kind.meanings, prefix) or unknown(
                str(part), fields, kind.renamed, f"{prefix}{key}." if key else prefix
            )
            return f"{key}.{part}" if key else str(part), near, error["input"]
        if isinstance(part, int):
            key, value = f"{key}[{part}]", value[part] if isinstance(value, list | tuple) else value
        elif part in fields:
            field = fields[part]
            key = f"{key}.{part}" if key else part
            value = value.get(part) if isinstance(value, Mapping) else None
            inner = model_in(field.annotation)
            if inner is None:
                break
            kind = inner
    if field is None:
        return key, "expected keys and values", value
    if value is None and field.is_required():
        return key, f"it is required: expected {words(field)}", None
    if error["type"] == "model_type" and part in fields:
        return key, "expected a section: lines of `key: value`, indented", value
    if error["type"] == "finite_number":
        return key, "expected a finite number", value
    most = error.get("ctx", {}).get("le", error.get("ctx", {}).get("lt"))
    if most is not None and most >= MOST:  # `words` does not tell of it
        return key, f"expected a number {'of at most' if 'le' in error['ctx'] else 'below'} {most:g}", value
    return key, f"expected {words(field)}", value


def meant(name: str, meanings: Mapping[str, str], prefix: str = "") -> str | None:
    """What to say of a key by which another tool means one of ours; None where it is none."""
    ours = meanings.get(name.rpartition(".")[2].replace("-", "_"))
    return None if ours is None else f"there is no such key; {prefix}{ours} is what is meant"


def unknown(name: str, known: Iterable[str], renamed: Mapping[str, str], prefix: str = "") -> str:
    """What to say of a key that does not exist: its new name, or the nearest of those that are ``known``."""
    if name in renamed:
        return renamed[name].format(prefix=prefix)
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    rest = f"is {prefix}{near[0]} meant?" if near else f"the keys are {', '.join(f'{prefix}{name}' for name in names)}"
    return f"there is no such key; {rest}"


def _drop(kind: type[Settings], tree: Any, key: str) -> None:
    """Take a key out of ``tree``; a required text becomes ``?``."""
    *sections, last = key.partition("[")[0].split(".")
    for at, section in enumerate(sections):
        if (rest := ".".join([*sections[at:], last])) in tree:  # an unknown key with dots in its name
            del tree[rest]
            return
        if section not in fields_of(kind):
            return
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree, kind = tree[section], model_in(fields_of(kind)[section].annotation) or kind
    field = fields_of(kind).get(last)
    tree.pop(last, None)
    if field is not None and field.is_required() and field.annotation is str:
        tree[last] = "?"


def _value(made: Settings, key: str) -> object:
    value: Any = made
    for name in key.replace("[", ".").replace("]", "").split("."):
        value = value[int(name)] if isinstance(value, list) else getattr(value, name)
    return value


# ------------------------------------------------------------------ what a key is, in words


def fields_of(kind: type[Settings]) -> dict[str, FieldInfo]:
    """The keys of a model as users write them."""
    return {field.alias or name: field for name, field in kind.model_fields.items()}


def model_in(hint: Any) -> type[Settings] | None:
    """The model that a key's value, or each of its items, is."""
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        return hint if issubclass(hint, Settings) else None
    return next(filter(None, map(model_in, typing.get_args(hint))), None)


def kinds_of(hint: Any) -> tuple[set[Any], bool]:
    """The types that a key takes, a choice among words being text; whether it also takes null."""
    if typing.get_origin(hint) is Annotated:
        return kinds_of(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = [kinds_of(part) for part in typing.get_args(hint) if part is not types.NoneType]
        return set().union(*(kinds for kinds, _ in parts)), types.NoneType in typing.get_args(hint)
    return {str if typing.get_origin(hint) is Literal else typing.get_origin(hint) or hint}, False


def words(field: FieldInfo) -> str:
    """What a key expects: "an integer of at least 1"."""
    found = _words(field.annotation, field.metadata)
    if not is_planned(field):
        return found
    return found.replace("one of ", "one of auto, ", 1) if found.startswith("one of ") else f"{found}, or auto"


def is_planned(field: FieldInfo) -> bool:
    """Whether a key may be ``auto`` in the sense of `Planned`."""
    return any(isinstance(one, Planned) for one in field.metadata)


def default_of(field: FieldInfo) -> Any:
    """What help and pages say that a key is where it is absent."""
    return "auto" if is_planned(field) else field.default


def _words(hint: Any, about: Iterable[Any]) -> str:
    about, arguments = list(about), typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        inner = [m for one in arguments[1:] for m in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return _words(arguments[0], [*inner, *about])
    kinds = [kind for kind in arguments if kind is not types.NoneType]
    if len(kinds) < len(arguments):
        one = _words(kinds[0], about)
        return f"{one}{',' * (' ' in one)} or null"
    if found := [one.words for one in about if isinstance(one, Expected)]:
        return found[-1]
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(hint) is list:
        if typing.get_origin(arguments[0]) is Literal:
            return f"a list of some of {', '.join(typing.get_args(arguments[0]))}"
        return f"a list of {'texts' if arguments[0] is str else 'numbers'}"
    name = {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(hint, "keys and values")
    return f"{name}{_range(about)}"


def _range(about: Iterable[Any]) -> str:
    said = []
    for one in about:
        if isinstance(one, limits.Ge):
            said.append(f"of at least {one.ge}")
        elif isinstance(one, limits.Gt):
            said.append(f"above {one.gt}")
        elif isinstance(one, limits.Lt) and one.lt < MOST:  # type: ignore[operator]
            said.append(f"below {one.lt}")
        elif isinstance(one, limits.Le) and one.le < MOST:  # type: ignore[operator]
            said.append(f"at most {one.le}")
    return " " + " and ".join(said) if said else ""
