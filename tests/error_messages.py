"""What the package raises for its users, read from its source; and what docs/troubleshooting.md says of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from documentation import ROOT, page_text

PACKAGE = ROOT / "distillabse"
# ValueError and TypeError are what the schema and the encoder tell users of wrong values.
ERRORS = {
    "ConfigurationError", "InputError", "StorageError", "TrainingError", "GateFailed", "Interrupted",
    "DistillabseError", "ValueError", "TypeError",
}  # fmt: skip
# Functions whose texts are messages that another one puts together.
PARTS = {"environment.py": "_problems", "settings.py": "_explain"}
HOLE = "…"


@dataclass(frozen=True)
class Message:
    """A message with `…` for what is put in; `place` is file and line."""

    place: str
    text: str


def raised_messages(package: Path = PACKAGE) -> list[Message]:
    """Every message that the package can raise as one of `ERRORS`."""
    return [
        Message(f"{path.relative_to(package)}:{line}", text)
        for path in sorted(package.rglob("*.py"))
        for line, text in _messages(path, ast.parse(path.read_text(encoding="utf-8")))
        if path.name != "errors.py"
    ]


def _messages(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    names = _named_texts(tree)
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS):
            continue
        given = node.args[0] if node.args else ast.Constant("")
        if isinstance(given, ast.Call) and isinstance(given.func, ast.Name) and given.func.id in functions:
            returned = [made for made in ast.walk(functions[given.func.id]) if isinstance(made, ast.Return)]
            for made in returned:
                if made.value is not None:
                    yield made.lineno, spelt(made.value, names)
        else:
            yield node.lineno, spelt(given, names)
    if part := PARTS.get(path.name):
        for node in ast.walk(functions[part]):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.JoinedStr):
                yield node.lineno, spelt(node.value, names)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
                yield node.lineno, spelt(node.args[0], names)


def _named_texts(tree: ast.Module) -> dict[str, str]:
    """Texts that have a name in a module, such as a remedy that several messages end with."""
    return {
        node.targets[0].id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }  # fmt: skip


def spelt(node: ast.expr, names: dict[str, str]) -> str:
    """A text as it is written in the source, with `…` for every hole."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(spelt(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return spelt(node.value, names) if isinstance(node.value, ast.Name) else HOLE
    if isinstance(node, ast.Name):
        return names.get(node.id, HOLE)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return spelt(node.left, names) + spelt(node.right, names)
    if isinstance(node, ast.IfExp):
        return f"{spelt(node.body, names)} {spelt(node.orelse, names)}"
    return HOLE


def says_something(message: Message) -> bool:
    """Whether any of its words are its own; else it passes on another message, which is listed itself."""
    return re.search(r"\w{2}", message.text) is not None


def phrases(text: str | None = None) -> list[str]:
    """The fixed parts of messages in the first column of the tables of the page."""
    page = page_text("docs/troubleshooting.md") if text is None else text
    rows = [line for line in page.splitlines() if line.startswith("| ``") or line.startswith("| `")]
    cells = [re.split(r"(?<!\\)\|", row)[1] for row in rows]
    return [
        (found[1] or found[2]).replace("\\|", "|").strip()
        for cell in cells
        for found in re.finditer(r"``(.+?)``|`(.+?)`", cell)
    ]


def covers(phrase: str, message: Message) -> bool:
    """Whether all parts of a phrase, which `…` parts, are in a message in their order."""
    pattern = ".*?".join(re.escape(part.strip()) for part in phrase.split(HOLE))
    return re.search(pattern, message.text, re.DOTALL) is not None
