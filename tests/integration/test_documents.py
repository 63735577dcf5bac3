"""Documents are true: every command and snippet runs, and metrics equal the committed results."""

import configparser
import contextlib
import functools
import importlib.util
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from nbclient import NotebookClient
from torch.distributed.run import get_args_parser as torchrun_parser

import data_scripts
import modeling_reftr
from benchmarks.newcomer import first_commands
from benchmarks.quote_results import DOCUMENTS, NOTEBOOK, name_of_repository, quote, results_in
from data_scripts.building import flags_of
from tests.helpers.documents import FENCE, blocks_of, commands_of
from tests.helpers.layout_documents import environment_of, make_published_sizes, make_user_folder
from tests.helpers.local_hub import Hub
from tests.helpers.tiny import ROOT
from training_reftr.arguments import parse_arguments


# expected output and files of the blocks of a document
EXPECTED = {
    "README.md": (
        ["'phrase': 'the green star'"],
        ["out.png", "answers.png", "runs/demo/predictions.png", "runs/refcoco_masks/report.md"],
    ),
    "docs/train_refcoco.md": (
        ["120,624", "of val [1.0, 2.0, 31.0, 22.0]", "The dry run succeeded. An epoch of"],
        ["samples.png", "runs/refcoco_r50_masks_pretrained/report.md", "held_out.json", "exported/README.md"],
    ),
    "docs/your_own_pictures.md": (
        ['"phrase": "the blue car"', '"image": "mine/3.jpg"'],
        [
            *("samples.png", "runs/mine/report.md", "out.png", "answered/00002_2.png", "answers.jsonl"),
            *("mine_coco/train.json", "mine_odvg/images/1.jpg", "results.json", "tasks.json"),
        ],
    ),
    "docs/presence.md": (
        ["none, one or several: pr_f1_iou@0.5"],
        ["runs/shapes_presence/presence.png", "runs/demo_presence/report.md", "runs/demo_several/predictions.jsonl"],
    ),
    "docs/cutouts.md": (
        ["cutouts: 0 errors, 0 warnings.", '"phrase": "the mug left of the apple"'],
        ["samples.png", "runs/objects/report.md", "out.png"],
    ),
    "docs/published_checkpoints.md": (
        [
            "337 weights taken, left: ['query_embed.weight']",
            "Compared with the published metrics in runs/reproduce/refcoco_unc/report.md",
        ],
        ["back.pth", "runs/reproduce/refcoco_unc/report.md", "runs/report/report.md"],
    ),
    "docs/recipes.md": (
        ["decoder_layers: 3", "integer_boxes: true"],
        ["runs/small/report.md", "runs/masks/model.safetensors", "runs/mine/metrics.jsonl"],
    ),
    "docs/trainer.md": (["eval_mask_mean_iou_resized"], ["runs/trainer/model.safetensors"]),
    "docs/many_gpus.md": ([], ["runs/two/model.safetensors", "runs/two_report/report.md"]),
    "docs/serve.md": (
        ["torch.Size([1, 100, 200])", "'score': 1.0, 'label': 'the red circle'", '"phrase": "the star"'],
        ["answers.png", "runs/demo-onnx", "runs/demo-onnx-captions"],
    ),
    "docs/evaluate.md": (["\n0.8\n"], ["runs/report/predictions.jsonl", "runs/report/visualizations/test"]),
    "docs/hub.md": ([], ["exported/README.md", "runs/mine/README.md"]),
    "docs/how_it_works.md": (["pred_masks (1, 1, 120, 160)"], []),
}
PACKAGES = ("modeling_reftr", "data_scripts", "training_reftr", "reftr_cli")
PUSHED = {
    ("model", "someone/reftr-shapes"),
    ("model", "someone/reftr-mine"),
    ("dataset", "someone/pictures"),
    ("space", "someone/reftr-shapes-demo"),
}
TRAINING = ("train_reftr.py", "recipes/slurm.sbatch")
COMMANDS = re.compile(r"`((?:reftr|make|python|accelerate|torchrun|sbatch) [^`]+)`")
by_name = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.fixture(scope="module")
def user_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    make_user_folder(folder, tokenizer)
    return folder


@pytest.mark.slow
@by_name
def test_document_blocks_run(document, user_folder, tmp_path):
    name = str(document.relative_to(ROOT))
    if not any(block.is_run for block in blocks_of(document)):
        assert name not in EXPECTED
        return
    printed, files = EXPECTED[name]
    folder = tmp_path / "user"
    shutil.copytree(user_folder, folder, symlinks=True)
    if name == "docs/published_checkpoints.md":
        make_published_sizes(folder)
    with Hub() as hub:
        # only this document uses the Hub
        environment = hub.environment("hf_write", tmp_path / "home") if name == "docs/hub.md" else {}
        result = subprocess.run(
            [sys.executable, ROOT / "tests" / "helpers" / "documents.py", document],
            cwd=folder,
            env=environment_of(folder) | environment,
            capture_output=True,
            text=True,
            timeout=1500,
        )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert set(hub.repositories) == (PUSHED if environment else set())
    for text in printed:
        assert text in result.stdout
    for file in files:
        assert (folder / file).exists(), file
    if name == "docs/how_it_works.md":
        for name, shape in re.findall(r"^(\S.*?) (\([\d, ]+\))$", result.stdout, flags=re.MULTILINE):
            assert f"| {name} | {shape} |" in document.read_text()


def test_failing_block_is_named_with_its_line(tmp_path):
    for code, line, error in (
        ("```bash\ntrue\nfalse | true\n```", 2, "failed"),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```", 6, "assert x == 2"),
    ):
        (tmp_path / "page.md").write_text(code)
        command = [sys.executable, ROOT / "tests" / "helpers" / "documents.py", "page.md"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert result.returncode != 0
        assert f"line {line}" in result.stderr
        assert error in result.stderr


@pytest.mark.parametrize(
    "text",
    [
        "```\nreftr --help\n```",
        "```sh\nreftr --help\n```",
        "```console\n$ reftr --help\n```",
        '```json\n{"a": 1}\n```',
        "  ```bash\n  reftr --help\n  ```",
        "~~~bash\nreftr --help\n~~~",
        "<!-- skip: no time -->\n```bash\nreftr --help\n```",
    ],
)
def test_block_without_runner_is_refused(text, tmp_path):
    (tmp_path / "page.md").write_text(f"# Page\n\n{text}\n")
    with pytest.raises(ValueError, match=r"page\.md"):
        blocks_of(tmp_path / "page.md")


def test_blocks_of_reads_marks(tmp_path):
    text = "<!-- file: a/b.yaml -->\n```yaml\na: 1\n```\n\n<!-- not run: a cluster -->\n```bash\nsbatch x\n```\n"
    (tmp_path / "page.md").write_text(text)
    first, second = blocks_of(tmp_path / "page.md")
    assert (first.mark, first.note, first.line, first.code) == ("file", "a/b.yaml", 3, "a: 1\n")
    assert (second.mark, second.note, second.is_run) == ("not run", "a cluster", False)


# the notebook


@pytest.mark.slow
def test_notebook_runs(user_folder, tmp_path, monkeypatch):
    folder = tmp_path / "user"
    shutil.copytree(user_folder, folder, symlinks=True)
    (folder / "docs").mkdir()
    for name, value in environment_of(folder).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder / "docs"}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 3
    assert (folder / "runs" / "quick_start" / "report.md").exists()


def test_notebook_has_no_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_notebook_opens_in_colab_and_installs_project_first():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first, install = notebook.cells[:2]
    path = NOTEBOOK.relative_to(ROOT).as_posix()
    address = f"https://colab.research.google.com/github/{name_of_repository()}/blob/main/{path}"
    assert f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})" in first.source
    assert install.cell_type == "code"
    assert install.source.startswith("import importlib.util\n")
    assert f'%pip install --quiet "git+https://github.com/{name_of_repository()}"' in install.source
    assert notebook.metadata["colab"]["name"] == NOTEBOOK.name


# the README


ORDER = [
    "# RefTR for transformers",
    "referring expression comprehension (REC), referring expression segmentation (RES) and phrase grounding",
    "benchmarks/results/demo/predictions.png",
    "img.shields.io",
    "make demo",
    'pip install "git+https://github.com/',
    ".from_pretrained(",
    "<!-- summary results -->",
    "## Train on RefCOCO",
    "## Documentation",
    "## Status",
    "## Licence and citation",
]
MAX_WORDS = 900
OTHER_REPOSITORIES = {
    *("BryanPlummer/flickr30k_entities", "ChenyunWu/PhraseCutDataset", "henghuiding/gRefCOCO", "lichengunc/refer"),
    *("ubc-vision/RefTR", "zyang-ur/ReSC"),
}


def words_of(text: str) -> list[str]:
    """
    Return the words that a rendered document shows outside code blocks and tables: between spaces, with a letter or a
    digit. Comments, images and the addresses of links are not shown.
    """
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)
    text = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    return [word for word in text.split() if re.search(r"\w", word)]


def test_words_are_counted_as_rendered():
    text = "# A title\n\n![alt](a.png) [two words](b.md) · and\n\n| a | table |\n\n```bash\ncode\n```\n<!-- no -->\n"
    assert words_of(text) == ["A", "title", "two", "words", "and"]


def test_readme_answers_questions_of_visitors_in_order():
    text = " ".join((ROOT / "README.md").read_text().split())
    positions = [text.find(" ".join(part.split())) for part in ORDER]
    assert -1 not in positions, ORDER[positions.index(-1)]
    assert positions == sorted(positions)


def test_readme_stays_short():
    assert 0 < len(words_of((ROOT / "README.md").read_text())) < MAX_WORDS


def test_readme_begins_with_two_commands_and_six_lines_of_python():
    text = (ROOT / "README.md").read_text()
    assert len(first_commands(text)) == 2
    python = [block.code for block in blocks_of(ROOT / "README.md") if block.language == "python"]
    assert [len([line for line in code.splitlines() if line]) for code in python] == [6]


def test_badges_of_readme_match_setup():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (transformers,) = re.findall(r"^transformers(.*)$", setup["options"]["install_requires"], re.MULTILINE)
    found = dict(re.findall(r"img\.shields\.io/badge/(\w+)-(.+)-blue\)", (ROOT / "README.md").read_text()))
    assert {name: unquote(text).replace("--", "-").replace("_", " ") for name, text in found.items()} == {
        "licence": setup["metadata"]["license"],
        "python": setup["options"]["python_requires"],
        "transformers": transformers,
        "tests": "make test",  # how they are run, since no service reports whether they pass
    }


def test_status_of_readme_has_three_lines_and_details():
    status = (ROOT / "README.md").read_text().split("## Status\n")[1].split("\n## ")[0]
    assert status.count("\n- ") == 3
    assert "](docs/status.md)" in status


def test_address_of_repository_is_the_same_everywhere():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["url"] == f"https://github.com/{name_of_repository()}"
    paths = [*DOCUMENTS, NOTEBOOK, ROOT / "CITATION.cff"]
    paths += [path for folder in ("demo", *PACKAGES) for path in (ROOT / folder).rglob("*.py")]
    found = {}
    for path in paths:
        names = re.findall(r"github(?:\.com)?/([\w.-]+/[\w-]+)", path.read_text(encoding="utf-8"))
        found |= {path: set(names) - OTHER_REPOSITORIES} if set(names) - OTHER_REPOSITORIES else {}
    assert set().union(*found.values()) == {name_of_repository()}
    assert {ROOT / "README.md", NOTEBOOK} <= found.keys()


def test_quote_writes_address_of_setup_into_commands_and_links():
    text = 'pip install "git+https://github.com/a/b.c" https://colab.research.google.com/github/a/b/blob/main/c.ipynb'
    name = name_of_repository()
    address = f"https://colab.research.google.com/github/{name}/blob/main/c.ipynb"
    assert quote(text) == f'pip install "git+https://github.com/{name}" {address}'
    assert quote("https://github.com/ubc-vision/RefTR") == "https://github.com/ubc-vision/RefTR"


# a newcomer


@pytest.mark.slow
def test_newcomer_benchmark_gets_answers(user_folder, tmp_path, run):
    """Run the newcomer benchmark in an existing environment with a training of two steps."""
    argv = ("--environment", user_folder / ".venv", "--max_steps", 2, "--output", tmp_path / "result.json")
    run("benchmarks/newcomer.py", *argv, timeout=900)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["seconds"].keys() == {"clone", "install", "demo", "answer", "all"}
    assert [answer["phrase"] for answer in result["answers"]] == ["the red square", "the green star"]
    assert all(0 <= answer["iou"] <= 1 for answer in result["answers"])


# versions


def test_version_is_same_in_package_changelog_and_citation():
    version = modeling_reftr.__version__
    # unreleased changes stand above the latest version
    assert re.search(r"^## (\d\S*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


def test_citation_file_matches_readme():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    (entry,) = [block.code for block in blocks_of(ROOT / "README.md") if block.language == "bibtex"]
    assert f"title={{{paper['title']}}}" in entry
    assert f"year={{{paper['year']}}}" in entry


def test_workflow_runs_ci_script_and_known_make_targets():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert (ROOT / ".ci" / "run").exists()
    assert ".ci/run" in commands
    for command in commands:
        if command.startswith("make "):
            check_make(command.split()[1:])
    assert workflow[True].keys() == {"push", "pull_request"}  # YAML 1.1 reads the key "on" as true


# commands, checked without running them


@functools.cache
def help_of(*argv) -> str:
    """Return the help of a command of `reftr`."""
    output, before = io.StringIO(), sys.argv
    sys.argv = ["reftr", *argv, "--help"]
    try:
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            runpy.run_module("modeling_reftr", run_name="__main__")
    finally:
        sys.argv = before
    return output.getvalue()


def names_of_options(argv) -> list[str]:
    return [word.partition("=")[0] for word in argv if word.startswith("--")]


def check_settings(argv):
    """Parse the settings of the training script."""
    parse_arguments([word for word in argv if word not in ("--print_config", "--help")])


def check_reftr(argv):
    if not argv or argv[0] == "--help":
        assert "usage" in help_of()
    elif argv[0] == "train":
        check_settings(argv[1:])
    else:
        depth = 2 if argv[0] == "data" else 1
        text = help_of(*argv[:depth])
        assert "usage" in text, argv
        known = set(re.findall(r"--\w+", text))
        if argv[0] == "data" and len(argv) > 2 and argv[2] in data_scripts.SOURCES:
            known |= {f"--{flag}" for flag in flags_of(data_scripts.SOURCES[argv[2]])}
        assert known >= set(names_of_options(argv)), argv


def check_launch(program, argv):
    """Parse the arguments of a launcher and of the script; return the config file of accelerate."""
    if program == "sbatch":
        check_settings(argv[argv.index("recipes/slurm.sbatch") + 1 :])
        return None
    if program == "accelerate":
        assert argv.pop(0) == "launch"
    script = "reftr_cli" if "reftr_cli" in argv else "train_reftr.py"
    rest = argv[argv.index(script) + 1 :]
    launch = (launch_command_parser() if program == "accelerate" else torchrun_parser()).parse_args(argv)
    assert (launch.training_script, launch.training_script_args) == (script, rest)
    assert bool(launch.module) == (script == "reftr_cli")
    (check_reftr if launch.module else check_settings)(rest)
    return getattr(launch, "config_file", None)


def check_make(argv):
    makefile = (ROOT / "Makefile").read_text()
    for word in argv:
        name, is_variable, _ = word.partition("=")
        assert f"$({name})" in makefile if is_variable else re.search(rf"^{name}:", makefile, flags=re.MULTILINE), word


def check_python(argv):
    if argv[0] == "-c":
        compile(argv[1], "-c", "exec")
    elif argv[0] in TRAINING:
        check_settings(argv[1:])
    elif argv[0] == "-m":
        assert importlib.util.find_spec(argv[1])
    else:
        text = (ROOT / argv[0]).read_text()
        for option in names_of_options(argv):
            assert f'"{option}"' in text, option


def check(command: str) -> Counter:
    """Check that the program of a command exists and accepts its arguments; return a count of programs."""
    argv = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", argv[0]):
        argv.pop(0)
    program, *argv = argv
    program = program.removeprefix(".venv/bin/")
    programs = Counter([program])
    match program:
        case "reftr":
            check_reftr(argv)
        case "make":
            check_make(argv)
        case "python":
            check_python(argv)
        case "accelerate" | "torchrun" | "sbatch":
            programs[check_launch(program, argv)] += 1
        case "pip" | "curl":
            assert shutil.which(program)
        case _:
            raise AssertionError(f"No check for {program!r}: {command}")
    return programs


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Enter a folder with the recipes and the files that the documents write."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    for document in DOCUMENTS:
        for block in blocks_of(document):
            if block.mark == "file":
                Path(block.note).parent.mkdir(parents=True, exist_ok=True)
                Path(block.note).write_text(block.code)


@by_name
def test_document_commands_accept_their_arguments(document, checkout):
    for block in blocks_of(document):
        if block.language == "python":
            compile(block.code, str(block), "exec")
        elif block.language == "bash":
            for command in commands_of(block):
                check(command)
    for command in COMMANDS.findall(FENCE.sub("", document.read_text())):
        check(command)


def test_check_finds_wrong_commands(checkout):
    for command, error in (
        ("reftr train recipes/demo.yaml --num_epoch 3", ValueError),
        ("reftr train recipes/none.yaml", OSError),
        ("make dmeo", AssertionError),
        ("make reproduce CHECK=a.pth", AssertionError),
        ("torchrun --nproc_per_nodes 4 train_reftr.py recipes/demo.yaml", SystemExit),
        ("python benchmarks/speed.py --devise cuda", AssertionError),
        ("python train.py", OSError),
        ("wget this", AssertionError),
    ):
        with pytest.raises(error):
            check(command)


def test_many_gpus_page_shows_every_launcher(checkout):
    commands = [command for block in blocks_of(ROOT / "docs" / "many_gpus.md") for command in all_commands(block)]
    programs = sum(map(check, commands), Counter())
    files = {f"recipes/accelerate/{path.name}" for path in (ROOT / "recipes" / "accelerate").iterdir()}
    assert {name for name in programs if name and "/" in name} == files
    assert programs["sbatch"] == 2
    assert programs["torchrun"] >= 3


def all_commands(block):
    return commands_of(block) if block.language == "bash" else []


def slug(title: str) -> str:
    """Return the anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@by_name
def test_document_links_have_targets(document):
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_documents_are_linked_in_index_and_readme():
    pages = {path.name for path in (ROOT / "docs").iterdir()} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.\w+)\)", (ROOT / "docs" / "README.md").read_text()))
    assert pages <= set(re.findall(r"\]\(docs/([\w.]+)\)", (ROOT / "README.md").read_text()))


def test_documents_quote_committed_results():
    texts = [document.read_text() for document in (*DOCUMENTS, NOTEBOOK)]
    assert sorted(name for text in texts for name in results_in(text)) == [
        "data_rows",
        "demo",
        "formats",
        "mask_conditioning",
        "newcomer",
        "openmoji",
        "own_images",
        "precision",
        "shapes_presence_frozen",
        "shapes_small",
        "space",
        "speed_cpu",
        "summary",
    ]
    assert [quote(text) for text in texts] == texts
