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

    output_dir: str = setting("runs/reftr", "Folder of the best model, its processor and the report.")

    dataset: str = setting("shapes", "Name of the data set, see data_scripts.")
    dataset_config: str = setting("{}", "Settings of the data set: a mapping, in JSON on the command line.")
    data_cache_dir: str | None = setting(None, "Where built sets are kept (the datasets library's own cache).")
    train_split: str = setting("train", "Split to train on.")
    validation_split: str = setting("validation", "Split that chooses the best checkpoint.")
    test_split: str = setting("test", "Split that the report is about.")
    image_size: int = setting(640, "Length in pixels that the longer side of a picture is brought to.")
    expressions_per_image: int = setting(8, "Sentences drawn for each image of a batch; all, where it has fewer.")
    num_workers: int = setting(2, "Processes that prepare batches.")

    model_name_or_path: str | None = setting(None, "RefTR folder or Hub id to start from, or to evaluate.")
    model: str = setting("{}", "Fields of RefTRConfig, new or changed: a mapping, in JSON on the command line.")
    attn_implementation: str | None = setting(None, "eager, sdpa, ...; none: what transformers chooses.")
    tokenizer: str | None = setting(None, "Tokenizer of a new model, a folder or Hub id; none: trained on the set.")

    num_epochs: int = setting(90, "Passes over the training images.")
    max_steps: int = setting(0, "Stop after so many updates; 0: do not.")
    batch_size: int = setting(8, "Images a process and step.")
    gradient_accumulation_steps: int = setting(1, "Steps an update.")
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

    evaluation_batch_size: int = setting(16, "Images a process and step of evaluation.")
    evaluate_every: int = setting(1, "Epochs between evaluations.")
    log_every: int = setting(50, "Updates between lines of the log.")
    best_metric: str | None = setting(
        None, "Validation figure that chooses the best; none: mask_mean_iou with masks, else accuracy@0.5."
    )
    two_step_masks: bool = setting(False, "Resize masks as published, in two steps; else once, which fits better.")
    num_pictures: int = setting(12, "Pictures in predictions.png.")
    eval_only: bool = setting(False, "Evaluate model_name_or_path (absent: output_dir) on the test split, and report.")

    def __post_init__(self):
        for name in ("dataset_config", "model"):
            value = getattr(self, name)
            try:
                setattr(self, name, json.loads(value))
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}={value!r} is not JSON: {error}.") from error
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}={value!r} must be a mapping of names to values.")
        at_least_one = ("image_size", "expressions_per_image", "num_epochs", "batch_size")
        at_least_one += ("gradient_accumulation_steps", "evaluation_batch_size", "evaluate_every", "log_every")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        not_negative = (
            "num_workers",
            "max_steps",
            "warmup_steps",
            "lr_drop_epochs",
            "num_pictures",
            "seed",
        )
        not_negative += ("learning_rate", "backbone_learning_rate", "text_learning_rate", "mask_head_learning_rate")
        not_negative += ("weight_decay",)
        for name in not_negative:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number of at least 0.")
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"adam_beta2={self.adam_beta2} must be at least 0 and less than 1.")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be greater than 0; inf does not cut.")
        if self.lr_schedule not in ("step", "cosine", "constant"):
            raise ValueError(f"lr_schedule={self.lr_schedule!r} must be 'step', 'cosine' or 'constant'.")


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
