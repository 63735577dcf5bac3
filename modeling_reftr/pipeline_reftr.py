"""The `visual-grounding` pipeline: pictures and words -> boxes and masks."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline

from .decoding_reftr import is_undecoded, without_decoding
from .drawing_reftr import draw_answers
from .image_processing_reftr import picture_size, to_pil_image
from .inputs_reftr import to_list


PICTURES = (str, Path, Image.Image, np.ndarray, torch.Tensor)


class VisualGroundingPipeline(Pipeline):
    """
    Answers words about a picture with boxes and masks. `import modeling_reftr` makes `pipeline` know the task, and a
    saved folder carries the code of it, for `pipeline("visual-grounding", model=..., trust_remote_code=True)`.

    Example:

    ```python
    import modeling_reftr
    from transformers import pipeline

    ground = pipeline("visual-grounding", model="runs/demo")
    answers = ground("photo.jpg", text=["the red circle", "the star"])
    answers[0]["phrase"], answers[0]["box"], answers[0]["mask"]
    ground.draw("photo.jpg", answers).save("answers.png")
    ```

    Several threads may ask at once: a call changes neither the pipeline nor its model and processor, and returns what
    it returns alone."""

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.eval()

    def __call__(self, images, text=None, phrases=None, **kwargs) -> list | Iterator:
        """
        Ask. A picture is encoded once for all that is asked about it in one question.

        Args:
            images:
                An image (PIL, array `(height, width, 3)`, tensor, path, URL) or a list of them; or a question, a dict
                of "image", "text" and, for captions, "phrases"; or a list, a dataset or a generator of questions or
                images.
            text (`str`, `list[str]` or `list[list[str]]`):
                What to look for: one expression, or a list of them. With a list of images a `str` is asked of each
                image, and a list has one entry for each image, `str` or `list[str]`, however many images there are.
                With any other iterable of images a `str` is asked of each, and lists are refused: their questions
                bring their own texts.
            phrases (*optional*):
                With captions as text, the phrases of each caption, as `str` or as (start, end) characters: nested
                under `text`, a list for each caption, or None where the caption is its one phrase. Absent: every text
                is one phrase.
            batch_size (`int`, *optional*, defaults to 1): pictures a forward. Padding changes answers a little.
            num_workers (`int`, *optional*, defaults to 0): processes that prepare pictures.
            threshold (`float`, *optional*, defaults to 0.5): probability from which a pixel is in the mask.

        Returns:
            `list[dict]`, for each phrase in the order asked: `phrase` (`str`), `box` (`xmin`, `ymin`, `xmax`, `ymax`
            in pixels of the upright picture, `float`) and, from a model that predicts masks, `mask` (`PIL.Image.Image`
            of mode "L" and the picture's size, 255 in the mask). `box` and `mask` are None for a phrase behind the
            longest text that is read. For a list of pictures or questions a list of such lists, for other iterables
            an iterator of them, read as they are needed.

        Raises:
            ValueError: if there is no picture or no text, or a text, a phrase or a picture makes no sense.
            OSError: if a file is missing or is no picture.
        """
        images = without_decoding(images)
        batch_size = kwargs.pop("batch_size", None) or self._batch_size or 1
        if isinstance(images, np.ndarray) and images.dtype.kind in "OU" and images.ndim == 1:
            images = images.tolist()  # an array of paths or images is a list of them
        if isinstance(images, (*PICTURES, dict)):
            ((answers,),) = super().__call__([[make_question(images, text, phrases)]], batch_size=1, **kwargs)
            return answers
        if isinstance(images, (list, tuple)):
            batches = list(make_batches(spread(images, text, phrases), batch_size))
            return list(itertools.chain.from_iterable(super().__call__(batches, batch_size=1, **kwargs)))
        if not isinstance(images, Iterable) and not hasattr(images, "__getitem__"):
            raise ValueError(f"{type(images).__name__} is no picture, no question, and no list of them.")
        if not isinstance(text, (str, type(None))):
            raise ValueError(
                f"A list of texts, with images from an iterable ({type(images).__name__}), does not say which image "
                "each is about: give one str for all, a list of images, or questions that bring their texts."
            )
        questions = (make_question(item, text, phrases) for item in images)
        batches = (batch for batch in make_batches(questions, batch_size))
        return itertools.chain.from_iterable(super().__call__(batches, batch_size=1, **kwargs))

    def _sanitize_parameters(self, threshold: float | None = None):
        return {}, {} if threshold is None else {"threshold": threshold}, {}

    def preprocess(self, batch: list[dict]) -> dict:
        """Questions -> inputs of the model, (height, width) of the pictures, the words of each sentence's phrases."""
        images = [self.open_image(question["image"]) for question in batch]
        sentences = [question["text"] for question in batch]
        phrases = None if batch[0]["phrases"] is None else [question["phrases"] for question in batch]
        inputs = self.processor(images=images, text=sentences, phrases=phrases)
        flat = [sentence for group in sentences for sentence in group]
        spoken = [[sentence] for sentence in flat]
        if phrases is not None:
            of_sentences = [names for group in phrases for names in group]
            spoken = [
                [sentence]
                if names is None
                else [name if isinstance(name, str) else sentence[name[0] : name[1]] for name in names]
                for sentence, names in zip(flat, of_sentences, strict=True)
            ]
        return {
            "inputs": dict(inputs),
            "sizes": [picture_size(image) for image in images],
            "spoken": spoken,
            "counts": [len(group) for group in sentences],
        }

    def _forward(self, batch: dict, threshold: float = 0.5) -> dict:
        outputs = self.model(**batch.pop("inputs"))
        if outputs.pred_masks is None:
            return {**batch, "results": self.processor.post_process_grounding(outputs, batch["sizes"])}
        results = self.processor.post_process_referring_segmentation(outputs, batch["sizes"], threshold)
        return {**batch, "results": results}

    def postprocess(self, batch: dict) -> list[list[dict]]:
        """What the model says of each sentence -> the answers to each question."""
        with_masks = any("masks" in result for result in batch["results"])
        answers = []
        for words, result in zip(batch["spoken"], batch["results"], strict=True):
            unanswered = {"box": None, **({"mask": None} if with_masks else {})}
            found = [{"phrase": phrase, **unanswered} for phrase in words]
            for place, index in enumerate(result["phrase_indices"]):
                found[index]["box"] = to_box(result["boxes"][place])
                if with_masks:
                    found[index]["mask"] = Image.fromarray(result["masks"][place].numpy().astype(np.uint8) * 255)
            answers.append(found)
        sentences = iter(answers)
        return [list(itertools.chain.from_iterable(itertools.islice(sentences, n))) for n in batch["counts"]]

    def open_image(self, image):
        """The one picture that `image` is, upright."""
        images = self.processor.image_processor.open_images(image)
        if len(images) != 1:
            raise ValueError(f"A question is about one picture, and this one has {len(images)}: ask about each.")
        return images[0]

    def draw(self, image, answers: list[dict], width: int | None = None) -> Image.Image:
        """
        The picture with its answers in colours, and their words below.

        Args:
            image: the picture, as it was asked about.
            answers (`list[dict]`): what a call gave for it.
            width (`int`, *optional*): of the result, in pixels; absent: the picture's, between 320 and 960.
        """
        image = to_pil_image(self.open_image(image))
        boxes_xyxy = [answer["box"] and list(answer["box"].values()) for answer in answers]
        masks = [mask and np.asarray(mask) > 0 for mask in (answer.get("mask") for answer in answers)]
        phrases = [answer["phrase"] for answer in answers]
        return draw_answers(image, boxes_xyxy, phrases, masks=masks, width=width or max(320, min(960, image.width)))

    def save_pretrained(self, save_directory, **kwargs):
        """Save model and processor, with the code of them and of this pipeline."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def spread(images: list, text, phrases) -> list[dict]:
    """
    Make a question of each image, or take the questions that `images` are.

    Args:
        images (`list`): images or questions, of which there has to be one.
        text, phrases: a `str` (and its phrases) is asked of each image; a list has an entry for each image.

    Raises:
        ValueError: if there are no images, or not one text, or one list of phrases, for each.
    """
    if len(images) == 0:
        raise ValueError("There are no images: give one picture or a list of them.")
    if isinstance(text, str) or text is None:
        return [make_question(image, text, phrases) for image in images]
    text = to_list(text, "text")
    phrases = [None] * len(images) if phrases is None else to_list(phrases, "phrases")
    for name, values in (("texts", text), ("lists of phrases", phrases)):
        if len(values) != len(images):
            raise ValueError(
                f"{len(values)} {name} for {len(images)} pictures: give one text for all of them, or a list with what "
                "is asked of each."
            )
    return [make_question(*question) for question in zip(images, text, phrases, strict=True)]


def make_question(image, text, phrases) -> dict:
    """
    Make a question about one image.

    Args:
        image: an image, or a question as a dict, which brings its text and phrases.
        text (`str` or `list[str]`): one sentence or several.
        phrases (*optional*): the list of phrases of a `str`, or one such list (or None) for each of a `list[str]`.

    Returns:
        `dict`: "image", "text" (`list[str]`) and "phrases" (a list with an entry for each text, or None).

    Raises:
        ValueError: if there is no text, or the phrases are not those of one text each.
    """
    if isinstance(image, dict) and not is_undecoded(image):
        if text is not None or phrases is not None:
            raise ValueError("Questions bring their texts and phrases: give none beside them.")
        if not {"image", "text"} <= image.keys():
            raise ValueError(f"A question has an 'image' and a 'text', and this one {sorted(map(str, image))}.")
        image, text, phrases = image["image"], image["text"], image.get("phrases")
    if isinstance(text, str):
        text, phrases = [text], None if phrases is None else [phrases]
    elif text is not None:
        text = to_list(text, "text")
    if not text or not all(isinstance(sentence, str) for sentence in text):
        raise ValueError(f"text={text!r} is neither an expression nor a list of them: name what to look for.")
    phrases = None if phrases is None else to_list(phrases, "phrases")
    if phrases is not None and len(phrases) != len(text):
        raise ValueError(f"{len(phrases)} lists of phrases for {len(text)} texts: give a list of phrases for each.")
    return {"image": image, "text": text, "phrases": phrases}


def make_batches(questions: Iterable[dict], batch_size: int) -> Iterator[list[dict]]:
    """Questions in turn, as many at a time; those with phrases and those without apart."""
    for _, group in itertools.groupby(questions, key=lambda question: question["phrases"] is None):
        while batch := list(itertools.islice(group, batch_size)):
            yield batch


def to_box(box_xyxy: torch.Tensor) -> dict[str, float]:
    """(4,) -> the box by names."""
    return dict(zip(("xmin", "ymin", "xmax", "ymax"), box_xyxy.tolist(), strict=True))


__all__ = ["VisualGroundingPipeline"]
