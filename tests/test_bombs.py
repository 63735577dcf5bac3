"""
Files that are small and unfold to anything: zip bombs, lists in themselves, sizes that are only claimed. Every door
says a sentence, soon, and takes little memory.
"""

import codecs
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from processes import ENVIRONMENT


ROOT = Path(__file__).resolve().parents[1]
MAGIC = 0x1950A86A20F9469CFC6C
# a tuple of itself twice, forty times over: 2 ** 40 entries in 160 bytes
UNFOLDING = b"N" + b"q\x00h\x00\x86" * 40
LIST_OF_LISTS = b"]q\x00" + b"]q\x01(h\x00h\x00eq\x00" * 40


class Claim:
    """A storage in a pickle, of a number of elements."""

    def __init__(self, count, key="0"):
        self.pid = ("storage", torch.FloatStorage, key, "cpu", count)


class Call:
    """Calls a function when it is unpickled."""

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
    """A file of torch.save, with this pickle and one storage of so many bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, data in [("a/data.pkl", content), ("a/version", b"3\n"), ("a/data/0", bytes(size)), *entries]:
            archive.writestr(name, data)
        archive.comment = comment
        change(archive)
    return buffer.getvalue()


def legacy(content: bytes, keys=("0",), rest=b"") -> bytes:
    """A file of torch.save before 1.6."""
    first = [pickle.dumps(value, 2) for value in (MAGIC, 1001, {"little_endian": True})]
    return b"".join([*first, content, keys if isinstance(keys, bytes) else dump(list(keys)), rest])


def overlap(archive):
    """Let fifty more entries of the directory point to the one storage."""
    for number in range(50):
        entry = zipfile.ZipInfo(f"a/data/{number + 1}")
        for name in ("header_offset", "CRC", "compress_size", "file_size"):
            setattr(entry, name, getattr(archive.getinfo("a/data/0"), name))
        archive.filelist.append(entry)


GOOD = weights(tensor(4, 0, (2, 2), (2, 1)))
# name -> (row of the scorecard, content of the file)
CHECKPOINTS = {
    "a storage that unpacks": ("S12", lambda: zipped(dump(GOOD), 2**28, zipfile.ZIP_DEFLATED)),
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
    """A pickle that encodes a text in hexadecimal digits, forty times over."""
    value = b"ab"
    for _ in range(40):
        value = Call(codecs.encode, value, "hex")
    return dump(value)


# answers a line of JSON per file; address space is bounded, for what is reserved and not used is not in the peak
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


def read_in_a_process(paths) -> list[dict]:
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which Linux has")
@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.row(row)) for row in ("S12", "S13")])
def test_checkpoints_that_claim_or_unfold_to_more_than_they_have(row, tmp_path, record_property):
    names = [name for name, (its_row, _) in CHECKPOINTS.items() if its_row == row]
    paths = [tmp_path / f"{number}.pth" for number in range(len(names))]
    for name, path in zip(names, paths, strict=True):
        path.write_bytes(CHECKPOINTS[name][1]())
        assert path.stat().st_size < 1_200_000
    whole = [tmp_path / "whole.pth", tmp_path / "legacy.pth"]
    whole[0].write_bytes(zipped(dump(GOOD)))
    whole[1].write_bytes(legacy(dump(GOOD, (None,)), rest=struct.pack("<q", 4) + bytes(16)))
    *answers, first, second = read_in_a_process([*paths, *whole])
    assert first["weights"] == second["weights"] == ["vl_transformer.level_embed"]
    said = (" is refused: ", " cannot be read ", " holds no weights", " is not a dense")
    faults = {
        name: answer
        for name, answer in zip(names, answers, strict=True)
        if answer.get("error") != "ValueError"
        or not any(words in answer["said"] for words in said)
        or "emory" in answer["said"]
        or len(answer["said"]) > 1000
        or answer["grown"] > 50_000_000
        or answer["seconds"] > 2
    }
    record_property("counted", (len(names) - len(faults), len(names)))
    assert not faults
