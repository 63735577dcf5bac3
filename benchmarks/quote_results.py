"""
Write the committed results into README.md, between its marks:

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


def quote(readme: str) -> str:
    """The README with the committed results between its marks."""

    def table(match: re.Match) -> str:
        start, run, end = match.groups()
        metrics = json.loads((RESULTS / run / "metrics.json").read_text())
        return f"{start}{table_of_shapes(metrics['splits']['test'])}\n{end}"

    return re.sub(r"(<!-- (\w+) results -->\n).*?(<!-- end of \2 results -->)", table, readme, flags=re.DOTALL)


def main():
    if len(sys.argv) > 1:
        run = Path(sys.argv[1])
        (RESULTS / run.name).mkdir(exist_ok=True)
        for name in FILES:
            shutil.copy(run / name, RESULTS / run.name / name)
    path = ROOT / "README.md"
    path.write_text(quote(path.read_text()))


if __name__ == "__main__":
    main()
