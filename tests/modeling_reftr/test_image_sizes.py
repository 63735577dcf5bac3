"""Claimed sizes of images, URLs and processor files are checked before memory of that size is allocated."""

import contextlib
import io
import json
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data_scripts.reading import read_image_size
from data_scripts.reftr_index import read_mask_array
from modeling_reftr import RefTRImageProcessor, RefTRProcessor, fetching_reftr, open_image
from modeling_reftr.image_processing_reftr import pad_batch
from training_reftr.images import decode_array, encode_array


def saved(name, size=(64, 48), **settings) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size).save(content, name, **settings)
    return content.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """Return a PNG with one more chunk before its pixels."""
    content = saved("PNG")
    return content[:33] + chunk(kind, data) + content[33:]


def png_of(width, height) -> bytes:
    """Return a PNG whose header claims a size."""
    return (
        saved("PNG")[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")
    )


def gif_of(width, height) -> bytes:
    content = saved("GIF")
    frame = content.index(b"\x2c")  # the size of the first frame follows its position
    return (
        content[:6]
        + struct.pack("<HH", width, height)
        + content[10 : frame + 5]
        + struct.pack("<HH", width, height)
        + content[frame + 9 :]
    )


def webp_of(width, height) -> bytes:
    """Return a WEBP of two small frames whose canvas claims a size."""
    content = bytearray(saved("WEBP", save_all=True, append_images=[Image.new("RGB", (64, 48), "red")]))
    start = content.index(b"VP8X") + 12
    content[start : start + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(content)


def tiff_of(width, height) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def bmp_of(width, height) -> bytes:
    content = bytearray(saved("BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def jpeg_of(width, height) -> bytes:
    content = bytearray(saved("JPEG"))
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(content)


LARGE_HEADERS = {
    "PNG": png_of(100_000, 100_000),
    "JPEG": jpeg_of(60_000, 60_000),
    "GIF": gif_of(60_000, 60_000),
    "WEBP": webp_of(16_000, 16_000),
    "TIFF": tiff_of(100_000, 100_000),
    "BMP": bmp_of(100_000, 100_000),
    "PPM": b"P6 100000 100000 255\n",
    "PFM": b"Pf 30000 30000 -1.0\n",
}


@contextlib.contextmanager
def serving(respond, address="127.0.0.1"):
    """Run a server whose responses `respond(handler)` writes; yield its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):  # the client has disconnected
                respond(self)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer((address, 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{address}:{server.server_port}"
        server.shutdown()


def answer(handler, content=b"", status=200, **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def peak_of(action) -> tuple[str, int]:
    """Return the error message of an action and the peak memory of Python and NumPy in bytes."""
    tracemalloc.start()
    try:
        action()
        return "", 0
    except (ValueError, OSError) as error:
        return str(error), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_image_size_at_limit_is_read_and_above_is_refused(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png_of(10_000, 5_000))
    assert read_image_size(path) == (10_000, 5_000)
    path.write_bytes(png_of(10_000, 5_001))
    with pytest.raises(ValueError, match=r"image\.png' has 10000 x 5001 pixels, more than 50,000,000"):
        read_image_size(path)
    with pytest.raises(ValueError, match=r"image\.png' has 10000 x 5001 pixels, expected 1 to 50,000,000"):
        open_image(path)


MEMORY = """
import resource, sys
from modeling_reftr import open_image

open_image(b"P5 2 1 255 ab")
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        open_image(path)
    except (ValueError, OSError) as error:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used, str(error))
"""


@pytest.mark.row("S13")
def test_open_image_refuses_large_header_before_decoding(tmp_path, run, record_property):
    """Measure the peak memory of a separate process, which includes decoders outside of Python."""
    paths = [tmp_path / f"{name}.jpg" for name in LARGE_HEADERS]
    for path, content in zip(paths, LARGE_HEADERS.values(), strict=True):
        path.write_bytes(content)
        with pytest.raises((ValueError, OSError), match=r"50,000,000"):
            read_image_size(path)
    lines = run("-c", MEMORY, *paths).stdout.splitlines()
    passed = [int(line.split()[0]) < 100_000 and "50,000,000" in line for line in lines]
    record_property("counted", (sum(passed), len(paths)))
    assert len(passed) == len(paths)
    assert all(passed), lines


@pytest.mark.parametrize(
    "content",
    [
        with_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000))),
        with_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(200_000_000))),
        with_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000))),
        saved("PNG")[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt",
    ],
    ids=["zTXt", "iTXt", "iCCP", "tEXt"],
)
def test_open_image_does_not_unpack_large_png_chunks(content):
    """Chunks are dropped or refused; in both cases memory of their size is not allocated."""
    tracemalloc.start()
    with contextlib.suppress(ValueError, OSError):
        open_image(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_open_image_decodes_only_first_frame(name):
    frames = [Image.effect_noise((64, 48), 9).convert("RGB") for _ in range(200)]
    content = io.BytesIO()
    frames[0].save(content, name, save_all=True, append_images=frames[1:])
    begin = time.monotonic()
    assert open_image(content.getvalue()).size == (64, 48)
    assert time.monotonic() - begin < 1


@pytest.mark.row("S13")
def test_open_image_refuses_large_base64_before_decoding():
    text = "data:image/png;base64," + "A" * 90_000_000
    message, peak = peak_of(lambda: open_image(text))
    assert "it has more than 67,108,864 bytes" in message
    assert len(message) < 500
    assert peak < 10_000_000


# URLs


@pytest.mark.row("S13")
def test_open_image_refuses_url_with_large_content_length():
    def respond(handler):
        answer(handler, b"x" * 1000, Content_Length=str(10**10))

    with serving(respond) as url:
        message, peak = peak_of(lambda: open_image(url, allow_private=True))
    assert "it has 10,000,000,000 bytes, more than 67,108,864" in message
    assert peak < 10_000_000


@pytest.mark.parametrize("length", [None, "1000", "nonsense", "-5"])
@pytest.mark.row("S13")
def test_open_image_limits_url_bytes_despite_wrong_content_length(length, monkeypatch):
    monkeypatch.setattr(fetching_reftr, "MAX_BYTES", 1_000_000)
    sent = []

    def respond(handler):
        answer(handler, **({} if length is None else {"Content_Length": length}))
        for _ in range(400):
            handler.wfile.write(bytes(10_000))
            sent.append(10_000)

    with serving(respond) as url:
        message, peak = peak_of(lambda: open_image(url, allow_private=True))
    assert message
    assert "took more than" not in message
    if length is None:
        assert "it has more than 1,000,000 bytes" in message
    assert peak < 10_000_000


def drip(handler, headers_too: bool):
    """Answer one byte at a time, for ten times as long as allowed."""
    if not headers_too:
        answer(handler)
    else:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
    for _ in range(100):
        handler.wfile.write(b"x")
        time.sleep(0.05)


@pytest.mark.parametrize("headers_too", [False, True], ids=["content", "headers"])
@pytest.mark.row("S13")
def test_open_image_stops_slow_url_at_timeout(headers_too, monkeypatch):
    assert fetching_reftr.MAX_SECONDS == 20
    assert fetching_reftr.MAX_BYTES == 64 * 1024**2
    monkeypatch.setattr(fetching_reftr, "MAX_SECONDS", 0.5)
    with serving(lambda handler: drip(handler, headers_too)) as url:
        begin = time.monotonic()
        with pytest.raises(OSError, match=r"it took more than 0\.5 seconds"):
            open_image(url, allow_private=True)
        assert time.monotonic() - begin < 3


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.9.9.9", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "0.0.0.0", "10.0.0.1"),
        *("172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255"),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[fe80::1]", "[fd00::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
        "user:word@127.0.0.1",
    ],
)
def test_processor_refuses_private_addresses(processor, host):
    with pytest.raises(OSError, match=r"only public addresses are fetched.*allow_private=True|Address family|resol"):
        processor(f"http://{host}:9/1.png", "the star")


def resolving(addresses):
    """Return a replacement of the resolver that maps names to addresses."""
    return lambda host, port, **_: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses.get(host, host), port))]


def test_processor_refuses_host_name_of_private_address(processor, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", resolving({"images.example": "10.1.2.3"}))
    with pytest.raises(OSError, match=r"its host 'images\.example' is at 10\.1\.2\.3, and only public"):
        processor("http://images.example/1.png", "the star")


def test_processor_refuses_host_name_with_any_private_address(processor, monkeypatch):
    def resolve(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("8.8.8.8", "10.1.2.3")]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(OSError, match=r"is at 10\.1\.2\.3, and only public"):
        processor("http://images.example/1.png", "the star")


@pytest.mark.row("S13")
def test_processor_refuses_redirect_to_private_address(processor, monkeypatch):
    """127.0.0.2 stands for a public address that redirects to 127.0.0.1, by number and by name."""
    requests = []
    monkeypatch.setattr(fetching_reftr, "is_public", lambda address: address == "127.0.0.2")

    def respond(handler):
        requests.append(handler.path)
        answer(handler, png_of(1, 1))

    with serving(respond) as private:

        def redirect(handler):
            target = private if handler.path == "/number" else private.replace("127.0.0.1", "localhost")
            answer(handler, status=302, Location=f"{target}/secret")

        with serving(redirect, "127.0.0.2") as public:
            for path in ("number", "name"):
                with pytest.raises(OSError, match="only public addresses are fetched"):
                    processor(f"{public}/{path}", "the star")
    assert not requests


def test_open_image_connects_to_checked_address(monkeypatch):
    """A name is not resolved a second time, when the address may differ; the server receives the name."""
    monkeypatch.setattr(fetching_reftr, "is_public", lambda address: address == "127.0.0.2")
    hosts = []

    def respond(handler):
        hosts.append(handler.headers["Host"])
        answer(handler, saved("PNG"))

    with serving(respond, "127.0.0.2") as url:
        port = url.rpartition(":")[2]
        real, answers = socket.getaddrinfo, iter(["127.0.0.2", "127.0.0.1"])

        def resolve(host, *args, **kwargs):
            if host == "images.example":
                return resolving({host: next(answers)})(host, *args, **kwargs)
            return real(host, *args, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        assert open_image(f"http://images.example:{port}/1.png").size == (64, 48)
    assert hosts == [f"images.example:{port}"]
    assert next(answers) == "127.0.0.1"


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/1", "https://:80/", "data:,x"])
def test_open_image_refuses_redirect_to_invalid_url(location):
    with (
        serving(lambda handler: answer(handler, status=302, Location=location)) as url,
        pytest.raises(OSError, match="is not an http or https URL with a host"),
    ):
        open_image(url, allow_private=True)


def test_open_image_stops_after_five_redirects():
    requests = []

    def redirect(handler):
        requests.append(handler.path)
        answer(handler, status=302, Location="/again")

    with serving(redirect) as url, pytest.raises(OSError, match="it was redirected more than 5 times"):
        open_image(url, allow_private=True)
    assert len(requests) == 6


def test_open_image_follows_redirect():
    def respond(handler):
        if handler.path == "/1.png":
            answer(handler, saved("PNG"))
        else:
            answer(handler, status=301, Location="1.png")

    with serving(respond) as url:
        assert open_image(f"{url}/0.png", allow_private=True).size == (64, 48)


# settings of processors

HUGE = [10**9, 1e9, float("nan"), float("inf"), -1, 0, "1e9", "640", True, [], [10**9, 10**9], {}, {"height": 10**9}]
SIDES = [
    {"height": 10**9, "width": 10**9},
    {"height": 10**9, "width": 1},
    {"height": -5, "width": 5},
    {"height": 0, "width": 5},
    {"height": float("nan"), "width": 5},
    {"height": "64", "width": "64"},
    {"height": 64.5, "width": 64},
    {"shortest_edge": 640, "longest_edge": 10**9},
    {"shortest_edge": 10**9, "longest_edge": 10**9},
    {"shortest_edge": 1e9, "longest_edge": 1e9},
    {"max_height": 10**9, "max_width": 10**9},
]
SETTINGS = [
    *(("size", value) for value in [*HUGE, *SIDES]),
    *(("pad_size", value) for value in [*HUGE, *SIDES]),
    *(("size_divisor", value) for value in [10**9, 10**400, *HUGE[1:8]]),
    *(("image_mean", value) for value in ["a", [float("nan")] * 3, [0.5] * 2, [1e400] * 3, 10**400]),
    *(("image_std", value) for value in [0, [0.0] * 3, [-1] * 3, "a", [float("nan")] * 3]),
    *(("rescale_factor", value) for value in [0, 0.0, float("nan"), float("inf"), "a"]),
    *(("do_resize", value) for value in ["no", 2, [], {}]),
    *(("device", value) for value in ["nowhere", {}, [1]]),
    *((name, 1) for name in ("preprocess", "fetch_images", "backend", "__class__", "__dict__", "valid_kwargs")),
]


@pytest.mark.row("S13")
def test_processor_file_with_invalid_values_is_refused(processor, tmp_path, record_property):
    """The error is raised on loading or in the first call, before memory of that size is allocated."""
    processor.save_pretrained(tmp_path)
    path, passed = tmp_path / "processor_config.json", []
    settings = json.loads(path.read_text())

    def load_and_call(name, value):
        changed = {**settings, "image_processor": {**settings["image_processor"], name: value}}
        path.write_text(json.dumps(changed))
        RefTRProcessor.from_pretrained(tmp_path)(Image.new("RGB", (64, 48)), "the star")

    load_and_call("do_pad", True)  # the unchanged file is accepted
    for name, value in SETTINGS:
        if name == "size" and value == {}:
            continue  # an empty dict means the default
        message, peak = peak_of(lambda name=name, value=value: load_and_call(name, value))
        passed.append((name, str(value)[:40], name in message and len(message) < 2000 and peak < 50_000_000))
    record_property("counted", (sum(is_good for *_, is_good in passed), len(passed)))
    assert not [item for item in passed if not item[-1]]


@pytest.mark.parametrize("name", ["size", "pad_size"])
def test_image_processor_rejects_invalid_sizes_in_call(processor, name):
    for value in (*HUGE[:11], *SIDES):
        message, peak = peak_of(
            lambda value=value: processor.image_processor(Image.new("RGB", (64, 48)), **{name: value})
        )
        assert name in message, value
        assert peak < 50_000_000


def test_pad_batch_rejects_padding_over_pixel_limit():
    images = [torch.zeros(3, 1, 20_000), torch.zeros(3, 20_000, 1)]
    with pytest.raises(
        ValueError, match=r"would be padded to \(20000, 20000\) in a batch, more than 50,000,000 pixels"
    ):
        pad_batch(images)
    with pytest.raises(ValueError, match="size_divisor"):
        pad_batch([torch.zeros(3, 4, 4)], size_divisor=10**9)


def test_post_process_masks_rejects_too_large_target_sizes():
    outputs = SimpleNamespace(
        pred_boxes=torch.zeros(1, 1, 4),
        pred_masks=torch.zeros(1, 1, 4, 4),
        phrase_mask=torch.ones(1, 1, dtype=torch.bool),
        pixel_mask=torch.ones(1, 16, 16),
        image_index=None,
    )
    with pytest.raises(ValueError, match=r"target_sizes has .* and masks have at most 50,000,000 pixels"):
        RefTRImageProcessor().post_process_masks(outputs, [(10**6, 10**6)])


# arrays


def npy_of(shape: str, data: bytes = b"") -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.row("S13")
def test_array_readers_reject_oversized_headers(tmp_path):
    path = tmp_path / "mask.npy"
    path.write_bytes(npy_of("(1000000, 1000000)", bytes(100)))
    message, peak = peak_of(lambda: read_mask_array(path))
    assert "is damaged" in message
    assert peak < 10_000_000
    with open(path, "wb") as file:  # as large as claimed, but sparse
        file.write(npy_of("(10000, 10000)"))
        file.truncate(file.tell() + 10**8)
    message, peak = peak_of(lambda: read_mask_array(path))
    assert "has 10000 x 10000 pixels, more than 50,000,000" in message
    assert peak < 10_000_000
    content = npy_of("(1000000, 1000000, 3)", bytes(100))
    message, peak = peak_of(lambda: decode_array(content + zlib.crc32(content).to_bytes(4, "little")))
    assert "its header claims uint8 of (1000000, 1000000, 3)" in message
    assert peak < 10_000_000
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(decode_array(encode_array(image)), image)
