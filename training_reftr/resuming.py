"""
What a run that resumes from a checkpoint may change: a checkpoint fixes the settings of the kind `MODEL`; what the
others change is said, and written down. Nothing here holds a collective.
"""

import dataclasses
import logging
from pathlib import Path

from data_scripts.quoting import quote
from modeling_reftr import RefTRConfig, RefTRProcessor
from training_reftr.arguments import LEARNING, MODEL, TrainingArguments, merge, settings_of_kind
from training_reftr.build import differences
from training_reftr.checkpoints import load_state
from training_reftr.sizes import describe_size, image_size_of, max_text_length_of


logger = logging.getLogger(__name__)


def with_sizes_of(args: TrainingArguments, processor: RefTRProcessor) -> TrainingArguments:
    """Return the settings with the sizes that a processor has, whether they were given or it brought them."""
    return dataclasses.replace(
        args,
        image_size=image_size_of(processor.image_processor),
        max_text_length=max_text_length_of(processor),
        size_divisor=processor.image_processor.size_divisor,
    )


def with_model_of(
    args: TrainingArguments, config: RefTRConfig, processor: RefTRProcessor, settings: dict, checkpoint: Path
) -> TrainingArguments:
    """
    Return the settings of a run that resumes, with those of the kind `MODEL` as they are in the checkpoint, so that
    what is written of the run is what ran.

    Args:
        args ([`TrainingArguments`]): as given. What is None, and what `model` does not name, is the checkpoint's.
        config ([`RefTRConfig`]), processor ([`RefTRProcessor`]): of the checkpoint.
        settings (`dict`): of the run that wrote the checkpoint. It may lack settings that its version did not have.
        checkpoint (`Path`): its folder, for the message.

    Raises:
        ValueError: if a setting is given that differs, naming it, both values and what to do.
    """
    image_processor = processor.image_processor
    lengths = f"{processor.max_expression_length} (captions: {processor.max_caption_length})"
    known = {name: settings[name] for name in settings_of_kind(MODEL) if name in settings and name != "model"}
    known |= {
        "image_size": image_size_of(image_processor) or describe_size(image_processor),
        "max_text_length": max_text_length_of(processor) or lengths,
        "size_divisor": image_processor.size_divisor,
    }
    given = {name: getattr(args, name) for name in known if getattr(args, name) is not None}
    changed = [(name, known[name], value) for name, value in given.items() if value != known[name]]
    changed += [(f"model.{name}", value, wanted) for name, value, wanted in differences(config, args.model)]
    if changed:
        listed = ", ".join(
            f"{name}={quote(wanted)} (the checkpoint has {quote(value)})" for name, value, wanted in changed
        )
        raise ValueError(
            f"A run that resumes keeps its model, and {str(checkpoint)!r} fixes {listed}. To resume, leave these "
            "settings as they were; to change them, start a new run from the model: --init_from and another "
            "--output_dir, without --resume."
        )
    kept = {name: value for name, value in known.items() if name not in ("image_size", "max_text_length")}
    kept["model"] = merge(settings.get("model", {}), args.model)
    return with_sizes_of(dataclasses.replace(args, **kept), processor)


def refuse_changes(args: TrainingArguments, checkpoint: Path | None):
    """Raise the ValueError of `with_model_of` for a checkpoint, None for none, without loading its weights."""
    if checkpoint is not None:
        config, processor = RefTRConfig.from_pretrained(checkpoint), RefTRProcessor.from_pretrained(checkpoint)
        with_model_of(args, config, processor, load_state(checkpoint).settings, checkpoint)


def find_changes(state, args: TrainingArguments, global_batch_size: int) -> list[str]:
    """
    Return what differs from the run that wrote a checkpoint and changes what is learned, "learning_rate=0.1 (was
    0.01)".

    Args:
        state (`TrainingState`): of the checkpoint.
        args ([`TrainingArguments`]): of the run that resumes.
        global_batch_size (`int`): samples of all processes in a batch.
    """
    names = [name for name in settings_of_kind(LEARNING) if name in state.settings]
    changed = [
        f"{name}={quote(getattr(args, name))} (was {quote(state.settings[name])})"
        for name in names
        if getattr(args, name) != state.settings[name]
    ]
    if state.seen and state.seen[-1][0] != global_batch_size:
        changed.append(f"{global_batch_size} samples of all processes in a batch (was {state.seen[-1][0]})")
    return changed
