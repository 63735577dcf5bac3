"""
Test the builders as loading scripts of datasets 3.6, which copies a script and its imported siblings to another
folder: the rows must equal those of `data_scripts.load`. `tests/helpers/layout_<builder module>.py` generates the
files in the project's environment ($PROJECT_PYTHON), because some of them are written by torch.
"""

import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


MODULES = tempfile.TemporaryDirectory()
os.environ["HF_MODULES_CACHE"] = MODULES.name  # the folder for copies of scripts, read when datasets is imported

import datasets  # noqa: E402


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import data_scripts  # noqa: E402 -- requires the path above


SMALL = {name: {"num_train": 3, "num_validation": 2, "num_test": 2} for name in ("shapes", "cutouts")}


def module_of(source) -> str:
    return source.builder.__module__.rpartition(".")[2]


def layout_of(source) -> str | None:
    """Return the name of the layout module of a source: `flickr30k` for the builder module `flickr30k_entities`."""
    names = [path.stem.removeprefix("layout_") for path in (ROOT / "tests" / "helpers").glob("layout_*.py")]
    return max((name for name in names if module_of(source).startswith(name)), key=len, default=None)


def make_files(source, folder: Path):
    """Generate the files of a source in the project's environment."""
    layout = layout_of(source)
    code = (
        f"import inspect, pathlib, tests.helpers.layout_{layout} as layout; make = layout.make_{layout}; "
        f"named = {{'name': {source.name!r}}} if 'name' in inspect.signature(make).parameters else {{}}; "
        f"make(pathlib.Path({str(folder)!r}), **named)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([os.environ["PROJECT_PYTHON"], "-c", code], env=environment, check=True)


SOURCES = [source for source in data_scripts.SOURCES.values() if source.builder.__module__.startswith("data_scripts.")]


def test_datasets_is_version_3_6():
    assert datasets.__version__.startswith("3.6.")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_every_source_has_files(source):
    assert module_of(source) in SMALL or layout_of(source)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
@pytest.mark.parametrize("num_proc", [None, 2])
def test_script_gives_rows_of_load(source, num_proc, tmp_path):
    flags = SMALL.get(module_of(source), {})
    data_dir = None
    if layout_of(source):
        data_dir = str(tmp_path / "files")
        make_files(source, tmp_path / "files")
    loaded = datasets.load_dataset(
        str(Path(inspect.getfile(source.builder))),
        source.config_name,
        data_dir=data_dir,
        cache_dir=str(tmp_path / "cache"),
        num_proc=num_proc,
        trust_remote_code=True,
        **flags,
    )
    expected = data_scripts.load(source.name, data_dir=data_dir, cache_dir=str(tmp_path / "other"), **flags)
    assert set(loaded) == set(expected) <= set(source.splits)
    for split, rows in loaded.items():
        assert rows.features == data_scripts.FEATURES
        raw, wanted = (
            part.cast_column("image", datasets.Image(decode=False)).to_list() for part in (rows, expected[split])
        )
        assert raw == wanted
