"""
Build the answers of the pipeline and the predictor, and convert them to JSON.

An answer in Python is a dict of `label`, `score`, `box` and, from a model that predicts masks, `mask`, as returned by
the library's pipelines for detection and segmentation. In JSON, `segmentation` replaces `mask`.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .drawing_reftr import draw_answers
from .inputs_reftr import is_sequence, to_list
from .phrases_reftr import phrase_text
from .quoting_reftr import quote
from .rle_reftr import to_coco_rle


def flatten_question(text: Any, phrases: Any) -> tuple[list[str], list | None]:
    """
    Convert what is asked about one image to a list of sentences, and a list of the phrases of each.

    Args:
        text (`str` or `list[str]`): one sentence or several.
        phrases (*optional*): the list of phrases of a `str`, or one such list (or None) for each of a `list[str]`.

    Raises:
        ValueError: if there is no text, or the phrases do not match it.
    """
    if isinstance(text, str):
        text, phrases = [text], None if phrases is None else [phrases]
    elif text is not None:
        text = to_list(text, "text")
    if not text or not all(isinstance(sentence, str) for sentence in text):
        raise ValueError(f"text={quote(text)} must be an expression to locate or a list of expressions.")
    if phrases is not None:
        phrases = to_list(phrases, "phrases")
        if len(phrases) != len(text):
            raise ValueError(f"{len(phrases)} lists of phrases for {len(text)} texts: give one list per text.")
        # The processor rejects a single str and other values that are not lists.
        phrases = [to_list(names, "phrases") if is_sequence(names) else names for names in phrases]
    return [str(sentence) for sentence in text], phrases


def labels_of_sentences(sentences: list[str], phrases: list | None) -> list[list[str]]:
    """Return the text of each phrase of each sentence; a sentence without phrases is its own phrase."""
    if phrases is None:
        return [[sentence] for sentence in sentences]
    return [
        [sentence] if of_sentence is None else [phrase_text(phrase, sentence) for phrase in of_sentence]
        for sentence, of_sentence in zip(sentences, phrases, strict=True)
    ]


def make_answers(labels: list[list[str]], results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """
    Build the answers of each sentence.

    Args:
        labels (`list[list[str]]`): the texts of each sentence's phrases.
        results (`list[dict]`): the result of the processor's post-processing for each sentence.

    Returns:
        `list[list[dict]]`: for each sentence the answers of its phrases in order, at least one each, see
        [`VisualGroundingPipeline.__call__`].
    """
    has_masks = any("masks" in result for result in results)
    answers = []
    for of_sentence, result in zip(labels, results, strict=True):
        has_presence, scores = "phrase_scores" in result, result["scores"].tolist()
        of_slots = [[] for _ in of_sentence]
        for position, slot in enumerate(result["phrase_indices"]):
            answer = {"score": scores[position], "box": box_to_dict(result["boxes"][position])}
            if has_masks:
                pixels = result["masks"][position].cpu().numpy().astype(np.uint8) * 255
                answer["mask"] = Image.fromarray(pixels)
            of_slots[slot].append(answer)
        found = []
        for slot, (label, of_slot) in enumerate(zip(of_sentence, of_slots, strict=True)):
            if not of_slot:
                score = result["phrase_scores"].get(slot, 0.0) if has_presence else 0.0
                of_slot.append({"score": score, "box": None, **({"mask": None} if has_masks else {})})
            number = {"phrase_index": slot} if has_presence else {}
            found += [{"label": label, "phrase": label, **number, **answer} for answer in of_slot]
        answers.append(found)
    return answers


def join_sentences(answers: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """
    Return the answers about all sentences of a question in one list, with a `phrase_index` that counts the phrases of
    all sentences.

    Example:

    ```python
    >>> from modeling_reftr.answers_reftr import join_sentences

    >>> several = [{"phrase_index": 0}, {"phrase_index": 0}, {"phrase_index": 1}]
    >>> [answer["phrase_index"] for answer in join_sentences([several, [{"phrase_index": 0}]])]
    [0, 0, 1, 2]

    ```"""
    joined, offset = [], 0
    for of_sentence in answers:
        for answer in of_sentence:
            is_numbered = "phrase_index" in answer
            joined.append({**answer, "phrase_index": answer["phrase_index"] + offset} if is_numbered else answer)
        if joined and "phrase_index" in joined[-1]:  # each phrase has an answer
            offset = joined[-1]["phrase_index"] + 1
    return joined


def group(values: Iterable[Any], counts: Iterable[int]) -> list[list]:
    """Split values into lists of the given lengths."""
    values = iter(values)
    return [list(itertools.islice(values, count)) for count in counts]


def box_to_dict(box_xyxy: torch.Tensor) -> dict[str, float]:
    """Convert a box (4,) to a dict of `xmin`, `ymin`, `xmax` and `ymax`."""
    return dict(zip(("xmin", "ymin", "xmax", "ymax"), box_xyxy.tolist(), strict=True))


def draw_on(image: Image.Image, answers: list[dict[str, Any]], width: int | None = None) -> Image.Image:
    """Draw answers onto their image; see `draw_answers` for `width`, by default the image's, from 320 to 960."""
    boxes_xyxy = [answer["box"] and list(answer["box"].values()) for answer in answers]
    masks = [mask and np.asarray(mask) > 0 for mask in (answer.get("mask") for answer in answers)]
    labels = [answer["label"] for answer in answers]
    return draw_answers(image, boxes_xyxy, labels, masks=masks, width=width or max(320, min(960, image.width)))


def answer_to_json(answer: dict[str, Any]) -> dict[str, Any]:
    """
    Convert an answer of the pipeline or the predictor to JSON.

    Returns:
        `dict`: the fields of `json_answer`, `phrase`, an alias of `label`, and `phrase_index`, if the answer has it.
    """
    box = answer["box"] and list(answer["box"].values())
    segmentation = {}
    if "mask" in answer:
        segmentation["segmentation"] = answer["mask"] and to_coco_rle(np.asarray(answer["mask"]))
    number = {name: answer[name] for name in ("phrase_index",) if name in answer}
    return {**json_answer(answer["label"], box, answer["score"], **segmentation), "phrase": answer["label"], **number}


def json_answer(
    label: str, box_xyxy: Sequence[float] | None, score: float | None = None, **segmentation: dict[str, Any] | None
) -> dict[str, Any]:
    """
    Return an answer in JSON.

    Args:
        label (`str`): the text of the phrase.
        box_xyxy (`(4,)`, *optional*): the box in pixels; None: there is no answer.
        score (`float`, *optional*):
            The presence of the answer; by default that of a model without presence, 1 if there is a box.
        segmentation (`dict`, *optional*): the mask in COCO RLE, None without an answer; omit it without masks.

    Returns:
        `dict`: `label`, `score` (rounded to four digits), `box` ([xmin, ymin, xmax, ymax] in pixels, rounded to
        hundredths) and `segmentation`, if it was given.
    """
    if score is None:
        score = 0.0 if box_xyxy is None else 1.0
    return {
        "label": label,
        "score": round(float(score), 4),
        "box": None if box_xyxy is None else [round(float(side), 2) for side in box_xyxy],
        **segmentation,
    }
