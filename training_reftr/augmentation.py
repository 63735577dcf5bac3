"""
Augmentations that keep texts, boxes and masks consistent with the image. Nothing here is a collective, and the given
random generator is the only source of randomness.

- `brightness`: HSV's V is multiplied by a factor between 0.5 and 1.5 and clipped.
- `published`: the same. Settings turn it into `none` if the published loader does not augment the split,
  see `published_results.is_augmented_as_published`.
- `strong`: the same, and of S as well; a crop that keeps every box complete; the longer side scaled by 0.8 to 1.2;
  and, with probability 0.5, a mirrored image if its texts can be mirrored.

A mirrored English text has its directions swapped, in whole words and parts of hyphenated ones, with their capitals:
left - right, leftmost - rightmost, lefthand, lefthanded, leftside, leftward(s), clockwise - counterclockwise
(anticlockwise). An image is not mirrored if one of its texts

- has another word with "left" or "right" in it: bright, upright, leftover, copyright, a slip of the pen;
- has "left" or "right" where it may not be a direction: "two left", "has left", "left over", "right next to", "all
  right" (`UNSURE_BEFORE`, `UNSURE_AFTER`), unless a word such as "the", "on" or "far" stands before it, or "of",
  "side", "hand" or "most" after it; or where it never is one: "the right angle" (`NEVER_AFTER`);
- mentions something that can be read, or that has a sense of rotation or a side of its own: digits other than ordinals
  (2nd), single letters, quotation marks, "number", "letter", "word", "logo", "o'clock", "starboard", "east", ...
  (`READABLE`).

These words are English: do not use `strong` for texts in other languages.
"""

import bisect
import functools
import random
import re
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from modeling_reftr.image_processing_reftr import resize_nearest
from training_reftr.samples import Sample


FACTORS = (0.5, 1.5)  # of brightness and saturation
SCALES = (0.8, 1.2)  # of the longer side
MAX_CUT = 0.2  # of a side, from each of its ends


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


LEFTS = words("left leftmost lefthand lefthanded lefthander leftside leftward leftwards")
SWAPS = {left: left.replace("left", "right") for left in LEFTS}
SWAPS |= {right: left for left, right in SWAPS.items()}
SWAPS |= {"clockwise": "counterclockwise", "counterclockwise": "clockwise", "anticlockwise": "clockwise"}
# whole words, of which those with a direction in them are looked at
WORD = re.compile(r"\b(?:(?:counter|anti)\W?clockwise|[a-z]+)\b", re.IGNORECASE | re.ASCII)
DIRECTION = re.compile("left|right|clockwise", re.IGNORECASE | re.ASCII)
# before "left" and "right" these tell a direction ...
SURE_BEFORE = words(
    """
    on the to at from of near far top bottom upper lower front back middle center centre extreme very most
    our your my towards toward facing closest nearest furthest farthest
    second third fourth fifth 1st 2nd 3rd 4th 5th left right
    """
)
# ... and after them these
SURE_AFTER = words("of side hand handed most corner edge half")
# before them these may tell something else: "two left", "has left", "is right behind", "all right", "up right"
UNSURE_BEFORE = words(
    """
    has have had having be been being is are was were am s re ve just already get gets got getting
    who that which what it he she they i we you person people
    one two three four five six seven eight nine ten much little bit lot few some any more only half all none
    nothing anything something everything everyone nobody
    piece pieces slice slices bite bites food drink space room up not never so go goes going turn turned almost
    """
)
# ... and after them these: "left over", "left the room", "right next to", "right behind"
UNSURE_AFTER = words(
    """
    over overs behind out alone open on in at by for to off from with the a an his her its their this that
    there here now away next above below beneath under underneath beside besides near against around inside outside
    between through along across up down before after beyond past uneaten untouched unattended empty standing
    """
)
# and these tell something else whatever stands before: "the right angle", "the right way up"
NEVER_AFTER = words(
    "angle angles angled way time size amount choice answer order one ones thing over overs behind away now"
)
LONGEST = 20  # characters of a word: longer ones are in none of these lists
READABLE = re.compile(
    r"""
    (?!\b\d*(?:1st|2nd|3rd|\dth)\b)\b\w*\d\w*   # digits, but for ordinals
    | \b(?![aist]\b)[a-z]\b                     # single letters, but for articles and what an apostrophe leaves
    | ["\u201c\u201d\u00ab\u00bb\#]             # quotation
    | \b(?:numbers?|numbered|numerals?|digits?|letters?|lettering|words?|wording|texts?|writing|written|writes?|says|
        saying|said|reads?|reading|spells?|spelled|spelling|labels?|labell?ed|logos?|brands?|captions?|initials|names?|
        named|titles?|titled|alphabet|printed|mirrored|reversed|backwards?)\b
    | o\W?clock
    | \b(?:starboard|port\W+side|drivers?|passenger'?s?\W+side)\b
    | \b(?:east|west|eastern|western|north(?:east|west)|south(?:east|west))\b
    """,
    re.IGNORECASE | re.VERBOSE,
)


def augment(sample: Sample, kind: str, rng: random.Random) -> Sample:
    """
    Augment a sample.

    Args:
        sample ([`Sample`]): its boxes are never cropped.
        kind (`str`): "none", "published", which is "brightness", or "strong".
        rng (`random.Random`): the only source of randomness.
    """
    if kind == "none":
        return sample
    if kind == "strong":
        sample = crop_and_scale(sample, rng)
        if rng.random() < 0.5:
            sample = mirror(sample) or sample
    pixels = sample.image
    if kind == "strong":
        pixels = change_saturation(pixels, rng.uniform(*FACTORS))
    pixels = change_brightness(pixels, rng.uniform(*FACTORS))
    return replace(sample, image=pixels)


def change_brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """
    Multiply and clip HSV's V, and keep H and S: all channels of a pixel are multiplied alike.

    One channel after the other: NumPy takes five times as long over an axis of three.

    Args:
        pixels (`np.ndarray` of shape `(height, width, 3)`, uint8): RGB.

    Example:

    ```python
    >>> import numpy as np
    >>> from training_reftr.augmentation import change_brightness

    >>> change_brightness(np.array([[[200, 100, 0]]], np.uint8), 1.5).tolist()
    [[[255, 128, 0]]]

    ```"""
    channels = [pixels[..., index] for index in range(3)]
    value = functools.reduce(np.maximum, channels).astype(np.float32)
    gain = np.minimum(np.float32(factor), 255 / np.maximum(value, 1))
    changed = np.empty_like(pixels)
    for index, channel in enumerate(channels):
        changed[..., index] = np.rint(channel * gain)
    return changed


def change_saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    """
    Multiply and clip HSV's S, and keep H and V: what a channel lacks of the largest is multiplied.

    Args:
        pixels (`np.ndarray` of shape `(height, width, 3)`, uint8): RGB.
    """
    channels = [pixels[..., index] for index in range(3)]
    value = functools.reduce(np.maximum, channels).astype(np.float32)
    largest_lack = value - functools.reduce(np.minimum, channels)
    gain = np.minimum(np.float32(factor), value / np.maximum(largest_lack, 1))
    changed = np.empty_like(pixels)
    for index, channel in enumerate(channels):
        changed[..., index] = np.rint(value - (value - channel) * gain)
    return changed


def crop_and_scale(sample: Sample, rng: random.Random) -> Sample:
    """Crop at most `MAX_CUT` of each side, and nothing of a box; then scale the longer side by `SCALES`."""
    height, width = sample.image.shape[:2]
    first = np.append(sample.boxes_xyxy[:, :2], [[width, height]], axis=0).min(axis=0)
    last = np.append(sample.boxes_xyxy[:, 2:], [[0, 0]], axis=0).max(axis=0)
    # at whole pixels, so that the crop does not interpolate
    begin = [
        int(rng.uniform(0, max(0.0, min(MAX_CUT * side, edge))))
        for side, edge in zip((width, height), first, strict=True)
    ]
    end = [
        int(np.ceil(rng.uniform(min(side, max((1 - MAX_CUT) * side, edge)), side)))
        for side, edge in zip((width, height), last, strict=True)
    ]
    longer = rng.uniform(*SCALES) * max(width, height)
    cut = np.subtract(end, begin)
    new_width, new_height = (max(1, round(side * longer / cut.max())) for side in cut.tolist())
    scale = np.array([new_width, new_height] * 2) / np.tile(cut, 2)
    masks = sample.masks
    if masks is not None:
        cropped = torch.from_numpy(masks[:, begin[1] : end[1], begin[0] : end[0]])
        masks = resize_nearest(cropped, (new_height, new_width)).numpy()
    image = Image.fromarray(sample.image).resize((new_width, new_height), Image.BILINEAR, box=(*begin, *end))
    boxes_xyxy = (sample.boxes_xyxy - np.tile(begin, 2)) * scale
    return replace(sample, image=np.array(image), boxes_xyxy=boxes_xyxy, masks=masks)


def mirror(sample: Sample) -> Sample | None:
    """Mirror an image with its boxes, masks and sentences; return None if a sentence does not allow it."""
    sentences = [mirror_sentence(sentence) for sentence in sample.sentences]
    if None in sentences:
        return None
    width = sample.image.shape[1]
    boxes_xyxy = sample.boxes_xyxy.copy()
    boxes_xyxy[:, [0, 2]] = width - boxes_xyxy[:, [2, 0]]
    masks = None if sample.masks is None else np.ascontiguousarray(sample.masks[:, :, ::-1])
    image = np.ascontiguousarray(sample.image[:, ::-1])
    return replace(sample, image=image, boxes_xyxy=boxes_xyxy, masks=masks, sentences=sentences)


def mirror_sentence(sentence: dict) -> dict | None:
    """Return a sentence with its directions swapped and its phrases at their new offsets, or None."""
    words = mirrored_words(sentence["text"])
    if words is None:
        return None
    pieces, starts, ends, shifts, done = [], [], [], [0], 0
    for start, end, word in words:
        pieces += sentence["text"][done:start], word
        starts.append(start)
        ends.append(end)
        shifts.append(shifts[-1] + len(word) - (end - start))
        done = end
    text = "".join([*pieces, sentence["text"][done:]])
    phrases = []
    for phrase in sentence["phrases"]:
        # a phrase that begins or ends within a swapped word is extended to all of it
        number = bisect.bisect_right(ends, phrase["start"])
        begin = min([phrase["start"], *starts[number : number + 1]])
        number = bisect.bisect_left(starts, phrase["end"])
        end = max([phrase["end"], *ends[max(0, number - 1) : number]])
        begin += shifts[bisect.bisect_left(starts, begin)]
        end += shifts[number]
        phrases.append({**phrase, "start": begin, "end": end})
    return {**sentence, "text": text, "phrases": phrases}


def mirrored_words(text: str) -> list[tuple[int, int, str]] | None:
    """
    Return the replacements of a text when its image is mirrored, as (start, end, word) in order; None if it must not
    be mirrored (see above).

    Example:

    ```python
    >>> from training_reftr.augmentation import mirrored_words

    >>> mirrored_words("Left-most man on the right")
    [(0, 4, 'Right'), (21, 26, 'left')]
    >>> mirrored_words("two slices left") is None
    True

    ```"""
    if READABLE.search(text):
        return None
    found, spans = [], [match.span() for match in re.finditer(r"\w+", text)]
    starts = [start for start, _ in spans]
    for match in WORD.finditer(text):
        if DIRECTION.search(match[0]) is None:
            continue
        word = re.sub(r"\W", "", match[0].lower())
        if word not in SWAPS:
            return None
        if word in ("left", "right"):
            # the word before it, and two after it
            number = bisect.bisect_left(starts, match.start())
            before = [(start, min(end, match.start())) for start, end in spans[max(0, number - 1) : number]]
            number = bisect.bisect_left(starts, match.end())
            after = [(max(start, match.end()), end) for start, end in spans[max(0, number - 1) : number + 2]]
            if not is_direction(
                [text[max(start, end - LONGEST) : end] for start, end in before],
                [text[start : min(end, start + LONGEST)] for start, end in after if start < end],
            ):
                return None
        found.append((match.start(), match.end(), match_capitals(SWAPS[word], match[0])))
    return found


def is_direction(before: list[str], after: list[str]) -> bool:
    """Return whether "left" or "right" is surely a direction between the word before it and those after it."""
    previous = "".join(split_words(before)[-1:])
    after = split_words(after)[:2]
    following = "".join(after[:1])
    if following in NEVER_AFTER or after == ["side", "up"]:
        return False
    if following in SURE_AFTER or previous in SURE_BEFORE:
        return True
    return previous not in UNSURE_BEFORE and following not in UNSURE_AFTER


def split_words(pieces: list[str]) -> list[str]:
    """Return the words of pieces of a text in lower case, which may have more of them: an I with a dot becomes two."""
    return re.findall(r"\w+", " ".join(pieces).lower())


def match_capitals(word: str, model: str) -> str:
    """Return a word with the capitalization of another: all letters, the first, or none."""
    if model.isupper():
        return word.upper()
    return word.capitalize() if model[0].isupper() else word
