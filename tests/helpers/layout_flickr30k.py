"""Generate a dozen images of Flickr30k Entities in its authors' layout, with the irregularities of the real files."""

from pathlib import Path

from PIL import Image


def boxes_xml(width, height, objects):
    """Return an annotation file; `objects` are pairs of names and a 1-based box or None."""
    lines = ["<annotation>", "\t<filename>picture.jpg</filename>", "\t<size>"]
    lines += [f"\t\t<width>{width}</width>", f"\t\t<height>{height}</height>", "\t\t<depth>3</depth>", "\t</size>"]
    for names, box in objects:
        lines.append("\t<object>")
        lines += [f"\t\t<name>{name}</name>" for name in names]
        if box is None:
            lines += ["\t\t<nobndbox>0</nobndbox>", "\t\t<scene>1</scene>"]
        else:
            tags = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            lines += ["\t\t<bndbox>", *(f"\t\t\t<{tag}>{value}</{tag}>" for tag, value in tags), "\t\t</bndbox>"]
        lines.append("\t</object>")
    return "\n".join([*lines, "</annotation>"])


def make_flickr30k(folder: Path, image_dir: str = "flickr30k-images") -> dict:
    """Write the dataset into a folder, and return the image ids of its splits and the sizes of its images."""
    for name in ("Annotations", "Sentences", image_dir):
        (folder / name).mkdir(parents=True)
    images = {}

    def add_image(image_id, size, objects, captions, orientation=None, mode="RGB", newline="\n", stored=None):
        exif = Image.Exif()
        stored = stored or size
        if orientation:
            exif[0x0112] = orientation
            stored = size[::-1] if orientation > 4 else size
        Image.new(mode, stored, "gray").save(folder / image_dir / f"{image_id}.jpg", exif=exif)
        (folder / "Annotations" / f"{image_id}.xml").write_text(boxes_xml(*size, objects))
        (folder / "Sentences" / f"{image_id}.txt").write_bytes(newline.join([*captions, ""]).encode())
        images[image_id] = size

    add_image(
        "36979",
        (50, 40),
        [
            (["11"], (1, 1, 11, 21)),
            (["12"], (5, 6, 30, 26)),  # chain 12 has two boxes
            (["12", "13"], (21, 2, 41, 12)),  # one box of two chains
            (["14"], None),
            (["15"], (40, 30, 60, 44)),  # crosses the image's edge
            (["16"], (9, 9, 9, 20)),  # without extent
            (["0"], (3, 3, 9, 9)),
        ],
        [
            "[/EN#11/people A man] with [/EN#12/vehicles/scene two buses] , [/EN#0/notvisual that] , "
            "on [/EN#14/scene a street] .",
            "A man near [/EN#15/other the   edge] and [/EN#13/vehicles a bus] .",
            "[/EN#14/scene A street] is all there is .",
            "[/EN#16/other A thin line] and [/EN#11/people Zoë 's café] .",
            "[/EN#11/people The same man] is here [/EN#12/vehicles twice .",
        ],
    )  # fmt: skip
    # stored rotated, annotated upright
    add_image("1001", (40, 60), [(["21"], (2, 3, 12, 13))], ["[/EN#21/animals A dog] runs ."] * 5, orientation=6)
    add_image("1002", (30, 30), [(["31"], (2, 3, 12, 13))], ["[/EN#31/animals A cat] sits ."])
    add_image("1003", (30, 30), [(["41"], None)], ["Nothing is boxed in [/EN#41/scene this yard] ."] * 5)
    add_image("1004", (30, 20), [(["51"], (1, 1, 31, 21))], ["[/EN#51/scene All of it] ."] * 5)
    # a grey image; a chain of three boxes, of which one is outside the image and one has fractional coordinates
    boxes = [(["61"], (1, 1, 6, 6)), (["61"], (11.5, 1, 16.5, 6)), (["61"], (90, 1, 99, 6))]
    add_image("1005", (30, 30), boxes, ["[/EN#61/bodyparts Hands] in [/EN#0/notvisual the air] ."] * 5, mode="L")
    # Windows line ends, and an empty line between captions
    captions = ["[/EN#62/people/other She] and [/EN#63/people he] .", "", "[/EN#63/people He] alone ."]
    boxes = [(["62"], (1, 1, 11, 11)), (["63"], (11, 11, 21, 21))]
    add_image("1006", (30, 30), boxes, captions, newline="\r\n")
    # one box of three chains; a phrase with punctuation at the end of its caption
    captions = ['[/EN#64/people Two] of [/EN#65/people a "group" (of 3)]', "[/EN#66/people/animals A cow/bull]"]
    add_image("1007", (30, 30), [(["64", "65", "66"], (1, 1, 11, 11))], captions)
    # the image is smaller than annotated
    add_image("1008", (60, 40), [(["67"], (11, 11, 31, 31))], ["[/EN#67/clothing A hat] ."], stored=(30, 20))
    # a box that begins at 0, although the authors' coordinates begin at 1; a chain without a box; an empty phrase
    captions = ["[/EN#68/other It] beside [/EN#999/other nothing] and [/EN#68/other ] ."]
    add_image("1009", (30, 30), [(["68"], (0, 0, 11, 11))], captions)
    # a chain that is a scene in one object and has a box in another; a text without any phrase
    captions = ["[/EN#69/scene A hall] with [/EN#70/instruments a drum] .", "Nobody plays ."]
    add_image("1010", (30, 30), [(["69"], None), (["69"], (1, 1, 31, 31)), (["70"], (3, 3, 9, 9))], captions)
    # a chain with two phrases in one caption, and the same text for two chains
    captions = ["[/EN#71/people A boy] behind [/EN#72/people a boy] , [/EN#71/people who] sings ."]
    add_image("1011", (30, 30), [(["71"], (1, 1, 9, 9)), (["72"], (11, 11, 19, 19))], captions)
    splits = {
        "train": ["36979", "1002", "1003", "1005", "1006", "1007"],
        "val": ["1001", "1008", "1009"],
        "test": ["1004", "1010", "1011"],
    }
    for split, image_ids in splits.items():
        (folder / f"{split}.txt").write_text("\n".join(image_ids) + "\n")
    # like the authors' file: a line that describes the format, and no newline at the end
    (folder / "UNRELATED_CAPTIONS").write_text("# format: <imageID> <sentence number>\n36979 2\n1002 1")
    return {"splits": splits, "sizes": images}
