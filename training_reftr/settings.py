"""
The settings of a run: one dataclass per component, each validated where its fields are. Nothing here is a collective.

Recipes, the command line and checkpoints name the fields of all components in one flat mapping.
"""

import difflib
import re
from collections.abc import Collection, Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from data_scripts.quoting import quote
from training_reftr.published_results import is_augmented_as_published
from training_reftr.run_folder import RunFolder


class Scope(Enum):
    """What a setting is about, which decides what a resumed run may change and what its recipe.yaml contains."""

    MODEL = "fixed by the checkpoint"  # a change is refused on resume
    RESULTS = "affects results"  # a change applies on resume, with a warning
    MACHINE = "machine-specific"  # a change applies; recipe.yaml does not contain it
    NEUTRAL = "neutral"  # a change applies


def setting(scope: Scope, default: Any, text: str) -> Any:
    """Declare a field with its scope and help text."""
    metadata = {"scope": scope, "help": text}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def require_at_least_one(part: Any, *names: str) -> None:
    """Raise a ValueError if a field is less than 1; None is allowed."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={quote(value)} must be at least 1.")


def require_non_negative(part: Any, *names: str) -> None:
    """Raise a ValueError if a field is negative or not finite."""
    for name in names:
        value = getattr(part, name)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}={quote(value)} must be a finite number of at least 0.")


def require_choice(part: Any, name: str, choices: Collection[str | None]) -> None:
    """Raise a ValueError if a field is not one of the choices."""
    value = getattr(part, name)
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices if choice is not None)
        raise ValueError(f"{name}={quote(value)} must be one of {known}.")


def check_names(given: Iterable[str], known: Collection[str], where: str) -> None:
    """Raise a ValueError for the first unknown name, with the closest known one."""
    for name in given:
        if name not in known:
            name = str(name)[:80]  # difflib is slow on long texts
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else f" Known: {', '.join(sorted(known))}."
            raise ValueError(f"{where} has no field {name!r}.{hint}")


@dataclass
class DataSettings:
    """Which samples are read, and how they are batched."""

    dataset: str = setting(
        Scope.RESULTS, "shapes", "Dataset of data_scripts, a folder, or user/name of the Hub; several joined: a,b."
    )
    dataset_config: dict = setting(
        Scope.RESULTS, {}, "Flags of the dataset, for several by dataset name: a mapping, YAML here."
    )
    data_dir: str | None = setting(Scope.MACHINE, None, "Folder of the dataset's files.")
    data_cache_dir: str | None = setting(
        Scope.MACHINE, None, "Folder of built datasets; none: the cache of the datasets library."
    )
    train_split: str = setting(Scope.RESULTS, "train", "Split to train on; train+val for two of them.")
    validation_split: str = setting(Scope.RESULTS, "validation", "Split that selects the best checkpoint.")
    test_splits: str = setting(Scope.RESULTS, "test", "Splits to report on: testA,testB.")
    streaming: bool = setting(Scope.RESULTS, False, "Stream the training rows from the files, without building.")
    stream_weights: dict = setting(
        Scope.RESULTS,
        {},
        "Shares of several streamed datasets in an epoch, by dataset name: a mapping, YAML here; none: all their "
        "samples.",
    )
    image_cache: str | None = setting(
        Scope.MACHINE, None, "Folder that caches images at image_size; none: read them every time."
    )
    image_size: int | None = setting(
        Scope.MODEL, None, "Longer side of an image in pixels; none: the loaded model's, 640 for a new one."
    )
    keep_aspect_ratio: bool | None = setting(
        Scope.MODEL,
        None,
        "Whether images keep their aspect ratio when they are resized; false: to squares of image_size; none: the "
        "loaded model's, true for a new one.",
    )
    mask_resampling: str | None = setting(
        Scope.MODEL,
        None,
        "How target masks are resized: nearest, as published, which shifts them by up to half a pixel, or "
        "nearest-exact; none: the loaded model's, nearest for a new one.",
    )
    max_text_length: int | None = setting(
        Scope.MODEL, None, "Longest sentence in tokens; none: 40, and 90 with several phrases."
    )
    size_divisor: int | None = setting(
        Scope.MODEL,
        None,
        "Pad batches of images to multiples of this many pixels, for compile; changes predictions slightly.",
    )
    group_by_image: bool = setting(
        Scope.RESULTS, True, "Encode an image once for its sentences; otherwise one sentence per sample."
    )
    expressions_per_image: int = setting(
        Scope.RESULTS, 8, "Sentences of an image in a batch; the others come in other batches."
    )
    bucket_by_shape: bool = setting(
        Scope.RESULTS,
        True,
        "Batch images of similar shape, and texts of similar length, together; false for trained batch norms, whose "
        "statistics would depend on the shape.",
    )
    negative_ratio: float = setting(
        Scope.RESULTS,
        0.0,
        "Expressions about other images of a batch that are asked about each image, per sentence of training, and "
        "refer to nothing there; for model.predict_presence.",
    )
    augmentation: str = setting(
        Scope.RESULTS,
        "published",
        "published: brightness, where the published loader of the dataset and split has it; brightness: always; "
        "strong: saturation, crop, scale, flip; or none.",
    )
    num_workers: int = setting(Scope.NEUTRAL, 2, "Processes that prepare batches.")

    @property
    def sentences_per_sample(self) -> int:
        """The maximum number of sentences of an image in a sample."""
        return self.expressions_per_image if self.group_by_image else 1

    def __post_init__(self) -> None:
        require_at_least_one(self, "image_size", "max_text_length", "size_divisor", "expressions_per_image")
        require_non_negative(self, "num_workers", "negative_ratio")
        for name, weight in self.stream_weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ValueError(f"stream_weights has {name}={quote(weight)}; expected a finite number above 0.")
        require_choice(self, "augmentation", ("none", "published", "brightness", "strong"))
        require_choice(self, "mask_resampling", (None, "nearest", "nearest-exact"))


@dataclass
class InitializationSettings:
    """Where the model, its weights and its tokenizer come from."""

    init_from: str | None = setting(
        Scope.MODEL, None, "RefTR folder, Hub id or published .pth to start from, or to evaluate."
    )
    init_detr: str | None = setting(
        Scope.MODEL, None, "DETR to take the image backbone and encoder from: .pth, folder or Hub id."
    )
    init_backbone: str | None = setting(
        Scope.MODEL, None, "Weights of the image backbone: a file, or timm's for ImageNet: timm."
    )
    init_text: str | None = setting(
        Scope.MODEL, None, "Text encoder to start from, with its tokenizer: a folder or Hub id."
    )
    model: dict = setting(Scope.MODEL, {}, "Fields of RefTRConfig, new or changed: a mapping, YAML here.")
    tokenizer: str | None = setting(
        Scope.MODEL,
        None,
        "Tokenizer of a new model or a published .pth, folder or Hub id; none: init_text's, or trained on the data.",
    )
    attn_implementation: str | None = setting(
        Scope.RESULTS, None, "Attention implementation: eager, sdpa, ...; none: the default of transformers."
    )

    # starts that would load the same weights twice
    EXCLUDED = {"init_from": ("init_detr", "init_backbone", "init_text"), "init_detr": ("init_backbone",)}
    REASONS = {
        "init_from": "a RefTR has all of its weights",
        "init_detr": "a DETR has the image backbone and its encoder",
    }

    def __post_init__(self) -> None:
        if self.model:
            from modeling_reftr import RefTRConfig  # imports torch, which takes seconds

            check_names(self.model, {item.name for item in fields(RefTRConfig)}, "model")
        for name, others in self.EXCLUDED.items():
            for other in others:
                if getattr(self, name) and getattr(self, other):
                    raise ValueError(
                        f"{name}={quote(getattr(self, name))} and {other}={quote(getattr(self, other))} contradict "
                        f"each other: {self.REASONS[name]}. Remove one of them."
                    )


@dataclass
class OptimizationSettings:
    """Batches, precision and the optimizer; learning rates, decay and clipping default to the published ones."""

    batch_size: int = setting(
        Scope.RESULTS, 8, "Images per process and batch; sentences if they are not grouped by image."
    )
    gradient_accumulation_steps: int = setting(Scope.RESULTS, 1, "Batches per optimizer step.")
    mixed_precision: str | None = setting(
        Scope.RESULTS, None, "no, bf16 or fp16; none: what accelerate is configured for."
    )
    compile: bool = setting(
        Scope.NEUTRAL, False, "Compile the training step with torch.compile; evaluation is not compiled."
    )
    learning_rate: float = setting(
        Scope.RESULTS, 1e-4, "Peak learning rate of everything but the backbones and the mask head."
    )
    backbone_learning_rate: float = setting(Scope.RESULTS, 1e-5, "Peak learning rate of the image backbone.")
    text_learning_rate: float = setting(Scope.RESULTS, 1e-5, "Peak learning rate of the text backbone.")
    mask_head_learning_rate: float = setting(
        Scope.RESULTS, 1e-4, "Peak learning rate of the mask head; published: 10 x learning_rate."
    )
    weight_decay: float = setting(Scope.RESULTS, 1e-4, "Weight decay of AdamW.")
    adam_beta2: float = setting(
        Scope.RESULTS, 0.999, "AdamW's decay of squared gradients; a shorter memory leaves plateaus sooner."
    )
    ema_decay: float = setting(
        Scope.RESULTS,
        0.0,
        "Decay per step of a moving average of the weights, which is evaluated and saved as the model; 0: none.",
    )
    max_grad_norm: float = setting(Scope.RESULTS, 0.1, "Clip the norm of the gradient of all parameters to this.")
    seed: int = setting(Scope.RESULTS, 42, "Random seed of weights, order, choice of expressions and dropout.")

    def __post_init__(self) -> None:
        require_at_least_one(self, "batch_size", "gradient_accumulation_steps")
        require_non_negative(
            self,
            "learning_rate",
            "backbone_learning_rate",
            "text_learning_rate",
            "mask_head_learning_rate",
            "weight_decay",
            "seed",
        )
        require_choice(self, "mixed_precision", (None, "no", "bf16", "fp16"))
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"adam_beta2={self.adam_beta2} must be at least 0 and less than 1.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"ema_decay={self.ema_decay} must be at least 0 and less than 1, for example 0.999; 0: no average."
            )
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be greater than 0; inf does not clip.")


@dataclass
class ScheduleSettings:
    """How long a run is, and how its learning rates change."""

    num_epochs: int = setting(Scope.RESULTS, 90, "Passes over the training expressions.")
    max_steps: int = setting(Scope.RESULTS, 0, "Stop after this many optimizer steps; 0: no limit.")
    lr_schedule: str = setting(Scope.RESULTS, "step", "step: x0.1 after each of lr_drop_epochs; cosine; or constant.")
    lr_drop_epochs: list[int] = setting(Scope.RESULTS, [60], "Epochs before each drop of the step schedule.")
    warmup_epochs: float = setting(
        Scope.RESULTS, 0.0, "Epochs over which the learning rates rise to their peak, with any schedule."
    )
    warmup_steps: int = setting(Scope.RESULTS, 0, "The same in optimizer steps, instead of warmup_epochs.")

    def __post_init__(self) -> None:
        require_at_least_one(self, "num_epochs")
        require_non_negative(self, "max_steps", "warmup_epochs", "warmup_steps")
        require_choice(self, "lr_schedule", ("step", "cosine", "constant"))
        if self.lr_drop_epochs != sorted(set(self.lr_drop_epochs)) or min(self.lr_drop_epochs, default=1) < 1:
            raise ValueError(
                f"lr_drop_epochs={quote(self.lr_drop_epochs)} must be increasing numbers of epochs, from 1 on."
            )
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs:g} and warmup_steps={self.warmup_steps} exclude each other: set "
                "one of them to 0."
            )


@dataclass
class CheckpointSettings:
    """The folder of a run, and when it is written to."""

    output_dir: str = setting(
        Scope.MACHINE, "runs/reftr", "Folder of checkpoints, the best model, its processor and the report."
    )
    resume: str | None = setting(
        Scope.MACHINE, None, "Resume from a checkpoint: its folder, or auto: the latest valid one in output_dir."
    )
    checkpoint_every: int = setting(
        Scope.NEUTRAL, 0, "Optimizer steps between checkpoints within an epoch; 0: only at its end."
    )
    keep_checkpoints: int = setting(
        Scope.NEUTRAL, 2, "Number of latest checkpoints to keep; the best model is kept in addition."
    )
    watchdog_minutes: float = setting(
        Scope.NEUTRAL, 30.0, "A process that waits this long for the others ends the job."
    )
    dry_run: bool = setting(
        Scope.NEUTRAL, False, "Run a few steps of everything, print memory and time per epoch, and leave no files."
    )

    @property
    def folder(self) -> RunFolder:
        """The files of `output_dir`."""
        return RunFolder(Path(self.output_dir))

    def __post_init__(self) -> None:
        require_at_least_one(self, "keep_checkpoints")
        require_non_negative(self, "checkpoint_every")
        if not 0 < self.watchdog_minutes < float("inf"):
            raise ValueError(f"watchdog_minutes={self.watchdog_minutes} must be greater than 0 and finite.")


@dataclass
class EvaluationSettings:
    """How the model is evaluated, and what the report shows."""

    evaluation_batching: str = setting(
        Scope.RESULTS,  # predictions, and so the best model, depend on it
        "grouped",
        "Batches of evaluation, whose padding changes predictions: grouped: images with all their sentences; "
        "published: consecutive sentences of the annotations; unpadded: images of one resized size.",
    )
    evaluation_batch_size: int | None = setting(
        Scope.NEUTRAL,
        None,
        "Images (published: sentences) per process and batch of evaluation; none: 16, published 8.",
    )
    evaluate_every: int = setting(Scope.RESULTS, 1, "Epochs between evaluations.")
    best_metric: str | None = setting(
        Scope.RESULTS,
        None,
        "Validation metric that selects the best model; none: pr_f1_iou@0.5 with presence, else mask_mean_iou with "
        "masks, else accuracy@0.5.",
    )
    two_step_masks: bool = setting(
        Scope.RESULTS, False, "Resize masks as published, in two steps; otherwise once, which is more accurate."
    )
    eval_only: bool = setting(
        Scope.NEUTRAL, False, "Evaluate init_from (by default the model in output_dir) on the test splits, and report."
    )
    num_pictures: int = setting(Scope.NEUTRAL, 8, "Images in predictions.png, and in trackers at each evaluation.")
    visualize: int = setting(Scope.NEUTRAL, 0, "Samples to draw individually: texts, boxes, masks, attention.")

    def __post_init__(self) -> None:
        require_at_least_one(self, "evaluation_batch_size", "evaluate_every")
        require_non_negative(self, "num_pictures", "visualize")
        require_choice(self, "evaluation_batching", ("grouped", "published", "unpadded"))
        if self.evaluation_batch_size is None:
            self.evaluation_batch_size = 8 if self.evaluation_batching == "published" else 16


@dataclass
class TrackingSettings:
    """Where the metrics of a run are logged."""

    log_every: int = setting(Scope.NEUTRAL, 50, "Optimizer steps between lines of the log.")
    trackers: str = setting(
        Scope.NEUTRAL, "none", "Trackers of metrics in addition to metrics.jsonl: tensorboard,wandb,trackio."
    )
    run_name: str | None = setting(Scope.NEUTRAL, None, "Name of the run in trackers; none: that of output_dir.")

    def __post_init__(self) -> None:
        require_at_least_one(self, "log_every")

    @property
    def tracker_names(self) -> list[str]:
        """The names in `trackers`."""
        return [name for name in self.trackers.replace(" ", "").split(",") if name not in ("", "none")]


@dataclass
class HubSettings:
    """The repository that the run is pushed to."""

    push_to_hub: str | None = setting(
        Scope.MACHINE, None, "Hub id, user/name, to push to: each best model, and the final one with a card."
    )
    hub_private: bool = setting(Scope.MACHINE, False, "Create a new repository as private.")
    hub_dataset: str | None = setting(Scope.NEUTRAL, None, "Hub id of the dataset, for the results in the card.")

    def __post_init__(self) -> None:
        for name in ("push_to_hub", "hub_dataset"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
                raise ValueError(f"{name}={quote(value)} is not a Hub id: expected user/name.")


@dataclass
class TrainingSettings:
    """
    All settings of a run.

    Args:
        data, initialization, optimization, schedule, checkpoints, evaluation, tracking, hub: the components.

    Raises:
        ValueError: if settings of different components contradict each other.

    Example:

    ```python
    >>> from training_reftr.settings import TrainingSettings

    >>> settings = TrainingSettings.from_flat(dataset="refcoco_unc", learning_rate=2e-4)
    >>> settings.data.dataset, settings.optimization.learning_rate
    ('refcoco_unc', 0.0002)

    ```"""

    data: DataSettings = field(default_factory=DataSettings)
    initialization: InitializationSettings = field(default_factory=InitializationSettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    hub: HubSettings = field(default_factory=HubSettings)

    def __post_init__(self) -> None:
        data, evaluation, init_from = self.data, self.evaluation, self.initialization.init_from
        with_masks = bool(self.initialization.model.get("predict_masks"))
        if data.augmentation == "published" and not is_augmented_as_published(
            data.dataset, data.train_split, with_masks
        ):
            data.augmentation = "none"
        if evaluation.evaluation_batching != "grouped" and data.size_divisor is not None:
            raise ValueError(
                f"evaluation_batching={evaluation.evaluation_batching!r} pads images to the largest of their batch, "
                f"and size_divisor={data.size_divisor} pads them further: remove one of them."
            )
        if self.checkpoints.dry_run and evaluation.eval_only:
            raise ValueError("dry_run rehearses training, and eval_only does not train: remove one of them.")
        if self.hub.push_to_hub and evaluation.eval_only and init_from:
            raise ValueError(
                f"push_to_hub={quote(self.hub.push_to_hub)} pushes output_dir, and with eval_only and init_from="
                f"{quote(init_from)} it contains no model: evaluate the model in its own folder, --output_dir, "
                "without init_from."
            )

    @classmethod
    def from_flat(cls, **values: Any) -> "TrainingSettings":
        """
        Build the settings from the fields of all components.

        Raises:
            ValueError: if a field does not exist, or a value is invalid.
        """
        check_names(values, FIELDS, "The run")
        parts = {}
        for part in fields(cls):
            names = [item.name for item in fields(part.type) if item.name in values]
            parts[part.name] = part.type(**{name: values[name] for name in names})
        return cls(**parts)

    def to_flat(self) -> dict[str, Any]:
        """Return the fields of all components by name."""
        return {name: value for part in asdict(self).values() for name, value in part.items()}

    def replace(self, **values: Any) -> "TrainingSettings":
        """Return a copy with other values of some fields, validated again."""
        return self.from_flat(**self.to_flat() | values)


# the fields of all components by name
FIELDS = {item.name: item for part in fields(TrainingSettings) for item in fields(part.type)}


def names_in_scope(*scopes: Scope) -> list[str]:
    """
    Return the names of the settings of some scopes.

    Example:

    ```python
    >>> from training_reftr.settings import Scope, names_in_scope

    >>> names_in_scope(Scope.MODEL)[:3]
    ['image_size', 'keep_aspect_ratio', 'mask_resampling']

    ```"""
    return [name for name, item in FIELDS.items() if item.metadata["scope"] in scopes]


def default_of(name: str) -> Any:
    """Return the default of a setting."""
    item = FIELDS[name]
    return item.default_factory() if item.default is MISSING else item.default
