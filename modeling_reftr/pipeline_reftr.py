"""The `visual-grounding` pipeline: locate expressions and the phrases of captions in images."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers import Pipeline
from transformers.image_utils import ImageInput

from .answers_reftr import draw_on, flatten_question, group, join_sentences, labels_of_sentences, make_answers
from .decoding_reftr import is_undecoded, without_decoding
from .image_processing_reftr import is_one_image
from .inputs_reftr import is_sequence, to_list
from .pixels_reftr import height_and_width, to_pil_image


if TYPE_CHECKING:
    # Saving a model copies the files that are imported here, so that its folder has the predictor's code.
    from .predictor_reftr import RefTRPredictor as RefTRPredictor


HAVE_TEXTS = "Questions contain their text and phrases: do not pass `text` or `phrases` with them."


class VisualGroundingPipeline(Pipeline):
    """
    Locate expressions in images: predict a box, and a mask if the model was trained for it, for every phrase.

    `import modeling_reftr` registers the task. A saved folder contains the code, for
    `pipeline("visual-grounding", model=..., trust_remote_code=True)`.

    The pipeline is thread-safe: a call changes neither the pipeline nor its model and processor, and concurrent calls
    return what they return alone.

    Example:

    ```python
    import modeling_reftr
    from transformers import pipeline

    pipe = pipeline("visual-grounding", model="runs/demo")
    answers = pipe("photo.jpg", text=["the red circle", "the star"])
    answers[0]["label"], answers[0]["score"], answers[0]["box"], answers[0]["mask"]
    pipe.draw("photo.jpg", answers).save("answers.png")
    ```"""

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.eval()

    def __call__(
        self,
        images: ImageInput | Mapping | Iterable,
        text: str | list[str] | list[list[str]] | None = None,
        phrases: Sequence | None = None,
        **kwargs: Any,
    ) -> list | Iterator:
        """
        Locate expressions, or the phrases of captions, in images. Each image of a question is encoded once.

        Args:
            images:
                An image (PIL, array `(height, width, 3)`, tensor, path, URL) or a sequence of them (list, tuple,
                array, Series, column of a dataset, ...; an array or tensor of four dimensions is one); or a question,
                a dict of "image", "text" and, for captions, "phrases"; or a sequence, a dataset or a generator of
                questions or images; or a dict of columns whose "image" is a sequence, as a batch of a dataset is.
            text (`str`, `list[str]` or `list[list[str]]`):
                An expression to locate, or a list or other sequence of them. With several images, a `str` is asked
                about each image, and a list has one entry per image, `str` or `list[str]`. With a generator of images
                a `str` is asked about each, and lists are rejected: use questions with their own texts.
            phrases (*optional*):
                With captions as text, the phrases of each caption, as `str` or (start, end) characters, nested under
                `text`: a list per caption, or None where the caption is its own phrase. By default every text is one
                phrase.
            batch_size (`int`, *optional*, defaults to 1): images per forward pass. Padding changes answers slightly.
            num_workers (`int`, *optional*, defaults to 0):
                Processes that prepare images; images of a generator are prepared in the current one.
            threshold (`float`, *optional*):
                The score above which a box is an answer, by default the one that the model was saved with. A model
                that does not predict presence answers every phrase.
            mask_threshold (`float`, *optional*, defaults to 0.5):
                The probability above which a pixel belongs to the mask.

        Returns:
            `list[dict]`: for each phrase in order, and for each of its answers, from the highest score to the lowest
                - **label** (`str`): the text of the phrase.
                - **score** (`float`): the probability that the box is an answer; 1.0 from a model without presence.
                - **box** (`dict[str, float]`): `xmin`, `ymin`, `xmax`, `ymax` in pixels of the upright image.
                - **mask** (`PIL.Image.Image`): only from a model that predicts masks, an image of mode "L" and of the
                  image's size, 255 in the mask.
                - **phrase** (`str`): an alias of `label`.
                - **phrase_index** (`int`): only from a model that predicts presence, the number of the phrase among
                  those asked about the image, which the answers of one phrase share.

            A phrase that refers to nothing in the image has one answer whose `box` and `mask` are None, with the
            highest score, which is not above the threshold. So has a phrase past the end of a truncated text, with a
            score of 0.0. For several images or questions, a list of such lists; for a dataset or a generator an
            iterator of them, which reads images as required.

        Raises:
            ValueError: if there is no image or no text, or a text, a phrase or an image is invalid.
            OSError: if a file is missing or is not an image.
        """
        images = without_decoding(images)
        if is_table(images):
            if text is not None or phrases is not None:
                raise ValueError(HAVE_TEXTS)
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
            raise ValueError(f"`images` must be an image, a question or a list of them, got {type(images).__name__}.")
        if not isinstance(text, (str, type(None))):
            raise ValueError(
                f"`text` must be one str for images from an iterable ({type(images).__name__}): a list does not say "
                "which image each text refers to. Give a list of images, or questions with their own texts."
            )
        kwargs["num_workers"] = 0  # a generator cannot be sent to another process
        questions = (make_question(item, text, phrases) for item in images)
        batches = (batch for batch in iter(lambda: list(itertools.islice(questions, batch_size)), []))
        return itertools.chain.from_iterable(super().__call__(batches, batch_size=1, **kwargs))

    def _sanitize_parameters(
        self, threshold: float | None = None, mask_threshold: float | None = None
    ) -> tuple[dict, dict, dict]:
        given = {"threshold": threshold, "mask_threshold": mask_threshold}
        return {}, {name: value for name, value in given.items() if value is not None}, {}

    def preprocess(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Prepare questions: consecutive ones with phrases, and consecutive ones without, are run separately.

        Returns:
            `list[dict]`: for each such part the inputs of the model, the (height, width) of the images, the text of
            each sentence's phrases, and the number of sentences of each question.
        """
        parts = itertools.groupby(batch, key=lambda question: question["phrases"] is None)
        return [self.preprocess_part(list(part)) for _, part in parts]

    def preprocess_part(self, part: list[dict[str, Any]]) -> dict[str, Any]:
        """Prepare questions that all have phrases, or all have none, see `preprocess`."""
        images = [self.open_image(question["image"]) for question in part]
        sentences = [question["text"] for question in part]
        phrases = None if part[0]["phrases"] is None else [question["phrases"] for question in part]
        inputs = self.processor(images=images, text=sentences, phrases=phrases)
        flat_sentences = list(itertools.chain.from_iterable(sentences))
        flat_phrases = None if phrases is None else list(itertools.chain.from_iterable(phrases))
        return {
            "inputs": dict(inputs),
            "sizes": [height_and_width(image) for image in images],
            "labels": labels_of_sentences(flat_sentences, flat_phrases),
            "counts": [len(of_image) for of_image in sentences],
        }

    def _forward(self, batch: list[dict[str, Any]], **thresholds: float) -> list[dict[str, Any]]:
        return [self._forward_part(part, **thresholds) for part in batch]

    def _forward_part(
        self, part: dict[str, Any], threshold: float | None = None, mask_threshold: float = 0.5
    ) -> dict[str, Any]:
        outputs = self.model(**part.pop("inputs"), return_dict=True)
        if outputs.pred_masks is None:
            results = self.processor.post_process_grounding(outputs, part["sizes"], threshold)
        else:
            results = self.processor.post_process_referring_segmentation(
                outputs, part["sizes"], mask_threshold, threshold=threshold
            )
        return {**part, "results": results}

    def postprocess(self, batch: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Convert the results of each sentence to the answers of each question."""
        answers = []
        for part in batch:
            for of_question in group(make_answers(part["labels"], part["results"]), part["counts"]):
                answers.append(join_sentences(of_question))
        return answers

    def open_image(self, image: ImageInput) -> Any:
        """
        Open the one image of a question and return it upright.

        Raises:
            ValueError: if there is not exactly one.
        """
        images = self.processor.image_processor.open_images(image)
        if len(images) != 1:
            raise ValueError(f"A question must be about one image, got {len(images)}: ask about each.")
        return images[0]

    def draw(self, image: ImageInput, answers: list[dict[str, Any]], width: int | None = None) -> Image.Image:
        """
        Draw answers onto their image, with their texts at their boxes; see `draw_answers`.

        Args:
            image: the image, as it was passed to the call.
            answers (`list[dict]`): the answers of the call.
            width (`int`, *optional*): the width of the result in pixels, by default the image's, from 320 to 960.
        """
        return draw_on(to_pil_image(self.open_image(image)), answers, width)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save model and processor, with their code and that of this pipeline."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


class Questions(Dataset):
    """
    Hold questions about images.

    If the images are in a dataset, questions are made when they are requested; if they are in memory, at once, so that
    an error is raised before the first answer.

    Args:
        images: a nonempty sequence of images or of questions.
        text, phrases: a `str` (and its phrases) is asked about each image; a list has an entry per image.

    Raises:
        ValueError: if there are no images, or not one text, or one list of phrases, per image.
    """

    def __init__(self, images: Sequence, text: Any, phrases: Any) -> None:
        is_lazy = is_dataset(images) or (isinstance(images, Sequence) and not isinstance(images, (list, tuple)))
        self.images = images if is_lazy else to_list(images, "images")
        if len(self.images) == 0:
            raise ValueError("There are no images: give one image or a list of them.")
        self.is_for_all = isinstance(text, str) or text is None
        self.text, self.phrases = text, phrases
        if not self.is_for_all:
            self.text = to_list(text, "text")
            self.phrases = [None] * len(self.images) if phrases is None else to_list(phrases, "phrases")
            for name, values in (("texts", self.text), ("lists of phrases", self.phrases)):
                if len(values) != len(self.images):
                    raise ValueError(
                        f"{len(values)} {name} for {len(self.images)} images: give one text for all of them, or a "
                        "list with an entry per image."
                    )
        self.made = None
        if not is_lazy:
            self.made = [self.make(index) for index in range(len(self.images))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.make(index) if self.made is None else self.made[index]

    def make(self, index: int) -> dict[str, Any]:
        """Make a question, see `make_question`."""
        text, phrases = (self.text, self.phrases) if self.is_for_all else (self.text[index], self.phrases[index])
        return make_question(self.images[index], text, phrases)


class Batches(Dataset):
    """
    Group questions into batches, in order.

    Args:
        questions (`Questions`): the questions.
        batch_size (`int`): the maximum number of questions in a batch.
    """

    def __init__(self, questions: Questions, batch_size: int) -> None:
        self.questions, self.batch_size = questions, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.questions) / self.batch_size)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        numbers = range(len(self.questions))[index * self.batch_size : (index + 1) * self.batch_size]
        return [self.questions[number] for number in numbers]


def is_dataset(images: Any) -> bool:
    """Return whether images are in a dataset of torch or of the datasets library, which is read as required."""
    return isinstance(images, Dataset) or hasattr(images, "column_names")


def is_table(images: Any) -> bool:
    """Return whether these are questions by columns, as a batch of the datasets library: `{"image": [...], ...}`."""
    if not isinstance(images, Mapping) or is_undecoded(images):
        return False
    column = images.get("image")
    return is_sequence(column) and not is_one_image(column)


def make_question(image: Any, text: Any, phrases: Any) -> dict[str, Any]:
    """
    Make a question about one image.

    Args:
        image: an image, or a question, a dict with its own text and phrases.
        text (`str` or `list[str]`): one sentence or several.
        phrases (*optional*): the list of phrases of a `str`, or one such list (or None) for each of a `list[str]`.

    Returns:
        `dict`: "image", "text" (`list[str]`) and "phrases" (a list with an entry per text, or None).

    Raises:
        ValueError: if there is no text, or the phrases do not match it.
    """
    if isinstance(image, Mapping) and not is_undecoded(image):
        if text is not None or phrases is not None:
            raise ValueError(HAVE_TEXTS)
        if not {"image", "text"} <= image.keys():
            raise ValueError(f"A question must have an 'image' and a 'text', got {sorted(map(str, image))}.")
        image, text, phrases = image["image"], image["text"], image.get("phrases")
    text, phrases = flatten_question(text, phrases)
    return {"image": image, "text": text, "phrases": phrases}


__all__ = ["VisualGroundingPipeline"]
