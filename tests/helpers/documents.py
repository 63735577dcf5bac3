"""
Find and run the blocks of documents: `python tests/helpers/documents.py docs/serve.md` runs every block of a document
in the current folder, one after the other: Bash with bash, Python in one namespace.

A block is run by its language, unless an HTML comment above it says otherwise, to be read by whoever edits it:

    <!-- not run: the reason -->     is checked alone
    <!-- file: mine/train.jsonl -->  is what this file holds from here on
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


FENCE = re.compile(r"(?:^<!-- ([\w ]+): ([^\n]+?) -->\n)?^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUN = ("bash", "python")
# language -> the marks that a block of it may have; what is data must be a file of some command
MARKS = {
    **dict.fromkeys(RUN, (None, "not run")),
    **dict.fromkeys(("json", "yaml"), ("file",)),
    **dict.fromkeys(("bibtex", "mermaid", "text"), (None,)),
}


@dataclass(frozen=True)
class Block:
    """A block of `document` whose code begins at `line`; `mark` and `note` are those of the comment above it."""

    document: Path
    line: int
    language: str
    code: str
    mark: str | None
    note: str | None

    @property
    def is_run(self) -> bool:
        return self.language in RUN and self.mark is None

    def __str__(self):
        return f"{self.document.name} line {self.line}"


def blocks_of(document: Path) -> list[Block]:
    """
    All blocks of a document.

    Raises:
        ValueError: for one that would be passed over: of a language that nothing runs, with a mark that means nothing,
            or fenced in another way than by three backticks at the beginning of a line.
    """
    text = document.read_text(encoding="utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        mark, note, language, code = match.groups()
        block = Block(document, text.count("\n", 0, match.start(4)) + 1, language, code, mark, note)
        if mark not in MARKS.get(language, ()):
            raise ValueError(f"{block}: nothing runs a block of {language!r} that is marked {mark!r}; see {__file__}.")
        blocks.append(block)
    fences = len(re.findall(r"^\s*(?:```|~~~)", text, flags=re.MULTILINE))
    if fences != 2 * len(blocks):
        raise ValueError(f"{document.name} has {fences} fences, and {len(blocks)} blocks that can be read.")
    return blocks


def commands_of(block: Block) -> list[str]:
    """The commands of a block of Bash, one a line, lines that go on joined."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run(blocks: list[Block]):
    """
    Run blocks in this folder.

    Raises:
        RuntimeError: names the first block of Bash that failed. What Python raises comes with the document's lines.
    """
    names = {"__name__": "__main__"}
    for block in blocks:
        sys.stdout.write(f"--- {block}\n")
        sys.stdout.flush()
        if block.mark == "file":
            Path(block.note).parent.mkdir(parents=True, exist_ok=True)
            Path(block.note).write_text(block.code, encoding="utf-8")
        elif block.is_run and block.language == "bash":
            if subprocess.run(["bash", "-euxo", "pipefail", "-c", block.code]).returncode:
                raise RuntimeError(f"{block} failed.")
        elif block.is_run:
            padding = "\n" * (block.line - 1)  # errors are told by the document's lines
            exec(compile(padding + block.code, str(block.document), "exec"), names)


if __name__ == "__main__":
    run(blocks_of(Path(sys.argv[1]).resolve()))
