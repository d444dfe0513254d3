"""The fenced blocks of the documentation, each with what stands in the comment before it."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>not run|settings only): (?P<reason>[^\n]+?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block: ``mark`` is ``not run``, ``settings only`` or empty; ``heading`` is the section that it stands in."""

    page: str
    line: int
    heading: str
    language: str
    text: str
    mark: str
    reason: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """The lines of a shell block without comments, continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def pages() -> list[Path]:
    """README, CONTRIBUTING and the pages of docs/, but not those that are generated from the code."""
    docs = sorted((REPOSITORY / "docs").rglob("*.md"))
    written = [path for path in docs if not {"_build", "generated"} & set(path.parts)]
    return [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *written]


def blocks_of(path: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text, blocks = path.read_text(), []
    for match in _BLOCK.finditer(text):
        before = text[: match.start("indent")]
        headings = re.findall(r"^#+ (.+)$", before, re.MULTILINE)
        blocks.append(
            Block(
                page=str(path.relative_to(REPOSITORY)),
                line=before.count("\n") + 1,
                heading=headings[-1] if headings else "",
                language=match["language"],
                text=textwrap.dedent(match["text"]),
                mark=match["mark"] or "",
                reason=match["reason"] or "",
            )
        )
    return blocks
