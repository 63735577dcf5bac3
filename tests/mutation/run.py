"""
Apply each listed one-line fault to a copy of the checkout and run the affected tests, which must fail.

The lists are the YAML files next to this script. Each entry gives the `file`, the text `old` that occurs once in it,
the text `new` that replaces it, what it `breaks`, the `tests` (pytest node ids) of which one must fail, and, for a
fault that does not change behaviour, the reason why it `survives`. Results are written after every trial and
committed: an interrupted run continues, and trials whose file and tests did not change are not repeated.
"""

import argparse
import concurrent.futures
import hashlib
import importlib
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml
from tqdm import tqdm


FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
TABLE = FOLDER / "table.md"
RESULTS = FOLDER / "results.json"
FIELDS = {"file", "old", "new", "breaks", "tests"}
# every trial is forked from a process that has imported these libraries, because importing them takes longer than many
# tests
LIBRARIES = [
    "accelerate",
    "datasets",
    "timm",
    "pycocotools.mask",
    "pytest",
    "torch",
    "torchvision.transforms.v2",
    "transformers.models.bert.modeling_bert",
]
SERVER = multiprocessing.get_context("forkserver")
TIMEOUT = 400  # seconds, after which a fault that makes a test hang counts as killed


def load_mutations(lists: list[str] | None = None) -> list[dict]:
    """
    Return the entries of the lists, each with the name of its `list`.

    Raises:
        ValueError: if an entry lacks a field or has an unknown one, its file or tests do not exist, `old` does not
            occur exactly once, or two entries of a file break the same.
    """
    mutations, seen, faults = [], set(), []
    for path in sorted(FOLDER.glob("*.yaml")):
        if lists and path.stem not in lists:
            continue
        for entry in yaml.safe_load(path.read_text()):
            name = f"{path.name}: {entry.get('file')}: {entry.get('breaks')}"
            if FIELDS - set(entry) or set(entry) - FIELDS - {"survives"}:
                faults.append(f"{name}: an entry must have {sorted(FIELDS)} and may have survives.")
                continue
            if (entry["file"], entry["breaks"]) in seen:
                faults.append(f"{name}: occurs twice; say what is different.")
            seen.add((entry["file"], entry["breaks"]))
            count = (ROOT / entry["file"]).read_text().count(entry["old"]) if (ROOT / entry["file"]).is_file() else 0
            if count != 1 or entry["old"] == entry["new"]:
                faults.append(f"{name}: `old` must occur once and differ from `new`, it occurs {count} times.")
            missing = [test for test in entry["tests"] if not is_defined(test)]
            if missing or not entry["tests"]:
                faults.append(f"{name}: tests must be node ids that exist, got {missing or 'none'}.")
            mutations.append({**entry, "list": path.stem})
    if faults:
        raise ValueError("\n".join(faults))
    return mutations


def is_defined(test: str) -> bool:
    """Return whether the file of a pytest node id exists and defines the function it names."""
    file, _, function = test.partition("::")
    function = function.partition("[")[0]
    return (ROOT / file).is_file() and f"def {function}" in (ROOT / file).read_text() + "def "


def identity(mutation: dict) -> str:
    """Return a hash of the inputs of a trial: the fault, the file that it is applied to, and the tests."""
    content = [mutation["file"], mutation["old"], mutation["new"], *mutation["tests"]]
    content += [(ROOT / test.partition("::")[0]).read_text() for test in (mutation["file"], *mutation["tests"])]
    return hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]


def copy_checkout(folder: Path) -> Path:
    """Copy the tracked and the untracked, not ignored files of the checkout to a folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_pytest(checkout: Path, argv: list[str], output: str):
    """Run pytest in a checkout, with its output in a file, and exit; the target of a forked process."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    # bytecode would be stale for a file that is mutated and restored within a second
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path[:] = [str(checkout), *(path for path in sys.path if Path(path).resolve() not in (ROOT, FOLDER))]
    os.chdir(checkout)
    code = importlib.import_module("pytest").main(argv)
    sys.stdout.flush()
    os._exit(code)


def run_tests(checkout: Path, tests: list[str], *options: str) -> tuple[int | None, str]:
    """Return pytest's exit code in a checkout, None after the time limit, and its output."""
    argv = ["-q", "--tb=line", "-m", "not slow", "-p", "no:cacheprovider", *options, *tests]
    with tempfile.NamedTemporaryFile(prefix="mutation-", suffix=".log") as output:
        process = SERVER.Process(target=run_pytest, args=(checkout, argv, output.name))
        process.start()
        process.join(None if "-n" in options else TIMEOUT)
        code = process.exitcode
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        return code, Path(output.name).read_text(errors="replace")


def try_mutation(checkout: Path, mutation: dict) -> dict:
    """Return the outcome of one trial: killed, survived or an error, with the test that failed first."""
    path, start = checkout / mutation["file"], time.perf_counter()
    text = path.read_text()
    path.write_text(text.replace(mutation["old"], mutation["new"]))
    try:
        code, output = run_tests(checkout, mutation["tests"], "-x", "-rfE")
    finally:
        path.write_text(text)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    outcome = {0: "survived", 1: "killed", None: "killed"}.get(code, "error")
    return {
        "outcome": outcome,
        "by": failed.group(1) if failed else f"not finished after {TIMEOUT} seconds" if code is None else "",
        "seconds": round(time.perf_counter() - start, 1),
        **({"output": output[-2000:]} if outcome == "error" else {}),
    }


def save(results: dict[str, dict], path: Path):
    """Write one line per result to a temporary file and rename it, so that an interruption keeps the old results."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(results[key])}" for key in sorted(results))
    aside = path.with_suffix(".tmp")
    aside.write_text(f"{{\n{lines}\n}}\n")
    aside.replace(path)


def try_all(mutations: list[dict], results: dict[str, dict], path: Path, num_workers: int):
    """Try the mutations in parallel, each worker in its own copy, and save the results after each trial."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        checkouts = queue.SimpleQueue()
        for number in range(num_workers):
            checkouts.put(copy_checkout(Path(scratch) / str(number)))

        def trial(mutation):
            checkout, key = checkouts.get(), identity(mutation)  # hash before the file or its tests can be edited
            try:
                return mutation, key, try_mutation(checkout, mutation)
            finally:
                checkouts.put(checkout)

        with concurrent.futures.ThreadPoolExecutor(num_workers) as executor:
            trials = [executor.submit(trial, mutation) for mutation in mutations]
            for done in tqdm(concurrent.futures.as_completed(trials), total=len(trials), unit="mutation"):
                mutation, key, result = done.result()
                results[key] = result
                save(results, path)
                if result["outcome"] != "killed":
                    tqdm.write(f"{result['outcome']}: {mutation['file']}: {mutation['breaks']}")


def to_cell(text: str) -> str:
    """Return a text as the cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def table(mutations: list[dict], results: dict[str, dict]) -> str:
    """Return the outcomes as Markdown."""
    rows = [(mutation, results[identity(mutation)]) for mutation in mutations]
    outcomes = Counter(result["outcome"] for _, result in rows)
    lines = [
        "# Mutations",
        "",
        "One-line faults, each applied to a copy of the checkout, and the first test that failed. Written by",
        "`make mutation`.",
        "",
        f"{len(rows)} tried, {outcomes['killed']} killed, {outcomes['survived']} survived.",
        "",
        "| file | what it breaks | outcome | found by, or why it survives |",
        "|---|---|---|---|",
    ]
    for mutation, result in rows:
        by = mutation.get("survives", "no reason") if result["outcome"] == "survived" else result["by"]
        cells = (f"`{mutation['file']}`", mutation["breaks"], result["outcome"], by)
        lines.append("| " + " | ".join(map(to_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Try the mutations without a result, write the table, and return 1 if a mutation survives without a reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", nargs="+", metavar="NAME", help="only these lists; the table is not written")
    parser.add_argument("--match", metavar="TEXT", help="only entries whose file or `breaks` contains this; no table")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-baseline", action="store_true", help="skip the first run of the tests without a fault")
    options = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    SERVER.set_forkserver_preload(LIBRARIES)
    try:
        mutations = load_mutations(options.list)
    except (ValueError, OSError) as error:
        print(error)
        return 1
    if options.match:
        mutations = [entry for entry in mutations if options.match in entry["file"] + " " + entry["breaks"]]
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    tried = {key for key, result in results.items() if result["outcome"] != "error"}
    pending = [mutation for mutation in mutations if identity(mutation) not in tried]
    if pending and not options.no_baseline:
        tests = sorted({test for mutation in pending for test in mutation["tests"]})
        with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
            code, output = run_tests(copy_checkout(Path(scratch)), tests, "-rfE", "-n", str(options.workers))
        if code != 0:
            print(f"The tests fail without a fault:\n{output[-4000:]}")
            return 1
    try_all(pending, results, options.results, options.workers)
    unexplained = [
        f"{mutation['file']}: {mutation['breaks']}"
        for mutation in mutations
        if results[identity(mutation)]["outcome"] != ("survived" if "survives" in mutation else "killed")
    ]
    outcomes = Counter(results[identity(mutation)]["outcome"] for mutation in mutations)
    print(f"{len(mutations)} mutations: {dict(outcomes)}")
    print("\n".join(["unexplained:", *unexplained] if unexplained else ["none unexplained"]))
    if not (options.list or options.match):
        save({identity(mutation): results[identity(mutation)] for mutation in mutations}, options.results)
        TABLE.write_text(table(mutations, results))
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
