"""
Write the committed results into README.md, between its marks:

    python benchmarks/quote_results.py            # from benchmarks/results
    python benchmarks/quote_results.py runs/demo  # first take over a run's metrics.json and predictions.png
"""

import json
import re
import shutil
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo"


def demo_table(metrics: dict) -> str:
    """The demo's figures of one split as a Markdown table."""
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
    table = demo_table(json.loads((RESULTS / "metrics.json").read_text())["splits"]["test"])
    return re.sub(
        r"(<!-- demo results -->\n).*?(<!-- end of demo results -->)",
        lambda match: f"{match[1]}{table}\n{match[2]}",
        readme,
        flags=re.DOTALL,
    )


def main():
    if len(sys.argv) > 1:
        for name in ("metrics.json", "predictions.png"):
            shutil.copy(Path(sys.argv[1]) / name, RESULTS / name)
    path = ROOT / "README.md"
    path.write_text(quote(path.read_text()))


if __name__ == "__main__":
    main()
