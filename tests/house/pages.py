"""Reads the Markdown pages: code blocks, headings with their anchors, links, and the commands in shell examples."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import click

from receiver.cli.main import main

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_PUNCTUATION = ";()<>|&\n"


class Block(NamedTuple):
    """One fenced code block."""

    page: str
    language: str
    text: str


class Link(NamedTuple):
    """One link. `line` is the whole line that it is in."""

    page: str
    text: str
    target: str
    line: str


def read_pages() -> dict[str, str]:
    """Return every tracked Markdown page by its path."""
    listed = subprocess.run(["git", "ls-files", "*.md"], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name: (ROOT / name).read_text() for name in listed.stdout.split() if (ROOT / name).is_file()}


def blocks_of(page: str, text: str) -> list[Block]:
    """Return the fenced code blocks of a page."""
    return [Block(page, language, dedent(code)) for _, language, code in _FENCE.findall(text)]


def prose_of(text: str) -> str:
    """Return a page without its fenced code blocks."""
    return _FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    """Return the code spans of a page's prose."""
    return _CODE.findall(prose_of(text))


def links_of(page: str, text: str) -> list[Link]:
    """Return the links of a page's prose."""
    return [
        Link(page, label, target, line) for line in prose_of(text).splitlines() for label, target in _LINK.findall(line)
    ]


def headings_of(text: str, level: int | None = None) -> dict[str, str]:
    """Return the headings of a page (of one level, or all) by the anchors that GitHub gives them."""
    anchors: dict[str, str] = {}
    wanted: dict[str, str] = {}
    for marks, title in re.findall(r"^(#+) (.+)$", prose_of(text), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", _LINK.sub(r"\1", title).lower()).replace(" ", "-")
        repeats = sum(re.fullmatch(rf"{re.escape(plain)}(-\d+)?", anchor) is not None for anchor in anchors)
        anchor = f"{plain}-{repeats}" if repeats else plain
        anchors[anchor] = title
        if level in (None, len(marks)):
            wanted[anchor] = title
    return wanted


def section(text: str, title: str) -> str:
    """Return the section with this heading, subsections included."""
    found = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert found is not None, f"no section {title!r}"
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def first_column(table: str) -> list[str]:
    """Return the first cells of a section's table rows, without its head."""
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    return [row.split("|")[1].strip() for row in rows[1:]]


def calls_of(script: str) -> Iterator[list[str]]:
    """Yield the arguments of each call of kling-relay in a shell script: directly, as a module or in a container."""
    without_comments = re.sub(r"(^|[ \t])#.*$", "", script.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(without_comments, posix=True, punctuation_chars=_PUNCTUATION)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    for token in [*lexer, "\n"]:
        if token.strip(_PUNCTUATION):
            words.append(token)
            continue
        call = _call(words)
        if call is not None:
            yield call
        words = []


def _call(words: list[str]) -> list[str] | None:
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    if not words:
        return None
    if words[0].rpartition("/")[2] == "kling-relay":
        return words[1:]
    if "-m" in words and words[words.index("-m") + 1] == "receiver":
        return words[words.index("-m") + 2 :]
    if words[:2] == ["docker", "run"]:
        image = next((n for n, word in enumerate(words) if re.search(r"(^|/)kling-relay(:|$)", word)), None)
        return None if image is None else words[image + 1 :]
    return None


def check_call(arguments: list[str], *, is_complete: bool) -> None:
    """Raise click.UsageError when a call names a command or an option that does not exist.

    A call that is complete is parsed as the command line does it: required options, choices, ranges.
    """
    command: click.Command = main
    context = click.Context(main, info_name="kling-relay")
    rest = arguments
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None, name
        command = found
        context = click.Context(command, parent=context, info_name=name)
    known = {"--help", "-h", *(opt for one in command.params for opt in (*one.opts, *one.secondary_opts))}
    for word in rest:
        option = word.partition("=")[0]
        if option.startswith("-") and option not in known:
            raise click.UsageError(f"no option {option} of {context.command_path}")
    if is_complete and not isinstance(command, click.Group):
        command.make_context(context.info_name, list(rest), parent=context.parent)


def commands(group: click.Group = main, path: str = "kling-relay") -> Iterator[str]:
    """Yield every command of the command line, with its groups."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}"
