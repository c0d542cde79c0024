"""Plain English: words that readers do not search for stay out of names, comments, docstrings, messages and pages."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BANNED = re.compile(
    r"\b(tell|tells|telling|told|mend|mends|mended|mending|anew|surely|whoever|nobody|of its own|of their own)\b",
    re.IGNORECASE,
)
PAGES = (".md", ".yaml", ".yml", ".toml", ".sql", ".example", ".service", ".bicep")


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT)
    return [name for name in listed.stdout.split() if (ROOT / name).is_file()]


def texts_of(name: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield a Python file's comments, docstrings, messages and names of functions, with their lines."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name.replace("_", " ")
        # A string of the product is a message; one of a test is data, unless it is a docstring.
        is_text = not name.startswith("tests/") or id(node) in docstrings
        if is_text and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from enumerate(node.value.splitlines(), node.lineno)


def banned_in(name: str) -> list[str]:
    source = (ROOT / name).read_text()
    lines = texts_of(name, source) if name.endswith(".py") else enumerate(source.splitlines(), 1)
    return [
        f"{name}:{line}: {found[0]!r} in {text.strip()[:90]!r}"
        for line, text in lines
        for found in BANNED.finditer(text)
    ]


@pytest.mark.parametrize("folder", ["receiver", "submitter", "tests", "infra", ""])
def test_no_private_language(folder: str) -> None:
    names = [
        name
        for name in tracked()
        if (name.startswith(f"{folder}/") if folder else "/" not in name)
        and (name.endswith((".py", *PAGES)) or name in ("Makefile", "infra/Dockerfile"))
        and name != "tests/house/test_words.py"
    ]
    found = [line for name in names for line in banned_in(name)]
    assert not found, "\n".join(found)


def test_a_banned_word_is_found_wherever_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    source = '"""It is told."""\n\n\ndef mend_it() -> str:  # anew\n    return "nobody"\n'
    (tmp_path / "one.py").write_text(source)
    assert len(banned_in("one.py")) == 4
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/one.py").write_text(source)
    assert len(banned_in("tests/one.py")) == 3  # a test's own strings are data
