"""Train a small tokenizer on the sentences of a dataset. Nothing here is a collective."""

from collections import Counter
from collections.abc import Iterable, Iterator

import datasets
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from training_reftr.streams import StreamedRows


def train_tokenizer(sentences: Iterable[str], max_length: int, vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """
    Train a lower-casing WordPiece tokenizer with BERT's special tokens.

    Its vocabulary has the characters of the sentences and their most frequent words. The same sentences always give
    the same tokenizer, on every process; the trainer of the tokenizers library breaks ties at random.

    Args:
        sentences (`Iterable[str]`): the training texts.
        max_length (`int`): the longest input of the model in tokens.
        vocab_size (`int`, *optional*, defaults to 4000): the number of tokens, unless there are more characters.
    """
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(
        word
        for sentence in sentences
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(sentence))
    )
    characters = sorted({character for word in counts for character in word})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters, *(f"##{character}" for character in characters)]
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    pieces += words[: max(0, vocab_size - len(pieces))]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def all_sentences(rows: datasets.Dataset | StreamedRows) -> Iterator[str]:
    """Yield every sentence of some rows, without reading their images."""
    for sentences in rows.annotations() if isinstance(rows, StreamedRows) else rows.select_columns("sentences"):
        for sentence in sentences["sentences"]:
            yield sentence["text"]
