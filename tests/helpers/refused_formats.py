"""Files of refused formats, and a replacement for the program that one of them starts."""

import io
import os
import struct

from PIL import EpsImagePlugin, Image


def saved(name: str, mode: str = "RGB") -> bytes:
    """Return the content of an image file that Pillow writes."""
    file = io.BytesIO()
    Image.new(mode, (64, 48), 1).save(file, name)
    return file.getvalue()


# Pillow's name of a format -> file content that Pillow would open
REFUSED = {
    "EPS": saved("EPS"),
    "WMF": struct.pack("<IHhhhhHIHH18x", 0x9AC6CDD7, 0, 0, 0, 64, 48, 72, 0, 0, 1)[:22] + b"\1\0\x09\0" + bytes(30),
    "PSD": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 48, 64, 8, 3) + bytes(12) + bytes(2) + bytes(3 * 64 * 48),
    "FITS": b"".join(
        line.ljust(80).encode()
        for line in ("SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 64", "NAXIS2  = 48", "END")
    ).ljust(2880)
    + bytes(64 * 48),
    "GBR": struct.pack(">IIIII", 29, 2, 64, 48, 1) + b"GIMP" + struct.pack(">I", 1) + b"\0" + bytes(64 * 48),
    "ICO": saved("ICO"),
    "PCX": saved("PCX"),
    "SGI": saved("SGI"),
    "JPEG2000": saved("JPEG2000"),
}


def is_refusal(sentence: str, name: str) -> bool:
    """Return whether a message names the detected format and the accepted ones."""
    return name in sentence and "JPEG, MPO, PNG, WEBP, GIF, BMP, TIFF, PPM and AVIF" in sentence


def stand_in_for_ghostscript(folder, monkeypatch):
    """Put a program `gs` on the PATH of this process and its children, and return the file that it would write."""
    mark, program = folder / "started", folder / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho started >> '{mark}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # the cached result of an earlier search
    return mark
