"""Draw samples of a dataset with their boxes, masks and texts."""

import random
from pathlib import Path

import datasets
from PIL import Image

from data_scripts.checking import image_file_of
from data_scripts.masks import decode_segmentation
from modeling_reftr.drawing_reftr import draw_answers, make_grid
from modeling_reftr.image_processing_reftr import open_image
from modeling_reftr.orientation_reftr import turn_upright


MAX_OBJECTS = 4  # of a picture with many expressions
COLUMNS = 4


def choose_phrases(row: dict, draw: random.Random) -> tuple[str, list[tuple[str, int]]]:
    """
    What to show of a row: a sentence of several phrases, or else one expression of each of a few objects.

    Returns:
        `str`: the sentence, empty for expressions. `list[tuple[str, int]]`: words and the object that they name.
    """
    captions = [sentence for sentence in row["sentences"] if len(sentence["phrases"]) > 1]
    if captions and draw.random() < len(captions) / len(row["sentences"]) + 0.25:
        sentence = draw.choice(captions)
        chosen = [(sentence, phrase) for phrase in sentence["phrases"]]
        return sentence["text"], [(words_of(*pair), pair[1]["objects"][0]) for pair in chosen if pair[1]["objects"]]
    pairs = [
        (sentence, phrase) for sentence in row["sentences"] for phrase in sentence["phrases"] if phrase["objects"]
    ]
    draw.shuffle(pairs)
    chosen = {}
    for sentence, phrase in pairs:
        if len(chosen) < MAX_OBJECTS:
            chosen.setdefault(phrase["objects"][0], words_of(sentence, phrase))
    return "", [(words, index) for index, words in chosen.items()]


def words_of(sentence: dict, phrase: dict) -> str:
    """The words of a phrase."""
    return sentence["text"][phrase["start"] : phrase["end"]]


def draw_preview(rows: datasets.Dataset, num: int, seed: int, width: int = 320) -> Image.Image:
    """
    Rows drawn at random: each picture with boxes and masks in the colours of the words under it. Where a name covers
    several boxes they are white, and their union is coloured.

    Args:
        rows (`datasets.Dataset`): a split.
        num (`int`): pictures, at least 1; fewer where the split has fewer.
        seed (`int`): of the draw.
        width (`int`, *optional*, defaults to 320): of each picture in pixels.

    Returns:
        `PIL.Image.Image`: a grid of four columns.

    Raises:
        ValueError: if there is nothing to draw.
        OSError: if a picture cannot be read.
    """
    if num < 1 or not len(rows):
        raise ValueError(f"--num {num} of {len(rows)} pictures: there must be at least one of each.")
    draw = random.Random(seed)
    indices = sorted(draw.sample(range(len(rows)), min(num, len(rows))))
    pictures = []
    for row in rows.cast_column("image", datasets.Image(decode=False)).select(indices):
        picture = turn_upright(open_image(image_file_of(row)), (row["height"], row["width"]))
        sentence, phrases = choose_phrases(row, draw)
        objects = [row["objects"][index] for _, index in phrases]
        masks = [decode_segmentation(item["segmentation"]) for item in objects]
        parts = [box for item in objects if len(item["boxes"]) > 1 for box in item["boxes"]]
        pictures.append(
            draw_answers(
                picture,
                [item["box"] for item in objects],
                [words for words, _ in phrases],
                true_boxes_xyxy=parts,
                masks=masks,
                title=f"{row['image_id']}: {sentence}" if sentence else row["image_id"],
                width=width,
            )
        )
    return make_grid(pictures, min(COLUMNS, len(pictures)))


def check_name(path: str | Path):
    """
    Refuse a file's name that no format of pictures ends with.

    Raises:
        ValueError: naming it.
    """
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--output {str(path)!r}: end it with a format of pictures, for example .png or .jpg.")
