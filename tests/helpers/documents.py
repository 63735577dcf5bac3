"""
Find and run the blocks of documents: `python tests/helpers/documents.py docs/serve.md` runs all blocks of a document
in the current folder, in order, Bash blocks with bash and Python blocks in one namespace.

An HTML comment above a block, which also informs its editors, changes what happens to it:

    <!-- not run: the reason -->     the block is checked, but not run
    <!-- file: mine/train.jsonl -->  the block is written to this file
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


FENCE = re.compile(r"(?:^<!-- ([\w ]+): ([^\n]+?) -->\n)?^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUN = ("bash", "python")
# language -> the marks that its blocks may have; blocks of data must be files for some command
MARKS = {
    **dict.fromkeys(RUN, (None, "not run")),
    **dict.fromkeys(("json", "yaml"), ("file",)),
    **dict.fromkeys(("bibtex", "mermaid", "text"), (None,)),
}


@dataclass(frozen=True)
class Block:
    """A block of `document` whose code begins at `line`, with `mark` and `note` from the comment above it."""

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
    Return all blocks of a document.

    Raises:
        ValueError: if a block would be ignored, because its language or its mark is unknown, or because it is not
            fenced by three backticks at the beginning of a line.
    """
    text = document.read_text(encoding="utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        mark, note, language, code = match.groups()
        block = Block(document, text.count("\n", 0, match.start(4)) + 1, language, code, mark, note)
        if mark not in MARKS.get(language, ()):
            raise ValueError(f"{block}: a block of {language!r} with the mark {mark!r} is not run; see {__file__}.")
        blocks.append(block)
    fences = len(re.findall(r"^\s*(?:```|~~~)", text, flags=re.MULTILINE))
    if fences != 2 * len(blocks):
        raise ValueError(f"{document.name} has {fences} fences, but {len(blocks)} blocks could be parsed.")
    return blocks


def commands_of(block: Block) -> list[str]:
    """Return the commands of a Bash block, one per line, with continued lines joined."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run(blocks: list[Block]):
    """
    Run blocks in the current folder.

    Raises:
        RuntimeError: if a Bash block fails. Exceptions of Python blocks are raised with the document's line numbers.
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
            padding = "\n" * (block.line - 1)  # tracebacks show the document's line numbers
            exec(compile(padding + block.code, str(block.document), "exec"), names)


if __name__ == "__main__":
    run(blocks_of(Path(sys.argv[1]).resolve()))
