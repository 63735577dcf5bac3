"""
Write the committed results and the table of file formats into the documents, between their markers, and the address of
the repository in `setup.cfg` into their commands and links:

    python benchmarks/quote_results.py            # from benchmarks/results
    python benchmarks/quote_results.py runs/demo  # first copy the metrics, the log of metrics and the image of a run
"""

import configparser
import json
import re
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from data_scripts.formats import describe_formats


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "demo/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
NOTEBOOK = ROOT / "docs" / "quick_start.ipynb"
# an address of this repository: what pip installs, what git clones, and what Colab opens
REPOSITORY = re.compile(
    r"((?:git\+|git clone )https://github\.com/|https://colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+"
)
BLOCK = re.compile(r"(<!-- (\w+) results -->\n).*?(<!-- end of \2 results -->)", re.DOTALL)
FILES = ("metrics.json", "metrics.jsonl", "predictions.png")  # files of a run to copy


def table_of_shapes(metrics: dict) -> str:
    """Format the metrics of one split of the shapes dataset as Markdown, with the published metric of masks."""
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
    if "mask_mean_iou_resized" in metrics:
        resized = f"{metrics['mask_mean_iou_resized']:.3f}"
        lines += ["", f"At the resized size, which is the published metric, the mean IoU of the masks is {resized}."]
    return "\n".join(lines)


def table_of_presence(splits: dict[str, dict]) -> str:
    """Format the metrics of phrases with none, one or several targets of one split as Markdown."""
    (values,) = splits.values()
    generalized = values["generalized"]
    rows = {
        "exactly the targets, Pr@(F1=1)": values["pr_f1_iou@0.5"],
        "of phrases with one target": generalized["per_group"]["one"]["pr_f1_iou@0.5"],
        "of phrases with several targets": generalized["per_group"]["several"]["pr_f1_iou@0.5"],
        "of phrases without a target (N-acc)": values["n_acc"],
        "AUROC of presence, all phrases without a target": values["presence_auroc"],
        "AUROC, absent": generalized["per_kind"]["absent"]["auroc"],
        "AUROC, half right": generalized["per_kind"]["half_right"]["auroc"],
        "N-acc at T-acc 0.95": values["presence_n_acc@t_acc_0.95"],
        "expected calibration error": values["expected_calibration_error"],
        "accuracy at IoU 0.5, phrases with one target": values["accuracy@0.5"],
        "mask mean IoU, phrases with one target": values.get("mask_mean_iou"),
        "masks of all phrases, gIoU": values.get("mask_giou"),
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value:.3f} |" for name, value in rows.items() if value is not None)]
    return "\n".join([*lines, "", f"{generalized['num_phrases']} phrases of the test split."])


def table_of_splits(splits: dict[str, dict]) -> str:
    """Format the metrics of a run as Markdown, one table per split, under their names if there are several."""
    if len(splits) == 1:
        return table_of_shapes(*splits.values())
    return "\n\n".join(f"`{name}`:\n\n{table_of_shapes(metrics)}" for name, metrics in splits.items())


def table_of_summary() -> str:
    """Format the metrics of all committed runs and of the blind baselines, the worst of several runs first."""
    demo = [run["metrics"] for run in json.loads(seeds_of("demo").read_text())["runs"] if not run["label"]]
    own_images = json.loads((RESULTS / "demo" / "own_images.json").read_text()).values()
    ratios = [item["accuracy@0.5"] for sizes in own_images for name, item in sizes.items() if name != "shape alone"]
    newcomer = json.loads((RESULTS / "newcomer.json").read_text())
    lines = ["| | accuracy at IoU 0.5 | mask mean IoU |", "|---|---|---|"]
    for name, part_of in (
        (f"`make demo`, 64 pixels, worst / mean / best of {len(demo)} seeds", lambda run: run),
        ("best constant box", lambda run: run["constant_box"]),
        ("expressions swapped between objects", lambda run: run["swapped_expressions"]),
    ):
        is_baseline = "mask_mean_iou" not in part_of(demo[0])
        accuracy, masks = (
            spread(demo, lambda run, key=key, part_of=part_of: part_of(run)[key], is_baseline)
            if key in part_of(demo[0])
            else ""
            for key in ("accuracy@0.5", "mask_mean_iou")
        )
        lines.append(f"| {name} | {accuracy} | {masks} |")
    lines.append(f"| the same models, images drawn apart from 1:2 to 2:1, the worst | {min(ratios):.3f} | |")
    for name, recipe in (("shapes_small", "shapes/small.yaml"), ("openmoji", "cutouts/openmoji.yaml")):
        for split, values in json.loads((RESULTS / name / "metrics.json").read_text())["splits"].items():
            row = f"{values['accuracy@0.5']:.3f} | {values['mask_mean_iou']:.3f}"
            lines.append(f"| `{recipe}`, split `{split}`, one run | {row} |")
    minutes = f"{newcomer['seconds']['all'] / 60:.1f}"
    note = f"From a clone to an answer about another image: {minutes} minutes on {newcomer['machine']['cores']} cores."
    return "\n".join([*lines, "", note])


def spread(runs: list[dict], value_of: Callable[[dict], float], is_highest_worst: bool = False) -> str:
    """Format the worst, mean and best value of several runs."""
    values = sorted(map(value_of, runs), reverse=is_highest_worst)
    return f"**{values[0]:.3f}** / {statistics.mean(values):.3f} / {values[-1]:.3f}"


def table_of_seeds(results: dict) -> str:
    """
    Format the runs of `benchmarks/demo_seeds.py` as a Markdown table, followed by how they were made.

    The worst value comes first: the lowest one, but the highest one of a blind baseline and of `mask_separation`.
    """
    runs = [run for run in results["runs"] if not run["label"]]
    metrics = [run["metrics"] for run in runs]
    lines = ["| asked | accuracy at IoU 0.5 | mean IoU | mask mean IoU | phrases |", "|---|---|---|---|---|"]
    rows = {"all expressions": lambda run: run}
    rows |= {kind: lambda run, kind=kind: run["per_kind"][kind] for kind in metrics[0]["per_kind"]}
    rows |= {
        name: lambda run, key=key: run[key]
        for key, name in (
            ("constant_box", "best constant box"),
            ("swapped_expressions", "expressions swapped between objects"),
        )
    }
    for name, part_of in rows.items():
        first = part_of(metrics[0])
        is_baseline = "mask_mean_iou" not in first and "mask_mean_iou" in metrics[0]
        row = [
            spread(metrics, lambda run, key=key, part_of=part_of: part_of(run)[key], is_baseline)
            if key in first
            else ""
            for key in ("accuracy@0.5", "mean_iou", "mask_mean_iou")
        ]
        lines.append(f"| {name} | {' | '.join(row)} | {first['num_phrases']} |")
    numbers = ", ".join(str(run["seed"]) for run in runs)
    notes = [
        f"**Worst** / mean / best of {len(runs)} runs with the seeds {numbers}; of the blind baselines, the highest "
        f"value counts as the worst. {describe_runs(runs)}"
    ]
    if "mask_separation" in metrics[0]:
        notes.append(
            "The masks of different objects in one caption have a mean IoU of "
            f"{spread(metrics, lambda run: run['mask_separation'], True)}; that of the annotated masks is "
            f"{metrics[0]['mask_separation_target']:.3f}."
        )
    for label in dict.fromkeys(run["label"] for run in results["runs"] if run["label"]):
        labelled = [run for run in results["runs"] if run["label"] == label]
        accuracy = spread([run["metrics"] for run in labelled], lambda run: run["accuracy@0.5"])
        notes.append(f"{label}, accuracy of all expressions: {accuracy}. {describe_runs(labelled)}")
    return "\n".join([*lines, *(line for note in notes for line in ("", note))])


def table_of_mask_conditioning(results: dict) -> str:
    """Format the runs of `benchmarks/demo_seeds.py` with several labels, the ways to condition the mask head."""
    columns = {
        "accuracy at IoU 0.5": lambda run: run["accuracy@0.5"],
        "mask mean IoU": lambda run: run["mask_mean_iou"],
        "of captions": lambda run: run["per_kind"]["caption"]["mask_mean_iou"],
        "mask separation": lambda run: run["mask_separation"],
    }
    lines = [f"| `mask_conditioning` | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for label in dict.fromkeys(run["label"] for run in results["runs"]):
        metrics = [run["metrics"] for run in results["runs"] if run["label"] == label]
        row = [spread(metrics, value_of, name == "mask separation") for name, value_of in columns.items()]
        lines.append(f"| `{label}` | {' | '.join(row)} |")
    return "\n".join(lines)


def describe_runs(runs: list[dict]) -> str:
    """Say how long some runs took, and on what machines."""
    machines = dict.fromkeys(
        f"{count(machine['threads'], 'thread')} on {count(machine['cores'], 'core')} ({machine['cpu']}), "
        f"torch {machine['torch']}"
        for machine in (run["machine"] for run in runs)
    )
    minutes = sorted(run["minutes"] for run in runs)
    duration = " to ".join(dict.fromkeys(f"{value:.1f}" for value in (minutes[0], minutes[-1])))
    return f"Each run took {duration} minutes with {'; '.join(machines)}."


def count(number: int, noun: str) -> str:
    """Return a number with its noun, which gets an s unless the number is 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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
    note = "IoU of the boxes with the drawn objects, in an image of 320 x 200 pixels"
    note = f"{note}: {answers}. On {machine['cores']} cores."
    return "\n".join([*lines, "", note])


def table_of_own_images(results: dict) -> str:
    """Format the accuracy of `benchmarks/own_images.py`, the worst and the mean of the models, per size of images."""
    names = list(next(iter(results.values())))
    lines = [f"| accuracy at IoU 0.5 | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    values = {name: [sizes[name]["accuracy@0.5"] for sizes in results.values()] for name in names}
    lines.append("| worst | " + " | ".join(f"{min(values[name]):.3f}" for name in names) + " |")
    lines.append("| mean | " + " | ".join(f"{sum(values[name]) / len(results):.3f}" for name in names) + " |")
    return "\n".join(lines)


def table_of_rows(results: dict) -> str:
    """Format the seconds and the memory of `benchmarks/data_rows.py` per number of rows, and their last ratio."""
    counts = sorted({row["rows"] for row in results["rows"]})
    growth = f"{counts[-1]:,} to {counts[-2]:,}"
    heads = [head for unit in ("s", "MB") for head in (*(f"{count:,} rows, {unit}" for count in counts), growth)]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        found = {row["rows"]: row for row in results["rows"] if row["case"] == case}
        parts = []
        for what, digits in (("seconds", 1), ("megabytes", 0)):
            values = [found[count][what] for count in counts]
            parts += [*(f"{value:.{digits}f}" for value in values), f"{values[-1] / values[-2]:.1f}"]
        lines.append(f"| {case} | {' | '.join(parts)} |")
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return "\n".join([*lines, "", f"Measured on: {machine}."])


def seeds_of(name: str) -> Path:
    """Return the file of a run's repetitions with several seeds, see `benchmarks/demo_seeds.py`."""
    return RESULTS / name / "seeds.json"


def has_seeds(name: str) -> bool:
    """Return whether a run was repeated with several seeds, so that they are quoted in place of the single run."""
    path = seeds_of(name)
    return path.exists() and any(not run["label"] for run in json.loads(path.read_text())["runs"])


def results_in(text: str) -> list[str]:
    """Return the names of the results that a document quotes."""
    return [match[2] for match in BLOCK.finditer(text)]


def quote(document: str) -> str:
    """
    Replace the text between the markers of a document with the committed results of runs and benchmarks, the table of
    file formats, and the addresses of the repository with that of `setup.cfg`.
    """

    def table(match: re.Match) -> str:
        start, name, end = match.groups()
        if name == "precision":
            text = table_of_precision(json.loads((RESULTS / "precision.json").read_text()))
        elif name == "newcomer":
            text = table_of_newcomer(json.loads((RESULTS / "newcomer.json").read_text()))
        elif name == "formats":
            text = describe_formats()
        elif name == "own_images":
            text = table_of_own_images(json.loads((RESULTS / "demo" / "own_images.json").read_text()))
        elif name == "mask_conditioning":
            text = table_of_mask_conditioning(json.loads((RESULTS / "demo" / "mask_conditioning.json").read_text()))
        elif name == "summary":
            text = table_of_summary()
        elif name == "data_rows":
            text = table_of_rows(json.loads((RESULTS / "data_rows.json").read_text()))
        elif name == "space":
            text = table_of_space(json.loads((RESULTS / "space" / "speed.json").read_text()))
        elif has_seeds(name):
            text = table_of_seeds(json.loads(seeds_of(name).read_text()))
        elif name.startswith("speed"):
            text = table_of_speed(json.loads((RESULTS / f"{name}.json").read_text()))
        elif "presence" in name:
            text = table_of_presence(json.loads((RESULTS / name / "metrics.json").read_text())["splits"])
        else:
            text = table_of_splits(json.loads((RESULTS / name / "metrics.json").read_text())["splits"])
        return f"{start}{text}\n{end}"

    return REPOSITORY.sub(lambda match: match[1] + name_of_repository(), BLOCK.sub(table, document))


def name_of_repository() -> str:
    """Return the account and the name of this repository on GitHub."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["metadata"]["url"].removeprefix("https://github.com/")


def main():
    if len(sys.argv) > 1:
        run = Path(sys.argv[1])
        (RESULTS / run.name).mkdir(exist_ok=True)
        for name in FILES:
            shutil.copy(run / name, RESULTS / run.name / name)
    for path in (*DOCUMENTS, NOTEBOOK):
        path.write_text(quote(path.read_text()))


if __name__ == "__main__":
    main()
