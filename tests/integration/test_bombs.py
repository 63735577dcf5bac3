"""
Small files that unfold to huge values: zip bombs, nested references and false size claims. Every entry point refuses
them with a message, quickly and in little memory.
"""

import codecs
import functools
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data_scripts
from data_scripts.masks import decode_segmentation
from modeling_reftr import RefTRConfig
from modeling_reftr.convert_reftr_checkpoint import read_weights
from modeling_reftr.inputs_reftr import to_list, to_sizes, to_threshold
from modeling_reftr.pipeline_reftr import make_question
from modeling_reftr.rle_reftr import from_coco_rle
from tests.helpers.layout_refcoco import make_refcoco
from tests.helpers.layout_reftr_index import make_reftr_index
from tests.helpers.processes import ENVIRONMENT
from tests.helpers.tiny import ROOT, trials
from training_reftr.arguments import parse_arguments, to_type
from training_reftr.metrics.referring_expression_comprehension.referring_expression_comprehension import to_box
from training_reftr.metrics.referring_segmentation.referring_segmentation import ReferringSegmentation, count_pixels
from training_reftr.metrics.referring_segmentation.referring_segmentation import to_run_lengths as to_metric_mask
from training_reftr.settings import TrainingSettings


IMAGE = Image.new("RGB", (64, 48))
MAGIC = 0x1950A86A20F9469CFC6C
# a tuple that contains its predecessor twice, forty times over: 2 ** 40 entries in 160 bytes
UNFOLDING = b"N" + b"q\x00h\x00\x86" * 40
LIST_OF_LISTS = b"]q\x00" + b"]q\x01(h\x00h\x00eq\x00" * 40


class Claim:
    """A storage in a pickle that claims a number of elements."""

    def __init__(self, count, key="0"):
        self.pid = ("storage", torch.FloatStorage, key, "cpu", count)


class Call:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class ClaimPickler(pickle.Pickler):
    def persistent_id(self, value):
        return (*value.pid, *self.view) if isinstance(value, Claim) else None


def dump(value, view=()) -> bytes:
    content = io.BytesIO()
    pickler = ClaimPickler(content, protocol=2)
    pickler.view = view
    pickler.dump(value)
    return content.getvalue()


def tensor(count, offset, shape, stride):
    return Call(torch._utils._rebuild_tensor_v2, Claim(count), offset, shape, stride, False, {})


def weights(value):
    return {"model": {"vl_transformer.level_embed": value}}


def zipped(content: bytes, size=16, packing=zipfile.ZIP_STORED, entries=(), comment=b"", change=lambda archive: None):
    """Return a file of torch.save with this pickle and one storage of `size` bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, data in [("a/data.pkl", content), ("a/version", b"3\n"), ("a/data/0", bytes(size)), *entries]:
            archive.writestr(name, data)
        archive.comment = comment
        change(archive)
    return buffer.getvalue()


def legacy(content: bytes, keys=("0",), rest=b"") -> bytes:
    """Return a file in the format of torch.save before 1.6."""
    first = [pickle.dumps(value, 2) for value in (MAGIC, 1001, {"little_endian": True})]
    return b"".join([*first, content, keys if isinstance(keys, bytes) else dump(list(keys)), rest])


def overlap(archive):
    """Add fifty directory entries that point to the same storage."""
    for number in range(50):
        entry = zipfile.ZipInfo(f"a/data/{number + 1}")
        for name in ("header_offset", "CRC", "compress_size", "file_size"):
            setattr(entry, name, getattr(archive.getinfo("a/data/0"), name))
        archive.filelist.append(entry)


GOOD = weights(tensor(4, 0, (2, 2), (2, 1)))
# name -> (row of the scorecard, content of the file)
CHECKPOINTS = {
    "a storage that unpacks": ("S12", lambda: zipped(dump(GOOD), 2**27, zipfile.ZIP_DEFLATED)),
    "a storage that unpacks by LZMA": ("S12", lambda: zipped(dump(GOOD), 10**7, zipfile.ZIP_LZMA)),
    "a pickle that unpacks": ("S12", lambda: zipped(dump(GOOD) + bytes(10**8), 16, zipfile.ZIP_DEFLATED)),
    "entries over each other": ("S12", lambda: zipped(dump(GOOD), 10**5, change=overlap)),
    "a key that unfolds": ("S12", lambda: zipped(b"\x80\x02}" + UNFOLDING + b"Ns.")),
    "a key that unfolds, legacy": ("S12", lambda: legacy(b"\x80\x02}" + UNFOLDING + b"Ns.")),
    "a set that unfolds": ("S12", lambda: zipped(b"\x80\x02c__builtin__\nset\n](" + UNFOLDING + b"e\x85R.")),
    "a call of what unfolds": ("S12", lambda: zipped(b"\x80\x02" + LIST_OF_LISTS + b")R.")),
    "a storage that unfolds": ("S12", lambda: zipped(b"\x80\x02" + UNFOLDING + b"Q.")),
    "a shape that unfolds": ("S12", lambda: zipped(dump(tensor(4, 0, "SHAPE", (1,))).replace(
        b"X\x05\x00\x00\x00SHAPE", UNFOLDING.replace(b"\x00", b"\xff")))),
    "a class that unfolds": ("S12", lambda: zipped(b"\x80\x02" + UNFOLDING + b")\x81.")),
    "keys of storages that unfold": ("S12", lambda: legacy(dump(GOOD), b"\x80\x02](" + UNFOLDING + b"e.")),
    "text that doubles": ("S12", lambda: zipped(doubling_text())),
    "a state dict that unfolds": ("S12", lambda: zipped(b"\x80\x02" + LIST_OF_LISTS + b".")),
    "names that unfold": ("S12", lambda: zipped(
        b"\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00a" + LIST_OF_LISTS + b"ss.")),
    "nested without end": ("S12", lambda: zipped(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".")),
    "a storage": ("S13", lambda: zipped(dump(weights(tensor(10**12, 0, (2, 2), (2, 1)))))),
    "a storage without entry": ("S13", lambda: zipped(dump(weights(
        Call(torch._utils._rebuild_tensor_v2, Claim(4, "1"), 0, (2, 2), (2, 1), False, {}))))),
    "a storage a little larger than its entry": ("S13", lambda: zipped(dump(weights(tensor(5, 0, (2, 2), (2, 1)))))),
    "a shape": ("S13", lambda: zipped(dump(weights(tensor(4, 0, (10**6, 10**6), (10**6, 1)))))),
    "a shape without numbers": ("S13", lambda: zipped(dump(weights(tensor(4, 0, (-1, 2), (2, 1)))))),
    "strides": ("S13", lambda: zipped(dump(weights(tensor(4, 0, (2, 2), (10**12, 1)))))),
    "an offset": ("S13", lambda: zipped(dump(weights(tensor(4, 10**12, (2, 2), (2, 1)))))),
    "a storage, legacy": ("S13", lambda: legacy(dump(weights(tensor(10**12, 0, (2, 2), (2, 1))), (None,)))),
    "a shape, legacy": ("S13", lambda: legacy(dump(weights(tensor(4, 0, (10**10,), (1,))), (None,)), rest=bytes(24))),
    "a view, legacy": ("S13", lambda: legacy(dump(weights(tensor(4, 0, (2, 2), (2, 1))), (("1", 0, 10**12),)))),
    "a bytearray": ("S13", lambda: zipped(dump({"model": {}, "epoch": Call(bytearray, 10**12)}))),
    "a tensor": ("S13", lambda: zipped(dump({"model": {}, "epoch": Call(torch.Tensor, 10**12)}))),
    "text": ("S13", lambda: zipped(b"\x80\x02X\xff\xff\xff\xff.")),
    "text, legacy": ("S13", lambda: legacy(b"\x80\x02X\xff\xff\xff\xff.")),
    "a bytearray of protocol 5": ("S13", lambda: zipped(b"\x80\x05\x96" + bytes([255] * 7) + b"\x7f.")),
    "a frame": ("S13", lambda: zipped(b"\x80\x04\x95" + bytes([255] * 7) + b"\x7f.")),
    "entries of one name": ("S13", lambda: zipped(dump(GOOD), entries=[("A/DATA/0", bytes(99))])),
    "two pickles": ("S13", lambda: zipped(dump(GOOD), entries=[("b/data.pkl", dump(GOOD))])),
    "a directory elsewhere": ("S13", lambda: zipped(dump(GOOD), comment=b"PK\1\2" + bytes(60))),
    "tar": ("S13", lambda: b"storages".ljust(100, b"\0") + b"0000644\0" * 3 + b"77777777777\0" + bytes(377)),
}  # fmt: skip


def doubling_text() -> bytes:
    """Return a pickle that encodes a text as hexadecimal digits forty times."""
    value = b"ab"
    for _ in range(40):
        value = Call(codecs.encode, value, "hex")
    return dump(value)


# prints a line of JSON per file; limits the address space, because the peak does not show reserved memory
READ_ALL = """
import json, re, resource, sys, time, warnings
from pathlib import Path
from modeling_reftr.convert_reftr_checkpoint import read_weights
warnings.simplefilter("ignore")
def memory(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
limit = memory("VmSize") + 400_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
    before, started = memory("VmHWM"), time.perf_counter()
    try:
        answer = {"weights": list(read_weights(path))}
    except Exception as error:
        answer = {"error": type(error).__name__, "said": str(error)}
    answer |= {"grown": memory("VmHWM") - before, "seconds": time.perf_counter() - started}
    print(json.dumps(answer), flush=True)
"""


def read_in_process(paths) -> list[dict]:
    result = subprocess.run(
        [sys.executable, "-c", READ_ALL, *map(str, paths)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=200,
    )
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == len(paths), result.stderr
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Read every malicious checkpoint and two valid ones in one process; return the answers by name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    contents = {
        **{name: make() for name, (_, make) in CHECKPOINTS.items()},
        "zip": zipped(dump(GOOD)),
        "legacy": legacy(dump(GOOD, (None,)), rest=struct.pack("<q", 4) + bytes(16)),
    }
    paths = []
    for number, content in enumerate(contents.values()):
        assert len(content) < 1_200_000
        paths.append(folder / f"{number}.pth")
        paths[-1].write_bytes(content)
    return dict(zip(contents, read_in_process(paths), strict=True))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which Linux has")
@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.row(row)) for row in ("S12", "S13")])
def test_checkpoint_claiming_or_unfolding_too_much_is_refused(row, answers, record_property):
    names = [name for name, (its_row, _) in CHECKPOINTS.items() if its_row == row]
    assert answers["zip"]["weights"] == answers["legacy"]["weights"] == ["vl_transformer.level_embed"]
    refusals = (" is refused: ", " cannot be read ", " holds no weights", " is not a dense")
    faults = {
        name: answer
        for name, answer in ((name, answers[name]) for name in names)
        if answer.get("error") != "ValueError"
        or not any(phrase in answer["said"] for phrase in refusals)
        or "emory" in answer["said"]
        or len(answer["said"]) > 1000
        or answer["grown"] > 50_000_000
        or answer["seconds"] > 2
    }
    record_property("counted", (len(names) - len(faults), len(names)))
    assert not faults


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("asked", [{}, {"use_safetensors": False}])
def test_model_folder_with_pickled_weights_is_refused(make_model, name, asked, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), path)
    if name != path.name:
        path = path.rename(tmp_path / "part.bin")
        (tmp_path / name).write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), path.name)})
        )
    with pytest.raises(OSError, match="safetensors"):
        type(model).from_pretrained(tmp_path, **asked)


def safetensors_of(header, size=16) -> bytes:
    """Return a safetensors file with this header, or with a claimed header length, and `size` bytes of weights."""
    if isinstance(header, int):
        return struct.pack("<Q", header) + b"{}" + bytes(size)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def entry(shape, start, end, dtype="F32"):
    return {"vl_transformer.level_embed": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


SAFETENSORS = {
    "a header of 2 ** 63 bytes": 2**63,
    "a header of a terabyte": 10**12,
    "a header that is a little longer": 99,
    "a tensor of a terabyte": entry([10**12], 0, 4 * 10**12),
    "a shape larger than its bytes": entry([10**6, 10**6], 0, 16),
    "a shape that wraps around": entry([2**62, 2**62], 0, 16),
    "a negative shape": entry([-1, -4], 0, 16),
    "bytes past the end": entry([4], 10**12, 10**12 + 16),
    "bytes that end before they begin": entry([4], 16, 0),
    "tensors over each other": {"a": entry([4], 0, 16)["vl_transformer.level_embed"], **entry([4], 0, 16)},
    "nesting without end": b"[" * 10**5,
}


@pytest.mark.row("S13")
def test_safetensors_claiming_too_much_are_refused(tmp_path, record_property):
    path, passed = tmp_path / "weights.safetensors", {}
    path.write_bytes(safetensors_of(entry([4], 0, 16)))
    assert list(read_weights(path)) == ["vl_transformer.level_embed"]
    for name, header in SAFETENSORS.items():
        path.write_bytes(safetensors_of(header))
        message, peak = measure_refusal(lambda: read_weights(path))
        passed[name] = "cannot be read as a checkpoint of weights" in message and peak < 10_000_000
    record_property("counted", (sum(passed.values()), len(passed)))
    assert all(passed.values()), passed


# run lengths, through every function that accepts masks


def measure_refusal(call, is_measured=True) -> tuple[str, int]:
    """Return the message of a fast ValueError or OSError and the peak memory of Python and NumPy."""
    if is_measured:  # tracing is slow
        tracemalloc.start()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the call did not end"))
    signal.alarm(6)
    started = time.perf_counter()
    try:
        with pytest.raises((ValueError, OSError)) as caught:
            call()
        peak = tracemalloc.get_traced_memory()[1] if is_measured else 0
    finally:
        signal.alarm(0)
        tracemalloc.stop()
    message = str(caught.value)
    assert len(message) < 2000, message[:2000]
    assert time.perf_counter() - started < 5
    return message, peak


VALID_MASK = {"size": [48, 64], "counts": [100, 48 * 64 - 100]}
RUN_LENGTHS = {
    "a size of 100,000 x 100,000": {"size": [100_000, 100_000], "counts": [10**10]},
    "the same, compressed": {"size": [100_000, 100_000], "counts": "P2"},
    "a size that wraps around": {"size": [2**32, 2**32], "counts": [0]},
    "a side of 10 ** 5000": {"size": [10**5000, 1], "counts": [10**5000]},
    "no size": {"counts": [48 * 64]},
    "no counts": {"size": [48, 64]},
    "one side": {"size": [48 * 64], "counts": [48 * 64]},
    "three sides": {"size": [48, 64, 1], "counts": [48 * 64]},
    "a size in text": {"size": "48", "counts": [48 * 64]},
    "sides in text": {"size": ["48", "64x"], "counts": [48 * 64]},
    "sides that are not integers": {"size": [float("inf"), 64], "counts": [48 * 64]},
    "sides of nothing": {"size": [0, 64], "counts": []},
    "negative sides": {"size": [-48, -64], "counts": [48 * 64]},
    "sides that are None": {"size": [None, None], "counts": [48 * 64]},
    "counts that overrun": {"size": [48, 64], "counts": [0, 10**9]},
    "counts that overrun, compressed": {"size": [48, 64], "counts": "0PPPPo0"},
    "counts that end early": {"size": [48, 64], "counts": [5, 5]},
    "counts below nothing": {"size": [48, 64], "counts": [-5, 48 * 64 + 5]},
    "a count of 10 ** 5000": {"size": [48, 64], "counts": [10**5000]},
    "counts in text that are none": {"size": [48, 64], "counts": "no counts at all" * 10**5},
    "counts that unfold": {"size": [48, 64], "counts": "UNFOLDING"},
    "a size that unfolds": {"size": "UNFOLDING", "counts": [48 * 64]},
}


def make_unfolding_list(depth=40):
    """Return a list of 2 ** 40 nested references to one list."""
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


def make_cyclic_list():
    """Return a list that contains itself."""
    value = []
    value.append(value)
    return value


def expand_placeholders(value):
    """Replace the placeholder "UNFOLDING" by an unfolding list."""
    if value == "UNFOLDING":
        return make_unfolding_list()
    return {name: expand_placeholders(part) for name, part in value.items()} if isinstance(value, dict) else value


MASK_DOORS = {
    "from_coco_rle": lambda mask, tools: from_coco_rle(mask),
    "processor": lambda mask, tools: tools.processor(IMAGE, "the star", masks=mask),
    "metric": lambda mask, tools: tools.metric.compute(predictions=[mask], references=[VALID_MASK]),
    "metric's truth": lambda mask, tools: tools.metric.compute(predictions=[VALID_MASK], references=[mask]),
    "count_pixels": lambda mask, tools: count_pixels(mask, VALID_MASK),
    "a dataset": lambda mask, tools: decode_segmentation(mask),
}


@pytest.mark.row("S13")
def test_run_lengths_of_wrong_size_are_refused_in_little_memory(processor, tmp_path, record_property):
    """Allocate nothing of the claimed size, even where counting such a mask would be legal."""
    tools = SimpleNamespace(processor=processor, metric=ReferringSegmentation(cache_dir=str(tmp_path)))
    for door in MASK_DOORS.values():
        door(VALID_MASK, tools)
    passed = {}
    for name, mask in RUN_LENGTHS.items():
        for door in MASK_DOORS if name not in HUGE_BUT_COUNTED else ("from_coco_rle", "processor", "a dataset"):
            _, peak = measure_refusal(lambda door=door, mask=mask: MASK_DOORS[door](expand_placeholders(mask), tools))
            passed[name, door] = peak < 20_000_000
    record_property("counted", (sum(passed.values()), len(passed)))
    assert all(passed.values()), [trial for trial, is_good in passed.items() if not is_good]


HUGE_BUT_COUNTED = ("a size of 100,000 x 100,000", "the same, compressed")


# values quoted in messages


def make_unfolding_dict():
    value = {}
    for _ in range(40):
        value = {"a": value, "b": value}
    return value


def make_array_of_unfolding_lists():
    array = np.empty(2, dtype=object)
    array[0] = make_unfolding_list()
    return array


BOMBS = {
    "lists that are there twice": make_unfolding_list,
    "dicts that are there twice": make_unfolding_dict,
    "a list that holds itself": make_cyclic_list,
    "10 MB of text": lambda: "x" * 10**7,
    "an integer of 5,000 digits": lambda: 10**5000,
    "a tuple nested 10,000 times": lambda: functools.reduce(lambda inner, _: (inner,), range(10_000), ()),
    "a NumPy array of such lists": make_array_of_unfolding_lists,
}
VALUE_DOORS = {
    "text": lambda value, tools: tools.processor(IMAGE, value),
    "texts": lambda value, tools: tools.processor(IMAGE, [value]),
    "phrases": lambda value, tools: tools.processor(IMAGE, "the star", phrases=value),
    "a phrase": lambda value, tools: tools.processor(IMAGE, "the star", phrases=[value]),
    "boxes": lambda value, tools: tools.processor(IMAGE, "the star", boxes=value),
    "a side of a box": lambda value, tools: tools.processor(IMAGE, "the star", boxes=[value, 1, 2, 3]),
    "masks": lambda value, tools: tools.processor(IMAGE, "the star", masks=value),
    "images": lambda value, tools: tools.processor(value, "the star"),
    "original_sizes": lambda value, tools: tools.processor(IMAGE, "the star", original_sizes=value),
    "padding": lambda value, tools: tools.processor(IMAGE, "the star", padding=value),
    "size": lambda value, tools: tools.processor.image_processor(IMAGE, size=value),
    "image_mean": lambda value, tools: tools.processor.image_processor(IMAGE, image_mean=value),
    "device": lambda value, tools: tools.processor.image_processor(IMAGE, device=value),
    "do_pad": lambda value, tools: tools.processor.image_processor(IMAGE, do_pad=value),
    "to_list": lambda value, tools: to_list(value if isinstance(value, (dict, str, int)) else {1: value}, "text"),
    "to_threshold": lambda value, tools: to_threshold(value),
    "to_sizes": lambda value, tools: to_sizes([value], 1, "target_sizes"),
    "activation_function": lambda value, tools: RefTRConfig(activation_function=value),
    "d_model": lambda value, tools: RefTRConfig(d_model=value),
    "backbone": lambda value, tools: RefTRConfig(backbone=value),
    "question": lambda value, tools: make_question(
        IMAGE, value if isinstance(value, (int, dict)) else {1: value}, None
    ),
    "metric of boxes": lambda value, tools: to_box(value, "predictions[0]"),
    "metric of masks": lambda value, tools: to_metric_mask(value, "predictions[0]"),
    "a recipe's number": lambda value, tools: to_type("batch_size", value),
    "a recipe's flag": lambda value, tools: to_type("eval_only", value),
    "a recipe's list": lambda value, tools: to_type("lr_drop_epochs", value if value != 10**5000 else [None, value]),
    "a setting": lambda value, tools: TrainingSettings.from_flat(evaluation_batching=value),
}


@pytest.mark.row("S12")
def test_unfolding_arguments_are_refused_with_short_message(processor, record_property):
    """Shorten the quoted value in every message."""
    tools, failed = SimpleNamespace(processor=processor), []
    for door, call in VALUE_DOORS.items():
        for name, make in BOMBS.items():
            value = make()
            try:
                measure_refusal(lambda call=call, value=value: call(value, tools))
            except BaseException as error:
                failed.append((door, name, f"{type(error).__name__}: {str(error)[:200]}"))
    count = len(VALUE_DOORS) * len(BOMBS)
    record_property("counted", (count - len(failed), count))
    assert not failed, "\n".join(map(str, failed))


@pytest.mark.parametrize("name", ["quoting", "phrase_search"])
def test_both_packages_have_same_module(name):
    """Compare the copies: modeling_reftr is uploaded to the Hub without data_scripts, so they share no code."""
    copies = (ROOT / f"data_scripts/{name}.py", ROOT / f"modeling_reftr/{name}_reftr.py")
    first, second = (path.read_text(encoding="utf-8") for path in copies)
    assert first == second.replace(f"modeling_reftr.{name}_reftr", f"data_scripts.{name}")


# dataset files, recipes and the convert command


def record_with(opcodes: bytes) -> bytes:
    """Return a pickle of one reference with the same value, given as opcodes, in every field; memo 200 is taken."""
    names = ("ref_id", "image_id", "split", "sentences", "file_name", "category_id", "ann_id", "sent_ids")
    fields = b"".join(b"X" + struct.pack("<I", len(name)) + name.encode() + b"h\xc8" for name in names)
    return b"\x80\x02" + opcodes + b"q\xc80](}(" + fields + b"ue."


PICKLES = {
    "fields of lists that are there twice": record_with(LIST_OF_LISTS),
    "fields of tuples that are there twice": record_with(UNFOLDING),
    "a field that holds itself": record_with(b"]q\x00h\x00a"),
    "lists that are there twice": b"\x80\x02" + LIST_OF_LISTS + b".",
    "a key that unfolds": b"\x80\x02}" + UNFOLDING + b"Ns.",
    "a set that unfolds": b"\x80\x02c__builtin__\nset\n](" + UNFOLDING + b"e\x85R.",
    "nesting without end": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "a memo of 2 ** 32 entries": b"\x80\x02Nr\xff\xff\xff\xff.",
    "an integer of 5,000 digits": record_with(b"\x8b" + struct.pack("<I", 2100) + b"\x7f" * 2100),
    "a zip that unpacks": zipped(dump([{"ref_id": 1}]) + bytes(10**7), 16, zipfile.ZIP_DEFLATED),
    "a tensor of a terabyte": zipped(dump([tensor(10**12, 0, (10**12,), (1,))])),
}


@pytest.mark.row("S12")
def test_unfolding_dataset_pickles_are_refused(tmp_path, record_property):
    """Use the reader of references, the reader of the published index, and `combine`."""
    make_refcoco(tmp_path / "refs", "refcoco_unc")
    make_reftr_index(tmp_path / "index")
    paths = {
        "refs": tmp_path / "refs" / "refcoco" / "refs(unc).p",
        "index": tmp_path / "index" / "annotations_resc" / "unc" / "unc_train.pth",
    }
    settings = {"cache_dir": str(tmp_path / "cache")}
    doors = {
        "refs": lambda: data_scripts.load("refcoco_unc", data_dir=tmp_path / "refs", **settings),
        "index": lambda: data_scripts.load("resc_unc", data_dir=tmp_path / "index", **settings),
        "combine": lambda: data_scripts.combine(["refcoco_unc"], data_dir=tmp_path / "refs", **settings),
    }
    failed = []
    for name, content in list(PICKLES.items())[: len(trials(99, short=4))]:
        for path in paths.values():
            path.write_bytes(content)
        for door, call in doors.items():
            message, peak = measure_refusal(call)
            if paths.get(door, paths["refs"]).name not in message or peak > 100_000_000:
                failed.append((name, door, message, peak))
    count = 3 * len(list(PICKLES)[: len(trials(99, short=4))])
    record_property("counted", (count - len(failed), count))
    assert not failed


RECIPES = {
    "brackets": "model: " + "[" * 20_000 + "]" * 20_000,
    "braces": "{model: " * 10_000,
    "dashes": "- " * 20_000,
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nmodel: [*b, *b]\n",
    "an alias of itself": "model: &a {b: *a}\n",
    "merged mappings": "a: &a {x: 1}\nmodel: {<<: [*a, *a]}\n",
    "a number of 5,000 digits": f"batch_size: {'9' * 5000}\n",
    "a number of 5,000 digits, hexadecimal": f"batch_size: 0x{'f' * 5000}\n",
    "a flag of 5,000 digits, hexadecimal": f"eval_only: 0x{'f' * 5000}\n",
    "text of 900 kB": f"evaluation_batching: {'x' * 900_000}\n",
    "a name of 900 kB": f"? {'x' * 900_000}\n: 1\n",
    "a list instead of a number": f"batch_size: [{'1, ' * 1000}1]\n",
    "a list of 900 kB to inherit": f"inherit: [{'1, ' * 9000}1]\n",
}


@pytest.mark.row("S12")
def test_unfolding_recipes_are_refused(tmp_path, record_property):
    path, failed = tmp_path / "recipe.yaml", []
    for name, text in RECIPES.items():
        path.write_text(text)
        try:
            measure_refusal(
                lambda: parse_arguments([str(path), "--output_dir", str(tmp_path / "run")]), is_measured=False
            )
        except BaseException as error:
            failed.append((name, f"{type(error).__name__}: {str(error)[:200]}"))
    record_property("counted", (len(RECIPES) - len(failed), len(RECIPES)))
    assert not failed


@pytest.mark.row("S12")
def test_convert_refuses_unfolding_checkpoint_without_traceback(tmp_path, run, record_property):
    names = [name for name, (row, _) in CHECKPOINTS.items() if row == "S12"][: len(trials(5, short=1))]
    for name in names:
        path = tmp_path / "bomb.pth"
        path.write_bytes(CHECKPOINTS[name][1]())
        result = run(
            *("-m", "reftr_cli", "convert", "--checkpoint", path, "--no_processor"),
            *("--output_dir", tmp_path / "out"),
            check=False,
        )
        assert result.returncode == 1, name
        assert result.stderr.startswith(f"error: {str(path)!r} is refused: ") or f"{path} " in result.stderr, name
        assert "Traceback" not in result.stderr
        assert len(result.stderr) < 1000
        assert not (tmp_path / "out").exists()
    record_property("counted", (len(names), len(names)))
