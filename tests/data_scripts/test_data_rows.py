"""Importers and builders do the same work for each row, however many there are."""

import cProfile
import json

import pytest

from benchmarks.data_rows import CASES, make_files, make_images, run
from benchmarks.quote_results import RESULTS, table_of_rows


COUNTS = (100, 200, 400)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    make_images(folder, max(COUNTS))
    return folder


def count_calls(function, *args) -> int:
    """Return the number of function calls of a call, which, unlike its time, is always the same."""
    profile = cProfile.Profile()
    profile.runcall(function, *args)
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_number_of_calls_grows_with_the_rows(tmp_path, images, kind, name):
    calls = []
    for number, count in enumerate((COUNTS[0], *COUNTS)):  # a first one for what is done once
        folder = tmp_path / str(number)
        make_files(folder, kind, name, count)
        calls.append(count_calls(run, folder, images, kind, name))
    _, few, some, many = calls
    # twice as many more rows take twice as many more calls; 2.28 times with one more call per pair of rows
    assert 1.8 < (many - some) / (some - few) < 2.2


def test_committed_result_is_linear_in_time_and_memory():
    """From 10,000 to 100,000 rows, the time and the memory of each further row are those from 1,000 to 10,000."""
    rows = json.loads((RESULTS / "data_rows.json").read_text())["rows"]
    found = {(row["case"], row["rows"]): row for row in rows}
    assert {case for case, _ in found} == {f"{kind}: {name}" for kind, name in CASES}
    for case in dict.fromkeys(case for case, _ in found):
        for what in ("seconds", "megabytes"):
            few, some, many = (found[case, count][what] for count in (1_000, 10_000, 100_000))
            # of both, a part does not depend on the number of rows
            assert many < 13 * some, (case, what)
            assert some < 13 * few, (case, what)


def test_result_is_quoted_with_its_growth():
    rows = [
        {"case": "import: coco", "rows": count, "seconds": count / 10_000, "megabytes": count / 1000}
        for count in (1000, 10_000, 100_000)
    ]
    table = table_of_rows({"machine": {"python": "3.11", "cores": 2}, "rows": rows})
    assert "| import: coco | 0.1 | 1.0 | 10.0 | 10.0 | 1 | 10 | 100 | 10.0 |" in table
    assert "python 3.11, cores 2" in table
