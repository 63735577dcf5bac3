"""The `visual-grounding` pipeline: pictures and words -> boxes and masks."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers import Pipeline

from .decoding_reftr import is_undecoded, without_decoding
from .drawing_reftr import draw_answers
from .image_processing_reftr import is_one_image, picture_size, to_pil_image
from .inputs_reftr import is_sequence, to_list
from .processing_reftr import to_span
from .quoting_reftr import quote


BRING_TEXTS = "Questions bring their texts and phrases: give none beside them."


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
                An image (PIL, array `(height, width, 3)`, tensor, path, URL) or a sequence of them (list, tuple,
                array, Series, column of a dataset, ...; an array or tensor of four dimensions is one); or a question,
                a dict of "image", "text" and, for captions, "phrases"; or a sequence, a dataset or a generator of
                questions or images; or questions by columns, as a batch of a dataset is: a dict whose "image" is a
                sequence.
            text (`str`, `list[str]` or `list[list[str]]`):
                What to look for: one expression, or a list of them, or another sequence. With several images a `str`
                is asked of each image, and a list has one entry for each image, `str` or `list[str]`, however many
                images there are. With a generator of images a `str` is asked of each, and lists are refused: their
                questions bring their own texts.
            phrases (*optional*):
                With captions as text, the phrases of each caption, as `str` or as (start, end) characters: nested
                under `text`, a list for each caption, or None where the caption is its one phrase. Absent: every text
                is one phrase.
            batch_size (`int`, *optional*, defaults to 1): pictures a forward. Padding changes answers a little.
            num_workers (`int`, *optional*, defaults to 0): processes that prepare images; what a generator gives is
                prepared in this one.
            threshold (`float`, *optional*, defaults to 0.5): probability from which a pixel is in the mask.

        Returns:
            `list[dict]`, for each phrase in the order asked: `phrase` (`str`), `box` (`xmin`, `ymin`, `xmax`, `ymax`
            in pixels of the upright picture, `float`) and, from a model that predicts masks, `mask` (`PIL.Image.Image`
            of mode "L" and the picture's size, 255 in the mask). `box` and `mask` are None for a phrase behind the
            longest text that is read. For several images or questions a list of such lists; for those of a dataset or
            a generator an iterator of them, which reads images as they are needed.

        Raises:
            ValueError: if there is no picture or no text, or a text, a phrase or a picture makes no sense.
            OSError: if a file is missing or is no picture.
        """
        images = without_decoding(images)
        if is_table(images):
            if text is not None or phrases is not None:
                raise ValueError(BRING_TEXTS)
            images, text, phrases = without_decoding(images["image"]), images.get("text"), images.get("phrases")
        batch_size = kwargs.pop("batch_size", None) or self._batch_size or 1
        if is_one_image(images) or isinstance(images, Mapping):
            ((answers,),) = super().__call__([[make_question(images, text, phrases)]], batch_size=1, **kwargs)
            return answers
        if is_sequence(images) and not isinstance(images, IterableDataset):
            batches = Batches(Questions(images, text, phrases), batch_size)
            answers = itertools.chain.from_iterable(super().__call__(batches, batch_size=1, **kwargs))
            return answers if is_dataset(images) else list(answers)
        if isinstance(images, (bytes, Set)) or hasattr(images, "columns") or not isinstance(images, Iterable):
            raise ValueError(f"{type(images).__name__} is no picture, no question, and no list of them.")
        if not isinstance(text, (str, type(None))):
            raise ValueError(
                f"A list of texts, with images from an iterable ({type(images).__name__}), does not say which image "
                "each is about: give one str for all, a list of images, or questions that bring their texts."
            )
        kwargs["num_workers"] = 0  # a generator cannot be sent to another process
        questions = (make_question(item, text, phrases) for item in images)
        batches = (batch for batch in iter(lambda: list(itertools.islice(questions, batch_size)), []))
        return itertools.chain.from_iterable(super().__call__(batches, batch_size=1, **kwargs))

    def _sanitize_parameters(self, threshold: float | None = None):
        return {}, {} if threshold is None else {"threshold": threshold}, {}

    def preprocess(self, batch: list[dict]) -> list[dict]:
        """
        Prepare questions: those in turn with phrases, and those without, go through the model apart.

        Returns:
            `list[dict]`: for each such part the inputs of the model, (height, width) of the images, the words of each
            sentence's phrases, and the number of sentences of each question.
        """
        parts = itertools.groupby(batch, key=lambda question: question["phrases"] is None)
        return [self.preprocess_part(list(part)) for _, part in parts]

    def preprocess_part(self, part: list[dict]) -> dict:
        """Prepare questions all of which have phrases, or none, see `preprocess`."""
        images = [self.open_image(question["image"]) for question in part]
        sentences = [question["text"] for question in part]
        phrases = None if part[0]["phrases"] is None else [question["phrases"] for question in part]
        inputs = self.processor(images=images, text=sentences, phrases=phrases)
        flat = [sentence for group in sentences for sentence in group]
        spoken = [[sentence] for sentence in flat]
        if phrases is not None:
            of_sentences = [names for group in phrases for names in group]
            spoken = [
                [sentence] if names is None else [to_words(name, sentence) for name in names]
                for sentence, names in zip(flat, of_sentences, strict=True)
            ]
        return {
            "inputs": dict(inputs),
            "sizes": [picture_size(image) for image in images],
            "spoken": spoken,
            "counts": [len(group) for group in sentences],
        }

    def _forward(self, batch: list[dict], threshold: float = 0.5) -> list[dict]:
        return [self._forward_part(part, threshold) for part in batch]

    def _forward_part(self, part: dict, threshold: float) -> dict:
        outputs = self.model(**part.pop("inputs"), return_dict=True)
        if outputs.pred_masks is None:
            return {**part, "results": self.processor.post_process_grounding(outputs, part["sizes"])}
        results = self.processor.post_process_referring_segmentation(outputs, part["sizes"], threshold)
        return {**part, "results": results}

    def postprocess(self, batch: list[dict]) -> list[list[dict]]:
        """What the model says of each sentence -> the answers to each question."""
        return [answers for part in batch for answers in answers_of_part(part)]

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


class Questions(Dataset):
    """
    Questions about images, which are made when they are asked for where the images are in a dataset, and at once, so
    that an error comes before the first answer, where they are in memory.

    Args:
        images: a sequence of images or of questions, of which there has to be one.
        text, phrases: a `str` (and its phrases) is asked of each image; a list has an entry for each image.

    Raises:
        ValueError: if there are no images, or not one text, or one list of phrases, for each.
    """

    def __init__(self, images, text, phrases):
        is_lazy = is_dataset(images) or (isinstance(images, Sequence) and not isinstance(images, (list, tuple)))
        self.images = images if is_lazy else to_list(images, "images")
        if len(self.images) == 0:
            raise ValueError("There are no images: give one picture or a list of them.")
        self.is_for_all = isinstance(text, str) or text is None
        self.text, self.phrases = text, phrases
        if not self.is_for_all:
            self.text = to_list(text, "text")
            self.phrases = [None] * len(self.images) if phrases is None else to_list(phrases, "phrases")
            for name, values in (("texts", self.text), ("lists of phrases", self.phrases)):
                if len(values) != len(self.images):
                    raise ValueError(
                        f"{len(values)} {name} for {len(self.images)} pictures: give one text for all of them, or a "
                        "list with what is asked of each."
                    )
        self.made = None
        if not is_lazy:
            self.made = [self.make(index) for index in range(len(self.images))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return self.make(index) if self.made is None else self.made[index]

    def make(self, index: int) -> dict:
        """Make a question, see `make_question`."""
        text, phrases = (self.text, self.phrases) if self.is_for_all else (self.text[index], self.phrases[index])
        return make_question(self.images[index], text, phrases)


class Batches(Dataset):
    """
    Questions in turn, as many at a time.

    Args:
        questions (`Questions`): what is asked.
        batch_size (`int`): at most so many in a batch.
    """

    def __init__(self, questions: Questions, batch_size: int):
        self.questions, self.batch_size = questions, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.questions) / self.batch_size)

    def __getitem__(self, index: int) -> list[dict]:
        numbers = range(len(self.questions))[index * self.batch_size : (index + 1) * self.batch_size]
        return [self.questions[number] for number in numbers]


def is_dataset(images) -> bool:
    """Return whether images are in a dataset, of torch or of the datasets library, which is read as it is needed."""
    return isinstance(images, Dataset) or hasattr(images, "column_names")


def is_table(images) -> bool:
    """Return whether these are questions by columns, as a batch of the datasets library: `{"image": [...], ...}`."""
    if not isinstance(images, Mapping) or is_undecoded(images):
        return False
    column = images.get("image")
    return is_sequence(column) and not is_one_image(column)


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
    if isinstance(image, Mapping) and not is_undecoded(image):
        if text is not None or phrases is not None:
            raise ValueError(BRING_TEXTS)
        if not {"image", "text"} <= image.keys():
            raise ValueError(f"A question has an 'image' and a 'text', and this one {sorted(map(str, image))}.")
        image, text, phrases = image["image"], image["text"], image.get("phrases")
    if isinstance(text, str):
        text, phrases = [text], None if phrases is None else [phrases]
    elif text is not None:
        text = to_list(text, "text")
    if not text or not all(isinstance(sentence, str) for sentence in text):
        raise ValueError(f"text={quote(text)} is neither an expression nor a list of them: name what to look for.")
    phrases = None if phrases is None else to_list(phrases, "phrases")
    if phrases is not None and len(phrases) != len(text):
        raise ValueError(f"{len(phrases)} lists of phrases for {len(text)} texts: give a list of phrases for each.")
    if phrases is not None:
        # a single str, or what else is no list, the processor refuses
        phrases = [to_list(names, "phrases") if is_sequence(names) else names for names in phrases]
    return {"image": image, "text": [str(sentence) for sentence in text], "phrases": phrases}


def answers_of_part(part: dict) -> list[list[dict]]:
    """Return the answers to each question of a part, see `VisualGroundingPipeline.preprocess`."""
    with_masks = any("masks" in result for result in part["results"])
    answers = []
    for words, result in zip(part["spoken"], part["results"], strict=True):
        unanswered = {"box": None, **({"mask": None} if with_masks else {})}
        found = [{"phrase": phrase, **unanswered} for phrase in words]
        for place, index in enumerate(result["phrase_indices"]):
            found[index]["box"] = to_box(result["boxes"][place])
            if with_masks:
                found[index]["mask"] = Image.fromarray(result["masks"][place].numpy().astype(np.uint8) * 255)
        answers.append(found)
    sentences = iter(answers)
    return [list(itertools.chain.from_iterable(itertools.islice(sentences, n))) for n in part["counts"]]


def to_words(phrase, sentence: str) -> str:
    """Return the words of a phrase, which is a `str` or (start, end) characters of its sentence."""
    return str(phrase) if isinstance(phrase, str) else sentence[slice(*to_span(phrase, sentence))]


def to_box(box_xyxy: torch.Tensor) -> dict[str, float]:
    """(4,) -> the box by names."""
    return dict(zip(("xmin", "ymin", "xmax", "ymax"), box_xyxy.tolist(), strict=True))


__all__ = ["VisualGroundingPipeline"]
