"""What installing the project puts where."""

import configparser
import re
import zipfile

from conftest import ROOT


def test_a_wheel_holds_no_vague_top_level_names(run, tmp_path):
    import shutil

    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".venv", ".legacy", ".git", "runs", "*.egg-info", "build")
    )
    run("-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, source, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    names = {name for name in names if not name.endswith(".dist-info")}
    assert names == {"modeling_reftr", "data_scripts", "training_reftr", "train_reftr.py"}


def test_every_package_that_is_imported_is_declared():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    declared = {re.split(r"[<>=]", line)[0].strip() for line in settings["options"]["install_requires"].split("\n")}
    required = {"torch", "torchvision", "transformers", "datasets", "accelerate", "evaluate", "timm", "pycocotools"}
    assert required | {"safetensors"} <= declared
    imported = set()
    for folder in ("modeling_reftr", "data_scripts", "training_reftr", "."):
        for path in (ROOT / folder).glob("*.py"):
            imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), flags=re.MULTILINE))
    names = {"PIL": "pillow", "yaml": "pyyaml"}
    own = {"modeling_reftr", "data_scripts", "training_reftr", "train_reftr"}
    import sys

    outside = {names.get(name, name) for name in imported - own if name not in sys.stdlib_module_names}
    assert outside <= declared
