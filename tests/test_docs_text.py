"""The documents against the code: keys, messages and links that they name are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from pydantic import TypeAdapter

from ows_ds import config
from ows_ds.config.reference import reference

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDER = (  # of what messages are filled with
    r"\bstep-N\b|\[[^\]]*\]|\.\.\.|'[^']*'|[()]|\b[A-Z]+\b|\b\d[\d.]*|\b(?:nan|inf|None)\b|RankMismatchError: "
)
OTHERS = ("address already in use", "Timed out waiting")  # an operating system's words, torch's


def test_the_reference_is_what_the_code_says() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert text == reference(), "write it again: python -m ows_ds.config.reference docs/reference.md"


def test_the_reference_has_every_key() -> None:
    rows = re.findall(r"^\| `([\w.]+)`( \*)? \|", reference(), re.MULTILINE)
    assert [key for key, _ in rows] == list(config.recipe_keys())
    starred = {key for key, star in rows if star}
    assert "train.resume" in starred
    assert "optim.rank" not in starred


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_that_are_named_exist(page: Path) -> None:
    hints = config.recipe_keys()
    quoted = re.findall(r"`(\w+\.\w+)(?:: ([^`]+))?`", page.read_text(encoding="utf-8"))
    for key, value in quoted:
        section, name = key.split(".")
        if section not in config.Recipe.model_fields or name in (
            "json",
            "py",
            "png",
            "parameters",
            "encode_rows",
            "RunLog",
        ):
            continue
        assert key in hints
        if value and "..." not in value and "is invalid" not in value and "[:N]" not in value:
            field = hints[key]
            TypeAdapter(Annotated[field.annotation, field]).validate_python(yaml.safe_load(value))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as they are made of them: lower case, words joined by dashes, no other signs."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


# ---- messages


@cache
def said() -> str:
    """All texts in the code: strings with what is put into them left out, and scripts."""
    texts = []
    for path in (ROOT / "ows_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    texts += [path.read_text(encoding="utf-8") for path in (ROOT / "ows_ds").rglob("*.sh")]
    return " ".join("\n".join(texts).split())


def parts(message: str) -> list[str]:
    """What of a quoted message must stand in the code: no values, names in capitals or numbers."""
    found = re.split(rf"{PLACEHOLDER}| is invalid: ", message)
    return [part.strip(" :,;") for part in found if len(part.strip(" :,;").split()) > 1]


def quoted() -> list[str]:
    """The messages that docs/troubleshooting.md is about: those in headings, and in the table of ends."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    lines = re.findall(r"^### .*$", text, re.MULTILINE) + re.findall(r"^\| (`.*?) \| ", text, re.MULTILINE)
    return [message for line in lines for message in re.findall(r"`([^`]+)`", line)]


def test_there_are_messages() -> None:
    assert len([message for message in quoted() if parts(message)]) > 40
    assert parts("optim.rank: '...' is invalid: expected at most N, the smaller side of NAME") == [
        "expected at most",
        "the smaller side of",
    ]


@pytest.mark.parametrize("message", quoted())
def test_messages_that_are_explained_exist(message: str) -> None:
    for part in parts(message):
        assert part in said() or part in OTHERS, part


def test_a_message_that_is_none_is_found_out() -> None:
    assert "the moon is not in its place" not in said()
