"""Rules for builder modules, which keep them loadable in every supported version of datasets."""

import ast
import subprocess
import sys

import pytest

from data_scripts import SOURCES
from tests.helpers.tiny import ROOT


MODULES = sorted(
    {source.builder.__module__ for source in SOURCES.values() if source.builder.__module__.startswith("data_scripts.")}
)


def siblings(name: str) -> set[str]:
    tree = ast.parse((ROOT / "data_scripts" / f"{name}.py").read_text())
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}


@pytest.mark.parametrize("module", MODULES)
def test_builder_module_imports_every_sibling_directly(module):
    """datasets 3.6 copies the siblings that a script imports, but not the imports of those siblings."""
    direct = siblings(module.rpartition(".")[2])
    for sibling in direct:
        assert siblings(sibling) <= direct, f"{module} must import from .{siblings(sibling) - direct} as well"


@pytest.mark.parametrize("module", MODULES)
def test_builder_module_has_no_comment_after_sibling_import(module):
    """datasets 3.6 reads a comment there as the URL of a file to download."""
    lines = (ROOT / "data_scripts" / f"{module.rpartition('.')[2]}.py").read_text().splitlines()
    assert not [line for line in lines if line.startswith("from .") and "#" in line]


def test_data_scripts_import_loads_no_torch_or_model():
    code = (
        "import sys, data_scripts; sys.exit(' '.join({'torch', 'transformers', 'modeling_reftr'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not result.stderr.strip()
