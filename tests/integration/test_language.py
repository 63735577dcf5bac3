"""The product and its documents use the field's terms: words of a dialect of ours do not come back."""

import re

import pytest

from tests.helpers.tiny import ROOT


# pattern -> the field's term
DIALECT = {
    r"\bpictures?\b": "image",
    r"\bdata sets?\b": "dataset",
    r"\b(?:these|joined|several|published|own) sets\b": "datasets",
    r"\bfigures?\b": "metrics",
    r"\bwhole numbers?\b": "integer",
    r"\bhalf numbers\b|\bnumbers of 16 bits\b": "dtype or precision",
    r"\b(?:the|a|its|no|peak|initial) rates?\b": "learning rate",
    r"\bupdates?\b(?!\()": "optimizer step",
    r"\b(?:a|the|no|one|their) places? (?:to|in|of|for|that|where)\b": "slot, index or folder",
    r"\bvisit(?:s|ed)?\b": "sample",
    r"\bcells?\b": "bucket, or position of a feature map",
    r"\bdeals?\b|\bdealt\b": "shard",
    r"\bdraw = (?!ImageDraw)|\bdraw\.(?:choice|random|integers|shuffle|permutation|normal)\b": "rng",
    r"\bwords = (?:sys\.)?argv\b|\bwords of (?:a|the) command\b": "argv",
    r"\b(?:is|are|be) no (?!longer\b|such\b)": "is not a",
    r"\b(?:lays?|laid|lies?) over\b": "merge",
    r"\bfind_\w*faults?\b|\bfinds? fault\b": "validate",
    r"\b(?:holds?|is) (?:a |no )?collectives?\b(?<!is a collective)": "is a collective",
    r"\bnewest whole\b": "latest valid checkpoint",
    r"\bneeds?\b|\bneeded\b": "require",
    r"\bwhole (?:checkpoint|folder|file|run|set|split|dataset|manifest|cache)s?\b": "complete",
    r"\bcontrols\b": "blind baselines",
    r"\b(?:an?|one) \w+ a (?:sentence|phrase|process|picture|image|step)\b": "one ... per ...",
}
# names that users have in their files and calls, and paths in examples of their folders
KEPT = re.compile(
    r"your_own_pictures|DATA=data SET|num_pictures|elem_id|picture\[|\[picture|`picture`|\bpicture: |\"picture\""
    r"|if not picture\b"
    r"|someone/pictures|pictures/|picture is not None|path = picture|picture \(`|picture = gr"
    r"|[Tt]here (?:is|are) no |predictions of the demo|has no "
    # cells of tables in text, and the verb
    r"|the cell (?:of a table|even in code)|Format rows of cells|join\(cells\)|for cells in|cells = "
    r"|update `config"
)
FOLDERS = ("data_scripts", "modeling_reftr", "training_reftr", "reftr_cli", "demo", "docs", "recipes")
TEST_NAMES = [
    (path, name)
    for path in sorted((ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
]
NAME_DIALECT = re.compile(
    r"^test_(?:a|an|the|what|where|that)_|_(?:pictures?|figures|beside|cells?|whole_numbers?|updates?)(?:_|$)|_is_no_(?!longer)"
)
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
def test_file_uses_terms_of_the_glossary(path):
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
        "ten updates of the weights",
        "a place in the list",
        "draw = np.random.default_rng(0)",
        "three things need this",
        "the whole checkpoint",
        "find_faults(rows)",
        "the cells of a feature map",
    ],
)
def test_dialect_words_are_found(text):
    assert find_dialect(text)


def test_names_of_tests_say_unit_condition_and_outcome():
    assert [f"{path.name}: {name}" for path, name in TEST_NAMES if NAME_DIALECT.search(name)] == []


@pytest.mark.parametrize("name", ["test_a_bad_line_is_named", "test_kept_pictures", "test_what_cannot_be_streamed"])
def test_dialect_in_names_is_found(name):
    assert NAME_DIALECT.search(name)
