"""Mutation lists match code and tests, and survivors without a reason are reported."""

import re
import sys
from collections import Counter

import pytest

from tests.helpers.tiny import ROOT


sys.path.insert(0, str(ROOT / "tests" / "mutation"))
import run as mutation


@pytest.fixture(scope="module")
def mutations():
    return mutation.load_mutations()


def test_mutation_lists_cover_all_packages(mutations):
    packages = Counter(entry["file"].partition("/")[0] for entry in mutations)
    assert len(mutations) >= 150
    assert {"modeling_reftr", "training_reftr", "data_scripts", "demo", "train_reftr.py"} <= set(packages)
    assert any("/metrics/" in entry["file"] for entry in mutations)


def test_survivor_without_reason_is_reported(tmp_path, capsys, monkeypatch):
    entry = {
        "file": "LICENSE",
        "old": "Apache License",
        "new": "x",
        "breaks": "y",
        "tests": ["tests/training_reftr/test_lock.py"],
    }
    path = tmp_path / "results.json"
    monkeypatch.setattr(mutation, "load_mutations", lambda lists: [entry])
    mutation.save({mutation.identity(entry): {"outcome": "survived", "by": "", "seconds": 1.0}}, path)
    assert mutation.main(["--list", "all", "--results", str(path)]) == 1
    assert "unexplained:\nLICENSE: y" in capsys.readouterr().out


def test_mutation_table_matches_lists_and_explains_survivors(mutations):
    lines = mutation.TABLE.read_text().splitlines()
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines if line.startswith("| `")]
    assert all(outcome in ("killed", "survived") for _, _, outcome, _ in rows)
    assert Counter((file, breaks) for file, breaks, _, _ in rows) == Counter(
        (f"`{entry['file']}`", mutation.to_cell(entry["breaks"])) for entry in mutations
    )
    survived = {(file, breaks) for file, breaks, outcome, _ in rows if outcome == "survived"}
    assert survived == {
        (f"`{entry['file']}`", mutation.to_cell(entry["breaks"])) for entry in mutations if "survives" in entry
    }
