"""
Compare the speed of a full-size RefTR (ResNet-50, BERT-base) with the published pattern, with the same weights and the
same answers, alternating within one run:

    python benchmarks/speed.py --output benchmarks/results/speed_cpu.json
    python benchmarks/speed.py --device cuda --output benchmarks/results/speed_gpu.json
    python benchmarks/speed.py --rows latency_1 evaluation

The published pattern encodes the image once per expression, pads text to 40 tokens (captions to 90, with 16 phrase
slots of 22 tokens), materializes attention weights, applies frozen batch norm as a multiplication and an addition, and
uses float32, the contiguous memory format and batches of 8 that are not grouped by shape. Each row is the ratio of the
median time or memory of our code to that of the published pattern; its spread goes from the lower to the upper
quartile of the ratios of the rounds. Images have the sizes of RefCOCO's; weights and pixels are random, because no
time depends on them.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
import transformers
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor
from torchvision.ops import box_iou
from transformers.image_transforms import center_to_corners_format

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding
from modeling_reftr.image_processing_reftr import pad_batch
from reftr_cli.graph_export import export


SIDES = ("ours", "published")
# dtypes of our models; the published pattern is measured in float32
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
ROOT = Path(__file__).resolve().parents[1]
SIZES = ((480, 640), (480, 640), (640, 480), (427, 640))  # (height, width) of images
PUBLISHED_BATCH = 8
EXPRESSIONS = 7  # expressions per image, as in RefCOCO
IMAGES = {"cpu": 8, "cuda": 64}  # images of an evaluation
GROUPS = {"cpu": 2, "cuda": 16}  # images per batch of ours; on CPUs, larger temporaries cost more than batching saves
CONFIG = {}  # arguments of RefTRConfig; the defaults are the published values
TOKENS = (3, 4, 4, 5, 5, 6, 8, 11)  # lengths of RefCOCO's expressions in tokens, including [CLS] and [SEP]


@dataclass
class Row:
    """
    A measurement of our code and of the published pattern.

    Args:
        name, unit (`str`): name and unit of the measurement; lower is better in every unit.
        ours, published_pattern (`list[float]`): values of each round.
        difference (`dict`): differences between the answers of both, see `difference_of`.
    """

    name: str
    unit: str
    ours: list[float]
    published_pattern: list[float]
    difference: dict

    def as_json(self) -> dict:
        ratios = [ours / theirs for ours, theirs in zip(self.ours, self.published_pattern, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
        medians = [statistics.median(values) for values in (self.ours, self.published_pattern)]
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": round(medians[0], 5),
            "published_pattern": round(medians[1], 5),
            "ratio": round(medians[0] / medians[1], 4),
            "spread": [round(quartiles[0], 4), round(quartiles[2], 4)],
            "rounds": len(ratios),
            **self.difference,
        }


def build_model(predict_masks: bool = False) -> RefTRForVisualGrounding:
    """Build a model with random weights that predicts different boxes for different inputs."""
    torch.manual_seed(0)
    model = RefTRForVisualGrounding(RefTRConfig(predict_masks=predict_masks, box_head_init_std=0.1, **CONFIG))
    for module in model.model.backbone.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.weight.uniform_(0.8, 1.2)
            module.bias.normal_(0, 0.1)
    return model.eval()


def as_published(model: RefTRForVisualGrounding) -> RefTRForVisualGrounding:
    """Copy a model to one that runs like the published code: eager attention, float32, not fused."""
    config = RefTRConfig.from_dict(model.config.to_dict())
    published = RefTRForVisualGrounding._from_config(config, attn_implementation="eager", dtype=torch.float32)
    published.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    return published.eval().to(model.device)


def make_texts(count: int, seed: int = 0) -> list[list[int]]:
    """Generate token ids of expressions with the lengths of RefCOCO's."""
    rng = random.Random(seed)
    return [[101, *rng.choices(range(1000, 30000), k=rng.choice(TOKENS) - 2), 102] for _ in range(count)]


def make_captions(count: int, seed: int = 0) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Generate token ids of captions with the lengths of Flickr30k's, and the token spans of three phrases in each."""
    rng = random.Random(seed)
    captions = []
    for _ in range(count):
        ids, spans = [101], []
        for _ in range(3):
            start = len(ids) + rng.choice((0, 1, 2))
            end = start + rng.choice((2, 2, 3, 4))
            ids += rng.choices(range(1000, 30000), k=end - len(ids))
            spans.append((start, end))
        captions.append(([*ids, 102], spans))
    return captions


def pad(sequences: list[list[int]], width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids to a width, by default that of the longest; return ids and attention mask, (sequences, width)."""
    width = width or max(map(len, sequences))
    rows = [ids + [0] * (width - len(ids)) for ids in sequences]
    ids = torch.tensor(rows)
    return ids, (ids != 0).long()


def make_questions(num_images: int, num_expressions: int, seed: int = 0) -> list[tuple[torch.Tensor, list]]:
    """Generate images (3, height, width) of several shapes, each with the token ids of its expressions."""
    generator = torch.Generator().manual_seed(seed)
    texts = make_texts(num_images * num_expressions, seed)
    return [
        (
            torch.randn(3, *SIZES[index % len(SIZES)], generator=generator),
            texts[index * num_expressions : (index + 1) * num_expressions],
        )
        for index in range(num_images)
    ]


def collate(images: list[torch.Tensor], texts: list[list], image_index: list[int] | None, width=None) -> dict:
    """Collate images, padded to the largest of them, and texts to inputs of the model."""
    pixel_values, pixel_mask = pad_batch(images)
    ids, mask = pad(texts, width)
    inputs = {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "input_ids": ids, "attention_mask": mask}
    return inputs if image_index is None else {**inputs, "image_index": torch.tensor(image_index)}


def with_phrases(inputs: dict, captions: list, fixed: bool) -> dict:
    """Add the phrases of captions to inputs; `fixed` pads them to 16 slots of 22 tokens, as published."""
    slots = 16 if fixed else 3
    phrases = [[101, *ids[start:end], 102] for ids, spans in captions for start, end in spans]
    ids, mask = pad(phrases, 22 if fixed else None)
    ids, mask = (values.unflatten(0, (-1, 3)) for values in (ids, mask))
    spans = torch.tensor([spans for _, spans in captions])
    inputs["phrase_index"] = torch.cartesian_prod(torch.arange(len(captions)), torch.arange(slots))
    if fixed:  # padding phrases consist of [CLS] and [SEP], and the text backbone encodes them as well
        padding = torch.zeros(len(captions), slots - 3, 22, dtype=torch.long)
        padding[..., 0], padding[..., 1] = 101, 102
        ids, mask = torch.cat((ids, padding), dim=1), torch.cat((mask, (padding != 0).long()), dim=1)
        spans = torch.cat((spans, torch.tensor([0, 1]).expand(len(captions), slots - 3, 2)), dim=1)
    return {**inputs, "phrase_input_ids": ids, "phrase_attention_mask": mask, "phrase_spans": spans}


def published_batches(questions, size: int = PUBLISHED_BATCH, width: int = 40) -> list[dict]:
    """Batch expressions in random order, each with its own copy of the image."""
    samples = [(image, text) for image, texts in questions for text in texts]
    random.Random(0).shuffle(samples)
    return [
        collate(*map(list, zip(*samples[start : start + size], strict=True)), None, width)
        for start in range(0, len(samples), size)
    ]


def our_batches(questions, size: int) -> list[dict]:
    """Batch images of similar shape, each once for all its expressions."""
    questions = sorted(questions, key=lambda question: tuple(question[0].shape))
    batches = []
    for start in range(0, len(questions), size):
        group = questions[start : start + size]
        texts = [text for _, texts in group for text in texts]
        image_index = [index for index, (_, texts) in enumerate(group) for _ in texts]
        batches.append(collate([image for image, _ in group], texts, image_index))
    return batches


def answer(model: RefTRForVisualGrounding, batches: list[dict], **kwargs) -> list:
    """Predict the boxes of each batch, and the masks if the model predicts them."""
    answers = []
    with torch.no_grad():
        for batch in batches:
            outputs = model(**batch, **kwargs)
            answers.append((outputs.pred_boxes, outputs.pred_masks))
    return answers


def move(batch: dict, device: str) -> dict:
    """Move a batch to a device before the measurement, so that the transfer is not timed."""
    return {name: value.to(device) for name, value in batch.items()}


def race(actions: list[Callable], rounds: int, device: str) -> list[list[float]]:
    """Measure the seconds of each action, alternating between them, after a warm-up round."""
    seconds = [[] for _ in actions]
    for number in range(rounds + 1):
        for times, action in zip(seconds, actions, strict=True):
            start = time.perf_counter()
            action()
            if device != "cpu":
                torch.cuda.synchronize()
            if number:
                times.append(time.perf_counter() - start)
    return seconds


def one_image(count: int) -> tuple[str, dict, dict]:
    """
    Return a name and the inputs of both sides for one image of 640 x 480 and `count` expressions. The inputs of the
    published pattern contain one copy of the image per expression.
    """
    image, texts = torch.randn(3, *SIZES[0], generator=torch.Generator().manual_seed(1)), make_texts(count)
    name = f"one image, {count} expression{'s' * (count > 1)}"
    return name, collate([image], texts, [0] * count), collate([image] * count, texts, None, width=40)


def latency(count: int, device: str, rounds: int, **kwargs) -> list[Row]:
    """Measure one image with one or several expressions; kwargs are passed to `compare`."""
    name, grouped, published = one_image(count)
    pair = (grouped, published)
    return compare(name, "milliseconds", 1e-3, [grouped], [published], pair, device, rounds, **kwargs)


def compiled(device: str, rounds: int) -> list[Row]:
    """Measure one image and one expression with a compiled model: constant weights on a CPU, one graph on a GPU."""
    prepare = partial(torch.compile, mode=None if device == "cpu" else "reduce-overhead")
    with inductor.patch(freezing=device == "cpu"):  # as TORCHINDUCTOR_FREEZING=1 does
        return latency(1, device, rounds, prepare=prepare, label=", compiled")


def evaluation_compiled(device: str, rounds: int) -> list[Row]:
    """Measure `evaluation` with a model that is compiled for each of the few shapes."""
    # by default torch stops compiling after the eighth shape of all models together
    with inductor.patch(freezing=device == "cpu"), dynamo.patch(recompile_limit=100):
        return evaluation(device, rounds, prepare=partial(torch.compile, dynamic=False), label=", compiled")


def exported(device: str, rounds: int) -> list[Row]:
    """Measure single images with ONNX Runtime on a CPU, using the graph of `reftr export`."""
    if device != "cpu":
        raise ValueError(f"The row 'exported' is of ONNX Runtime on a CPU: --device {device} has none.")
    model = as_published(build_model())
    with contextlib.redirect_stdout(sys.stderr):  # torch prints its progress
        graph = export(build_model())
    rows = []
    for count in (1, EXPRESSIONS):
        name, grouped, published = one_image(count)
        actions = [lambda: graph(**grouped), lambda: answer(model, [published], output_attentions=True)]  # noqa: B023
        milliseconds = [[1000 * value for value in times] for times in race(actions, rounds, device)]
        expected = answer(model, [published])[0][0]
        difference = difference_of(graph(**grouped).pred_boxes, expected)
        rows.append(Row(f"{name}, float32, ONNX Runtime", "milliseconds", *milliseconds, difference))
    return rows


def compare(
    name, unit, count, grouped, published, pair, device, rounds, predict_masks=False, prepare=None, label=""
) -> list[Row]:
    """
    Compare forward passes in several dtypes with the published pattern in float32.

    Args:
        name, unit (`str`): name and unit of the rows.
        count (`float`): divisor of the seconds.
        grouped, published (`list[dict]`): batches of both sides.
        pair (`(dict, dict)`): one batch of each side, which must have the same answers.
        prepare (`Callable`, *optional*): applied to our models, such as `torch.compile`.
        label (`str`, *optional*): appended to the names of the rows.
    """
    grouped, published, pair = ([move(batch, device) for batch in batches] for batches in (grouped, published, pair))
    model = as_published(build_model(predict_masks)).to(device)
    models = {key: build_model(predict_masks).to(device, getattr(torch, key)).fused_copy() for key in DTYPES[device]}
    if prepare is not None:
        models = {key: prepare(side) for key, side in models.items()}
    *ours, theirs = race(
        [
            *(lambda side=side: answer(side, grouped) for side in models.values()),
            lambda: answer(model, published, output_attentions=True),
        ],
        rounds,
        device,
    )
    expected = answer(model, pair[1:])[0][0]
    rows = []
    for (dtype, side), times in zip(models.items(), ours, strict=True):
        seconds = [[value / count for value in values] for values in (times, theirs)]
        rows.append(
            Row(f"{name}, {dtype}{label}", unit, *seconds, difference_of(answer(side, pair[:1])[0][0], expected))
        )
    return rows


def difference_of(boxes: torch.Tensor, others: torch.Tensor) -> dict:
    """Return the largest difference of two lists of relative boxes_cxcywh, and their mean and least IoU."""
    others = others[:, : boxes.shape[1]]  # the rest is padding
    corners = [center_to_corners_format(values.flatten(0, 1).float()) for values in (boxes, others)]
    ious = box_iou(*corners).diagonal()
    return {
        "largest_difference": float((boxes - others).abs().max()),
        "mean_iou": round(ious.mean().item(), 4),
        "least_iou": round(ious.min().item(), 4),
    }


def evaluation(device: str, rounds: int, predict_masks: bool = False, **kwargs) -> list[Row]:
    """Measure forward passes over images with seven expressions each; kwargs are passed to `compare`."""
    questions = make_questions(IMAGES[device], EXPRESSIONS)
    grouped, published = our_batches(questions, GROUPS[device]), published_batches(questions)
    # answers are compared at the same padded size, because padding changes them
    batch = grouped[0]
    images = {name: batch[name][batch["image_index"]] for name in ("pixel_values", "pixel_mask")}
    single = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **images}
    name, count = f"evaluation{', masks' * predict_masks}", len(questions) * EXPRESSIONS
    unit = "seconds an expression"
    return compare(name, unit, count, grouped, published, (batch, single), device, rounds, predict_masks, **kwargs)


def captions(device: str, rounds: int) -> list[Row]:
    """Measure forward passes over images with five captions each, of three phrases."""
    images = [image for image, _ in make_questions(GROUPS[device], 1)]
    texts = make_captions(5 * len(images))
    inputs = collate(images, [ids for ids, _ in texts], [index // 5 for index in range(len(texts))])
    grouped = [with_phrases(inputs, texts, fixed=False)]
    samples = [(images[index // 5], text) for index, text in enumerate(texts)]
    published = []
    for start in range(0, len(samples), PUBLISHED_BATCH):
        repeated, captions = zip(*samples[start : start + PUBLISHED_BATCH], strict=True)
        inputs = collate(list(repeated), [ids for ids, _ in captions], None, width=90)
        published.append(with_phrases(inputs, list(captions), fixed=True))
    # answers are compared on one caption, padded in the published pattern only
    one = [collate(images[:1], [texts[0][0]], None, width) for width in (None, 90)]
    pair = [with_phrases(inputs, texts[:1], fixed) for inputs, fixed in zip(one, (False, True), strict=True)]
    return compare(
        "evaluation, captions", "seconds a phrase", 3 * len(texts), grouped, published, pair, device, rounds
    )


def training_step(side: str, device: str, is_fast: bool = False) -> tuple[Callable, int, RefTRForVisualGrounding]:
    """
    Return a function that makes an optimizer step of one side, its number of expressions, and the model; `is_fast`
    applies `compile` and `mixed_precision: bf16` of the training script.
    """
    model = build_model().to(device)
    questions = make_questions(max(PUBLISHED_BATCH, GROUPS[device]), EXPRESSIONS)
    if side == "ours":
        group = GROUPS[device]
        (batch,), kwargs = our_batches(questions[:group], group), {}
    else:
        model = as_published(model)
        batch, kwargs = published_batches(questions)[0], {"output_attentions": True}
    model.freeze_parameters()
    model.train()
    count = len(batch["input_ids"])
    batch = move(batch, device)
    labels = [{"boxes": torch.rand(1, 4, device=device) / 2 + 0.25} for _ in range(count)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=side == "ours")
    if is_fast:
        model.compile()

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=is_fast):
            loss = model(**batch, labels=labels, **kwargs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()
        optimizer.zero_grad()

    return step, count, model


def training(device: str, rounds: int, is_fast: bool = False) -> list[Row]:
    """Measure optimizer steps, of eight expressions in the published pattern and of grouped expressions in ours."""
    sides = (training_step("ours", device, is_fast), training_step("published", device))
    steps, counts, _ = zip(*sides, strict=True)
    times = race(list(steps), rounds, device)
    seconds = [[value / count for value in values] for values, count in zip(times, counts, strict=True)]
    name = f"training step, {'bfloat16, compiled' if is_fast else 'float32'}"
    return [Row(name, "seconds an expression", *seconds, {})]


def training_memory(device: str, rounds: int) -> list[Row]:
    """Measure the peak memory of a step beyond weights and optimizer state, each side in a separate process."""
    peaks = []
    for side in SIDES:
        command = [sys.executable, __file__, "--memory_of", side, "--device", device]
        # freed memory is returned to the system immediately, so that the peak counts only memory in use
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
        printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        peaks.append([float(printed)])
    return [Row("training step, memory, float32", "GB an expression", *peaks, {})]


def preparation(device: str, rounds: int) -> list[Row]:
    """Measure preprocessing of JPEG files to a batch on one core, compared with the published steps in OpenCV."""
    found = run_script("data_throughput.py")["640 x 480"]
    if "published, pictures a second" not in found:
        raise ValueError("The published steps require OpenCV: pip install opencv-python-headless.")
    ours, published = ([1 / found[f"{side}, pictures a second"]] for side in ("rows", "published"))
    return [Row("JPEG file to batch, one core", "seconds per image", ours, published, {})]


def loading(device: str, rounds: int) -> list[Row]:
    """Measure loading from a saved folder, compared with a BERT and an image backbone of the same size."""
    seconds = run_script("loading.py")["seconds"]
    parts = [seconds["BERT"] + seconds["backbone"]]
    return [Row("loading a saved model, beside its parts by the library", "seconds", [seconds["RefTR"]], parts, {})]


def run_script(name: str) -> dict:
    """Run another benchmark in a separate process and return its JSON output."""
    command = [sys.executable, str(ROOT / "benchmarks" / name)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def memory_of(side: str, device: str) -> float:
    """Return the peak memory of two steps of one side, in GB per expression, beyond the memory kept between them."""
    step, count, model = training_step(side, device)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    kept = 2 * 4 * trained  # bytes of the optimizer's moments
    if device == "cpu":
        before = psutil.Process().memory_info().rss
    else:
        before = torch.cuda.memory_allocated()
    step()
    step()
    if device == "cpu":
        peak = peak_memory()
    else:
        peak = torch.cuda.max_memory_allocated()
    return (peak - before - kept) / count / 1e9


def peak_memory() -> int:
    """
    Return the peak memory of this process in bytes. On Linux it is read from /proc, because the value of getrusage
    starts at the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# row name -> (measurement, number of rounds)
ROWS = {
    "latency_1": (partial(latency, 1), 15),
    "latency_7": (partial(latency, EXPRESSIONS), 5),
    "compiled": (compiled, 15),
    "exported": (exported, 5),
    "evaluation": (evaluation, 3),
    "evaluation_compiled": (evaluation_compiled, 3),
    "evaluation_masks": (partial(evaluation, predict_masks=True), 3),
    "captions": (captions, 3),
    "training": (training, 3),
    "training_compiled": (partial(training, is_fast=True), 3),
    "training_memory": (training_memory, 1),
    "preparation": (preparation, 1),
    "loading": (loading, 1),
}


def machine(device: str) -> dict:
    """Describe the machine and the versions of a measurement."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor_name() -> str:
    """Return the name of the CPU, with its bfloat16 instruction sets."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    formats = [name for name in ("avx512_bf16", "amx_bf16") if name in facts.get("flags", "").split()]
    return " with ".join([facts.get("model name", platform.machine()), *formats])


def main():
    parser = argparse.ArgumentParser(description="Speed compared with the published pattern.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="rows to measure; all rows of the device by default")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, help="number of rounds of each row, in place of its default")
    parser.add_argument("--output", help="JSON file to write the rows to; rows with other names are kept")
    parser.add_argument("--memory_of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        sys.stdout.write(f"{memory_of(args.memory_of, args.device)}\n")
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch reports no GPU.")
    path = args.output and Path(args.output)
    results = {"machine": machine(args.device), "rows": []}
    if path and path.exists():
        kept = json.loads(path.read_text())
        if kept["machine"] != results["machine"]:
            raise ValueError(
                f"--output {args.output}: its rows were measured on {kept['machine']}, and this is "
                f"{results['machine']}. Name another file, or remove this one."
            )
        results = kept
    for name in args.rows or [name for name in ROWS if args.device == "cpu" or name != "exported"]:
        torch.compiler.reset()  # discard the graphs of the previous row
        action, rounds = ROWS[name]
        rows = [row.as_json() for row in action(args.device, args.rounds or rounds)]
        sys.stdout.write("".join(f"{json.dumps(row)}\n" for row in rows))
        sys.stdout.flush()
        if path:  # replace the rows of the same name, and append new ones
            results["rows"] = list({row["name"]: row for row in [*results["rows"], *rows]}.values())
            path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
