"""The JSON schema of a recipe, for editors: ranges, choices, defaults and help texts of every key."""

import json
from typing import Any

from ows_ds.config.recipe import Recipe


def schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a recipe file. Checks across keys are not part of it."""
    found = json.loads(json.dumps(Recipe.model_json_schema()).replace("\\n", " "))  # descriptions of several lines
    for name, section in found["properties"].items():  # a section may be empty, its lines commented out
        if name not in found.get("required", ()):
            found["properties"][name] = {"anyOf": [{"$ref": section["$ref"]}, {"type": "null"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "Recipe of ows-ds"}


def schema_text() -> str:
    """The schema as a file has it."""
    return json.dumps(schema(), indent=2) + "\n"
