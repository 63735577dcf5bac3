"""Generate images of every EXIF orientation with every kind of annotation, as files of the refer API."""

import json
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


ORIENTATIONS = range(1, 9)
WAYS = ("no size", "upright", "stored", "neither")
# sides and box are multiples of 8, so that no JPEG block contains two colours
UPRIGHT_SIZE = (80, 64)  # (width, height)
UPRIGHT_BOX = (16, 8, 40, 48)
TEXT = "the red box"

# orientation -> transposition of the upright image that the orientation reverts
STORING = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class Case(NamedTuple):
    """An image of one orientation with one kind of annotation."""

    orientation: int
    way: str

    @property
    def number(self) -> int:
        """Return the COCO id of the image."""
        return 100 * self.orientation + WAYS.index(self.way)

    @property
    def file_name(self) -> str:
        """Return the file name of the image."""
        return f"COCO_train2014_{self.number:012d}.jpg"

    @property
    def is_stored(self) -> bool:
        """Return whether the image is annotated in the stored frame, and this frame differs from the upright one."""
        return self.way == "stored" and self.orientation >= 5

    @property
    def frame(self) -> np.ndarray:
        """Return the pixels (height, width, 3) in the frame of the annotation."""
        return draw_stored(self.orientation) if self.is_stored else draw_upright()

    @property
    def size(self) -> tuple[int, int]:
        """Return the (height, width) of the frame."""
        return self.frame.shape[:2]

    @property
    def box(self) -> list[int]:
        """Return the box xyxy of the red pixels of the frame."""
        return find_red(self.frame)

    @property
    def annotated_size(self) -> tuple[int, int] | None:
        """Return the (height, width) of the annotation."""
        if self.way == "no size":
            return None
        if self.way == "neither":
            return self.size[0] * 2, self.size[1] * 2
        return draw_stored(self.orientation).shape[:2] if self.way == "stored" else self.size


CASES = [Case(orientation, way) for orientation in ORIENTATIONS for way in WAYS]


def draw_upright() -> np.ndarray:
    """Draw a gray image with a red box, (height, width, 3)."""
    width, height = UPRIGHT_SIZE
    pixels = np.full((height, width, 3), 128, np.uint8)
    x0, y0, x1, y1 = UPRIGHT_BOX
    pixels[y0:y1, x0:x1] = (255, 0, 0)
    return pixels


def draw_stored(orientation: int) -> np.ndarray:
    """Draw the same image as a file of this orientation stores it."""
    image = Image.fromarray(draw_upright())
    return np.asarray(image.transpose(STORING[orientation]) if orientation in STORING else image)


def find_red(pixels: np.ndarray) -> list[int]:
    """Return the box xyxy of the red pixels of (height, width, 3)."""
    pixels = np.asarray(pixels).astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1:] < 60).all(axis=-1)
    rows, columns = red.any(axis=1).nonzero()[0], red.any(axis=0).nonzero()[0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def orientation_exif(orientation: int) -> Image.Exif:
    """Return EXIF data with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def save_jpeg(path: Path, orientation: int):
    """Write the image as a JPEG of this orientation."""
    exif = orientation_exif(orientation)
    Image.fromarray(draw_stored(orientation)).save(path, quality=100, subsampling=0, exif=exif)


def make_images(folder: Path):
    """Write every case below `folder` as RefCOCO (unc), one image per case, in the split train."""
    image_dir = folder / "images" / "train2014"
    image_dir.mkdir(parents=True)
    instances = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "box"}]}
    refs = []
    for case in CASES:
        save_jpeg(image_dir / case.file_name, case.orientation)
        entry = {"id": case.number, "file_name": case.file_name}
        scale = 1
        if case.annotated_size is not None:
            entry["height"], entry["width"] = case.annotated_size
            scale = entry["width"] // case.size[1]
        instances["images"].append(entry)
        x0, y0, x1, y1 = (value * scale for value in case.box)
        instances["annotations"].append(
            {
                "id": case.number,
                "image_id": case.number,
                "category_id": 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
            }
        )
        refs.append(
            {
                "ref_id": len(refs),
                "ann_id": case.number,
                "image_id": case.number,
                "split": "train",
                "sentences": [{"sent": TEXT, "sent_id": len(refs)}],
            }
        )
    (folder / "refcoco").mkdir()
    (folder / "refcoco" / "instances.json").write_text(json.dumps(instances))
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
