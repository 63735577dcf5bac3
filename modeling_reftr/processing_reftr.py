"""RefTR's processor: pictures, words and phrases -> tensors; boxes back to pixels and phrases."""

import math
import re

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .image_processing_reftr import picture_size


logger = logging.get_logger(__name__)


class RefTRProcessor(ProcessorMixin):
    r"""
    Joins [`RefTRImageProcessor`] and a fast tokenizer.

    Args:
        image_processor ([`RefTRImageProcessor`]): for the pictures.
        tokenizer (`PreTrainedTokenizerFast`): for the words.
        max_expression_length (`int`, *optional*, defaults to 40):
            Longest sentence, in tokens, where no phrases are given (published: RefCOCO family, ReferIt, Visual
            Genome).
        max_caption_length, max_phrase_length, max_phrases (`int`, *optional*, default to 90, 22 and 16):
            Longest sentence and phrase where phrases are given (published: Flickr30k Entities), and the number of
            phrase slots that fixed length pads to.

    Example:

    ```python
    >>> from PIL import Image
    >>> from tokenizers import Tokenizer, models, pre_tokenizers, processors
    >>> from transformers import PreTrainedTokenizerFast
    >>> from modeling_reftr import RefTRImageProcessor, RefTRProcessor

    >>> words = {word: index for index, word in enumerate("[PAD] [CLS] [SEP] [UNK] the red blue cup".split())}
    >>> tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]")

    >>> processor = RefTRProcessor(RefTRImageProcessor(), tokenizer)
    >>> picture = Image.new("RGB", (100, 80))
    >>> inputs = processor(picture, ["the red cup", "the cup"], boxes=[[10, 20, 30, 40], [50, 20, 90, 60]])
    >>> inputs["input_ids"].tolist()
    [[1, 4, 5, 7, 2], [1, 4, 7, 2, 0]]
    >>> inputs["image_index"].tolist()
    [0, 0]

    ```"""

    def __init__(
        self,
        image_processor,
        tokenizer,
        max_expression_length: int = 40,
        max_caption_length: int = 90,
        max_phrase_length: int = 22,
        max_phrases: int = 16,
    ):
        self.max_expression_length = max_expression_length
        self.max_caption_length = max_caption_length
        self.max_phrase_length = max_phrase_length
        self.max_phrases = max_phrases
        if type(tokenizer).__module__.startswith("transformers."):
            # its file may name code of somebody; that was not followed, and is not passed on
            tokenizer.init_kwargs.pop("auto_map", None)
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images=None,
        text=None,
        phrases=None,
        boxes=None,
        masks=None,
        annotated_sizes=None,
        padding=None,
        return_tensors="pt",
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images (*optional*):
                A picture (PIL, array, tensor, path, URL) or a list of them. Absent: words alone, for images whose
                features there are already ([`RefTRForVisualGrounding.get_image_features`]).
            text (`str`, `list[str]` or `list[list[str]]`):
                One sentence; a list: all of one image, or one an image; a list of lists: the sentences of each image.
            phrases (*optional*):
                The phrases of each sentence, nested as `text` is and one list deeper: strings found in their sentence
                (regardless of case, whole words first, a repeated one at its next place), or (start, end) characters.
                Absent: one phrase, the whole sentence.
            boxes (*optional*):
                The box of each phrase, nested as `phrases` is, or, without phrases, one a sentence, nested as `text`
                is; (x0, y0, x1, y1) in pixels of the upright picture. Gives `labels`.
            masks (*optional*):
                The mask of each phrase, nested as `boxes` is, (height, width) of the picture, or COCO's run-length
                encoding of it; None for a sentence without masks. Gives `labels` too.
            annotated_sizes (list of `(height, width)`, *optional*):
                The size each picture was annotated at, which decides whether its EXIF orientation is followed.
            padding (`"longest"` or `"max_length"`, *optional*, defaults to `"longest"`):
                Pad text to the longest of the batch, or to the published fixed lengths.
            return_tensors (`str`, *optional*, defaults to `"pt"`): see `BatchFeature`.
            kwargs: settings of the image processor for this call, and `max_length`, the longest sentence in tokens,
                in place of the processor's own. Both also as `images_kwargs` and `text_kwargs`.

        Returns:
            `BatchFeature`: `pixel_values`, `pixel_mask`, `input_ids`, `attention_mask`, `image_index`; with phrases
            also `phrase_input_ids`, `phrase_attention_mask`, `phrase_spans`, `phrase_index`; with boxes or masks also
            `labels`. See [`RefTRForVisualGrounding.forward`] for their shapes.

        Raises:
            ValueError: if counts do not match, a text is blank, a phrase is not in its sentence, or a box is empty,
                inverted, not a number or outside its picture.
            OSError: if a file is missing or is no picture.
        """
        if padding is not None:
            kwargs["padding"] = padding
        kwargs = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        image_kwargs, text_kwargs = kwargs["images_kwargs"], kwargs["text_kwargs"]
        return_tensors = image_kwargs.pop("return_tensors", return_tensors)
        max_length = text_kwargs.pop("max_length", None)
        padding = text_kwargs.pop("padding", None) or "longest"
        if padding not in ("longest", "max_length", True):
            raise ValueError(f"padding={padding!r} must be 'longest' or 'max_length'.")
        if text is None:
            raise ValueError("There is no text: name what to look for.")
        if images is None:
            if boxes is not None or masks is not None:
                raise ValueError("Boxes and masks are in pixels of a picture: give images with them.")
            nested = isinstance(text, (list, tuple)) and any(isinstance(part, (list, tuple)) for part in text)
            data, sizes = {}, [None] * (len(text) if nested else 1)
        else:
            images = self.image_processor.open_images(images, annotated_sizes)
            sizes = [picture_size(image) for image in images]
            data = dict(self.image_processor(images, return_tensors=return_tensors, **image_kwargs))
        sentences, image_index, depth = arrange_sentences(text, len(sizes))
        data["image_index"] = image_index

        fixed = padding == "max_length"
        if phrases is None:
            data.update(self.encode_sentences(sentences, max_length or self.max_expression_length, fixed)[0])
            num_phrases = [1] * len(sentences)
        else:
            phrases = arrange_by_sentence(phrases, depth, sentences, image_index, "phrases")
            spans = [find_phrases(sentence, names) for sentence, names in zip(sentences, phrases, strict=True)]
            text_inputs, encodings = self.encode_sentences(sentences, max_length or self.max_caption_length, fixed)
            data.update(text_inputs)
            data.update(self.encode_phrases(sentences, spans, encodings, fixed))
            num_phrases = [len(names) for names in spans]

        targets = {"boxes": boxes, "masks": masks}
        targets = {
            name: arrange_by_sentence(values, depth, sentences, image_index, name)
            for name, values in targets.items()
            if values is not None
        }
        if targets:
            data["labels"] = [{} for _ in sentences]
            padded_size = tuple(np.shape(data["pixel_values"][0])[-2:])
        for index, (sentence, image) in enumerate(zip(sentences, image_index, strict=True)):
            for name, values in targets.items():
                value = values[index]
                if value is None:
                    continue
                if phrases is None and is_one_target(value, name):
                    value = [value]
                if len(value) != num_phrases[index]:
                    raise ValueError(
                        f"{len(value)} {name} for the {num_phrases[index]} phrases of {sentence!r}: give one a phrase."
                    )
                if name == "boxes":
                    data["labels"][index]["boxes"] = to_label_boxes(value, *sizes[image], sentence)
                else:
                    value = to_masks(value, *sizes[image], sentence)
                    data["labels"][index]["masks"] = self.image_processor.resize_masks(
                        value, padded_size, image_kwargs.get("size"), image_kwargs.get("do_resize")
                    )
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["labels"])

    @property
    def model_input_names(self) -> list[str]:
        """What a call without phrases gives."""
        return [*self.image_processor.model_input_names, "input_ids", "attention_mask", "image_index"]

    def encode_sentences(self, sentences: list[str], max_length: int, fixed: bool):
        """
        Token ids and mask of each sentence, (S, L), and the encodings with their character offsets.

        Raises:
            ValueError: if a sentence has no words.
        """
        sentences = [lower_case(sentence) for sentence in sentences]
        max_length = min(max_length, self.tokenizer.model_max_length)
        encodings = self.tokenizer(sentences, return_offsets_mapping=True, add_special_tokens=True, verbose=False)
        num_cut = 0
        for sentence, ids in zip(sentences, encodings["input_ids"], strict=True):
            if len(ids) <= 2:
                raise ValueError(f"The text {sentence!r} has no words: there is nothing to look for.")
            num_cut += len(ids) > max_length
        if num_cut:
            logger.warning(
                f"{num_cut} of {len(sentences)} texts are longer than {max_length} tokens and were cut; phrases past "
                "the cut are masked and get no answer."
            )
            encodings = self.tokenizer(
                sentences, return_offsets_mapping=True, truncation=True, max_length=max_length, padding=False
            )
            self.tokenizer.backend_tokenizer.no_truncation()  # else the limit would be saved as the tokenizer's own
        width = max_length if fixed else max(len(ids) for ids in encodings["input_ids"])
        return self.pad_tokens(encodings["input_ids"], width), encodings

    def pad_tokens(self, token_ids: list[list[int]], width: int, prefix: str = "") -> dict[str, np.ndarray]:
        """Right-pad lists of token ids to (len, width), with their mask."""
        input_ids = np.full((len(token_ids), width), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for index, ids in enumerate(token_ids):
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
        return {f"{prefix}input_ids": input_ids, f"{prefix}attention_mask": attention_mask}

    def encode_phrases(self, sentences, spans, encodings, fixed: bool) -> dict[str, np.ndarray]:
        """
        Each phrase by itself and where its tokens stand in the sentence. Padding slots, and phrases past the cut of
        their sentence, hold an empty phrase with the span [0, 1).

        Raises:
            ValueError: if there are no phrases, or more than fixed length has room for.
        """
        num_slots = max(len(sentence_spans) for sentence_spans in spans)
        if num_slots == 0:
            raise ValueError("No sentence has a phrase: name what to look for, or leave phrases out.")
        if fixed and num_slots > self.max_phrases:
            raise ValueError(
                f"A sentence has {num_slots} phrases; padding='max_length' has room for max_phrases="
                f"{self.max_phrases}."
            )
        num_slots = self.max_phrases if fixed else num_slots
        phrase_spans = np.zeros((len(sentences), num_slots, 2), dtype=np.int64)
        phrase_spans[..., 1] = 1
        texts = [[""] * num_slots for _ in sentences]
        for index, (sentence, sentence_spans) in enumerate(zip(sentences, spans, strict=True)):
            offsets = encodings["offset_mapping"][index]
            for slot, (start, end) in enumerate(sentence_spans):
                tokens = [number for number, (left, right) in enumerate(offsets) if left < end and right > start]
                if tokens:
                    phrase_spans[index, slot] = tokens[0], tokens[-1] + 1
                    texts[index][slot] = lower_case(sentence[start:end])
        flat = [text for row in texts for text in row]
        token_ids = self.tokenizer(flat, truncation=True, max_length=self.max_phrase_length, padding=False)[
            "input_ids"
        ]
        self.tokenizer.backend_tokenizer.no_truncation()
        # where no phrase is real, the first slot stands in for the model's text backbone
        phrase_index = [divmod(number, num_slots) for number, ids in enumerate(token_ids) if len(ids) > 2] or [(0, 0)]
        width = self.max_phrase_length if fixed else max(len(ids) for ids in token_ids)
        data = self.pad_tokens(token_ids, width, prefix="phrase_")
        data = {name: values.reshape(len(sentences), num_slots, width) for name, values in data.items()}
        return {**data, "phrase_spans": phrase_spans, "phrase_index": np.array(phrase_index)}

    def post_process_grounding(self, outputs, target_sizes) -> list[dict]:
        """
        Boxes in pixels and the phrases that they answer.

        Args:
            outputs ([`RefTRVisualGroundingOutput`]): of the model.
            target_sizes (`torch.Tensor` of shape `(I, 2)` or list of `(height, width)`):
                The original size of each image, or of each sentence's image.

        Returns:
            `list[dict]`, one a sentence: `boxes` (`torch.Tensor` of shape `(phrases, 4)`, xyxy in pixels), `phrases`
            (`list[str]`, as the tokenizer reads them) and `phrase_indices` (`list[int]`, their slots: padding and
            phrases past the cut of their sentence get no answer).

        Raises:
            ValueError: if there is not one size an image or a sentence.
        """
        boxes_xyxy = self.image_processor.post_process_boxes(outputs, target_sizes)
        token_ids = outputs.input_ids[:, None] if outputs.phrase_input_ids is None else outputs.phrase_input_ids
        # the host waits for the device a few times a batch, and not for every sentence
        phrase_mask, token_ids = outputs.phrase_mask.cpu(), token_ids.cpu()
        boxes_of_sentences = boxes_xyxy[outputs.phrase_mask].split(phrase_mask.sum(1).tolist())
        results = []
        for boxes, mask, ids in zip(boxes_of_sentences, phrase_mask, token_ids, strict=True):
            results.append(
                {
                    "boxes": boxes,
                    "phrases": self.tokenizer.batch_decode(ids[mask], skip_special_tokens=True),
                    "phrase_indices": mask.nonzero().flatten().tolist(),
                }
            )
        return results

    def post_process_referring_segmentation(
        self,
        outputs,
        target_sizes,
        threshold: float = 0.5,
        two_step: bool = False,
        return_coco_rle: bool = False,
    ) -> list[dict]:
        """
        Boxes and masks in pixels, and the phrases that they answer.

        Args:
            outputs ([`RefTRVisualGroundingOutput`]): of a model with `config.predict_masks`.
            target_sizes, threshold, two_step: see [`RefTRImageProcessor.post_process_masks`].
            return_coco_rle (`bool`, *optional*, defaults to `False`):
                Give `segmentations`, COCO's run-length encoding, in place of `masks`.

        Returns:
            `list[dict]`, one a sentence: what `post_process_grounding` gives, and `masks` (`torch.Tensor` of shape
            `(phrases, height, width)`, bool), or `segmentations` (`list[dict]`, `size` and `counts` each).

        Raises:
            ValueError: if the model predicts no masks, or there is not one size an image or a sentence.
        """
        results = self.post_process_grounding(outputs, target_sizes)
        masks_of_sentences = self.image_processor.post_process_masks(outputs, target_sizes, threshold, two_step)
        for result, masks in zip(results, masks_of_sentences, strict=True):
            if return_coco_rle:
                result["segmentations"] = [to_coco_rle(mask) for mask in masks]
            else:
                result["masks"] = masks
        return results


def to_coco_rle(mask: torch.Tensor) -> dict:
    """A bool mask (height, width) -> COCO's run-length encoding: `size` [height, width] and `counts` (`str`)."""
    from pycocotools import mask as coco_mask  # here, because only who asks for it needs it

    encoded = coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def from_coco_rle(segmentation: dict) -> np.ndarray:
    """
    COCO's run-length encoding (`size` [height, width], `counts` as `str`, `bytes` or a list of lengths) -> bool mask
    (height, width).

    Example:

    ```python
    >>> from modeling_reftr.processing_reftr import from_coco_rle

    >>> from_coco_rle({"size": [2, 3], "counts": [2, 2, 2]}).astype(int)
    array([[0, 1, 0],
           [0, 1, 0]])

    ```

    Raises:
        ValueError: if the run lengths are no mask of that size.
    """
    from pycocotools import mask as coco_mask

    size, counts = list(segmentation["size"]), segmentation["counts"]
    try:
        if isinstance(counts, (list, tuple)):
            encoded = coco_mask.frPyObjects({"size": size, "counts": list(counts)}, *size)
        else:
            encoded = {"size": size, "counts": counts.encode("ascii") if isinstance(counts, str) else counts}
        mask = coco_mask.decode(encoded).astype(bool)
    except (ValueError, OverflowError, TypeError) as error:
        raise ValueError(f"The run lengths {str(counts)[:80]!r} are no mask of {size} [height, width].") from error
    # where run lengths end early, the library leaves the rest of the mask to chance
    if mask.sum() != coco_mask.area(encoded):
        raise ValueError(f"The run lengths {str(counts)[:80]!r} do not fill a mask of {size} [height, width].")
    return mask


def lower_case(text: str) -> str:
    """Lower case, a character for a character, so that places in the text stay what they are."""
    if text.isascii():
        return text.lower()
    return "".join(low if len(low := character.lower()) == 1 else character for character in text)


def arrange_sentences(text, num_images: int) -> tuple[list[str], list[int], int]:
    """
    `text` as the processor takes it -> the sentences in one list, the image of each, and how deep `text` nests.

    Raises:
        ValueError: if the counts do not match, a sentence is blank, or an image has none.
    """
    if isinstance(text, str):
        if num_images != 1:
            raise ValueError(f"One text for {num_images} images: give a list with one text an image.")
        sentences, image_index, depth = [text], [0], 0
    elif not isinstance(text, (list, tuple)) or len(text) == 0:
        raise ValueError(f"text={text!r} must be a sentence, a list of them, or a list for each image.")
    elif all(isinstance(sentence, str) for sentence in text):
        if num_images not in (1, len(text)):
            raise ValueError(
                f"{len(text)} texts for {num_images} images: give one an image, or a list for each image."
            )
        image_index = [0] * len(text) if num_images == 1 else list(range(num_images))
        sentences, depth = list(text), 1
    elif all(isinstance(group, (list, tuple)) and all(isinstance(s, str) for s in group) for group in text):
        if len(text) != num_images:
            raise ValueError(f"{len(text)} lists of texts for {num_images} images: give one list an image.")
        sentences = [sentence for group in text for sentence in group]
        image_index = [index for index, group in enumerate(text) for _ in group]
        depth = 2
        if [] in [list(group) for group in text]:
            raise ValueError("An image has no sentence: give each image one, or leave the image out.")
    else:
        raise ValueError("text mixes sentences and lists: give a list of sentences, or a list of sentences an image.")
    for sentence in sentences:
        if not sentence.strip():
            raise ValueError(f"The text {sentence!r} is blank: there is nothing to look for.")
    return sentences, image_index, depth


def arrange_by_sentence(values, depth: int, sentences: list[str], image_index: list[int], name: str) -> list:
    """
    Values nested as the text is -> one entry a sentence.

    Raises:
        ValueError: if they are nested otherwise.
    """
    if depth == 0:
        return [values]
    if depth == 2:
        counts, given = (
            [image_index.count(index) for index in sorted(set(image_index))],
            [len(group) for group in values],
        )
        if given != counts:
            raise ValueError(f"{name} must be nested as text is: {counts} sentences an image, got {given}.")
        values = [value for group in values for value in group]
    if len(values) != len(sentences):
        raise ValueError(f"{len(values)} entries of {name} for {len(sentences)} sentences: give one a sentence.")
    return list(values)


def find_phrases(sentence: str, phrases) -> list[tuple[int, int]]:
    """
    Where phrases (strings, or spans that are checked) stand in their sentence, as (start, end) characters.

    Raises:
        ValueError: if a phrase is blank or not in the sentence, or a span is empty or leaves it.

    Example:

    ```python
    >>> from modeling_reftr.processing_reftr import find_phrases

    >>> find_phrases("A dog beside a dog", ["a dog", "a dog"])
    [(0, 5), (13, 18)]

    ```"""
    if isinstance(phrases, str):
        raise ValueError(f"phrases={phrases!r}: give a list of phrases for each sentence.")
    lowered = lower_case(sentence)
    spans, next_place = [], {}
    for phrase in phrases:
        if isinstance(phrase, str):
            wanted = lower_case(phrase.strip())
            if not wanted:
                raise ValueError(f"A phrase of {sentence!r} is blank.")
            begin = next_place.get(wanted, 0)
            match = re.compile(rf"(?<!\w){re.escape(wanted)}(?!\w)").search(lowered, begin)
            start = match.start() if match else lowered.find(wanted, begin)
            if start < 0:
                times = "" if begin == 0 else " once more"
                raise ValueError(f"The phrase {phrase!r} is not{times} in its sentence {sentence!r}.")
            end = start + len(wanted)
            next_place[wanted] = end
        else:
            start, end = (int(place) for place in phrase)
            if not 0 <= start < end <= len(sentence) or not sentence[start:end].strip():
                raise ValueError(
                    f"The span ({start}, {end}) is no part of {sentence!r}, which has {len(sentence)} characters."
                )
        spans.append((start, end))
    return spans


def is_one_target(value, name: str) -> bool:
    """Whether this is one box or mask itself, not a list of them."""
    if isinstance(value, dict):
        return True
    return len(value) > 0 and not isinstance(value[0], dict) and np.ndim(value[0]) == {"boxes": 0, "masks": 1}[name]


def to_masks(masks, height: int, width: int, sentence: str) -> np.ndarray:
    """
    Masks, or COCO's run-length encodings of them -> (phrases, height, width), bool.

    Raises:
        ValueError: if a mask has not the size of its picture.
    """
    arrays = np.zeros((len(masks), height, width), dtype=bool)
    for index, mask in enumerate(masks):
        size = tuple(mask["size"]) if isinstance(mask, dict) else np.shape(mask)
        if size != (height, width):
            raise ValueError(
                f"A mask of {sentence!r} has the size {size}, its picture has {(height, width)} (height, width)."
            )
        arrays[index] = from_coco_rle(mask) if isinstance(mask, dict) else np.asarray(mask) != 0
    return arrays


def to_label_boxes(boxes, height: int, width: int, sentence: str) -> torch.Tensor:
    """
    (phrases, 4) xyxy in pixels -> (cx, cy, w, h) in 0..1 of the picture. A box may pass the picture's edge by a pixel
    (annotations round), and is cut there.

    Raises:
        ValueError: if a box is empty, inverted, not a number or outside its picture.

    Example:

    ```python
    >>> from modeling_reftr.processing_reftr import to_label_boxes

    >>> to_label_boxes([[160, 0, 480, 480]], height=480, width=640, sentence="the bus")
    tensor([[0.5000, 0.5000, 0.5000, 1.0000]])

    ```"""
    labels = []
    for box in np.asarray(boxes, dtype=np.float64).reshape(-1, 4).tolist():
        x0, y0, x1, y1 = box
        if not (x0 < x1 and y0 < y1 and math.isfinite(sum(box))):
            raise ValueError(f"The box {box} of {sentence!r} is not (x0, y0, x1, y1) with x0 < x1 and y0 < y1.")
        left, top, right, bottom = (
            max(x0, 0) / width,
            max(y0, 0) / height,
            min(x1, width) / width,
            min(y1, height) / height,
        )
        passes = min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1
        if passes or left >= right or top >= bottom:
            raise ValueError(f"The box {box} of {sentence!r} leaves its picture of {width} x {height} pixels.")
        labels.append([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
    return torch.tensor(labels, dtype=torch.float32).reshape(-1, 4)


RefTRProcessor.register_for_auto_class()

__all__ = ["RefTRProcessor"]
