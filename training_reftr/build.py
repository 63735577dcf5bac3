"""Model and processor of a run. Nothing here holds a collective."""

from dataclasses import fields

import torch
from transformers import AutoTokenizer

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRImageProcessor, RefTRProcessor
from training_reftr.arguments import check_names
from training_reftr.data import all_sentences, train_tokenizer


def build_model(args, train_rows) -> tuple[RefTRForVisualGrounding, RefTRProcessor]:
    """
    Where weights come from: `init_from`, a RefTR folder or Hub id, with the fields that `args.model` changes
    (masks over a boxes-only model, for example); absent, a new model as `args.model` says, with random weights.
    Nothing is downloaded unless `init_from` or `tokenizer` names it.

    Raises:
        ValueError: if `args.model` has an unknown field, its vocabulary is smaller than the tokenizer's, or it changes
            a backbone of the loaded model.
    """
    check_names(args.model, {item.name for item in fields(RefTRConfig)}, "model")
    if args.init_from is not None:
        config = RefTRConfig.from_pretrained(args.init_from)
        model = RefTRForVisualGrounding.from_pretrained(
            args.init_from,
            config=change_config(config, args.model),
            dtype=torch.float32,
            attn_implementation=args.attn_implementation,
        )
        return model, RefTRProcessor.from_pretrained(args.init_from)

    settings = dict(args.model)
    max_length = settings.get("max_text_positions", RefTRConfig.max_text_positions)
    if args.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        tokenizer = train_tokenizer(all_sentences(train_rows), max_length)
        text_config = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        settings["text_config"] = {**text_config, **settings.get("text_config", {})}
    config = RefTRConfig(**settings)
    if config.text_config.vocab_size < len(tokenizer):
        raise ValueError(
            f"model.text_config.vocab_size={config.text_config.vocab_size} is smaller than the tokenizer's "
            f"{len(tokenizer)} tokens."
        )
    size = {"shortest_edge": args.image_size, "longest_edge": args.image_size}
    processor = RefTRProcessor(RefTRImageProcessor(size=size), tokenizer)
    return RefTRForVisualGrounding._from_config(config, attn_implementation=args.attn_implementation), processor


def change_config(config: RefTRConfig, changes: dict) -> RefTRConfig:
    """
    A loaded configuration with other values of its own fields.

    Raises:
        ValueError: if a change is about a backbone, whose weights are what they are.
    """
    values = config.to_dict()
    for name, value in changes.items():
        if isinstance(value, dict):
            known = values[name]
            for key, wanted in value.items():
                if known.get(key) != wanted:
                    raise ValueError(
                        f"model.{name}.{key}={wanted!r}, but init_from has {known.get(key)!r} there: leave "
                        "it out, or train a new model."
                    )
        else:
            values[name] = value
    return RefTRConfig.from_dict(values)
