"""
Settings that a resumed run may change: a checkpoint fixes those of `Scope.MODEL`; changes of others are logged and
recorded. Nothing here is a collective.
"""

import logging
from pathlib import Path

from data_scripts.quoting import quote
from modeling_reftr import RefTRConfig, RefTRProcessor
from training_reftr.arguments import merge
from training_reftr.build import (
    describe_size,
    differences,
    image_size_of,
    keeps_aspect_ratio,
    max_text_length_of,
)
from training_reftr.checkpoints import TrainingState, load_state
from training_reftr.data import TrainingData
from training_reftr.settings import Scope, TrainingSettings, names_in_scope


logger = logging.getLogger(__name__)


def with_sizes_of(settings: TrainingSettings, processor: RefTRProcessor) -> TrainingSettings:
    """Return the settings with the sizes that a processor has, whether they were given or it brought them."""
    return settings.replace(
        image_size=image_size_of(processor.image_processor),
        keep_aspect_ratio=keeps_aspect_ratio(processor.image_processor),
        mask_resampling=processor.image_processor.mask_resampling,
        max_text_length=max_text_length_of(processor),
        size_divisor=processor.image_processor.size_divisor,
    )


def with_model_of(
    settings: TrainingSettings, config: RefTRConfig, processor: RefTRProcessor, former: dict, checkpoint: Path
) -> TrainingSettings:
    """
    Return the settings of a run that resumes, with those of `Scope.MODEL` as they are in the checkpoint, so that
    what is written of the run is what ran.

    Args:
        settings ([`TrainingSettings`]): as given. What is None, and what `model` does not name, is the checkpoint's.
        config ([`RefTRConfig`]), processor ([`RefTRProcessor`]): of the checkpoint.
        former (`dict`): the settings of the run that wrote the checkpoint. It may lack settings
            of later versions.
        checkpoint (`Path`): its folder, for the message.

    Raises:
        ValueError: if a setting is given that differs, naming it, both values and what to do.
    """
    image_processor = processor.image_processor
    lengths = f"{processor.max_expression_length} (captions: {processor.max_caption_length})"
    known = {name: former[name] for name in names_in_scope(Scope.MODEL) if name in former and name != "model"}
    known |= {
        "image_size": image_size_of(image_processor) or describe_size(image_processor),
        "keep_aspect_ratio": keeps_aspect_ratio(image_processor),
        "mask_resampling": image_processor.mask_resampling,
        "max_text_length": max_text_length_of(processor) or lengths,
        "size_divisor": image_processor.size_divisor,
    }
    flat = settings.to_flat()
    given = {name: flat[name] for name in known if flat[name] is not None}
    changed = [(name, known[name], value) for name, value in given.items() if value != known[name]]
    changed += [
        (f"model.{name}", value, wanted) for name, value, wanted in differences(config, settings.initialization.model)
    ]
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
    kept["model"] = merge(former.get("model", {}), settings.initialization.model)
    return with_sizes_of(settings.replace(**kept), processor)


def refuse_changes(settings: TrainingSettings, checkpoint: Path | None) -> None:
    """Raise the ValueError of `with_model_of` for a checkpoint, None for none, without loading its weights."""
    if checkpoint is not None:
        config, processor = RefTRConfig.from_pretrained(checkpoint), RefTRProcessor.from_pretrained(checkpoint)
        with_model_of(settings, config, processor, load_state(checkpoint).settings, checkpoint)


def find_changes(
    state: TrainingState, settings: TrainingSettings, global_batch_size: int, data: TrainingData | None = None
) -> list[str]:
    """
    Return what differs from the run that wrote a checkpoint and changes what is learned, "learning_rate=0.1 (was
    0.01)".

    Args:
        state (`TrainingState`): of the checkpoint.
        settings ([`TrainingSettings`]): of the run that resumes.
        global_batch_size (`int`): samples of all processes in a batch.
        data ([`TrainingData`], *optional*): of the run that resumes, for what a stream leaves out.
    """
    flat = settings.to_flat()
    names = [name for name in names_in_scope(Scope.RESULTS) if name in state.settings]
    changed = [
        f"{name}={quote(flat[name])} (was {quote(state.settings[name])})"
        for name in names
        if flat[name] != state.settings[name]
    ]
    if state.seen and state.seen[-1][0] != global_batch_size:
        changed.append(f"{global_batch_size} samples of all processes in a batch (was {state.seen[-1][0]})")
    if data is not None and data.layout and state.seen and len(state.seen[-1]) == 2 + len(data.layout):
        former, layout = tuple(state.seen[-1][2:]), data.layout
        if former != layout:
            changed.append(
                f"{layout[0]} processes with {layout[1]} readers of the stream each (was {former[0]} with {former[1]})"
            )
        if former != layout or state.seen[-1][0] != global_batch_size:
            num_left_out = data.num_left_out(state.epoch, state.seen)
            changed.append(f"{num_left_out} samples left out of this epoch, which windows that were begun had")
    return changed
