"""The code of Markdown pages: blocks with what stands above them, and shell lines as words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>not run|long): (?P<why>[^>]+) -->\n)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<body>.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: `bash`, `python`, `json`, `yaml` or `text`.
        title: the file that the block stands for; "" if none.
        mark: `not run` or `long`, for which the line above gives a reason; "" if it is to be run.
        line: where it begins.
    """

    language: str
    title: str
    mark: str
    body: str
    line: int


@dataclass(frozen=True)
class Line:
    """A command of a shell block: its words, and the exit status that its comment promises."""

    words: list[str]
    status: int


def pages() -> list[str]:
    """README.md, docs/ and the pages of benchmarks and models, but no reports that commands have written."""
    found = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "easyedit_mdm").rglob("*.md")]
    found += [path for path in (ROOT / "benchmarks").rglob("*.md") if path.name != "report.md"]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def blocks_of(text: str) -> list[Block]:
    """Every fenced block, in order."""
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        parts = {name: match[name] or "" for name in ("language", "title", "mark", "body")}
        found.append(Block(**parts, line=line))
    assert len(found) * 2 == len(re.findall(r"^```", text, re.M)), "a block that is not closed, or indented"
    return found


def shell_lines(body: str) -> Iterator[Line]:
    """The commands of a block: continued lines joined, `&&` apart, assignments in front left out."""
    for line in re.sub(r"\\\n\s*", "", body).splitlines():
        promised = re.search(r"#.*exit status (\d)", line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.wordchars += "$={}[],:%@+"
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word not in ("&&", "|", ";"):
                words.append(word)
                continue
            while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
                words.pop(0)
            if words:
                yield Line(words, int(promised[1]) if promised else 0)
            words = []
