"""Predictor for RefTR: encode an image once, then locate many expressions in it."""

import os
from typing import Any

import torch
from PIL import Image
from transformers.image_utils import ImageInput

from .answers_reftr import answer_to_json, draw_on, flatten_question, join_sentences, labels_of_sentences, make_answers
from .modeling_reftr import RefTRForVisualGrounding
from .pixels_reftr import height_and_width, to_pil_image
from .processing_reftr import RefTRProcessor


# Arguments of `from_pretrained` that both the model and the processor require.
SHARED_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


class RefTRPredictor:
    """
    Locate many expressions in one image, which is encoded once.

    A predictor holds the features of its image and is not thread-safe: use one per image or thread. Several predictors
    can share a model and a processor, which are thread-safe.

    Args:
        model ([`RefTRForVisualGrounding`]): the model, also a `fused_copy()`. It is set to evaluation mode.
        processor ([`RefTRProcessor`]): its processor.

    Example:

    ```python
    from modeling_reftr import RefTRPredictor

    predictor = RefTRPredictor.from_pretrained("runs/demo")
    predictor.set_image("photo.jpg")
    for text in ("the red circle", "the star"):
        (answer,) = predictor.predict(text)
        answer["label"], answer["box"]
    ```"""

    def __init__(self, model: RefTRForVisualGrounding, processor: RefTRProcessor) -> None:
        self.model = model.eval()
        self.processor = processor
        self.reset_image()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "RefTRPredictor":
        """
        Load a model and its processor from a folder or the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): the folder or the Hub id.
            kwargs: arguments of `RefTRForVisualGrounding.from_pretrained`, such as `dtype` and `device_map`.

        Raises:
            ValueError: if a file is damaged; the message names it.
            OSError: if there is no model or no processor.
        """
        shared_kwargs = {name: kwargs[name] for name in SHARED_ARGUMENTS if name in kwargs}
        model = RefTRForVisualGrounding.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(model, RefTRProcessor.from_pretrained(pretrained_model_name_or_path, **shared_kwargs))

    @torch.no_grad()
    def set_image(self, image: ImageInput, original_size: tuple[int, int] | None = None) -> None:
        """
        Encode the image that `predict` is asked about, and forget the previous one.

        Args:
            image: a PIL image, an array, a tensor, a path or a URL.
            original_size (`(height, width)`, *optional*):
                The size that the image was annotated at, which decides whether its EXIF orientation is followed.

        Raises:
            ValueError: if there is not exactly one image, or it is invalid.
            OSError: if a file is missing or is not an image.
        """
        self.reset_image()
        image_processor = self.processor.image_processor
        images = image_processor.open_images(image, None if original_size is None else [original_size])
        if len(images) != 1:
            raise ValueError(f"`set_image` takes one image, got {len(images)}: use one predictor per image.")
        inputs = image_processor(images[0], return_tensors="pt").to(self.model.device)
        self.features = self.model.get_image_features(**inputs)
        self.image = to_pil_image(images[0])

    def reset_image(self) -> None:
        """Forget the image."""
        self.image, self.features = None, None

    @torch.no_grad()
    def predict(
        self,
        text: str | list[str],
        phrases: list | None = None,
        mask_threshold: float = 0.5,
        threshold: float | None = None,
    ) -> list[dict[str, Any]]:
        """
        Locate expressions, or the phrases of captions, in the image.

        Args:
            text (`str` or `list[str]`): an expression or caption, or several.
            phrases (*optional*):
                The phrases of a caption, as `str` or (start, end) characters, nested under `text`: a list for a `str`,
                a list of lists for a `list[str]`, with None where a text is its own phrase. By default every text is
                one phrase.
            mask_threshold (`float`, *optional*, defaults to 0.5):
                The probability above which a pixel belongs to the mask.
            threshold (`float`, *optional*):
                The score above which a box is an answer, by default the one that the model was saved with.

        Returns:
            `list[dict]`: the answers of the phrases, in their order, see [`VisualGroundingPipeline.__call__`].

        Raises:
            ValueError: if no image is set, there is no text, or a text or a phrase is invalid.
        """
        if self.features is None:
            raise ValueError("No image is set: call `set_image` before `predict`.")
        sentences, phrases = flatten_question(text, phrases)
        inputs = self.processor(text=sentences, phrases=phrases).to(self.model.device)
        outputs = self.model(image_features=self.features, **inputs, return_dict=True)
        sizes = [height_and_width(self.image)]
        if outputs.pred_masks is None:
            results = self.processor.post_process_grounding(outputs, sizes, threshold)
        else:
            results = self.processor.post_process_referring_segmentation(
                outputs, sizes, mask_threshold, threshold=threshold
            )
        return join_sentences(make_answers(labels_of_sentences(sentences, phrases), results))

    @staticmethod
    def to_json(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Convert answers of `predict` to JSON: boxes as lists and masks as COCO RLE, see `answer_to_json`."""
        return [answer_to_json(answer) for answer in answers]

    def draw(self, answers: list[dict[str, Any]], width: int | None = None) -> Image.Image:
        """
        Draw answers onto the image, with their texts at their boxes; see `draw_answers`.

        Args:
            answers (`list[dict]`): answers of `predict`.
            width (`int`, *optional*): the width of the result in pixels, by default the image's, from 320 to 960.

        Raises:
            ValueError: if no image is set.
        """
        if self.image is None:
            raise ValueError("No image is set: call `set_image` before `draw`.")
        return draw_on(self.image, answers, width)


__all__ = ["RefTRPredictor"]
