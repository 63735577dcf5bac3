"""Generate small files of Visual Genome in its authors' layout, with the irregularities of the real files."""

import json
from pathlib import Path

from tests.helpers.layout_refcoco import save_picture


SIZE = (40, 30)


def make_visual_genome(folder: Path, coco_ids=(581857, 20, 100)) -> dict:
    """
    Write region_descriptions.json, image_data.json and images in VG_100K and VG_100K_2. Its images:

    1, 2, 3  images of COCO with the given ids, one per id
    50       not in COCO, with invalid regions and a text that is not ASCII
    51       annotated at twice the size of the image
    52       only in image_data.json
    53       only in region_descriptions.json
    54       a grey image, with a region of its full size
    55       a JPEG with an orientation, annotated upright
    56       the same region three times, and another one with the same text
    57       without a region: no row
    58       a region across the right and the lower edge, with fractional coordinates
    59       an image of COCO that no dataset holds out
    60       twice in region_descriptions.json; the first entry is used

    Returns:
        `dict`: "regions_file", "images_file", "dropped" (number of regions), "image_ids" of the rows.
    """
    images, entries = [], []

    def add(number, regions, coco=None, annotated=SIZE, **options):
        second = number % 2 == 0
        save_picture(folder / ("VG_100K_2" if second else "VG_100K") / f"{number}.jpg", SIZE, **options)
        images.append(
            {
                "width": annotated[0],
                "height": annotated[1],
                "image_id": number,
                "url": f"https://cs.stanford.edu/people/rak248/VG_100K{'_2' if second else ''}/{number}.jpg",
                "coco_id": coco,
                "flickr_id": None,
            }
        )
        entries.append(
            {
                "id": number,
                "regions": [
                    {
                        "region_id": 100 * number + index,
                        "image_id": number,
                        "phrase": phrase,
                        "x": x,
                        "y": y,
                        "width": width,
                        "height": height,
                    }
                    for index, (phrase, x, y, width, height) in enumerate(regions)
                ],
            }
        )

    for number, coco in enumerate(coco_ids, start=1):
        add(number, [("the clock is green in colour", 4, 5, 20, 10), ("a wall ", 0, 0, 40, 30)], coco)
    add(
        50,
        [
            ("a café ☕", 1, 2, 3, 4),
            ("past the edge", -2, 20, 20, 15),
            ("", 1, 2, 3, 4),
            ("  ", 1, 2, 3, 4),
            ("outside", 41, 2, 3, 4),
            ("without height", 1, 2, 3, 0),
            ("inverted", 9, 9, -3, 4),
        ],
    )
    add(51, [("annotated larger", 20, 20, 40, 20)], annotated=(80, 60))
    images.append({**images[-1], "image_id": 52})
    entries.append({**entries[-1], "id": 53})
    add(54, [("all of it", 0, 0, 40, 30)], mode="L")
    add(55, [("turned", 2, 3, 20, 35)], annotated=(30, 40), orientation=6)
    add(56, [("a tree", 1, 1, 9, 9)] * 3 + [("a tree", 20, 1, 9, 9)])
    add(57, [])
    add(58, [("the corner", 30.5, 20.25, 20, 20)])
    add(59, [("a cat\ton  a mat", 5, 5, 10, 10)], coco=581900)
    add(60, [("the first", 5, 5, 10, 10)])
    entries.append({**entries[0], "id": 60})
    (folder / "region_descriptions.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    (folder / "image_data.json").write_text(json.dumps(images))
    return {
        "regions_file": folder / "region_descriptions.json",
        "images_file": folder / "image_data.json",
        "dropped": 5,
        "image_ids": [f"vg_{number}_coco_{coco}" for number, coco in enumerate(coco_ids, start=1)]
        + ["vg_50", "vg_51", "vg_54", "vg_55", "vg_56", "vg_58", "vg_59_coco_581900", "vg_60"],
    }
