"""Reading the pages of the documentation: their blocks, commands, links, anchors, and the keys that they name."""

from __future__ import annotations

import dataclasses
import re
import shlex
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    "docker/README.md",
    "benchmarks/README.md",
]
SHELLS = ("bash", "sh", "console", "shell")
_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its first line of text, counted from 1."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def page_text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, text: str | None = None) -> list[Block]:
    """All fenced blocks of a page."""
    text = page_text(page) if text is None else text
    return [
        Block(page, text[: found.start("text")].count("\n") + 1, found["language"], found["text"])
        for found in _BLOCK.finditer(text)
    ]


def all_blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in these languages."""
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


def commands(block: Block) -> list[str]:
    """The commands of a block of shell: a line each, those that go on joined, without comments and prompts."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    lines = (without_comment(line.removeprefix("$ ")) for line in joined.splitlines())
    if block.language == "console":  # what does not begin with a prompt was printed
        lines = (without_comment(line[2:]) for line in joined.splitlines() if line.startswith("$ "))
    return [line for line in lines if line]


def without_comment(line: str) -> str:
    """A command without the comment at its end, its quotes as they are."""
    quote = None
    for place, character in enumerate(line):
        if quote:
            quote = None if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and (place == 0 or line[place - 1].isspace()):
            return line[:place].strip()
    return line.strip()


def words(command: str) -> list[str]:
    return shlex.split(command)


def prose(page: str, text: str | None = None) -> str:
    """A page without its fenced blocks."""
    return _BLOCK.sub("", page_text(page) if text is None else text)


def inline_code(page: str) -> list[str]:
    """What stands between single backticks, on one line each; a table's `\\|` is a `|`."""
    found = re.finditer(r"(?<!`)`([^`]+)`(?!`)", prose(page))
    return [" ".join(span[1].split()).replace("\\|", "|") for span in found]


def links(page: str, text: str | None = None) -> list[str]:
    """Targets of a page's links and pictures."""
    shown = re.sub(r"(?<!`)`[^`]+`(?!`)", "code", prose(page, text))
    return [found[1] for found in re.finditer(r"\]\(([^()\s]+)\)", shown)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings: lower case, no punctuation, spaces as hyphens."""
    names: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", _BLOCK.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in names:
            number += 1
        names.add(name)
    return names


def broken_links(page: str, text: str | None = None) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of it."""
    broken = []
    text = page_text(page) if text is None else text
    for link in links(page, text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if not target.exists():
            broken.append(link)
        elif anchor and anchor not in anchors(text if not file else target.read_text(encoding="utf-8")):
            broken.append(link)
    return broken


def wrong_key(dotted: str, model: type[BaseModel]) -> str | None:
    """The part of a dotted key, such as export.quantization.kind, that the schema does not have; None: it has all.

    A block that holds anything, such as `training`, is of TrainingArguments; of a list, the key is of its items.
    """
    return _wrong_key(dotted.split("."), [model])


def _wrong_key(parts: list[str], models: list[type[BaseModel]]) -> str | None:
    if not parts:
        return None
    name, *rest = parts
    fields = [model.model_fields[name] for model in models if name in model.model_fields]
    if not fields:
        kinds = [
            model for model in models if "kind" in model.model_fields and model.model_fields["kind"].default == name
        ]
        return _wrong_key(rest, kinds) if kinds else name  # objectives.minilm: the entry of this kind
    if name == "training" and rest and not [inner for field in fields for inner in _models(field.annotation)]:
        from transformers import TrainingArguments

        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        return next((part for part in rest if part not in known), None)
    return _wrong_key(rest, [inner for field in fields for inner in _models(field.annotation)]) if rest else None


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not typing.get_args(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)
