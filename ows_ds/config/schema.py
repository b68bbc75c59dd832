"""The JSON schema of a recipe, for editors: ranges, choices, defaults and help texts of every key."""

import json
from typing import Any

from ows_ds.config.recipe import Recipe, planned_keys, sections


def schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a recipe file. Checks across keys are not part of it."""
    found = json.loads(json.dumps(Recipe.model_json_schema()).replace("\\n", " "))  # descriptions of several lines
    for name, section in found["properties"].items():  # a section may be empty, its lines commented out
        if name not in found.get("required", ()):
            found["properties"][name] = {"anyOf": [{"$ref": section["$ref"]}, {"type": "null"}]}
    for key in planned_keys():
        section, _, name = key.partition(".")
        kind = found["$defs"][sections()[section].__name__]["properties"]
        kind[name] = with_auto(kind[name])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "Recipe of ows-ds"}


def with_auto(key: dict[str, Any]) -> dict[str, Any]:
    """What a key may be, and ``auto``, which it is where it is absent."""
    if "enum" in key:
        return {**key, "enum": ["auto", *key["enum"]], "default": "auto"}
    about: dict[str, Any] = {name: key[name] for name in ("title", "description") if name in key}
    plain = {name: value for name, value in key.items() if name not in (*about, "default")}
    return {**about, "anyOf": [plain, {"const": "auto"}], "default": "auto"}


def schema_text() -> str:
    """The schema as a file has it."""
    return json.dumps(schema(), indent=2) + "\n"
