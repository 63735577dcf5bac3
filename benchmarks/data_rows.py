"""
Measure time and memory of importers and builders from 1,000 to 100,000 rows:

    python benchmarks/data_rows.py --output benchmarks/results/data_rows.json

A row is an image with an expression, or with two where a format has a record for each. All images are hard links to
a JPEG of 64 x 48, whose header is read. Each import and each build runs in a process of its own. Seconds are those of
the processor, so that other processes on the machine count as little as they can. Memory is the peak of the process
without what its imports take. Requires Linux.
"""

import argparse
import io
import json
import multiprocessing
import platform
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

import datasets
from PIL import Image

import data_scripts
from benchmarks.data_scale import link_images, make_text
from data_scripts.importing import import_files
from data_scripts.progress import disable_library_bars


COUNTS = (1_000, 10_000, 100_000)
WIDTH, HEIGHT = 64, 48
CATEGORIES = ("cup", "dog")


class Record(NamedTuple):
    """An image with objects: (text, box_xyxy, category) each."""

    number: int
    name: str
    objects: list[tuple[str, list[int], str]]


def make_records(count: int, num_objects: int = 1) -> Iterator[Record]:
    """Yield as many images, always the same."""
    rng = random.Random(0)
    for number in range(count):
        objects = []
        for category in CATEGORIES[:num_objects]:
            left, top = rng.randint(0, 40), rng.randint(0, 30)
            box = [left, top, left + rng.randint(5, 23), top + rng.randint(5, 17)]
            objects.append((make_text(rng, 2, 6), box, category))
        yield Record(number, f"{number}.jpg", objects)


def to_xywh(box: list[int]) -> list[int]:
    """Return a box_xyxy as left, top, width and height."""
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def write_lines(path: Path, lines: Iterator[dict]) -> Path:
    """Write JSON Lines."""
    with open(path, "w") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)
    return path


def write_jsonl(folder: Path, count: int) -> Path:
    """Write our JSON Lines."""
    return write_lines(
        folder / "train.jsonl",
        (
            {"image": name, "expressions": [{"text": text, "box": box} for text, box, _ in objects]}
            for _, name, objects in make_records(count)
        ),
    )


def write_coco(folder: Path, count: int) -> Path:
    """Write COCO's JSON of instances with captions."""
    images = [{"id": r.number, "file_name": r.name, "width": WIDTH, "height": HEIGHT} for r in make_records(count)]
    annotations = [
        {"image_id": record.number, "category_id": index, "bbox": to_xywh(box), "caption": text}
        for record in make_records(count)
        for index, (text, box, _) in enumerate(record.objects)
    ]
    categories = [{"id": index, "name": name} for index, name in enumerate(CATEGORIES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))
    return folder / "train.json"


def write_mdetr(folder: Path, count: int) -> Path:
    """Write MDETR's JSON, an image entry per expression."""
    images, annotations = [], []
    for _, name, objects in make_records(count, 2):
        for text, box, _ in objects:
            entry = {"id": len(images), "file_name": name, "width": WIDTH, "height": HEIGHT, "caption": text}
            annotations.append({"image_id": len(images), "bbox": to_xywh(box), "tokens_positive": [[0, 3]]})
            images.append({**entry, "dataset_name": "refcoco"})
    (folder / "train.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "train.json"


def write_odvg(folder: Path, count: int) -> Path:
    """Write ODVG JSON Lines."""

    def line(record: Record) -> dict:
        caption = " near ".join(f"{category} {text}" for text, _, category in record.objects)
        regions = [{"bbox": box, "phrase": f"{category} {text}"} for text, box, category in record.objects]
        size = {"filename": record.name, "height": HEIGHT, "width": WIDTH}
        return {**size, "grounding": {"caption": caption, "regions": regions}}

    return write_lines(folder / "train.jsonl", map(line, make_records(count)))


def write_phrasecut(folder: Path, count: int) -> Path:
    """Write the JSON of PhraseCut, an entry per phrase."""
    entries = [
        {"image_id": record.number, "phrase": text, "instance_boxes": [to_xywh(box)], "Polygons": []}
        for record in make_records(count)
        for text, box, _ in record.objects
    ]
    (folder / "refer_train.json").write_text(json.dumps(entries))
    return folder / "refer_train.json"


def write_label_studio(folder: Path, count: int) -> Path:
    """Write the JSON export of Label Studio."""
    tasks = []
    for _, name, objects in make_records(count):
        results = []
        for index, (text, box, category) in enumerate(objects):
            numbers = dict(zip(("x", "y", "width", "height"), to_xywh(box), strict=True))
            value = {side: 100 * n / (HEIGHT if side in "y height" else WIDTH) for side, n in numbers.items()}
            region = {"id": str(index), "type": "rectanglelabels", "value": {**value, "rectanglelabels": [category]}}
            results += [{**region, "original_width": WIDTH, "original_height": HEIGHT}]
            results += [{"id": str(index), "type": "textarea", "value": {"text": [text]}}]
        tasks.append({"data": {"image": f"/data/upload/1/{name}"}, "annotations": [{"result": results}]})
    (folder / "train.json").write_text(json.dumps(tasks))
    return folder / "train.json"


def write_cvat(folder: Path, count: int) -> Path:
    """Write the XML of CVAT for images."""
    with open(folder / "train.xml", "w") as file:
        file.write("<annotations>")
        for number, name, objects in make_records(count):
            file.write(f'<image id="{number}" name="{name}" width="{WIDTH}" height="{HEIGHT}">')
            for text, box, category in objects:
                corners = " ".join(f'{n}="{v}"' for n, v in zip(("xtl", "ytl", "xbr", "ybr"), box, strict=True))
                file.write(f"<box label={quoteattr(category)} {corners}><attribute name='caption'>{text}</attribute>")
                file.write("</box>")
            file.write("</image>")
        file.write("</annotations>")
    return folder / "train.xml"


def write_image_folder(folder: Path, count: int) -> Path:
    """Write the metadata.jsonl of an imagefolder."""

    def line(record: Record) -> dict:
        boxes, texts = [to_xywh(box) for _, box, _ in record.objects], [text for text, *_ in record.objects]
        return {"file_name": record.name, "objects": {"bbox": boxes, "text": texts}}

    return write_lines(folder / "metadata.jsonl", map(line, make_records(count)))


def write_image_text_bbox(folder: Path, count: int) -> Path:
    """Write an array of objects with image, text and bbox."""
    entries = [
        {"image": name, "text": text, "bbox": box}
        for _, name, objects in make_records(count)
        for text, box, _ in objects
    ]
    (folder / "train.json").write_text(json.dumps(entries))
    return folder / "train.json"


def write_qwen(folder: Path, count: int) -> Path:
    """Write conversations of Qwen-VL, with boxes of 0..1000, which the import has to recognize."""

    def line(record: Record) -> dict:
        sides = (WIDTH, HEIGHT, WIDTH, HEIGHT)
        found = [
            {"bbox_2d": [1000 * value // side for value, side in zip(box, sides, strict=True)], "label": text}
            for text, box, _ in record.objects
        ]
        answer = json.dumps(found)
        turns = [{"from": "human", "value": "Locate all."}, {"from": "gpt", "value": answer}]
        return {"image": record.name, "conversations": turns}

    return write_lines(folder / "train.jsonl", map(line, make_records(count)))


def write_loc_tokens(folder: Path, count: int) -> Path:
    """Write the JSON Lines of PaliGemma."""

    def line(record: Record) -> dict:
        parts = []
        for text, (x0, y0, x1, y1), _ in record.objects:
            numbers = (1023 * y0 // HEIGHT, 1023 * x0 // WIDTH, 1023 * y1 // HEIGHT, 1023 * x1 // WIDTH)
            parts.append("".join(f"<loc{number:04d}>" for number in numbers) + f" {text}")
        return {"image": record.name, "prefix": "detect", "suffix": " ; ".join(parts)}

    return write_lines(folder / "train.jsonl", map(line, make_records(count)))


def write_parquet(path: Path, rows: list[dict]) -> Path:
    """Write rows as Parquet."""
    path.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def write_samples(folder: Path, count: int) -> Path:
    """Write rows in the columns of moondream/refcoco-m, with their images inside."""
    content = encode_image()
    rows = []
    for number, name, objects in make_records(count):
        samples = [
            {"id": 2 * number + index, "category": category, "sentences": [text], "bbox": list(map(float, box))}
            for index, (text, box, category) in enumerate((t, to_xywh(b), c) for t, b, c in objects)
        ]
        image = {"bytes": content, "path": None}
        rows.append({"image": image, "image_id": number, "file_name": name, "samples": samples})
    return write_parquet(folder / "rows" / "train.parquet", rows)


def write_refer(folder: Path, count: int) -> Path:
    """Write rows in the columns of jxu124/refcoco, one per object, those of an image far apart."""
    rows = []
    for index in range(len(CATEGORIES)):
        for number, name, objects in make_records(count, 2):
            text, box, _ = objects[index]
            rows.append(
                {
                    "ann_id": 2 * number + index,
                    "split": "train",
                    "sentences": [{"sent": text, "sent_id": 2 * number + index}],
                    "raw_anns": json.dumps({"segmentation": []}),
                    "raw_image_info": json.dumps({"width": WIDTH, "height": HEIGHT}),
                    "image_path": name,
                    "bbox": list(map(float, box)),
                }
            )
    return write_parquet(folder / "rows" / "train.parquet", rows)


def encode_image() -> bytes:
    """Return the content of the JPEG."""
    file = io.BytesIO()
    Image.effect_noise((WIDTH, HEIGHT), 90).convert("RGB").save(file, "JPEG")
    return file.getvalue()


IMPORTS: dict[str, Callable] = {
    "mdetr_json": write_mdetr,
    "odvg": write_odvg,
    "phrasecut": write_phrasecut,
    "coco": write_coco,
    "label_studio": write_label_studio,
    "cvat": write_cvat,
    "imagefolder": write_image_folder,
    "image_text_bbox": write_image_text_bbox,
    "qwen": write_qwen,
    "loc_tokens": write_loc_tokens,
}
BUILDS: dict[str, Callable] = {
    "jsonl": write_jsonl,
    "mdetr_json": write_mdetr,
    "odvg": write_odvg,
    "named rows, images inside": write_samples,
    "named rows, paths of images": write_refer,
}
CASES = [*(("import", name) for name in IMPORTS), *(("build", name) for name in BUILDS)]


def make_files(folder: Path, kind: str, name: str, count: int) -> None:
    """Write the annotations of a case into a folder."""
    folder.mkdir(parents=True)
    (IMPORTS if kind == "import" else BUILDS)[name](folder, count)


def make_images(folder: Path, count: int) -> None:
    """Write the images of all cases into a folder."""
    link_images(folder, (f"{number}.jpg" for number in range(count)), encode_image())


def run(folder: Path, images: Path, kind: str, name: str) -> int:
    """Import or build the files of a case, and return the number of rows."""
    if kind == "import":
        file = next(path for path in folder.iterdir() if path.suffix in (".json", ".jsonl", ".xml"))
        report = import_files(name, {"train": [file]}, folder / "out", images)
        return report.counts["train"]["images"]
    flags = {"data_dir": str(folder), "cache_dir": str(folder / "cache")}
    if name != "named rows, images inside":
        flags["image_dir"] = str(images)
    return len(data_scripts.load(str(folder / "rows") if name.startswith("named") else name, "train", **flags))


def megabytes(name: str) -> float:
    """Return the memory of this process: VmRSS, or its peak, VmHWM."""
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measure(folder: Path, images: Path, kind: str, name: str) -> tuple[int, float, float]:
    """Return the rows, the seconds and the megabytes of `run`."""
    disable_library_bars()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    base, start = megabytes("VmRSS"), time.process_time()
    count = run(folder, images, kind, name)
    return count, time.process_time() - start, megabytes("VmHWM") - base


def apart(function: Callable, *args: Any) -> Any:
    """Return the result of a function that runs in a forked process, which has the imports of this one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of rows")
    parser.add_argument("--cases", nargs="+", default=[""], help="parts of the names of the cases, such as import:")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    cases = [case for case in CASES if any(part in ": ".join(case) for part in args.cases)]
    results = {"machine": {"python": platform.python_version(), "datasets": datasets.__version__}, "rows": []}
    for count in args.counts:
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder) / "images"
            apart(make_images, images, count)
            for number, (kind, name) in enumerate(cases):
                files = Path(folder) / str(number)
                apart(make_files, files, kind, name, count)
                found, seconds, size = apart(measure, files, images, kind, name)
                if found != count:
                    raise RuntimeError(f"{kind} {name} made {found} rows of {count}.")
                case = f"{kind}: {name}"
                results["rows"].append(
                    {"case": case, "rows": count, "seconds": round(seconds, 3), "megabytes": round(size, 1)}
                )
                sys.stdout.write(
                    f"{case}, {count:,} rows: {seconds:.1f} s, {size:.0f} MB; {1e6 * seconds / count:.0f} us and "
                    f"{1e3 * size / count:.1f} kB per row\n"
                )
                sys.stdout.flush()
                if args.output:
                    args.output.write_text(json.dumps(results, indent=1) + "\n")
                shutil.rmtree(files)


if __name__ == "__main__":
    main()
