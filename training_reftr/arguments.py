"""The script's settings: a YAML recipe, overridden by the command line."""

import argparse
import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser


def setting(default, text: str):
    """A field with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingArguments:
    """Settings of a run. Rates, decay and clipping default to the published ones."""

    output_dir: str = setting("runs/reftr", "Folder of checkpoints, the best model, its processor and the report.")

    # data
    dataset: str = setting("shapes", "Data set of data_scripts; several joined: a,b; or a folder of Parquet files.")
    dataset_config: str = setting("{}", "Flags of the data set, of several by name: a mapping, JSON here.")
    data_dir: str | None = setting(None, "Where the data set's files are.")
    data_cache_dir: str | None = setting(None, "Where built sets are kept (the datasets library's own cache).")
    train_split: str = setting("train", "Split to train on; train+val for two of them.")
    validation_split: str = setting("validation", "Split that chooses the best checkpoint.")
    test_splits: str = setting("test", "Splits that the report is about: testA,testB.")
    streaming: bool = setting(False, "Read the training rows from the files in turn, building nothing.")
    image_cache: str | None = setting(None, "Folder that keeps pictures at image_size; none: read them every time.")
    image_size: int = setting(640, "Length in pixels that the longer side of a picture is brought to.")
    group_by_image: bool = setting(True, "Encode a picture once for its sentences; else one sentence a sample.")
    expressions_per_image: int = setting(8, "Sentences of an image in a batch; further ones come in other batches.")
    bucket_by_shape: bool = setting(True, "Put pictures of like shape, and texts of like length, into one batch.")
    augmentation: str = setting("published", "published: brightness; strong: saturation, crop, scale, flip; or none.")
    num_workers: int = setting(2, "Processes that prepare batches.")

    # where weights come from
    init_from: str | None = setting(None, "RefTR folder, Hub id or published .pth to start from, or to evaluate.")
    init_detr: str | None = setting(None, "DETR to take image backbone and encoder from: .pth, folder or Hub id.")
    init_backbone: str | None = setting(None, "Weights of the image backbone: a file, or timm's for ImageNet: timm.")
    init_text: str | None = setting(None, "Text encoder to start from, with its tokenizer: a folder or Hub id.")
    model: str = setting("{}", "Fields of RefTRConfig, new or changed: a mapping, JSON here.")
    tokenizer: str | None = setting(None, "Tokenizer of a new model, a folder or Hub id; none: trained on the set.")
    attn_implementation: str | None = setting(None, "eager, sdpa, ...; none: what transformers chooses.")

    # optimisation
    num_epochs: int = setting(90, "Passes over the training expressions.")
    max_steps: int = setting(0, "Stop after so many updates; 0: do not.")
    batch_size: int = setting(8, "Images a process and step; sentences where they are not grouped by image.")
    gradient_accumulation_steps: int = setting(1, "Steps an update.")
    mixed_precision: str | None = setting(None, "no, bf16 or fp16; none: what accelerate is configured for.")
    learning_rate: float = setting(1e-4, "Peak rate of everything but the backbones.")
    backbone_learning_rate: float = setting(1e-5, "Peak rate of the image backbone.")
    text_learning_rate: float = setting(1e-5, "Peak rate of the text backbone.")
    mask_head_learning_rate: float = setting(1e-4, "Peak rate of the mask head; published: 10 x learning_rate.")
    weight_decay: float = setting(1e-4, "AdamW's.")
    adam_beta2: float = setting(0.999, "AdamW's memory of squared gradients; shorter leaves plateaus sooner.")
    max_grad_norm: float = setting(0.1, "The gradient of all parameters together is cut to this norm.")
    lr_schedule: str = setting("step", "step: x0.1 after lr_drop_epochs; cosine; or constant.")
    lr_drop_epochs: int = setting(60, "Epochs before the step schedule's drop.")
    warmup_steps: int = setting(0, "Updates over which the rates grow to their peak.")
    seed: int = setting(42, "Of weights, order, choice of expressions and dropout.")

    # checkpoints and guards
    resume: str | None = setting(None, "Go on from a checkpoint: its folder, or auto: output_dir's newest, if any.")
    checkpoint_every: int = setting(0, "Updates between checkpoints within an epoch; 0: at its end only.")
    keep_checkpoints: int = setting(2, "Newest checkpoints to keep; the best model is kept beside them.")
    watchdog_minutes: float = setting(30.0, "A process that waits so long for the others ends the job.")
    dry_run: bool = setting(False, "One batch through everything; say memory and time an epoch, and leave nothing.")

    # evaluation and watching
    evaluation_batch_size: int = setting(16, "Images a process and step of evaluation.")
    evaluate_every: int = setting(1, "Epochs between evaluations.")
    best_metric: str | None = setting(
        None, "Validation figure that chooses the best; none: mask_mean_iou with masks, else accuracy@0.5."
    )
    two_step_masks: bool = setting(False, "Resize masks as published, in two steps; else once, which fits better.")
    eval_only: bool = setting(False, "Evaluate init_from (absent: output_dir) on the test splits, and report.")
    num_pictures: int = setting(12, "Pictures in predictions.png, and in trackers at each evaluation.")
    visualize: int = setting(0, "Samples to draw one by one: words, boxes, masks, attention.")
    log_every: int = setting(50, "Updates between lines of the log.")
    trackers: str = setting("none", "Where figures go beside metrics.jsonl: tensorboard,wandb,trackio.")
    run_name: str | None = setting(None, "Name of the run in trackers; none: that of output_dir.")

    def __post_init__(self):
        for name in ("dataset_config", "model"):
            value = getattr(self, name)
            try:
                setattr(self, name, json.loads(value) if isinstance(value, str) else value)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}={value!r} is not JSON: {error}.") from error
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}={value!r} must be a mapping of names to values.")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number of at least 0.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(repr(choice) for choice in choices if choice is not None)
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {known}.")
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"adam_beta2={self.adam_beta2} must be at least 0 and less than 1.")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be greater than 0; inf does not cut.")
        if not 0 < self.watchdog_minutes < float("inf"):
            raise ValueError(f"watchdog_minutes={self.watchdog_minutes} must be greater than 0 and finite.")


AT_LEAST_ONE = (
    "image_size",
    "expressions_per_image",
    "num_epochs",
    "batch_size",
    "gradient_accumulation_steps",
    "keep_checkpoints",
    "evaluation_batch_size",
    "evaluate_every",
    "log_every",
)
NOT_NEGATIVE = (
    "num_workers",
    "max_steps",
    "learning_rate",
    "backbone_learning_rate",
    "text_learning_rate",
    "mask_head_learning_rate",
    "weight_decay",
    "lr_drop_epochs",
    "warmup_steps",
    "seed",
    "checkpoint_every",
    "num_pictures",
    "visualize",
)
CHOICES = {
    "augmentation": ("none", "published", "strong"),
    "lr_schedule": ("step", "cosine", "constant"),
    "mixed_precision": (None, "no", "bf16", "fp16"),
}


def check_names(given, known, where: str):
    """Raise a ValueError that names the nearest known name for the first unknown one."""
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else f" Known: {', '.join(sorted(known))}."
            raise ValueError(f"{where} has no field {name!r}.{hint}")


def parse_arguments(argv: list[str]) -> TrainingArguments:
    """
    `[RECIPE.yaml] [--field value ...]`; the command line wins over the recipe, the recipe over the defaults.

    Raises:
        OSError: if the recipe is not there.
        ValueError: if the recipe is not a mapping, has a field that does not exist, or a value makes no sense.
    """
    parser = HfArgumentParser(TrainingArguments, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = "Train and evaluate RefTR. Usage: train_reftr.py [RECIPE.yaml] [--field value ...]"
    if argv and not argv[0].startswith("-"):
        recipe, argv = Path(argv[0]), argv[1:]
        if not recipe.is_file():
            raise OSError(f"There is no recipe {str(recipe)!r}.")
        values = yaml.safe_load(recipe.read_text()) or {}
        if not isinstance(values, dict):
            raise ValueError(f"The recipe {str(recipe)!r} must be a mapping of fields to values.")
        check_names(values, {item.name for item in fields(TrainingArguments)}, f"The recipe {str(recipe)!r}")
        # as words of the command line, so that both are read by one parser
        words = []
        for name, value in values.items():
            if value is not None:
                words += [f"--{name}", json.dumps(value) if isinstance(value, (dict, bool)) else str(value)]
        argv = words + argv
    check_names(
        [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")],
        {item.name for item in fields(TrainingArguments)} | {"help"},
        "The command line",
    )
    return parser.parse_args_into_dataclasses(argv)[0]
