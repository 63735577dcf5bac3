"""
Compare evaluation on several processes with evaluation on one: `run_grid` for tests and the scorecard, and its script.

The model computes its answers from the token ids by a fixed rule, so that only sharding and gathering can differ.
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[2]
MAX_IMAGES = 41


def run_grid(counts=range(1, MAX_IMAGES + 1), ranks=(1, 2, 3, 4), batch_sizes=range(1, 9), timeout=1200) -> dict:
    """
    Evaluate the first N images of a dataset, for each N of `counts`, on each number of processes, in batches of each
    size, and once more with an interruption. A case passes if every process has every phrase once, in order,
    bit-identical to a single process, and if all processes checked for an interruption equally often.

    Returns:
        `dict`: "passed", "of", and "failed", the names of the failed cases. A hang fails after `timeout` seconds.
    """
    cases = [list(counts), list(ranks), list(batch_sizes)]
    total = len(cases[1]) * (len(cases[0]) * len(cases[2]) + 1)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.ranks_evaluation", json.dumps(cases)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"passed": 0, "of": total, "failed": [f"not finished after {timeout} s"]}
    finally:  # kill the ranks, too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        return {"passed": 0, "of": total, "failed": [errors[-2000:]]}
    failed = json.loads(output.splitlines()[-1])
    return {"passed": total - len(failed), "of": total, "failed": failed}


class FixedAnswers(torch.nn.Module):
    """
    A model whose boxes and masks are computed from the token ids, in integers with one division, so that they do not
    depend on the position in a batch.
    """

    def fused_copy(self):
        return self

    def cache_text(self):
        return contextlib.nullcontext()

    def forward(self, pixel_values, pixel_mask, input_ids, attention_mask, image_index=None, **phrases):
        from modeling_reftr.modeling_reftr import RefTRVisualGroundingOutput

        ids = phrases.get("phrase_input_ids", input_ids[:, None])
        mask = phrases.get("phrase_attention_mask", attention_mask[:, None])
        positions = torch.arange(1, input_ids.shape[1] + 1)
        numbers = 7 * (input_ids * attention_mask * positions).sum(1)[:, None] + 13 * (ids * mask).sum(-1)
        boxes = (numbers[..., None] * torch.tensor([3, 5, 7, 11]) % 97 + 20) / 137
        pixels = (numbers[..., None] * torch.arange(256) % 97 - 48.5).unflatten(-1, (16, 16))
        return RefTRVisualGroundingOutput(
            pred_boxes=boxes,
            pred_masks=pixels,
            phrase_mask=mask.sum(-1) > 2,
            image_index=image_index,
            input_ids=input_ids,
            phrase_input_ids=phrases.get("phrase_input_ids"),
            pixel_mask=pixel_mask,
        )


def evaluate_cases(rank, world_size, port, processor, rows, expected, counts, batch_sizes, folder):
    """Evaluate all cases of one number of processes on one rank, and write the failed cases to a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    from accelerate import Accelerator, InitProcessGroupKwargs

    from training_reftr.evaluation import evaluate, phrase_keys, summarize
    from training_reftr.settings import TrainingSettings

    torch.set_num_threads(1)
    limit = InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=60)) if world_size > 1 else None
    accelerator = Accelerator(cpu=True, kwargs_handlers=[limit] if limit else None)
    assert accelerator.num_processes == world_size
    model = FixedAnswers()
    failed = []

    def run(count, batch_size, stop_after=math.inf):
        args = TrainingSettings.from_flat(evaluation_batch_size=batch_size, num_workers=0)
        calls = []

        def should_stop():
            calls.append(None)
            return len(calls) > stop_after

        part = rows.select(range(count))
        return evaluate(model, processor, part, args, accelerator, "test", should_stop), part, len(calls)

    for count in counts:
        for batch_size in batch_sizes:
            records, part, calls = run(count, batch_size)
            keys = [(record["image_id"], record["sentence_id"], record["phrase"]) for record in records]
            images = set(part["image_id"])
            if expected is None:
                (folder / "expected.json").write_text(json.dumps(records))
                continue
            wanted = [record for record in expected if record["image_id"] in images]
            same = json.loads(json.dumps(records)) == wanted and summarize(records) == summarize(wanted)
            once = keys == phrase_keys(part) and len(set(keys)) == len(keys)
            if not (same and once and calls == math.ceil(math.ceil(count / world_size) / batch_size)):
                failed.append(f"{world_size} processes, {count} images, batches of {batch_size}")
    records, _, calls = run(max(counts), 1, stop_after=1)
    can_stop = math.ceil(max(counts) / world_size) > 1
    if (records is None) != can_stop or calls != 1 + can_stop or not model.training:
        failed.append(f"{world_size} processes, stopped")
    (folder / f"{world_size}_{rank}.json").write_text(json.dumps(failed))
    accelerator.end_training()


def main(counts, ranks, batch_sizes):
    from torch.multiprocessing import start_processes

    import data_scripts
    from modeling_reftr import RefTRImageProcessor, RefTRProcessor
    from training_reftr.tokenizer_training import all_sentences, train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = data_scripts.load(
            "shapes", "test", cache_dir=str(folder), image_size=32, num_train=1, num_validation=1, num_test=MAX_IMAGES
        )
        tokenizer = train_tokenizer(all_sentences(rows), max_length=64)
        processor = RefTRProcessor(RefTRImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}), tokenizer)

        def start(world_size, expected, counts, batch_sizes):
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                port = listener.getsockname()[1]
            arguments = (world_size, port, processor, rows, expected, counts, batch_sizes, folder)
            # fork, so that the libraries are imported only once
            start_processes(evaluate_cases, args=arguments, nprocs=world_size, start_method="fork")

        start(1, None, [MAX_IMAGES], [MAX_IMAGES])
        expected = json.loads((folder / "expected.json").read_text())
        failed = []
        for world_size in ranks:
            start(world_size, expected, counts, batch_sizes)
            # count a case once, regardless of the number of ranks on which it fails
            parts = [json.loads((folder / f"{world_size}_{rank}.json").read_text()) for rank in range(world_size)]
            failed += sorted({name for part in parts for name in part})
    sys.stdout.write(json.dumps(failed) + "\n")


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
