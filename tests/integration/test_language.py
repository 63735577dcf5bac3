"""The product and its documents use the field's terms: words of a dialect of ours do not come back."""

import re

import pytest

from tests.helpers.tiny import ROOT


# pattern -> the field's term
DIALECT = {
    r"\bpictures?\b": "image",
    r"\bdata sets?\b": "dataset",
    r"\bfigures? (?:of|by|from|are|is)\b": "metrics",
    r"\bwhole numbers?\b": "integer",
    r"\b(?:is|are|be) no (?!longer\b|such\b)": "is not a",
    r"\b(?:lays?|laid|lies?) over\b": "merge",
    r"\bholds? (?:a |no )?collectives?\b": "is a collective",
    r"\bnewest whole\b": "latest valid checkpoint",
    r"\ba box a phrase\b|\ba query a phrase\b|\ban? \w+ a (?:sentence|phrase|process|picture)\b": "one ... per ...",
}
# names that users have in their files and calls, and paths in examples of their folders
KEPT = re.compile(
    r"your_own_pictures|DATA=data SET|num_pictures|elem_id|picture\[|\[picture|`picture`|\bpicture: |\"picture\""
    r"|if not picture\b"
    r"|someone/pictures|pictures/|picture is not None|path = picture|picture \(`|picture = gr"
    r"|[Tt]here (?:is|are) no |predictions of the demo|has no "
)
FOLDERS = ("data_scripts", "modeling_reftr", "training_reftr", "reftr_cli", "demo", "docs", "recipes")
FILES = [
    *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*")) if path.suffix in (".py", ".md", ".yaml")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "train_reftr.py")),
]


def find_dialect(text: str) -> list[str]:
    """Return the dialect words of a text, each with its line number and the term to use."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        for pattern, term in DIALECT.items():
            for match in re.finditer(pattern, KEPT.sub("", line), re.IGNORECASE):
                found.append(f"line {number}: {match[0]!r}, write {term!r}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_is_written_in_the_field_s_terms(path):
    assert find_dialect(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "Return a picture of each row.",
        "It is no model.",
        "Nothing here holds a collective.",
        "a whole number of pixels",
        "the figures of a run",
        "a box a phrase",
    ],
)
def test_dialect_is_found(text):
    assert find_dialect(text)
