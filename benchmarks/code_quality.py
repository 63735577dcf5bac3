"""
Compare code metrics with those of DETR in transformers, by the same rules:

    python benchmarks/code_quality.py --output benchmarks/results/code_quality.json

- functions over 60 code lines: lines without comments, docstrings and blank lines, nested functions included
- typed arguments: arguments with an annotation, without `self`, `cls`, `*args` and `**kwargs`
- imperative docstrings: docstrings of functions and methods that ruff's D401 accepts
- comment share: comment tokens divided by lines of code and comments
- mlinter findings: of transformers-mlinter with its default rules, on the files that are written to the Hub; without
  TRF038, which looks for tests in the folders of transformers' repository, which an installed DETR lacks as well
- upward imports: see tests/integration/test_imports.py
"""

import argparse
import ast
import io
import json
import shutil
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

import transformers


ROOT = Path(__file__).resolve().parents[1]
DETR = Path(transformers.__file__).parent / "models" / "detr"
FOLDERS = ("data_scripts", "modeling_reftr", "training_reftr", "reftr_cli", "demo")
MAX_LINES = 60
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def product_files() -> list[Path]:
    """Return the Python files of the product."""
    return [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))] + [ROOT / "train_reftr.py"]


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines that contain code, without blank lines, comments and docstrings."""
    lines = set()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return lines


def long_functions(path: Path) -> list[str]:
    """Return the functions of a file with more than `MAX_LINES` code lines."""
    source = path.read_text()
    lines = code_lines(source)
    return [
        f"{path.name}:{node.name} ({count})"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, FUNCTIONS)
        and (count := len(lines & set(range(node.lineno, node.end_lineno + 1)))) > MAX_LINES
    ]


def count_arguments(path: Path) -> tuple[int, int]:
    """Return the number of typed arguments of a file, and of all its arguments."""
    typed = total = 0
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, FUNCTIONS):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments = [argument for argument in arguments if argument.arg not in ("self", "cls")]
            total += len(arguments)
            typed += sum(argument.annotation is not None for argument in arguments)
    return typed, total


def count_docstrings(paths: list[Path]) -> tuple[int, int]:
    """Return the number of imperative docstrings of functions, and of all their docstrings."""
    total = sum(
        isinstance(node, FUNCTIONS) and ast.get_docstring(node) is not None
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
    )
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "D401", "--output-format", "json"]
    result = subprocess.run([*ruff, *map(str, paths)], capture_output=True, text=True)
    return total - len(json.loads(result.stdout)), total


def count_comments(paths: list[Path]) -> tuple[int, int]:
    """Return the number of comments, and of lines of code and comments."""
    comments = lines = 0
    for path in paths:
        source = path.read_text()
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        own = sum(token.type == tokenize.COMMENT for token in tokens)
        comments += own
        lines += own + len(code_lines(source))
    return comments, lines


def mlinter_findings(paths: list[Path], name: str) -> int | None:
    """Return the number of findings in a model's files, None if transformers-mlinter is not installed."""
    command = shutil.which("mlinter", path=str(Path(sys.executable).parent))
    if command is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "src", "transformers", "models", name)
        model.mkdir(parents=True)
        for path in paths:
            shutil.copy(path, model)
        options = ["--no-progress", "--no-cache", "--output-json", "findings.json"]
        subprocess.run(
            [command, *options, *(str(path.relative_to(folder)) for path in sorted(model.iterdir()))],
            cwd=folder,
            capture_output=True,
        )
        findings = json.loads(Path(folder, "findings.json").read_text())["findings"]
        return sum(finding["rule"] != "TRF038" for finding in findings)


def measure(paths: list[Path], model_files: list[Path], name: str) -> dict:
    """Return the measurements of some files, of which `model_files` are those of the model called `name`."""
    typed, arguments = (sum(counts) for counts in zip(*map(count_arguments, paths), strict=True))
    imperative, docstrings = count_docstrings(paths)
    comments, lines = count_comments(paths)
    return {
        "lines": lines,
        "long_functions": [function for path in paths for function in long_functions(path)],
        "typed_arguments": round(typed / arguments, 4),
        "imperative_docstrings": round(imperative / docstrings, 4),
        "comment_share": round(comments / lines, 4),
        "mlinter_findings": mlinter_findings(model_files, name),
    }


def count_upward_imports() -> int:
    """Return the number of imports from a higher layer of the project."""
    sys.path.insert(0, str(ROOT))
    from tests.integration.test_imports import PRODUCT, module_of, upward_imports

    return sum(len(upward_imports(module_of(path), path.read_text())) for path in PRODUCT)


def main() -> None:
    """Print the measurements of both, and write them as JSON."""
    parser = argparse.ArgumentParser(description="Compare code metrics with DETR in transformers.")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    detr = sorted(DETR.glob("*.py"))
    found = {
        "reftr": measure(product_files(), sorted((ROOT / "modeling_reftr").glob("*_reftr.py")), "reftr"),
        "detr": measure(detr, detr, "detr"),
        "transformers": transformers.__version__,
    }
    found["reftr"]["upward_imports"] = count_upward_imports()
    sys.stdout.write(f"{'':<24}{'reftr':>10}{'detr':>10}\n")
    for name in found["reftr"]:
        values = [found[model].get(name, "-") for model in ("reftr", "detr")]
        values = [len(value) if isinstance(value, list) else value for value in values]
        shown = [f"{value:.1%}" if isinstance(value, float) else str(value) for value in values]
        sys.stdout.write(f"{name:<24}{shown[0]:>10}{shown[1]:>10}\n")
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
