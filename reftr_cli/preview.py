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


MAX_EXPRESSIONS = 4  # to draw in an image with many
COLUMNS = 4


def choose_phrases(row: dict, rng: random.Random) -> tuple[str, list[tuple[str, list[int]]]]:
    """
    Choose a sentence of several phrases of a row, or a few expressions about different objects.

    Returns:
        `str`: the sentence, empty for expressions. `list`: the text and the object indices of each phrase.
    """
    captions = [sentence for sentence in row["sentences"] if len(sentence["phrases"]) > 1]
    if captions and rng.random() < len(captions) / len(row["sentences"]) + 0.25:
        sentence = rng.choice(captions)
        return sentence["text"], [(phrase_of(sentence, phrase), phrase["objects"]) for phrase in sentence["phrases"]]
    pairs = [(sentence, phrase) for sentence in row["sentences"] for phrase in sentence["phrases"]]
    rng.shuffle(pairs)
    chosen = {}
    for sentence, phrase in pairs:
        text = phrase_of(sentence, phrase)
        if len(chosen) < MAX_EXPRESSIONS:
            chosen.setdefault(tuple(sorted(phrase["objects"])) or text, (text, phrase["objects"]))
    return "", list(chosen.values())


def phrase_of(sentence: dict, phrase: dict) -> str:
    """Return the text of a phrase."""
    return sentence["text"][phrase["start"] : phrase["end"]]


def number_labels(text: str, number: int) -> list[str]:
    """
    Return the labels of the objects of a phrase.

    Example:

    ```python
    >>> from reftr_cli.preview import number_labels

    >>> number_labels("the cup", 1), number_labels("two cups", 2)
    (['the cup'], ['two cups (1 of 2)', 'two cups (2 of 2)'])

    ```"""
    return [text] if number == 1 else [f"{text} ({index} of {number})" for index in range(1, number + 1)]


def draw_preview(rows: datasets.Dataset, num: int, seed: int, width: int = 320) -> Image.Image:
    """
    Draw random rows: each image with boxes and masks of objects, and with the phrases at them.

    All objects of a phrase are drawn and numbered; a phrase that refers to nothing is listed below the image as not
    there. If an object has several boxes, they are dashed and their union is coloured.

    Args:
        rows (`datasets.Dataset`): a split.
        num (`int`): number of images, at least 1; fewer if the split has fewer.
        seed (`int`): random seed.
        width (`int`, *optional*, defaults to 320): width of each image in pixels.

    Returns:
        `PIL.Image.Image`: a grid of four columns.

    Raises:
        ValueError: if there is nothing to draw.
        OSError: if an image cannot be read.
    """
    if num < 1 or not len(rows):
        raise ValueError(f"--num {num} of {len(rows)} images: both must be at least 1.")
    rng = random.Random(seed)
    indices = sorted(rng.sample(range(len(rows)), min(num, len(rows))))
    images = []
    for row in rows.cast_column("image", datasets.Image(decode=False)).select(indices):
        image = turn_upright(open_image(image_file_of(row)), (row["height"], row["width"]))
        sentence, phrases = choose_phrases(row, rng)
        objects = [row["objects"][index] for _, indices in phrases for index in indices]
        absent = "; ".join(text for text, indices in phrases if not indices)
        titles = [f"{row['image_id']}: {sentence}" if sentence else row["image_id"]]
        titles += [f"- not there: {absent}"] if absent else []
        masks = [decode_segmentation(item["segmentation"]) for item in objects]
        parts = [box for item in objects if len(item["boxes"]) > 1 for box in item["boxes"]]
        images.append(
            draw_answers(
                image,
                [item["box"] for item in objects],
                [label for text, indices in phrases for label in number_labels(text, len(indices))],
                true_boxes_xyxy=parts,
                masks=masks,
                title=" ".join(titles),
                width=width,
                legend="dashed: the boxes of an object with several",
            )
        )
    return make_grid(images, min(COLUMNS, len(images)))


def check_name(path: str | Path) -> None:
    """
    Refuse a file name without the extension of an image format.

    Raises:
        ValueError: if it has another extension.
    """
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--output {str(path)!r}: must have the extension of an image format, such as .png or .jpg.")
