# Copyright 2026 The RefTR for transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Processor for RefTR: images, text and phrases to tensors, and outputs back to boxes and masks."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessorMixin
from transformers.utils import ModelOutput, TensorType, logging

from .configuration_reftr import AUTO_MAP, check_config_file
from .decoding_reftr import without_decoding
from .image_processing_reftr import RefTRImageProcessor
from .inputs_reftr import check_setting, take_renamed_argument, to_list, warn_about_joined_expressions
from .labels_reftr import group_targets, slots_of_targets, stack_masks, to_label_boxes
from .loading_reftr import CONFIG_FILES, IMAGE_PROCESSOR_FILES, TOKENIZER_FILES, naming_files
from .locating_reftr import check_source
from .phrases_reftr import find_phrases
from .presence_reftr import rank_queries
from .quoting_reftr import quote
from .rle_reftr import to_coco_rle
from .text_reftr import check_text, is_blank
from .unknown_words_reftr import find_unknown_words, spells_unknown_words, warn_about_unknown_words


logger = logging.get_logger(__name__)

LENGTHS = ("max_expression_length", "max_caption_length", "max_phrase_length", "max_phrases")
# The (start, end) characters of a sentence's phrases; None: its one phrase is the entire sentence.
Spans = list[tuple[int, int]] | None


class RefTRProcessor(ProcessorMixin):
    r"""
    Construct a RefTR processor, which combines [`RefTRImageProcessor`] and a fast tokenizer.

    Args:
        image_processor ([`RefTRImageProcessor`]): the image processor.
        tokenizer (`PreTrainedTokenizerFast`): the tokenizer.
        max_expression_length (`int`, *optional*, defaults to 40):
            The maximum length of a single expression in tokens, as published for the RefCOCO family, ReferIt and
            Visual Genome.
        max_caption_length, max_phrase_length, max_phrases (`int`, *optional*, default to 90, 22 and 16):
            The maximum lengths of a caption and of a phrase in tokens, as published for Flickr30k Entities, and the
            number of phrase slots that `padding="max_length"` pads to.

    Every sentence is encoded as published, whatever else is in the batch. A *single expression*, a sentence without
    phrases or with the entire text as its only phrase, is lower-cased by `str.lower` and truncated to
    `max_expression_length` tokens. A *caption*, a sentence with other phrases, keeps its case, and so do its phrases;
    it is truncated to `max_caption_length` tokens.

    The processor is thread-safe: a call changes neither the processor nor its tokenizer, and concurrent calls return
    what they return alone. Truncation and padding are done here and never by the tokenizer, whose own settings of
    them, as from a `tokenizer.json`, are disabled when the processor is constructed.

    Example:

    ```python
    >>> from PIL import Image
    >>> from tokenizers import Tokenizer, models, pre_tokenizers, processors
    >>> from transformers import PreTrainedTokenizerFast
    >>> from modeling_reftr import RefTRImageProcessor, RefTRProcessor

    >>> vocab = {word: index for index, word in enumerate("[PAD] [CLS] [SEP] [UNK] the red blue cup".split())}
    >>> tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]")

    >>> processor = RefTRProcessor(RefTRImageProcessor(), tokenizer)
    >>> image = Image.new("RGB", (100, 80))
    >>> inputs = processor(image, ["the red cup", "the cup"], boxes=[[10, 20, 30, 40], [50, 20, 90, 60]])
    >>> inputs["input_ids"].tolist()
    [[1, 4, 5, 7, 2], [1, 4, 7, 2, 0]]
    >>> inputs["image_index"].tolist()
    [0, 0]

    ```"""

    def __init__(
        self,
        image_processor: RefTRImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        max_expression_length: int = 40,
        max_caption_length: int = 90,
        max_phrase_length: int = 22,
        max_phrases: int = 16,
    ) -> None:
        lengths = (max_expression_length, max_caption_length, max_phrase_length, max_phrases)
        for name, length in zip(LENGTHS, lengths, strict=True):
            if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length < 2**31:
                raise ValueError(f"{name}={quote(length, 40)} must be an integer of at least 1.")
        self.max_expression_length = max_expression_length
        self.max_caption_length = max_caption_length
        self.max_phrase_length = max_phrase_length
        self.max_phrases = max_phrases
        if type(tokenizer).__module__.startswith("transformers."):
            # The tokenizer's file may name remote code. It was not loaded, and must not be saved again.
            tokenizer.init_kwargs.pop("auto_map", None)
        disable_truncation_and_padding(tokenizer)
        self.has_spelled_words = spells_unknown_words(tokenizer)
        super().__init__(image_processor, tokenizer)
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "RefTRProcessor | tuple[RefTRProcessor, dict]":
        """
        Load a processor, see `ProcessorMixin.from_pretrained`.

        Raises:
            ValueError: if a file is damaged; the message names it.
            OSError: if there is no processor.
        """
        check_source(pretrained_model_name_or_path, kwargs)
        check_config_file(pretrained_model_name_or_path, kwargs)
        names = TOKENIZER_FILES + IMAGE_PROCESSOR_FILES + CONFIG_FILES
        with naming_files(pretrained_model_name_or_path, names, kwargs):
            loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            (loaded[0] if isinstance(loaded, tuple) else loaded).validate_components()
        return loaded

    def validate_components(self) -> None:
        """
        Process an image and a text, so that invalid settings of a file, which no library validates, fail early.

        Raises:
            Exception: any error of a library; [`RefTRProcessor.from_pretrained`] adds the names of the files.
        """
        if self.tokenizer.num_special_tokens_to_add() < 2:
            raise ValueError("the tokenizer must add a token before and after each text, such as [CLS] and [SEP]")
        encoded, _ = self.tokenize(["a"], [min(self.max_expression_length, self.max_phrase_length)])
        self.pad_tokens([ids for ids, _ in encoded], self.max_expression_length)
        self.tokenizer.batch_decode([ids for ids, _ in encoded])
        self.image_processor(Image.new("RGB", (8, 8)))

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | list[list[str]] | None = None,
        phrases: Sequence | None = None,
        boxes: Sequence | None = None,
        masks: Sequence | None = None,
        original_sizes: Sequence[tuple[int, int] | None] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Encode images and the sentences about them.

        The nesting of `text` and the number of images alone determine which sentence refers to which image. Any list
        may be a tuple, an array or another sequence.

        Args:
            images (*optional*):
                An image (PIL, array, tensor, path, URL) or a list of them. If absent, only text is encoded, for images
                whose features were computed before ([`RefTRForVisualGrounding.get_image_features`]).
            text (`str`, `list[str]` or `list[list[str]]`):
                A `str` is one sentence about the one image. A `list[str]` holds all sentences about the one image, or
                one sentence per image if there are several; without `images` they refer to one image. A
                `list[list[str]]` holds the sentences of each image.
            phrases (*optional*):
                A list of phrases for each sentence, nested like `text`: a list of phrases for a `str`, a list of such
                lists for a `list[str]`, and so on. A phrase is a `str`, which is found in its sentence (regardless of
                case, whole words first, a repeated one at its next occurrence), or a pair of `int`, its (start, end)
                characters. None, for all or for one sentence: its one phrase is the entire sentence.
            boxes (*optional*):
                The boxes of the phrases of each sentence, (phrases, 4), as (x0, y0, x1, y1) in pixels of the upright
                image; (4,) or (1, 4) for a sentence without `phrases`. Nested like `phrases`. In place of its box, a
                phrase may have a list of boxes, if it refers to several objects, or an empty list, if it refers to
                nothing in the image. None for a sentence without boxes. Returned in `labels`.
            masks (*optional*):
                The masks of the phrases of each sentence, arrays (height, width) of the image's size or COCO RLE; one
                mask or a list of it for a sentence without `phrases`. Nested like `boxes`, with as many masks as boxes
                for each phrase. None for a sentence without masks. Returned in `labels`.
            original_sizes (list of `(height, width)`, *optional*):
                The size that each image was annotated at, which decides whether its EXIF orientation is followed.
            padding (`"longest"` or `"max_length"`, *optional*, defaults to `"longest"`):
                Pad text to the longest of the batch, or to the published fixed lengths. (A single expression in a
                batch with phrases is its own phrase; if it is longer than `max_phrase_length`, phrases are padded to
                `max_expression_length`.)
            return_tensors (`str`, *optional*, defaults to `"pt"`): see `BatchFeature`.
            kwargs: settings of the image processor for this call, and `max_length`, the maximum length of a sentence
                in tokens instead of the processor's own. Both are also accepted as `images_kwargs` and `text_kwargs`.

        Returns:
            `BatchFeature`: `pixel_values`, `pixel_mask`, `input_ids`, `attention_mask`, `image_index`; with phrases
            also `phrase_input_ids`, `phrase_attention_mask`, `phrase_spans`, `phrase_index`; with boxes or masks also
            `labels`. See [`RefTRForVisualGrounding.forward`] for their shapes.

        Raises:
            ValueError: if counts or nesting do not match, a text is blank or rejected by `check_text`, a phrase is not
                in its sentence, or a box is empty, inverted, not finite or outside its image.
            OSError: if a file is missing or is not an image.
        """
        original_sizes = take_renamed_argument(kwargs, "annotated_sizes", "original_sizes", original_sizes)
        for name, value in kwargs.items():
            check_setting(value, name)
        kwargs = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        image_kwargs, text_kwargs = kwargs["images_kwargs"], kwargs["text_kwargs"]
        return_tensors = image_kwargs.pop("return_tensors", "pt")
        padding = text_kwargs.pop("padding", None) or "longest"
        if padding not in ("longest", "max_length", True):
            raise ValueError(f"padding={quote(padding)} must be 'longest' or 'max_length'.")
        if text is None:
            raise ValueError("There is no text: give an expression to locate.")
        data, sizes = {}, None
        if images is not None:
            data, sizes = self.image_processor.preprocess_with_sizes(
                images, original_sizes, return_tensors=return_tensors, **image_kwargs
            )
        elif boxes is not None or masks is not None:
            raise ValueError("Boxes and masks are in pixels of an image: give images with them.")
        sentences, image_index, depth = flatten_sentences(text, None if sizes is None else len(sizes))
        spans = [None] * len(sentences)
        if phrases is not None:
            phrases = flatten_by_sentence(phrases, depth, sentences, image_index, "phrases")
            spans = [
                None if of_sentence is None else find_phrases(sentence, of_sentence)
                for sentence, of_sentence in zip(sentences, phrases, strict=True)
            ]
        targets = {
            name: flatten_by_sentence(values, depth, sentences, image_index, name)
            for name, values in (("boxes", boxes), ("masks", without_decoding(masks)))
            if values is not None
        }
        if not targets:
            warn_about_joined_expressions(
                sentence for sentence, sentence_spans in zip(sentences, spans, strict=True) if sentence_spans is None
            )
        data = {**data, "image_index": image_index}
        data |= self.encode_text(
            sentences,
            spans,
            phrases is not None,
            padding == "max_length",
            text_kwargs.pop("max_length", None),
            warns=not targets,
        )
        if targets:
            padded_size = tuple(np.shape(data["pixel_values"][0])[-2:])
            sizes = [sizes[index] for index in image_index]
            data["labels"] = self.encode_labels(sentences, spans, targets, sizes, padded_size, image_kwargs)
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["labels"])

    @property
    def model_input_names(self) -> list[str]:
        """The names that a call without phrases returns."""
        return [*self.image_processor.model_input_names, "input_ids", "attention_mask", "image_index"]

    def encode_text(
        self,
        sentences: list[str],
        spans: list[Spans],
        has_phrases: bool,
        fixed: bool,
        max_length: int | None = None,
        warns: bool = False,
    ) -> dict[str, np.ndarray]:
        """
        Encode and pad sentences and their phrases.

        Args:
            sentences (`list[str]`), spans (`list`): see `encode_sentences`.
            has_phrases (`bool`): whether to encode phrases.
            fixed (`bool`): whether to pad to the published lengths.
            max_length (`int`, *optional*), warns (`bool`, *optional*): see `encode_sentences`.

        Returns:
            `dict[str, np.ndarray]`: `input_ids` and `attention_mask` (S, L), and with phrases what `encode_phrases`
            returns.
        """
        encoded = self.encode_sentences(sentences, spans, max_length, warns)
        widths = [len(ids) for ids, _ in encoded]
        if fixed:
            longest = self.max_caption_length if has_phrases else self.max_expression_length
            widths.append(min(max_length or longest, self.tokenizer.model_max_length))
        data = self.pad_tokens([ids for ids, _ in encoded], max(widths))
        return data | self.encode_phrases(sentences, spans, encoded, fixed) if has_phrases else data

    def encode_sentences(
        self, sentences: list[str], spans: list[Spans], max_length: int | None = None, warns: bool = False
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """
        Encode each sentence as published: a single expression in lower case, a caption as it is.

        Args:
            sentences (`list[str]`): the sentences, S entries.
            spans (`list`): the (start, end) characters of each sentence's phrases; None: the entire sentence.
            max_length (`int`, *optional*): the maximum length in tokens, instead of the processor's own.
            warns (`bool`, *optional*, defaults to `False`): whether to warn about words unknown to the tokenizer.

        Returns:
            `list[tuple]`: for each sentence its token ids, and the (start, end) characters of each token.

        Raises:
            ValueError: if a sentence has no words, or `max_length` leaves no room for any.
        """
        texts, limits = [], []
        for sentence, sentence_spans in zip(sentences, spans, strict=True):
            is_expression = is_single_expression(sentence, sentence_spans)
            texts.append(sentence.lower() if is_expression else sentence)
            limits.append(max_length or (self.max_expression_length if is_expression else self.max_caption_length))
        encoded, cuts = self.tokenize(texts, limits)
        for sentence, (ids, _) in zip(sentences, encoded, strict=True):
            if len(ids) <= 2:
                raise ValueError(f"The text {quote(sentence)} has no words: give an expression to locate.")
        if cuts:
            logger.warning(
                f"{len(cuts)} of {len(sentences)} texts are longer than {' or '.join(map(str, sorted(set(cuts))))} "
                "tokens and were truncated; phrases past the end are masked and get no answer."
            )
        if warns:
            words = dict.fromkeys(
                word
                for text, tokens in zip(texts, encoded, strict=True)
                for word in find_unknown_words(text, *tokens, self.tokenizer, self.has_spelled_words)
            )
            if words:
                warn_about_unknown_words(tuple(words))
        return encoded

    def tokenize(
        self, texts: list[str], limits: list[int]
    ) -> tuple[list[tuple[list[int], list[tuple[int, int]]]], list[int]]:
        """
        Tokenize texts and truncate each to its limit as the tokenizer would, keeping its special tokens.

        Args:
            texts (`list[str]`): the texts, as the tokenizer receives them.
            limits (`list[int]`): the maximum length of each in tokens, including special tokens.

        Returns:
            `tuple`: token ids and (start, end) characters of each text, and the limit of each truncated text.

        Raises:
            ValueError: if a limit leaves no room besides the special tokens.
        """
        # Many texts of a batch are equal: empty slots, and the phrases that people use.
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        # A tokenizer.json can lack the very token that a text requires.
        with naming_files(self.tokenizer.name_or_path, ["tokenizer.json", "tokenizer_config.json"], {}):
            encodings = self.tokenizer(
                list(row_of), return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
            )
        names = ("input_ids", "offset_mapping", "special_tokens_mask")
        encoded, cuts = [], []
        for text, limit in zip(texts, limits, strict=True):
            ids, offsets, is_special = (encodings[name][row_of[text]] for name in names)
            limit = min(limit, self.tokenizer.model_max_length)
            if len(ids) > limit:
                # Keep what the tokenizer adds before and after a text; a special token typed in the text is text.
                first = is_special.index(0)
                last = len(ids) - is_special[::-1].index(0)
                room = limit - first - (len(ids) - last)
                if room < 1:
                    raise ValueError(
                        f"A length of {limit} tokens leaves no room for text besides the {len(ids) - last + first} "
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
        """Pad token ids on the right to shape (len(token_ids), width), and return them with their mask."""
        input_ids = np.full((len(token_ids), width), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for index, ids in enumerate(token_ids):
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
        return {f"{prefix}input_ids": input_ids, f"{prefix}attention_mask": attention_mask}

    def encode_phrases(
        self,
        sentences: list[str],
        spans: list[Spans],
        encoded: list[tuple[list[int], list[tuple[int, int]]]],
        fixed: bool,
    ) -> dict[str, np.ndarray]:
        """
        Encode each phrase by itself, and find its tokens in the sentence.

        Padding slots, and phrases past the end of their truncated sentence, hold an empty phrase with the span [0, 1).

        Args:
            sentences (`list[str]`), spans (`list`): see `encode_sentences`.
            encoded (`list[tuple]`): the result of `encode_sentences`.
            fixed (`bool`): whether to pad to the published lengths.

        Returns:
            `dict[str, np.ndarray]`: `phrase_input_ids` and `phrase_attention_mask` (S, P, Lp), `phrase_spans`
            (S, P, 2) and `phrase_index` (N, 2), see [`RefTRForVisualGrounding.forward`].

        Raises:
            ValueError: if there are no phrases, or more than the fixed number of slots.
        """
        num_slots = max(1 if sentence_spans is None else len(sentence_spans) for sentence_spans in spans)
        if num_slots == 0:
            raise ValueError("No sentence has a phrase: give phrases to locate, or omit the argument.")
        if fixed and num_slots > self.max_phrases:
            raise ValueError(
                f"A sentence has {num_slots} phrases, and padding='max_length' allows max_phrases={self.max_phrases}."
            )
        num_slots = self.max_phrases if fixed else num_slots
        phrase_spans = np.zeros((len(sentences), num_slots, 2), dtype=np.int64)
        phrase_spans[..., 1] = 1
        expressions, texts = {}, [""] * (len(sentences) * num_slots)
        for index, (sentence, sentence_spans) in enumerate(zip(sentences, spans, strict=True)):
            ids, offsets = encoded[index]
            if is_single_expression(sentence, sentence_spans):
                # As without phrases: the sentence's own tokens, and as context all but the first and the last.
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
            logger.warning(f"{len(cuts)} phrases are longer than {cuts[0]} tokens and were truncated.")
        token_ids = [expressions.get(number, ids) for number, (ids, _) in enumerate(phrases)]
        # If there are no real phrases, encode the first slot, as the text backbone requires at least one text.
        phrase_index = [divmod(number, num_slots) for number, ids in enumerate(token_ids) if len(ids) > 2] or [(0, 0)]
        width = max(map(len, token_ids))
        if fixed:
            width = (
                self.max_phrase_length if width <= self.max_phrase_length else max(width, self.max_expression_length)
            )
        data = self.pad_tokens(token_ids, width, prefix="phrase_")
        data = {name: values.reshape(len(sentences), num_slots, width) for name, values in data.items()}
        return {**data, "phrase_spans": phrase_spans, "phrase_index": np.array(phrase_index)}

    def encode_labels(
        self,
        sentences: list[str],
        spans: list[Spans],
        targets: dict[str, list],
        sizes: list[tuple[int, int]],
        padded_size: tuple[int, int],
        image_kwargs: dict[str, Any],
    ) -> list[dict[str, torch.Tensor]]:
        """
        Convert boxes and masks to the labels of the model.

        Args:
            sentences (`list[str]`), spans (`list`): see `encode_sentences`.
            targets (`dict[str, list]`): the `boxes` and `masks` of each sentence, None where it has none.
            sizes (list of `(height, width)`): the size of each sentence's image.
            padded_size (`(height, width)`): the padded size of the batch.
            image_kwargs (`dict`): settings of the image processor for this call.

        Returns:
            `list[dict[str, torch.Tensor]]`: the labels of each sentence, see [`RefTRForVisualGrounding.forward`].

        Raises:
            ValueError: if the targets do not match the phrases, or one is invalid.
        """
        labels = [{} for _ in sentences]
        for index, (sentence, sentence_spans, size) in enumerate(zip(sentences, spans, sizes, strict=True)):
            num_phrases = 1 if sentence_spans is None else len(sentence_spans)
            counts = {}
            for name, values in targets.items():
                value = values[index]
                if value is None:
                    continue
                of_phrases = group_targets(value, name, num_phrases, sentence_spans is None, sentence)
                counts[name] = [len(of_phrase) for of_phrase in of_phrases]
                flat = [target for of_phrase in of_phrases for target in of_phrase]
                if name == "boxes":
                    labels[index]["boxes"] = to_label_boxes(flat, *size, sentence)
                else:
                    masks = stack_masks(flat, *size, sentence)
                    labels[index]["masks"] = self.image_processor.resize_masks(
                        masks, padded_size, image_kwargs.get("size"), image_kwargs.get("do_resize")
                    )
            labels[index] |= slots_of_targets(counts, sentence)
        return labels

    def post_process_grounded_object_detection(
        self,
        outputs: ModelOutput,
        input_ids: TensorType | None = None,
        threshold: float | None = None,
        text_threshold: float = 0.0,
        target_sizes: TensorType | Sequence[tuple[int, int]] | None = None,
        text_labels: list[list[str]] | None = None,
        mask_threshold: float = 0.5,
    ) -> list[dict[str, Any]]:
        """
        Convert outputs to boxes (and masks) for each image, in the format of
        [`GroundingDinoProcessor.post_process_grounded_object_detection`].

        Args:
            outputs ([`RefTRVisualGroundingOutput`]): outputs of the model.
            input_ids (`torch.LongTensor` of shape `(S, L)`, *optional*):
                The token ids of the sentences, by default those of the outputs.
            threshold (`float`, *optional*): the score above which boxes are kept, see `post_process_grounding`.
            text_threshold (`float`, *optional*): unused, for code written for Grounding DINO.
            target_sizes (`torch.Tensor` of shape `(I, 2)` or list of `(height, width)`, *optional*):
                The original size of each image, in the order of `pixel_values`. By default boxes stay in 0..1.
            text_labels (`list[list[str]]`, *optional*):
                The texts asked about each image, which `text_labels` of the result are taken from. By default they are
                decoded from the token ids.
            mask_threshold (`float`, *optional*, defaults to 0.5):
                The probability above which a pixel belongs to the mask.

        Returns:
            `list[dict]`: for each image
                - **scores** (`torch.Tensor` of shape `(boxes,)`): presence; 1.0 from a model that does not predict it.
                - **boxes** (`torch.Tensor` of shape `(boxes, 4)`): boxes as (x0, y0, x1, y1).
                - **labels** (`torch.Tensor` of shape `(boxes,)`): the index of the box's text among those asked about
                  the image. With `phrases`, each sentence counts for the `P` phrase slots of the batch.
                - **text_labels** (`list[str]`): the text of each box.
                - **masks** (`torch.Tensor` of shape `(boxes, 1, height, width)`, bool): only from a model with
                  `config.predict_masks`.

        Raises:
            ValueError: if there is not one size or one list of texts per image, or a list is too short.
        """
        if input_ids is not None:
            outputs = dataclasses.replace(outputs, input_ids=input_ids)
        sentences = self.post_process_grounding(outputs, target_sizes, threshold)
        if outputs.pred_masks is not None:
            queries = rank_queries(outputs, threshold)
            masks = self.image_processor.post_process_masks(outputs, target_sizes, mask_threshold, queries=queries)
        num_images, num_slots = len(outputs.pixel_mask), outputs.pred_boxes.shape[1]
        if text_labels is not None and len(text_labels) != num_images:
            raise ValueError(f"{len(text_labels)} text_labels for {num_images} images: give one list per image.")
        image_index = range(num_images) if outputs.image_index is None else outputs.image_index.tolist()
        sentences_of_images = [[] for _ in range(num_images)]
        for index, image in enumerate(image_index):
            sentences_of_images[image].append(index)
        results = []
        for image, indices in enumerate(sentences_of_images):
            found = [sentences[index] for index in indices]
            labels = [
                number * num_slots + slot
                for number, sentence in enumerate(found)
                for slot in sentence["phrase_indices"]
            ]
            texts = [phrase for sentence in found for phrase in sentence["phrases"]]
            if text_labels is not None:
                texts = select_text_labels(text_labels[image], labels)
            boxes = torch.cat([outputs.pred_boxes.new_zeros(0, 4), *(sentence["boxes"] for sentence in found)])
            result = {
                "scores": torch.cat([boxes.new_zeros(0), *(sentence["scores"] for sentence in found)]),
                "boxes": boxes,
                "text_labels": texts,
                "labels": torch.tensor(labels, dtype=torch.long, device=boxes.device),
            }
            if outputs.pred_masks is not None:
                empty = boxes.new_zeros(0, *self.mask_size(outputs, image, target_sizes), dtype=torch.bool)
                result["masks"] = torch.cat([empty, *(masks[index] for index in indices)])[:, None]
            results.append(result)
        return results

    @staticmethod
    def mask_size(
        outputs: ModelOutput, image: int, target_sizes: TensorType | Sequence[tuple[int, int]] | None
    ) -> tuple[int, int]:
        """Return the (height, width) of an image's masks, see [`RefTRImageProcessor.post_process_masks`]."""
        if target_sizes is not None:
            return tuple(int(side) for side in target_sizes[image])
        pixel_mask = outputs.pixel_mask[image]
        return int(pixel_mask.amax(1).sum()), int(pixel_mask.amax(0).sum())

    def post_process_grounding(
        self,
        outputs: ModelOutput,
        target_sizes: TensorType | Sequence[tuple[int, int]] | None = None,
        threshold: float | None = None,
    ) -> list[dict[str, Any]]:
        """
        Convert outputs to boxes in pixels for each sentence, with the phrases that they belong to.

        Args:
            outputs ([`RefTRVisualGroundingOutput`]): outputs of the model.
            target_sizes (`torch.Tensor` of shape `(I, 2)` or list of `(height, width)`, *optional*):
                The original size of each image, in the order of `pixel_values`: one per image, however many sentences
                refer to it. By default boxes stay in 0..1.
            threshold (`float`, *optional*):
                The score above which boxes are kept, by default `config.presence_threshold` of the model. A model that
                does not predict presence answers each phrase with one box, whose score is 1.0.

        Returns:
            `list[dict]`: for each sentence
                - **boxes** (`torch.Tensor` of shape `(boxes, 4)`): xyxy in pixels, in the order of the phrases, those
                  of a phrase from the highest score to the lowest.
                - **scores** (`torch.Tensor` of shape `(boxes,)`): the presence of each box.
                - **phrases** (`list[str]`): the phrase of each box, as decoded by the tokenizer.
                - **phrase_indices** (`list[int]`): its slot: padding, phrases past the end of a truncated sentence
                  and phrases that nothing was found for are missing; phrases with several boxes are repeated.
                - **phrase_scores** (`dict[int, float]`): only from a model that predicts presence, for the slot of
                  each real phrase the highest presence, kept or not.

        Raises:
            ValueError: if there is not one size per image.
        """
        queries = rank_queries(outputs, threshold)
        boxes_xyxy = self.image_processor.scale_boxes(queries.boxes_cxcywh, outputs, target_sizes)
        token_ids = outputs.input_ids[:, None] if outputs.phrase_input_ids is None else outputs.phrase_input_ids
        # Copy the masks and tokens at once: each copy waits for the device.
        is_answer, token_ids, phrase_mask = queries.is_answer.cpu(), token_ids.cpu(), outputs.phrase_mask.cpu()
        highest = None if outputs.presence is None else queries.scores[..., 0].cpu()
        counts = is_answer.sum((1, 2)).tolist()
        boxes_of_sentences = boxes_xyxy[queries.is_answer].split(counts)
        scores_of_sentences = queries.scores[queries.is_answer].split(counts)
        results = []
        for index, (boxes, scores) in enumerate(zip(boxes_of_sentences, scores_of_sentences, strict=True)):
            slots = is_answer[index].nonzero()[:, 0]
            result = {
                "boxes": boxes,
                "scores": scores,
                "phrases": self.tokenizer.batch_decode(token_ids[index][slots], skip_special_tokens=True),
                "phrase_indices": slots.tolist(),
            }
            if highest is not None:
                real = phrase_mask[index].nonzero()[:, 0]
                result["phrase_scores"] = dict(zip(real.tolist(), highest[index][real].tolist(), strict=True))
            results.append(result)
        return results

    def post_process_referring_segmentation(
        self,
        outputs: ModelOutput,
        target_sizes: TensorType | Sequence[tuple[int, int]],
        mask_threshold: float = 0.5,
        two_step: bool = False,
        return_coco_rle: bool = False,
        threshold: float | None = None,
    ) -> list[dict[str, Any]]:
        """
        Convert outputs to boxes and masks in pixels for each sentence, with the phrases that they belong to.

        Args:
            outputs ([`RefTRVisualGroundingOutput`]): outputs of a model with `config.predict_masks`.
            target_sizes, two_step: see [`RefTRImageProcessor.post_process_masks`].
            mask_threshold (`float`, *optional*, defaults to 0.5):
                The probability above which a pixel belongs to the mask.
            return_coco_rle (`bool`, *optional*, defaults to `False`):
                Whether to return `segmentations`, COCO RLE, instead of `masks`.
            threshold (`float`, *optional*): the score above which boxes are kept, see `post_process_grounding`.

        Returns:
            `list[dict]`: for each sentence what `post_process_grounding` returns, and `masks` (`torch.Tensor` of shape
            `(boxes, height, width)`, bool), or `segmentations` (`list[dict]`, `size` and `counts` each).

        Raises:
            ValueError: if the model does not predict masks, or there is not one size per image.
        """
        results = self.post_process_grounding(outputs, target_sizes, threshold)
        masks_of_sentences = self.image_processor.post_process_masks(
            outputs, target_sizes, mask_threshold, two_step, queries=rank_queries(outputs, threshold)
        )
        for result, masks in zip(results, masks_of_sentences, strict=True):
            if return_coco_rle:
                result["segmentations"] = [to_coco_rle(mask) for mask in masks]
            else:
                result["masks"] = masks
        return results


def select_text_labels(text_labels: list[str], labels: list[int]) -> list[str]:
    """
    Return the texts of labels, see [`RefTRProcessor.post_process_grounded_object_detection`].

    Raises:
        ValueError: if there are fewer texts than labels require.
    """
    text_labels = to_list(text_labels, "text_labels of an image")
    if max(labels, default=-1) >= len(text_labels):
        raise ValueError(
            f"text_labels={quote(text_labels)} has {len(text_labels)} texts for an image with at least "
            f"{max(labels) + 1}: give the texts that were asked about the image, one per phrase."
        )
    return [text_labels[label] for label in labels]


def disable_truncation_and_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    """
    Disable truncation and padding of a fast tokenizer, which its `tokenizer.json` may enable.

    They are state of the Rust object that all threads share: once disabled, no call has to change it.
    """
    backend = tokenizer.backend_tokenizer
    lengths = {(backend.truncation or {}).get("max_length"), (backend.padding or {}).get("length")} - {None}
    if tokenizer.init_kwargs.get("max_length") in lengths:
        del tokenizer.init_kwargs["max_length"]  # the library's copy, which would be the max_length of each call
    backend.no_truncation()
    backend.no_padding()


def is_single_expression(sentence: str, spans: Spans) -> bool:
    """
    Return whether the one phrase of a sentence is the entire text.

    Args:
        sentence (`str`): the text.
        spans (list of `(start, end)`): characters of its phrases; None: the entire sentence.

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


def flatten_sentences(text: Any, num_images: int | None) -> tuple[list[str], list[int], int]:
    """
    Flatten the processor's `text` into one list of sentences.

    Args:
        text (`str`, `list[str]` or `list[list[str]]`): one sentence; sentences; or the sentences of each image.
        num_images (`int`, *optional*):
            With 1, a `list[str]` refers to the one image; with more, it holds one sentence per image. If absent, a
            `list[str]` refers to one image.

    Returns:
        `tuple`: the sentences (`list[str]`), the image of each (`list[int]`), and the nesting depth of `text` (0, 1
        or 2).

    Raises:
        ValueError: if counts do not match, a sentence is blank, or an image has none.
    """
    if isinstance(text, str):
        if num_images not in (None, 1):
            raise ValueError(f"One text for {num_images} images: give a list with one text per image.")
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
                    f"{len(sentences)} texts for {num_images} images: give one per image, or a list for each image."
                )
        elif any(is_sentence):
            raise ValueError(
                "text mixes sentences and lists: give a list of sentences, or a list of sentences for each image."
            )
        else:
            groups, depth = [to_list(group, "text of an image") for group in groups], 2
            if len(groups) != (num_images or len(groups)):
                raise ValueError(f"{len(groups)} lists of texts for {num_images} images: give one list per image.")
            if [] in groups:
                raise ValueError("An image has no sentence: give each image one, or omit the image.")
            sentences = [sentence for group in groups for sentence in group]
            image_index = [index for index, group in enumerate(groups) for _ in group]
    for index, sentence in enumerate(sentences):
        check_text(sentence, "text" if depth == 0 else f"text {index}")
        if is_blank(sentence):
            raise ValueError(f"The text {quote(sentence)} is blank: give an expression to locate.")
    return [str(sentence) for sentence in sentences], image_index, depth


def flatten_by_sentence(values: Any, depth: int, sentences: list[str], image_index: list[int], name: str) -> list:
    """
    Flatten values that are nested like the text into one list with an entry for each sentence.

    Args:
        values: values nested like `text`; entries are not examined.
        depth (`int`), sentences (`list[str]`), image_index (`list[int]`): see `flatten_sentences`.
        name (`str`): the name of the argument, for messages.

    Raises:
        ValueError: if they are nested differently.
    """
    if depth == 0:
        return [values]
    values = to_list(values, name)
    if depth == 2:
        groups = [to_list(group, f"{name} of an image") for group in values]
        counts = [image_index.count(index) for index in range(image_index[-1] + 1)]
        given = [len(group) for group in groups]
        if given != counts:
            raise ValueError(f"{name} must be nested like text, with {counts} sentences per image, got {given}.")
        values = [value for group in groups for value in group]
    if len(values) != len(sentences):
        raise ValueError(f"{len(values)} entries of {name} for {len(sentences)} sentences: give one per sentence.")
    return values


RefTRProcessor.register_for_auto_class()

__all__ = ["RefTRProcessor"]
