"""
Write the committed results into the documents, between their marks:

    python benchmarks/quote_results.py            # from benchmarks/results
    python benchmarks/quote_results.py runs/demo  # first take over a run's figures, log of figures and pictures
"""

import json
import re
import shutil
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "demo/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
BLOCK = re.compile(r"(<!-- (\w+) results -->\n).*?(<!-- end of \2 results -->)", re.DOTALL)
FILES = ("metrics.json", "metrics.jsonl", "predictions.png")  # of a run


def table_of_shapes(metrics: dict) -> str:
    """Figures of one split of the shapes as a Markdown table."""
    lines = ["| asked | accuracy at IoU 0.5 | mean IoU | mask mean IoU | phrases |", "|---|---|---|---|---|"]
    entries = {
        "all expressions": metrics,
        **metrics["per_kind"],
        "best constant box": metrics["constant_box"],
        "expressions swapped between objects": metrics["swapped_expressions"],
    }
    for name, values in entries.items():
        figures = [values["accuracy@0.5"], values["mean_iou"], values.get("mask_mean_iou")]
        cells = ["" if figure is None else f"{figure:.3f}" for figure in figures]
        lines.append(f"| {name} | {' | '.join(cells)} | {values['num_phrases']} |")
    return "\n".join(lines)


def table_of_speed(results: dict) -> str:
    """Rows of `benchmarks/speed.py` as a Markdown table, with the machine under it."""
    lines = ["| | ours | published pattern | ratio | spread |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        low, high = row["spread"]
        ours, published = (f"{float(f'{row[side]:.3g}'):g}" for side in ("ours", "published_pattern"))
        lines.append(
            f"| {row['name']}, {row['unit']} | {ours} | {published} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} |"
        )
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return "\n".join([*lines, "", f"Measured on: {machine}."])


def table_of_precision(results: dict) -> str:
    """Rows of `benchmarks/precision.py` as a Markdown table."""
    names = ("accuracy@0.5", "mean_iou", "mask_mean_iou", "iou_with_float32")
    lines = [
        "| numbers | accuracy at IoU 0.5 | mean IoU | mask mean IoU | boxes' mean IoU with float32's |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        figures = " | ".join(f"{row[name]:.3f}" for name in names)
        lines.append(f"| {row['name']} | {figures} |")
    return "\n".join([*lines, "", f"`{results['model']}`, {results['phrases']} phrases of its test split."])


def table_of_space(results: dict) -> str:
    """Figures of `benchmarks/space.py` as a Markdown table, with the machine under it."""
    lines = ["| seconds | median | shortest | longest |", "|---|---|---|---|"]
    for name, values in results["seconds"].items():
        lines.append(f"| {name} | {values['median']:.2f} | {values['shortest']:.2f} | {values['longest']:.2f} |")
    machine = ", ".join(f"{name} {value}" for name, value in results["measured_on"].items())
    return "\n".join([*lines, "", f"Measured on: {machine}."])


def table_of_newcomer(results: dict) -> str:
    """Figures of `benchmarks/newcomer.py` as a Markdown table, with the machine under it."""
    seconds, machine = results["seconds"], results["machine"]
    lines = [f"| minutes | {' | '.join(seconds)} |", "|---" * (len(seconds) + 1) + "|"]
    lines.append("| | " + " | ".join(f"{value / 60:.1f}" for value in seconds.values()) + " |")
    answers = " and ".join(f"{answer['iou']:.2f}" for answer in results["answers"])
    drawn = "in an image of 320 x 200, where the demo has seen squares alone"
    return "\n".join([*lines, "", f"Boxes' IoU with what was drawn, {drawn}: {answers}. On {machine['cores']} cores."])


def results_in(text: str) -> list[str]:
    """Names of the results that a document quotes."""
    return [match[2] for match in BLOCK.finditer(text)]


def quote(document: str) -> str:
    """A document's text with the committed results between its marks: of runs and of benchmarks."""

    def table(match: re.Match) -> str:
        start, name, end = match.groups()
        if name == "precision":
            text = table_of_precision(json.loads((RESULTS / "precision.json").read_text()))
        elif name == "newcomer":
            text = table_of_newcomer(json.loads((RESULTS / "newcomer.json").read_text()))
        elif name == "space":
            text = table_of_space(json.loads((RESULTS / "space" / "speed.json").read_text()))
        elif name.startswith("speed"):
            text = table_of_speed(json.loads((RESULTS / f"{name}.json").read_text()))
        else:
            text = table_of_shapes(json.loads((RESULTS / name / "metrics.json").read_text())["splits"]["test"])
        return f"{start}{text}\n{end}"

    return BLOCK.sub(table, document)


def main():
    if len(sys.argv) > 1:
        run = Path(sys.argv[1])
        (RESULTS / run.name).mkdir(exist_ok=True)
        for name in FILES:
            shutil.copy(run / name, RESULTS / run.name / name)
    for path in DOCUMENTS:
        path.write_text(quote(path.read_text()))


if __name__ == "__main__":
    main()
