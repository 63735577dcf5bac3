"""
Random cases of phrases with none, one or several targets. They are drawn with `random()` of Python's generator alone,
whose sequence is the same in every version, because fixtures contain results of these cases.
"""

import random

import numpy as np


def draw_box(rng):
    x0, y0 = 100 * rng.random(), 100 * rng.random()
    return [x0, y0, x0 + 5 + 40 * rng.random(), y0 + 5 + 40 * rng.random()]


def shift_box(rng, box, amount):
    """Return a box whose corners are moved by up to a share of its sides."""
    width, height = box[2] - box[0], box[3] - box[1]
    return [value + amount * (rng.random() - 0.5) * side for value, side in zip(box, (width, height) * 2, strict=True)]


def draw_box_case(rng, number_of_phrases=6):
    """
    Return predictions, with boxes and scores, and references of some phrases, with and without targets. Some targets
    overlap; some scores equal the threshold of 0.7. Every phrase has a box, which the authors' script requires.
    """
    predictions, references = [], []
    for phrase in range(number_of_phrases):
        targets = [draw_box(rng) for _ in range(phrase if phrase < 2 else int(4 * rng.random()))]
        if len(targets) > 1 and rng.random() < 0.5:
            targets[1] = shift_box(rng, targets[0], 0.7)
        boxes = [[*shift_box(rng, box, 0.6 * rng.random()), 0.6 + 0.5 * rng.random()] for box in targets]
        boxes += [[*draw_box(rng), 0.8 * rng.random()] for _ in range(int(1 + 1.5 * rng.random()))]
        boxes = sorted(([round(value, 1) for value in box] for box in boxes), key=lambda box: rng.random())
        predictions.append({"boxes": [box[:4] for box in boxes], "scores": [box[4] for box in boxes]})
        references.append([[round(value, 1) for value in box] for box in targets])
    return predictions, references


def box_cases(number, seed=0):
    rng = random.Random(seed)
    return [draw_box_case(rng) for _ in range(number)]


def draw_mask(rng, height=12, width=16):
    """Return the union of up to three rectangles, which is often empty."""
    mask = np.zeros((height, width), bool)
    for _ in range(int(4 * rng.random())):
        top, left = int(height * rng.random()), int(width * rng.random())
        mask[top : top + int(8 * rng.random()), left : left + int(9 * rng.random())] = True
    return mask


def mask_cases(number, seed=0, number_of_phrases=5):
    """
    Return cases of predictions (a mask, and whether the phrase is said to refer to nothing) and true masks, where at
    least one is empty and one is not.
    """
    rng, cases = random.Random(seed), []
    for _ in range(number):
        predictions, references = [], []
        for phrase in range(number_of_phrases):
            true = draw_mask(rng)
            true[:, :4] |= phrase == 0
            if phrase == 1 or (phrase > 1 and rng.random() < 0.3):
                true[:] = False
            mask = draw_mask(rng)
            if rng.random() < 0.6:
                mask = true ^ (mask & draw_mask(rng))
            is_absent = rng.random() < (0.2 if true.any() else 0.6)
            predictions.append({"mask": mask, "is_absent": is_absent})
            references.append(true)
        cases.append((predictions, references))
    return cases
