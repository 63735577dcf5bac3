"""RefTR's processor: pictures, words and phrases -> tensors; boxes back to pixels and phrases."""

import bisect
import math
import operator
import unicodedata
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .configuration_reftr import AUTO_MAP, check_config_file
from .decoding_reftr import is_undecoded, without_decoding
from .image_processing_reftr import check_picture, open_undecoded
from .inputs_reftr import check_setting, is_sequence, nesting_depth, to_list, warn_about_joined_expressions
from .loading_reftr import CONFIG_FILES, IMAGE_PROCESSOR_FILES, TOKENIZER_FILES, naming_files
from .quoting_reftr import quote
from .rle_reftr import fill_mask, to_coco_rle, to_run_lengths
from .text_reftr import MAX_CHARACTERS, check_text, is_blank


logger = logging.get_logger(__name__)

# halves of characters, which no text has: see `check_text`
WORD_START, WORD_END = "\ud800", "\udfff"
LENGTHS = ("max_expression_length", "max_caption_length", "max_phrase_length", "max_phrases")


class RefTRProcessor(ProcessorMixin):
    r"""
    Joins [`RefTRImageProcessor`] and a fast tokenizer.

    Args:
        image_processor ([`RefTRImageProcessor`]): for the pictures.
        tokenizer (`PreTrainedTokenizerFast`): for the words.
        max_expression_length (`int`, *optional*, defaults to 40):
            Longest single expression, in tokens (published: RefCOCO family, ReferIt, Visual Genome).
        max_caption_length, max_phrase_length, max_phrases (`int`, *optional*, default to 90, 22 and 16):
            Longest caption and phrase, in tokens (published: Flickr30k Entities), and the number of phrase slots that
            fixed length pads to.

    Every sentence is encoded as published, whatever stands beside it in the batch. A *single expression*, a sentence
    without phrases or with the whole text as its only phrase, is lower-cased by `str.lower` and cut after
    `max_expression_length` tokens. A *caption*, a sentence with other phrases, keeps its capitals, and so do its
    phrases; it is cut after `max_caption_length` tokens.

    Calls from several threads at once are safe, and each returns what it returns alone: a call changes neither the
    processor nor its tokenizer. Truncation and padding are done here and never by the tokenizer, whose own settings of
    them, as a `tokenizer.json` may bring them, are switched off when the processor is made.

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
        lengths = (max_expression_length, max_caption_length, max_phrase_length, max_phrases)
        for name, length in zip(LENGTHS, lengths, strict=True):
            if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length < 2**31:
                raise ValueError(f"{name}={quote(length, 40)} must be a whole number of at least 1.")
        self.max_expression_length = max_expression_length
        self.max_caption_length = max_caption_length
        self.max_phrase_length = max_phrase_length
        self.max_phrases = max_phrases
        if type(tokenizer).__module__.startswith("transformers."):
            # its file may name code of somebody; that was not followed, and is not passed on
            tokenizer.init_kwargs.pop("auto_map", None)
        leave_text_whole(tokenizer)
        super().__init__(image_processor, tokenizer)
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        See `ProcessorMixin.from_pretrained`.

        Raises:
            ValueError: if a file is damaged, naming it.
            OSError: if there is no processor.
        """
        check_config_file(pretrained_model_name_or_path, kwargs)
        names = TOKENIZER_FILES + IMAGE_PROCESSOR_FILES + CONFIG_FILES
        with naming_files(pretrained_model_name_or_path, names, kwargs):
            loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            (loaded[0] if isinstance(loaded, tuple) else loaded).check_parts()
        return loaded

    def check_parts(self):
        """
        Prepare an image and a text, so that what a file says, and no library looked at, fails now.

        Raises:
            Exception: any of a library, if a part cannot be used; [`RefTRProcessor.from_pretrained`] names its files.
        """
        if self.tokenizer.num_special_tokens_to_add() < 2:
            raise ValueError("the tokenizer must put a token before and one behind each text, as [CLS] and [SEP] are")
        encoded, _ = self.tokenize(["a"], [min(self.max_expression_length, self.max_phrase_length)])
        self.pad_tokens([ids for ids, _ in encoded], self.max_expression_length)
        self.tokenizer.batch_decode([ids for ids, _ in encoded])
        self.image_processor(Image.new("RGB", (8, 8)))

    def __call__(
        self,
        images=None,
        text=None,
        phrases=None,
        boxes=None,
        masks=None,
        annotated_sizes=None,
        **kwargs,
    ) -> BatchFeature:
        """
        Encode images, and what is asked about them.

        How a call is read follows from the nesting of `text` and the number of images alone, never from a length that
        happens to fit. Any list may be a tuple, an array or another sequence.

        Args:
            images (*optional*):
                An image (PIL, array, tensor, path, URL) or a list of them. Absent: text alone, for images whose
                features are there already ([`RefTRForVisualGrounding.get_image_features`]).
            text (`str`, `list[str]` or `list[list[str]]`):
                A `str` is one sentence about the one image. A `list[str]` holds all sentences about the one image, or,
                with several images, one sentence for each; without `images` they are all about one image. A
                `list[list[str]]` holds the sentences of each image.
            phrases (*optional*):
                For one sentence a list, nested under `text`: a list of phrases for a `str`, a list of such lists for a
                `list[str]`, and so on. A phrase is a `str`, which is found in its sentence (regardless of case, whole
                words first, a repeated one at its next occurrence), or a pair of `int`, (start, end) characters of it.
                None, for all or for one sentence: its one phrase is the whole sentence.
            boxes (*optional*):
                For one sentence the boxes_xyxy of its phrases, (phrases, 4), in pixels of the upright image; for one
                without `phrases`, (4,) or (1, 4). Nested under `text` as `phrases` is. None for a sentence without
                boxes. Gives `labels`.
            masks (*optional*):
                For one sentence the masks of its phrases, each an array (height, width) of the image's size or COCO's
                run-length encoding; for one without `phrases`, the mask itself or a list of it: (height, width) or
                (1, height, width). Nested under `text` as `boxes` is. None for a sentence without masks. Gives
                `labels`.
            annotated_sizes (list of `(height, width)`, *optional*):
                One for each image: the size it was annotated at, which decides whether its EXIF orientation is
                followed.
            padding (`"longest"` or `"max_length"`, *optional*, defaults to `"longest"`):
                Pad text to the longest of the batch, or to the published fixed lengths. (A single expression in a
                batch with phrases is its own phrase; where it is longer than `max_phrase_length`, phrases are padded
                to `max_expression_length`.)
            return_tensors (`str`, *optional*, defaults to `"pt"`): see `BatchFeature`.
            kwargs: settings of the image processor for this call, and `max_length`, the longest sentence in tokens,
                in place of the processor's own. Both also as `images_kwargs` and `text_kwargs`.

        Returns:
            `BatchFeature`: `pixel_values`, `pixel_mask`, `input_ids`, `attention_mask`, `image_index`; with phrases
            also `phrase_input_ids`, `phrase_attention_mask`, `phrase_spans`, `phrase_index`; with boxes or masks also
            `labels`. See [`RefTRForVisualGrounding.forward`] for their shapes.

        Raises:
            ValueError: if counts or nesting do not match, a text is blank or not one that `check_text` takes, a phrase
                is not in its sentence, or a box is empty, inverted, not a number or outside its image.
            OSError: if a file is missing or is not an image.
        """
        for name, value in kwargs.items():
            check_setting(value, name)
        kwargs = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        image_kwargs, text_kwargs = kwargs["images_kwargs"], kwargs["text_kwargs"]
        return_tensors = image_kwargs.pop("return_tensors", "pt")
        max_length = text_kwargs.pop("max_length", None)
        padding = text_kwargs.pop("padding", None) or "longest"
        if padding not in ("longest", "max_length", True):
            raise ValueError(f"padding={quote(padding)} must be 'longest' or 'max_length'.")
        if text is None:
            raise ValueError("There is no text: name what to look for.")
        if images is None:
            if boxes is not None or masks is not None:
                raise ValueError("Boxes and masks are in pixels of a picture: give images with them.")
            data, sizes = {}, None
        else:
            data, sizes = self.image_processor.preprocess_with_sizes(
                images, annotated_sizes, return_tensors=return_tensors, **image_kwargs
            )
            data = dict(data)
        sentences, image_index, depth = arrange_sentences(text, None if sizes is None else len(sizes))
        data["image_index"] = image_index

        fixed = padding == "max_length"
        spans = [None] * len(sentences)
        if phrases is not None:
            phrases = arrange_by_sentence(phrases, depth, sentences, image_index, "phrases")
            spans = [
                None if names is None else find_phrases(sentence, names)
                for sentence, names in zip(sentences, phrases, strict=True)
            ]
        if boxes is None and masks is None:
            warn_about_joined_expressions(
                sentence for sentence, sentence_spans in zip(sentences, spans, strict=True) if sentence_spans is None
            )
        encoded = self.encode_sentences(sentences, spans, max_length)
        widths = [len(ids) for ids, _ in encoded]
        if fixed:
            longest = self.max_expression_length if phrases is None else self.max_caption_length
            widths.append(min(max_length or longest, self.tokenizer.model_max_length))
        data |= self.pad_tokens([ids for ids, _ in encoded], max(widths))
        if phrases is not None:
            data |= self.encode_phrases(sentences, spans, encoded, fixed)

        targets = {"boxes": boxes, "masks": without_decoding(masks)}
        targets = {
            name: arrange_by_sentence(values, depth, sentences, image_index, name)
            for name, values in targets.items()
            if values is not None
        }
        if targets:
            data["labels"] = [{} for _ in sentences]
            padded_size = tuple(np.shape(data["pixel_values"][0])[-2:])
        for index, (sentence, image) in enumerate(zip(sentences, image_index, strict=True)):
            num_phrases = 1 if spans[index] is None else len(spans[index])
            for name, values in targets.items():
                value = values[index]
                if value is None:
                    continue
                if spans[index] is None and is_one_target(value, name):
                    value = [value]
                value = to_list(value, f"{name} of {quote(sentence)}")
                if len(value) != num_phrases:
                    raise ValueError(
                        f"{len(value)} {name} for the {num_phrases} phrases of {quote(sentence)}: give one a phrase."
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

    def encode_sentences(self, sentences: list[str], spans: list, max_length: int | None = None):
        """
        Encode each sentence as published: a single expression in lower case, a caption as it is.

        Args:
            sentences (`list[str]`): with S entries.
            spans (`list`): the (start, end) characters of each sentence's phrases; None: the whole sentence.
            max_length (`int`, *optional*): the longest in tokens, in place of the processor's own.

        Returns:
            `list[tuple]`, one for each sentence: token ids, and the (start, end) characters that each is made of.

        Raises:
            ValueError: if a sentence has no words, or `max_length` has no room for any.
        """
        texts, limits = [], []
        for sentence, sentence_spans in zip(sentences, spans, strict=True):
            is_expression = is_single_expression(sentence, sentence_spans)
            texts.append(sentence.lower() if is_expression else sentence)
            limits.append(max_length or (self.max_expression_length if is_expression else self.max_caption_length))
        encoded, cuts = self.tokenize(texts, limits)
        for sentence, (ids, _) in zip(sentences, encoded, strict=True):
            if len(ids) <= 2:
                raise ValueError(f"The text {quote(sentence)} has no words: there is nothing to look for.")
        if cuts:
            logger.warning(
                f"{len(cuts)} of {len(sentences)} texts are longer than {' or '.join(map(str, sorted(set(cuts))))} "
                "tokens and were cut; phrases past the cut are masked and get no answer."
            )
        return encoded

    def tokenize(self, texts: list[str], limits: list[int]) -> tuple[list[tuple[list, list]], list[int]]:
        """
        Tokenize texts, each cut to its limit as the tokenizer would, which keeps its special tokens.

        Args:
            texts (`list[str]`): as the tokenizer is to see them.
            limits (`list[int]`): the longest of each in tokens, with special tokens.

        Returns:
            `tuple`: token ids and (start, end) characters of each text, and the limit of each that was cut.

        Raises:
            ValueError: if a limit has no room for a token beside the special ones.
        """
        # a tokenizer.json can lack the very token that a text needs
        with naming_files(self.tokenizer.name_or_path, ["tokenizer.json", "tokenizer_config.json"], {}):
            encodings = self.tokenizer(
                texts, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
            )
        encoded, cuts = [], []
        for ids, offsets, is_special, limit in zip(
            encodings["input_ids"],
            encodings["offset_mapping"],
            encodings["special_tokens_mask"],
            limits,
            strict=True,
        ):
            limit = min(limit, self.tokenizer.model_max_length)
            if len(ids) > limit:
                # what the tokenizer puts before and after a text stays; a special token typed in the text is text
                first = is_special.index(0)
                last = len(ids) - is_special[::-1].index(0)
                room = limit - first - (len(ids) - last)
                if room < 1:
                    raise ValueError(
                        f"A length of {limit} tokens has no room for text beside the {len(ids) - last + first} "
                        "special tokens: give a larger max_length."
                    )
                kept = (
                    slice(last - room, last)
                    if self.tokenizer.truncation_side == "left"
                    else slice(first, first + room)
                )
                ids, offsets = ([*part[:first], *part[kept], *part[last:]] for part in (ids, offsets))
                cuts.append(limit)
            encoded.append((ids, offsets))
        return encoded, cuts

    def pad_tokens(self, token_ids: list[list[int]], width: int, prefix: str = "") -> dict[str, np.ndarray]:
        """Right-pad lists of token ids to (len, width), with their mask."""
        input_ids = np.full((len(token_ids), width), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for index, ids in enumerate(token_ids):
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
        return {f"{prefix}input_ids": input_ids, f"{prefix}attention_mask": attention_mask}

    def encode_phrases(self, sentences, spans, encoded, fixed: bool) -> dict[str, np.ndarray]:
        """
        Encode each phrase by itself, and find its tokens in the sentence. Padding slots, and phrases past the cut of
        their sentence, hold an empty phrase with the span [0, 1).

        Args:
            sentences, spans: see `encode_sentences`.
            encoded: what `encode_sentences` returned for them.
            fixed (`bool`): whether to pad to the published lengths.

        Returns:
            `dict[str, np.ndarray]`: `phrase_input_ids` and `phrase_attention_mask` (S, P, Lp), `phrase_spans`
            (S, P, 2) and `phrase_index` (N, 2), see [`RefTRForVisualGrounding.forward`].

        Raises:
            ValueError: if there are no phrases, or more than fixed length has room for.
        """
        num_slots = max(1 if sentence_spans is None else len(sentence_spans) for sentence_spans in spans)
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
        expressions, texts = {}, [""] * (len(sentences) * num_slots)
        for index, (sentence, sentence_spans) in enumerate(zip(sentences, spans, strict=True)):
            ids, offsets = encoded[index]
            if is_single_expression(sentence, sentence_spans):
                # as without phrases: the sentence's own tokens, and as context all but the first and the last
                phrase_spans[index, 0] = 1, len(ids) - 1
                expressions[index * num_slots] = ids
                continue
            for slot, (start, end) in enumerate(sentence_spans):
                tokens = [number for number, (left, right) in enumerate(offsets) if left < end and right > start]
                if tokens:
                    phrase_spans[index, slot] = tokens[0], tokens[-1] + 1
                    texts[index * num_slots + slot] = sentence[start:end]
        phrases, cuts = self.tokenize(texts, [self.max_phrase_length] * len(texts))
        if cuts:
            logger.warning(f"{len(cuts)} phrases are longer than {cuts[0]} tokens and were cut.")
        token_ids = [expressions.get(number, ids) for number, (ids, _) in enumerate(phrases)]
        # where no phrase is real, the first slot stands in for the model's text backbone
        phrase_index = [divmod(number, num_slots) for number, ids in enumerate(token_ids) if len(ids) > 2] or [(0, 0)]
        width = max(map(len, token_ids))
        if fixed:
            width = (
                self.max_phrase_length if width <= self.max_phrase_length else max(width, self.max_expression_length)
            )
        data = self.pad_tokens(token_ids, width, prefix="phrase_")
        data = {name: values.reshape(len(sentences), num_slots, width) for name, values in data.items()}
        return {**data, "phrase_spans": phrase_spans, "phrase_index": np.array(phrase_index)}

    def post_process_grounding(self, outputs, target_sizes) -> list[dict]:
        """
        Boxes in pixels and the phrases that they answer.

        Args:
            outputs ([`RefTRVisualGroundingOutput`]): of the model.
            target_sizes (`torch.Tensor` of shape `(I, 2)` or list of `(height, width)`):
                The original size of each image, in the order of `pixel_values`: one for each image, also where
                several sentences ask about an image or none does.

        Returns:
            `list[dict]`, one a sentence: `boxes` (`torch.Tensor` of shape `(phrases, 4)`, xyxy in pixels), `phrases`
            (`list[str]`, as the tokenizer reads them) and `phrase_indices` (`list[int]`, their slots: padding and
            phrases past the cut of their sentence get no answer).

        Raises:
            ValueError: if there is not one size for each image.
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
            ValueError: if the model predicts no masks, or there is not one size for each image.
        """
        results = self.post_process_grounding(outputs, target_sizes)
        masks_of_sentences = self.image_processor.post_process_masks(outputs, target_sizes, threshold, two_step)
        for result, masks in zip(results, masks_of_sentences, strict=True):
            if return_coco_rle:
                result["segmentations"] = [to_coco_rle(mask) for mask in masks]
            else:
                result["masks"] = masks
        return results


def leave_text_whole(tokenizer):
    """
    Switch off truncation and padding of a fast tokenizer, as its `tokenizer.json` may ask for them. They are state of
    the Rust object that all threads share: once they are off, no call has to touch them.
    """
    backend = tokenizer.backend_tokenizer
    lengths = {(backend.truncation or {}).get("max_length"), (backend.padding or {}).get("length")} - {None}
    if tokenizer.init_kwargs.get("max_length") in lengths:
        del tokenizer.init_kwargs["max_length"]  # the library's copy of it, which would be each call's max_length
    backend.no_truncation()
    backend.no_padding()


def is_single_expression(sentence: str, spans: list[tuple[int, int]] | None) -> bool:
    """
    Return whether the one phrase of a sentence is the whole text.

    Args:
        sentence (`str`): the text.
        spans (list of `(start, end)`): characters of its phrases; None: the whole sentence.

    Example:

    ```python
    >>> from modeling_reftr.processing_reftr import is_single_expression

    >>> is_single_expression("the dog", [(0, 7)]), is_single_expression("the dog.", [(0, 7)])
    (True, False)

    ```"""
    if spans is None:
        return True
    if len(spans) != 1:
        return False
    start, end = spans[0]
    return not sentence[:start].strip() and not sentence[end:].strip()


def arrange_sentences(text, num_images: int | None) -> tuple[list[str], list[int], int]:
    """
    Bring `text` as the processor takes it into one list.

    Args:
        text (`str`, `list[str]` or `list[list[str]]`): one sentence; sentences; or the sentences of each image.
        num_images (`int`, *optional*):
            With 1, a `list[str]` is about the one image; with more, it holds a sentence for each. Absent: a
            `list[str]` is about one image.

    Returns:
        `tuple`: the sentences (`list[str]`), the image of each (`list[int]`), and how deep `text` nests (0, 1 or 2).

    Raises:
        ValueError: if the counts do not match, a sentence is blank, or an image has none.
    """
    if isinstance(text, str):
        if num_images not in (None, 1):
            raise ValueError(f"One text for {num_images} images: give a list with one text an image.")
        sentences, image_index, depth = [text], [0], 0
    else:
        groups = to_list(text, "text")
        if not groups:
            raise ValueError("text=[] must be a sentence, a list of them, or a list for each image.")
        is_sentence = [isinstance(group, str) for group in groups]
        if all(is_sentence):
            sentences, depth = groups, 1
            if num_images in (None, 1):
                image_index = [0] * len(sentences)
            elif num_images == len(sentences):
                image_index = list(range(num_images))
            else:
                raise ValueError(
                    f"{len(sentences)} texts for {num_images} images: give one an image, or a list for each image."
                )
        elif any(is_sentence):
            raise ValueError(
                "text mixes sentences and lists: give a list of sentences, or a list of sentences an image."
            )
        else:
            groups, depth = [to_list(group, "text of an image") for group in groups], 2
            if len(groups) != (num_images or len(groups)):
                raise ValueError(f"{len(groups)} lists of texts for {num_images} images: give one list an image.")
            if [] in groups:
                raise ValueError("An image has no sentence: give each image one, or leave the image out.")
            sentences = [sentence for group in groups for sentence in group]
            image_index = [index for index, group in enumerate(groups) for _ in group]
    for index, sentence in enumerate(sentences):
        check_text(sentence, "text" if depth == 0 else f"text {index}")
        if is_blank(sentence):
            raise ValueError(f"The text {quote(sentence)} is blank, it has no words: there is nothing to look for.")
    return [str(sentence) for sentence in sentences], image_index, depth


def arrange_by_sentence(values, depth: int, sentences: list[str], image_index: list[int], name: str) -> list:
    """
    Bring values that are nested as the text is into one list, an entry for each sentence.

    Args:
        values: nested as `text` is; what an entry looks like is not looked at.
        depth (`int`), sentences (`list[str]`), image_index (`list[int]`): see `arrange_sentences`.
        name (`str`): of the argument, for messages.

    Raises:
        ValueError: if they are nested otherwise.
    """
    if depth == 0:
        return [values]
    values = to_list(values, name)
    if depth == 2:
        groups = [to_list(group, f"{name} of an image") for group in values]
        counts = [image_index.count(index) for index in range(image_index[-1] + 1)]
        given = [len(group) for group in groups]
        if given != counts:
            raise ValueError(f"{name} must be nested as text is: {counts} sentences an image, got {given}.")
        values = [value for group in groups for value in group]
    if len(values) != len(sentences):
        raise ValueError(f"{len(values)} entries of {name} for {len(sentences)} sentences: give one a sentence.")
    return values


def find_phrases(sentence: str, phrases) -> list[tuple[int, int]]:
    """
    Find phrases (strings, or pairs of `int`, which are checked) in their sentence, as (start, end) characters.

    Raises:
        ValueError: if a phrase is blank or not in the sentence, a span is empty or leaves it, or phrases together have
            more than `MAX_CHARACTERS` characters.

    Example:

    ```python
    >>> from modeling_reftr.processing_reftr import find_phrases

    >>> find_phrases("A dog beside a dog", ["a dog", "a dog"])
    [(0, 5), (13, 18)]

    ```"""
    if isinstance(phrases, str):
        raise ValueError(f"phrases={quote(phrases)}: give a list of phrases for each sentence.")
    folded = None
    # folded phrase -> where its next search begins, and whether whole words may still be found there
    spans, searches, length = [], {}, 0
    for phrase in to_list(phrases, f"phrases of {quote(sentence)}"):
        if isinstance(phrase, str):
            if folded is None:  # spans do without
                folded, starts = fold_case(sentence)
                marked, places = mark_words(folded)
            wanted, _ = fold_case(check_text(phrase, "A phrase").strip())
            if is_blank(wanted):
                raise ValueError(f"A phrase of {quote(sentence)} is blank.")
            begin, may_be_words = searches.get(wanted, (0, True))
            place = find_words(marked, places, wanted, begin) if may_be_words else None
            may_be_words = place is not None
            place = find_letters(folded, wanted, starts, begin) if place is None else place
            if place is None:
                times = "" if begin == 0 else " once more"
                raise ValueError(f"The phrase {quote(phrase)} is not{times} in its sentence {quote(sentence)}.")
            searches[wanted] = place + len(wanted), may_be_words
            start, end = starts[place], starts[place + len(wanted)]
        else:
            start, end = to_span(phrase, sentence)
            if not 0 <= start < end <= len(sentence) or is_blank(sentence[start:end]):
                raise ValueError(
                    f"The span ({start}, {end}) is no part of {quote(sentence)}, which has {len(sentence)} characters."
                )
        length += end - start
        if length > MAX_CHARACTERS:
            raise ValueError(
                f"The phrases of {quote(sentence)} have more than {MAX_CHARACTERS:,} characters together: ask for "
                "fewer of them at once."
            )
        spans.append((start, end))
    return spans


def to_span(phrase, sentence: str) -> tuple[int, int]:
    """Return a pair of `int`. Raises ValueError if it is something else."""
    try:
        start, end = (operator.index(place) for place in to_list(phrase, "phrase"))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The phrase {quote(phrase)} of {quote(sentence)} must be a str or a pair of int, (start, end) "
            "characters; phrases of one sentence are a list of them."
        ) from error
    return start, end


def fold_case(text: str) -> tuple[str, dict[int, int]]:
    """
    Return a text without difference of case, and the character of the text that each of its own begins: a letter may
    become several (the capital I with a dot, sharp s, ligatures), and only whole letters can be mapped back.

    Example:

    ```python
    >>> from modeling_reftr.processing_reftr import fold_case

    >>> fold_case("Maß")
    ('mass', {0: 0, 1: 1, 2: 2, 4: 3})

    ```"""
    pieces = [character.casefold() for character in text]
    starts, length = {}, 0
    for index, piece in enumerate(pieces):
        starts[length] = index
        length += len(piece)
    starts[length] = len(text)
    return "".join(pieces), starts


def mark_words(text: str) -> tuple[str, list[int]]:
    """
    Return a text with `WORD_START` wherever the character before is not part of a word, and `WORD_END` wherever the
    one behind is not; and for each of its indices, its end included, where that is in the marked text, marks included.
    A search for marked words finds whole words alone, in one step however often they are there as parts of others.

    Example:

    ```python
    >>> from modeling_reftr.processing_reftr import WORD_END, WORD_START, mark_words

    >>> marked, places = mark_words("up, a")
    >>> marked.replace(WORD_START, "[").replace(WORD_END, "]"), places
    ('[up],][ [a]', [0, 2, 3, 5, 8, 10])

    ```"""
    pieces, places, length, is_inside = [], [], 0, False
    for index, character in enumerate(text):
        was_inside, is_inside = is_inside, is_word(character)
        end = WORD_END if index > 0 and not is_inside else ""
        pieces += end, "" if was_inside else WORD_START, character
        places.append(length)
        length += len(end) + (not was_inside) + 1
    return "".join([*pieces, WORD_END]), [*places, length]


def find_words(marked: str, places: list[int], wanted: str, begin: int) -> int | None:
    """
    Return the first index from `begin` on where `wanted` stands in a text as whole words, None where it does not. The
    text is given by what `mark_words` returns for it.
    """
    place = marked.find(mark_words(wanted)[0], places[begin])
    return None if place < 0 else bisect.bisect_right(places, place) - 1


def find_letters(text: str, wanted: str, starts, begin: int) -> int | None:
    """Return the first index from `begin` on where `wanted` stands in `text`, from one of `starts` to another."""
    found = (place for place in find_all(text, wanted, begin) if place in starts and place + len(wanted) in starts)
    return next(found, None)


def find_all(text: str, wanted: str, begin: int) -> Iterator[int]:
    """
    Yield all indices from `begin` on where `wanted` stands in `text`, in time linear in the text. Where it stands
    twice at a distance of at most half its length, it repeats itself at that distance, and so only the characters of
    one more repetition are compared to find it there again.

    Example:

    ```python
    >>> from modeling_reftr.processing_reftr import find_all

    >>> list(find_all("banananas", "ana", 0))
    [1, 3, 5]

    ```"""
    place, distance = text.find(wanted, begin), 0
    while place >= 0:
        yield place
        end = place + len(wanted)
        if distance and text[end : end + distance] == text[end - distance : end]:
            place += distance
            continue
        following = text.find(wanted, place + 1)
        if 0 < following - place <= len(wanted) // 2:
            distance = following - place
        place = following


def is_word(character: str) -> bool:
    """Return whether a character is part of a word: a letter, a digit, an underscore, or a mark on one of them."""
    return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")


def is_one_target(value, name: str) -> bool:
    """
    Return whether the boxes or masks of a sentence with one phrase are the box (4,) or mask (height, width) itself,
    and not a list of it. The number of dimensions decides; a run-length encoding or a PIL image is a mask.

    Raises:
        ValueError: if it is neither.
    """
    if name == "masks" and isinstance(value, (dict, Image.Image)):
        return True
    values = to_list(value, name)
    return len(values) > 0 and nesting_depth(values) == {"boxes": 1, "masks": 2}[name]


def to_mask_array(mask, sentence: str) -> np.ndarray:
    """
    Return a mask (array, tensor, PIL image, or rows in any sequence) as an array.

    Raises:
        ValueError: if it is no rows of one length.
    """
    if isinstance(mask, torch.Tensor):
        return mask.detach().cpu().numpy()
    if is_sequence(mask) and not (isinstance(mask, np.ndarray) and mask.dtype != object):
        mask = [
            to_list(row, f"a row of a mask of {quote(sentence)}")
            for row in to_list(mask, f"a mask of {quote(sentence)}")
        ]
        if len({len(row) for row in mask}) > 1:
            raise ValueError(f"The rows of a mask of {quote(sentence)} are not of one length.")
        if any(is_sequence(value) for row in mask for value in row):  # NumPy would unfold it
            raise ValueError(f"A row of a mask of {quote(sentence)} holds lists; give numbers or booleans.")
    return np.asarray(mask)


def to_masks(masks, height: int, width: int, sentence: str) -> np.ndarray:
    """
    Stack masks (arrays, PIL images or COCO's run-length encodings) to (phrases, height, width), bool.

    Raises:
        ValueError: if a mask does not have the size of its image, or is a PIL image of a format that is not accepted.
    """
    arrays = np.zeros((len(masks), height, width), dtype=bool)
    for index, mask in enumerate(masks):
        mask = open_undecoded(mask) if is_undecoded(mask) else mask
        if isinstance(mask, Image.Image):
            check_picture(mask, f"A mask of {quote(sentence)}")  # before NumPy decodes it
        mask = mask if isinstance(mask, dict) else to_mask_array(mask, sentence)
        if isinstance(mask, dict):
            lengths, size = to_run_lengths(mask)
        else:
            size = mask.shape
        if size != (height, width):
            raise ValueError(
                f"A mask of {quote(sentence)} has the size {quote(size)}, its picture has "
                f"{(height, width)} (height, width)."
            )
        arrays[index] = fill_mask(lengths, *size) if isinstance(mask, dict) else mask != 0
    return arrays


def to_label_boxes(boxes, height: int, width: int, sentence: str) -> torch.Tensor:
    """
    Return boxes_cxcywh in 0..1 of the image, (phrases, 4), of boxes_xyxy in pixels, (phrases, 4). A box may pass the
    image's edge by a pixel (annotations round), and is cut there.

    Raises:
        ValueError: if a box is empty, inverted, not a number or outside its picture.

    Example:

    ```python
    >>> from modeling_reftr.processing_reftr import to_label_boxes

    >>> to_label_boxes([[160, 0, 480, 480]], height=480, width=640, sentence="the bus")
    tensor([[0.5000, 0.5000, 0.5000, 1.0000]])

    ```"""
    labels = []
    for box in boxes:
        try:
            box = [float(side) for side in to_list(box, "box")]
            x0, y0, x1, y1 = box
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"The box {quote(box)} of {quote(sentence)} must be four numbers, (x0, y0, x1, y1) in pixels; give "
                "one box for each phrase."
            ) from error
        if not (x0 < x1 and y0 < y1 and math.isfinite(sum(box))):
            raise ValueError(f"The box {box} of {quote(sentence)} is not (x0, y0, x1, y1) with x0 < x1 and y0 < y1.")
        left, top, right, bottom = (
            max(x0, 0) / width,
            max(y0, 0) / height,
            min(x1, width) / width,
            min(y1, height) / height,
        )
        passes = min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1
        if passes or left >= right or top >= bottom:
            raise ValueError(f"The box {box} of {quote(sentence)} leaves its picture of {width} x {height} pixels.")
        labels.append([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
    return torch.tensor(labels, dtype=torch.float32).reshape(-1, 4)


RefTRProcessor.register_for_auto_class()

__all__ = ["RefTRProcessor"]
