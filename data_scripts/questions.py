"""
Expressions for nothing, or for several objects, of a generated image.

Three kinds, named in each phrase's `types`:

- absent: "the star", where a word fits nothing in the image; the phrase has no object;
- half_right: "the red star", where something is red and something is a star, but nothing is both; or "the star left of
  the blue square", where every star is right of it by the margin; the phrase has no object;
- plural: "both circles", "every red shape", "the two stars on the left", two of three or more by the margin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .scenes import MARGIN, PLACES, RELATIONS, SceneConfig


OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
FORMS = ("attribute", "place", "relation", "plural")  # "the star", "the leftmost star" and so on
# expressions of other kinds with a place or a relation name few attributes; longer ones that fit nothing would be
# recognized without the image
SHORTNESS = 0.1
SIDES = {"on the left": (0, 1), "on the right": (0, -1), "at the top": (1, 1), "at the bottom": (1, -1)}


@dataclass
class Description:
    """
    Words for objects.

    Args:
        singular (`str`): the words, as in "red star".
        plural (`str`, *optional*): the words for several objects, as in "red stars", if known.
        objects (`list[int]`): indices of all objects of the image that the words fit.
        length (`int`): number of attributes that they name.
        weight (`float`): how often they are an expression by themselves, relative to others.
    """

    singular: str
    plural: str | None
    objects: list[int]
    length: int = 1
    weight: float = 1.0

    def weight_in(self, form: str) -> float:
        """Return how often the words are drawn for one of `FORMS`, relative to others."""
        return self.weight if form == "attribute" else SHORTNESS**self.length


def draw_questions(
    rng: np.random.Generator,
    config: SceneConfig,
    middles: list,
    descriptions: dict[str, list[Description]],
    anchors: list[tuple[str, int]],
) -> list[dict]:
    """
    Draw up to as many expressions of each kind as the settings ask for.

    A wrong relation of the only object of a description comes with the opposite one, which is true and has the type
    "relation": the relations of other expressions have two objects or more to choose from, and a model would learn to
    reject those that have one.

    Args:
        rng (`np.random.Generator`): one that draws nothing else, so that the rest of the image does not change.
        config (`SceneConfig`): the settings.
        middles (`list`): (x, y) in pixels of each object.
        descriptions (`dict[str, list[Description]]`): "known" fit an object; "absent" and "half_right" fit none, and
            are asked as expressions of these kinds.
        anchors (`list[tuple[str, int]]`): unique descriptions, and their objects, that a relation may refer to.

    Returns:
        `list[dict]`: sentences of one phrase, without ids.
    """
    known, margin = descriptions["known"], MARGIN * config.image_size
    absent = draw_misses(rng, descriptions["absent"], known, anchors, config.absent_questions)
    questions = [(text, "absent", []) for text in absent]
    count = config.half_right_questions
    attributes = [(text, None, None) for text in draw_misses(rng, descriptions["half_right"], known, anchors, count)]
    relations = find_false_relations(middles, known, anchors, margin)
    of_one = [relation for relation in relations if relation[1] is not None]
    of_several = [relation for relation in relations if relation[1] is None]
    relations = take_turns(rng, [of_one, of_several], count)
    for text, opposite, target in take_turns(rng, [attributes, relations], count):
        questions.append((text, "half_right", []))
        if opposite is not None:
            questions.append((opposite, "relation", [target]))
    plurals = draw_plurals(rng, known, middles, margin, config.plural_questions)
    questions += [(text, "plural", objects) for text, objects in plurals]
    return [
        {"text": text, "phrases": [{"start": 0, "end": len(text), "objects": objects, "types": [kind]}]}
        for text, kind, objects in questions
    ]


def choose(rng: np.random.Generator, choices: Sequence) -> Any:
    """Choose one of several things at random."""
    return choices[rng.integers(len(choices))]


def take_turns(rng: np.random.Generator, pools: list[list], count: int) -> list:
    """Take up to `count` things at random from several lists in turn, in a random order of the lists."""
    pools = [[pool[choice] for choice in rng.permutation(len(pool))] for pool in pools]
    pools = [pools[choice] for choice in rng.permutation(len(pools))]
    rounds = [pool[number] for number in range(count) for pool in pools if number < len(pool)]
    return rounds[:count]


def shuffle_descriptions(rng: np.random.Generator, descriptions: list[Description], form: str) -> list[Description]:
    """Shuffle descriptions so that those which one of `FORMS` favours tend to come first."""
    keys = [rng.exponential() / description.weight_in(form) for description in descriptions]
    return [descriptions[index] for index in np.argsort(keys)]


def draw_misses(
    rng: np.random.Generator,
    misses: list[Description],
    known: list[Description],
    anchors: list[tuple[str, int]],
    count: int,
) -> list[str]:
    """Draw up to `count` expressions with descriptions that fit nothing, in the forms of those that fit something."""
    drawn = {}
    for _ in range(min(count, len(misses))):
        form = choose(rng, FORMS)
        miss = next(item for item in shuffle_descriptions(rng, misses, form) if item.singular not in drawn)
        place, relation = choose(rng, list(PLACES)), choose(rng, list(RELATIONS))
        text = f"the {miss.singular}"
        if form == "place":
            text = f"the {place} {miss.singular}"
        elif form == "relation" and anchors and rng.random() < 0.5:
            text += f" {relation} the {choose(rng, anchors)[0]}"
        elif form == "relation":
            text = f"the {choose(rng, known).singular} {relation} {text}"
        elif form == "plural":
            text, _ = choose(rng, choose(rng, write_plurals(miss, [], 0)))
        drawn[miss.singular] = text
    return list(drawn.values())


def find_false_relations(
    middles: list, known: list[Description], anchors: list[tuple[str, int]], margin: float
) -> list[tuple[str, str | None, int | None]]:
    """
    Describe objects by a relation to an anchor of which the opposite is true, by the margin, of all that the words
    before the relation fit. If they fit one object, return the expression with the opposite relation and its object.
    """
    found = []
    for anchor_text, anchor in anchors:
        for description in known:
            candidates = [index for index in description.objects if index != anchor]
            for relation, (axis, direction) in RELATIONS.items():
                distances = [direction * (middles[index][axis] - middles[anchor][axis]) for index in candidates]
                if distances and min(distances) >= margin:
                    text, opposite = (
                        f"the {description.singular} {words} the {anchor_text}"
                        for words in (relation, OPPOSITES[relation])
                    )
                    found.append((text, opposite, candidates[0]) if len(candidates) == 1 else (text, None, None))
    return found


def draw_plurals(
    rng: np.random.Generator, known: list[Description], middles: list, margin: float, count: int
) -> list[tuple[str, list[int]]]:
    """Draw up to `count` expressions for several objects, each with another answer."""
    drawn = {}
    repeated = [description for description in known if len(description.objects) > 1]
    repeated = [repeated[choice] for choice in rng.permutation(len(repeated))]
    # "all shapes" comes last, because it is true of every image
    for description in sorted(repeated, key=lambda description: description.length == 0):
        text, objects = choose(rng, choose(rng, write_plurals(description, middles, margin)))
        if len(drawn) < count:
            drawn.setdefault(tuple(objects), (text, objects))
    return list(drawn.values())


def write_plurals(description: Description, middles: list, margin: float) -> list[list[tuple[str, list[int]]]]:
    """Return (expression, objects) of each form for the objects of a description: none of them, or two or more."""
    objects, plural = description.objects, description.plural
    forms = [[(f"every {description.singular}", objects)]]
    if plural is None:
        return forms
    forms += [[(f"all {plural}", objects)], [(f"the {plural}", objects)]]
    if len(objects) in (0, 2):
        forms.append([(f"both {plural}", objects)])
    pairs = {side: find_pair(middles, objects, side, margin) if objects else [] for side in SIDES}
    pairs = [(f"the two {plural} {side}", pair) for side, pair in pairs.items() if pair is not None]
    return [*forms, pairs] if pairs else forms


def find_pair(middles: list, candidates: list[int], side: str, margin: float) -> list[int] | None:
    """Return the two candidates on a side as in `SIDES`; None unless there are more, and they lead by the margin."""
    axis, direction = SIDES[side]
    order = sorted(candidates, key=lambda index: direction * middles[index][axis])
    if len(order) < 3 or direction * (middles[order[2]][axis] - middles[order[1]][axis]) < margin:
        return None
    return sorted(order[:2])
