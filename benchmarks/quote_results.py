"""
Write the committed results into the documents, between their markers:

    python benchmarks/quote_results.py            # from benchmarks/results
    python benchmarks/quote_results.py runs/demo  # first copy the metrics, the log of metrics and the image of a run
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
FILES = ("metrics.json", "metrics.jsonl", "predictions.png")  # files of a run to copy


def table_of_shapes(metrics: dict) -> str:
    """Format the metrics of one split of the shapes dataset as a Markdown table."""
    lines = ["| asked | accuracy at IoU 0.5 | mean IoU | mask mean IoU | phrases |", "|---|---|---|---|---|"]
    entries = {
        "all expressions": metrics,
        **metrics["per_kind"],
        "best constant box": metrics["constant_box"],
        "expressions swapped between objects": metrics["swapped_expressions"],
    }
    for name, values in entries.items():
        row = [values["accuracy@0.5"], values["mean_iou"], values.get("mask_mean_iou")]
        cells = ["" if value is None else f"{value:.3f}" for value in row]
        lines.append(f"| {name} | {' | '.join(cells)} | {values['num_phrases']} |")
    return "\n".join(lines)


def table_of_speed(results: dict) -> str:
    """Format the rows of `benchmarks/speed.py` as a Markdown table, followed by the machine."""
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
    """Format the rows of `benchmarks/precision.py` as a Markdown table."""
    names = ("accuracy@0.5", "mean_iou", "mask_mean_iou", "iou_with_float32")
    lines = [
        "| precision | accuracy at IoU 0.5 | mean IoU | mask mean IoU | mean IoU with the float32 boxes |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        metrics = " | ".join(f"{row[name]:.3f}" for name in names)
        lines.append(f"| {row['name']} | {metrics} |")
    return "\n".join([*lines, "", f"`{results['model']}`, {results['phrases']} phrases of its test split."])


def table_of_space(results: dict) -> str:
    """Format the times of `benchmarks/space.py` as a Markdown table, followed by the machine."""
    lines = ["| seconds | median | shortest | longest |", "|---|---|---|---|"]
    for name, values in results["seconds"].items():
        lines.append(f"| {name} | {values['median']:.2f} | {values['shortest']:.2f} | {values['longest']:.2f} |")
    machine = ", ".join(f"{name} {value}" for name, value in results["measured_on"].items())
    return "\n".join([*lines, "", f"Measured on: {machine}."])


def table_of_newcomer(results: dict) -> str:
    """Format the times of `benchmarks/newcomer.py` as a Markdown table, followed by the IoU of the answers."""
    seconds, machine = results["seconds"], results["machine"]
    lines = [f"| minutes | {' | '.join(seconds)} |", "|---" * (len(seconds) + 1) + "|"]
    lines.append("| | " + " | ".join(f"{value / 60:.1f}" for value in seconds.values()) + " |")
    answers = " and ".join(f"{answer['iou']:.2f}" for answer in results["answers"])
    image = "of 320 x 200 pixels (the demo model was trained on square images only)"
    note = f"IoU of the boxes with the drawn objects, in an image {image}: {answers}. On {machine['cores']} cores."
    return "\n".join([*lines, "", note])


def results_in(text: str) -> list[str]:
    """Return the names of the results that a document quotes."""
    return [match[2] for match in BLOCK.finditer(text)]


def quote(document: str) -> str:
    """Replace the text between the markers of a document with the committed results of runs and benchmarks."""

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
