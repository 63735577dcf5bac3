"""
The script's settings: YAML recipes that inherit from each other, overridden by the command line. Nothing here holds a
collective.
"""

import difflib
import re
import sys
import textwrap
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import get_args, get_type_hints

import yaml

from data_scripts.escaping import for_terminal
from data_scripts.quoting import quote
from data_scripts.reading import check_text, read_text
from data_scripts.yaml_values import MAX_YAML_CHARACTERS, read_yaml
from training_reftr.published_results import is_augmented_as_published
from training_reftr.recipe_choice import find_recipe


# What a setting is about, which decides what a run that resumes may change and what its recipe.yaml says.
MODEL = "model"  # the model that training starts from: a checkpoint fixes it, and a change is refused
LEARNING = "learning"  # what is learned from then on: a change applies, with a warning
MACHINE = "machine"  # where things are on this machine or account: a change applies, and recipe.yaml leaves it out
NEITHER = "neither"  # a change applies


def setting(kind: str, default, text: str):
    """Declare a field with its kind and its help text."""
    metadata = {"kind": kind, "help": text}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def settings_of_kind(*kinds: str) -> list[str]:
    """
    Return the names of the settings of some kinds.

    Example:

    ```python
    >>> from training_reftr.arguments import MODEL, settings_of_kind

    >>> settings_of_kind(MODEL)[:3]
    ['image_size', 'max_text_length', 'size_divisor']

    ```"""
    return [item.name for item in fields(TrainingArguments) if item.metadata["kind"] in kinds]


@dataclass
class TrainingArguments:
    """Settings of a run. Rates, decay and clipping default to the published ones."""

    output_dir: str = setting(
        MACHINE, "runs/reftr", "Folder of checkpoints, the best model, its processor and the report."
    )

    # data
    dataset: str = setting(
        LEARNING, "shapes", "Data set of data_scripts; several joined: a,b; or a folder of Parquet files."
    )
    dataset_config: dict = setting(LEARNING, {}, "Flags of the data set, of several by name: a mapping, YAML here.")
    data_dir: str | None = setting(MACHINE, None, "Where the data set's files are.")
    data_cache_dir: str | None = setting(
        MACHINE, None, "Where built sets are kept (the datasets library's own cache)."
    )
    train_split: str = setting(LEARNING, "train", "Split to train on; train+val for two of them.")
    validation_split: str = setting(LEARNING, "validation", "Split that chooses the best checkpoint.")
    test_splits: str = setting(LEARNING, "test", "Splits that the report is about: testA,testB.")
    streaming: bool = setting(LEARNING, False, "Read the training rows from the files in turn, building nothing.")
    image_cache: str | None = setting(
        MACHINE, None, "Folder that keeps pictures at image_size; none: read them every time."
    )
    image_size: int | None = setting(
        MODEL, None, "Pixels of the longer side; none: the loaded model's, 640 for a new one."
    )
    max_text_length: int | None = setting(
        MODEL, None, "Longest sentence in tokens; none: 40, and 90 with several phrases."
    )
    group_by_image: bool = setting(
        LEARNING, True, "Encode a picture once for its sentences; else one sentence a sample."
    )
    expressions_per_image: int = setting(
        LEARNING, 8, "Sentences of an image in a batch; further ones come in other batches."
    )
    bucket_by_shape: bool = setting(
        LEARNING, True, "Put pictures of like shape, and texts of like length, into one batch."
    )
    augmentation: str = setting(
        LEARNING,
        "published",
        "published: brightness, where the published loader of the dataset and split has it; brightness: always; "
        "strong: saturation, crop, scale, flip; or none.",
    )
    num_workers: int = setting(NEITHER, 2, "Processes that prepare batches.")
    size_divisor: int | None = setting(
        MODEL, None, "Pad batches of pictures to multiples of so many pixels, for compile; changes answers a little."
    )

    # where weights come from
    init_from: str | None = setting(
        MODEL, None, "RefTR folder, Hub id or published .pth to start from, or to evaluate."
    )
    init_detr: str | None = setting(
        MODEL, None, "DETR to take image backbone and encoder from: .pth, folder or Hub id."
    )
    init_backbone: str | None = setting(
        MODEL, None, "Weights of the image backbone: a file, or timm's for ImageNet: timm."
    )
    init_text: str | None = setting(MODEL, None, "Text encoder to start from, with its tokenizer: a folder or Hub id.")
    model: dict = setting(MODEL, {}, "Fields of RefTRConfig, new or changed: a mapping, YAML here.")
    tokenizer: str | None = setting(
        MODEL,
        None,
        "Tokenizer of a new model or a published .pth, folder or Hub id; none: init_text's, or trained on the set.",
    )
    attn_implementation: str | None = setting(LEARNING, None, "eager, sdpa, ...; none: what transformers chooses.")

    compile: bool = setting(NEITHER, False, "Compile the training step (torch.compile); evaluation stays as it is.")

    # optimisation
    num_epochs: int = setting(LEARNING, 90, "Passes over the training expressions.")
    max_steps: int = setting(LEARNING, 0, "Stop after so many updates; 0: do not.")
    batch_size: int = setting(LEARNING, 8, "Images a process and step; sentences where they are not grouped by image.")
    gradient_accumulation_steps: int = setting(LEARNING, 1, "Steps an update.")
    mixed_precision: str | None = setting(LEARNING, None, "no, bf16 or fp16; none: what accelerate is configured for.")
    learning_rate: float = setting(LEARNING, 1e-4, "Peak rate of everything but the backbones.")
    backbone_learning_rate: float = setting(LEARNING, 1e-5, "Peak rate of the image backbone.")
    text_learning_rate: float = setting(LEARNING, 1e-5, "Peak rate of the text backbone.")
    mask_head_learning_rate: float = setting(
        LEARNING, 1e-4, "Peak rate of the mask head; published: 10 x learning_rate."
    )
    weight_decay: float = setting(LEARNING, 1e-4, "AdamW's.")
    adam_beta2: float = setting(
        LEARNING, 0.999, "AdamW's memory of squared gradients; shorter leaves plateaus sooner."
    )
    max_grad_norm: float = setting(LEARNING, 0.1, "The gradient of all parameters together is cut to this norm.")
    lr_schedule: str = setting(LEARNING, "step", "step: x0.1 after each of lr_drop_epochs; cosine; or constant.")
    lr_drop_epochs: list[int] = setting(LEARNING, [60], "Epochs before each drop of the step schedule.")
    warmup_epochs: float = setting(LEARNING, 0.0, "Epochs over which the rates grow to their peak, with any schedule.")
    warmup_steps: int = setting(LEARNING, 0, "The same in updates, in place of warmup_epochs.")
    seed: int = setting(LEARNING, 42, "Of weights, order, choice of expressions and dropout.")

    # checkpoints and guards
    resume: str | None = setting(
        MACHINE, None, "Go on from a checkpoint: its folder, or auto: output_dir's newest, if any."
    )
    checkpoint_every: int = setting(NEITHER, 0, "Updates between checkpoints within an epoch; 0: at its end only.")
    keep_checkpoints: int = setting(NEITHER, 2, "Newest checkpoints to keep; the best model is kept beside them.")
    watchdog_minutes: float = setting(NEITHER, 30.0, "A process that waits so long for the others ends the job.")
    dry_run: bool = setting(
        NEITHER, False, "One batch through everything; say memory and time an epoch, and leave nothing."
    )

    # evaluation and watching
    evaluation_batching: str = setting(
        LEARNING,  # answers, and so the best model, depend on it
        "grouped",
        "Batches of evaluation, whose padding changes answers: grouped: images with all their sentences; published: "
        "sentences that follow each other in the annotations; unpadded: images of one resized size.",
    )
    evaluation_batch_size: int | None = setting(
        NEITHER, None, "Images, if published sentences, a process and step of evaluation; none: 16, published 8."
    )
    evaluate_every: int = setting(LEARNING, 1, "Epochs between evaluations.")
    best_metric: str | None = setting(
        LEARNING, None, "Validation figure that chooses the best; none: mask_mean_iou with masks, else accuracy@0.5."
    )
    two_step_masks: bool = setting(
        LEARNING, False, "Resize masks as published, in two steps; else once, which fits better."
    )
    eval_only: bool = setting(
        NEITHER, False, "Evaluate init_from (absent: output_dir) on the test splits, and report."
    )
    num_pictures: int = setting(NEITHER, 12, "Pictures in predictions.png, and in trackers at each evaluation.")
    visualize: int = setting(NEITHER, 0, "Samples to draw one by one: words, boxes, masks, attention.")
    log_every: int = setting(NEITHER, 50, "Updates between lines of the log.")
    trackers: str = setting(NEITHER, "none", "Where figures go beside metrics.jsonl: tensorboard,wandb,trackio.")
    run_name: str | None = setting(NEITHER, None, "Name of the run in trackers; none: that of output_dir.")

    # the Hub
    push_to_hub: str | None = setting(
        MACHINE, None, "Hub id, user/name, to push to: at each best, and at the end with a card."
    )
    hub_private: bool = setting(MACHINE, False, "Make a new repository private.")
    hub_dataset: str | None = setting(NEITHER, None, "Hub id of the data set, for the results in the card.")

    def __post_init__(self):
        if self.model:
            from modeling_reftr import RefTRConfig  # imports torch, which takes seconds

            check_names(self.model, {item.name for item in fields(RefTRConfig)}, "model")
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={quote(value)} must be at least 1.")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={quote(getattr(self, name))} must be a finite number of at least 0.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(repr(choice) for choice in choices if choice is not None)
                raise ValueError(f"{name}={quote(getattr(self, name))} must be one of {known}.")
        if self.evaluation_batch_size is None:
            self.evaluation_batch_size = 8 if self.evaluation_batching == "published" else 16
        if self.evaluation_batching != "grouped" and self.size_divisor is not None:
            raise ValueError(
                f"evaluation_batching={self.evaluation_batching!r} pads images to the largest of their batch, and "
                f"size_divisor={self.size_divisor} pads them further: leave one of them out."
            )
        with_masks = bool(self.model.get("predict_masks"))
        if self.augmentation == "published" and not is_augmented_as_published(
            self.dataset, self.train_split, with_masks
        ):
            self.augmentation = "none"
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"adam_beta2={self.adam_beta2} must be at least 0 and less than 1.")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be greater than 0; inf does not cut.")
        if not 0 < self.watchdog_minutes < float("inf"):
            raise ValueError(f"watchdog_minutes={self.watchdog_minutes} must be greater than 0 and finite.")
        if self.lr_drop_epochs != sorted(set(self.lr_drop_epochs)) or min(self.lr_drop_epochs, default=1) < 1:
            raise ValueError(
                f"lr_drop_epochs={quote(self.lr_drop_epochs)} must be numbers of epochs from 1 on, growing."
            )
        if self.dry_run and self.eval_only:
            raise ValueError("dry_run rehearses a training, and eval_only trains nothing: leave one of them out.")
        if self.push_to_hub and self.eval_only and self.init_from:
            raise ValueError(
                f"push_to_hub={quote(self.push_to_hub)} pushes output_dir, and with eval_only and init_from="
                f"{quote(self.init_from)} there is no model in it: evaluate the model in its own folder, "
                "--output_dir, without init_from."
            )
        for name in ("push_to_hub", "hub_dataset"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
                raise ValueError(f"{name}={quote(value)} is no id of the Hub: user/name.")
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs:g} and warmup_steps={self.warmup_steps} say the same twice: leave "
                "one of them at 0."
            )
        for name, others in EXCLUDED_STARTS.items():
            for other in others:
                if getattr(self, name) and getattr(self, other):
                    raise ValueError(
                        f"{name}={quote(getattr(self, name))} and {other}={quote(getattr(self, other))} contradict "
                        f"each other: {WHY_EXCLUDED[name]}. Leave one of them out."
                    )


AT_LEAST_ONE = (
    "image_size",
    "max_text_length",
    "size_divisor",
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
    "warmup_epochs",
    "warmup_steps",
    "seed",
    "checkpoint_every",
    "num_pictures",
    "visualize",
)
CHOICES = {
    "augmentation": ("none", "published", "brightness", "strong"),
    "evaluation_batching": ("grouped", "published", "unpadded"),
    "lr_schedule": ("step", "cosine", "constant"),
    "mixed_precision": (None, "no", "bf16", "fp16"),
}


# starts that give the same weights twice
EXCLUDED_STARTS = {"init_from": ("init_detr", "init_backbone", "init_text"), "init_detr": ("init_backbone",)}
WHY_EXCLUDED = {
    "init_from": "a RefTR brings all of its weights",
    "init_detr": "a DETR brings the image backbone with its encoder",
}


def check_names(given, known, where: str):
    """Raise a ValueError that names the nearest known name for the first unknown one."""
    for name in given:
        if name not in known:
            name = str(name)[:80]  # comparing takes time
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else f" Known: {', '.join(sorted(known))}."
            raise ValueError(f"{where} has no field {name!r}.{hint}")


def read_recipe(path: Path, heirs: tuple[Path, ...] = ()) -> dict[Path, dict]:
    """
    The settings of a recipe and of all that it inherits, by file, in the order in which they lie over each other: what
    is inherited first, the recipe itself last. A file that is inherited twice counts where it comes first.

    Args:
        path (`Path`): the recipe. Its `inherit` is a path, or a list of paths, relative to its own folder.
        heirs (`tuple[Path, ...]`): the recipes that inherit this one, the first asked for first.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is no mapping, has an unknown field, or inherits itself.
    """
    path = path.resolve()
    if not path.is_file():
        raise OSError(f"There is no recipe {str(path)!r}{f', which {heirs[-1]} inherits' if heirs else ''}.")
    if path in heirs:
        raise ValueError(f"The recipe inherits itself: {' -> '.join(map(str, (*heirs, path)))}.")
    if path.stat().st_size > MAX_YAML_CHARACTERS:
        raise ValueError(f"The recipe {str(path)!r} has {path.stat().st_size:,} bytes, too many for one.")
    values = read_yaml(read_text(path), f"The recipe {str(path)!r}") or {}
    if not isinstance(values, dict):
        raise ValueError(f"The recipe {str(path)!r} must be a mapping of fields to values.")
    parents = values.pop("inherit", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ValueError(f"inherit={quote(parents)} in the recipe {str(path)!r} must be a path or a list of paths.")
    check_names(values, {*TYPES, "inherit"}, f"The recipe {str(path)!r}")
    layers = {}
    for parent in parents:
        layers |= {
            file: layer
            for file, layer in read_recipe(path.parent / parent, (*heirs, path)).items()
            if file not in layers
        }
    return {**layers, path: values}


def read_words(words: list[str]) -> dict:
    """
    Settings of the command line: `--name value`, `--name=value`, `--name` for true, and `--model.decoder_layers 3` for
    a key inside a mapping; `null` takes a setting back.

    Raises:
        ValueError: if a field does not exist, lacks its value, or has no keys inside.
    """
    settings = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{quote(word)} is no setting. The order is: recipes first, then --field value ...")
        name, given, value = word[2:].partition("=")
        if name.count(".") > MAX_DEPTH:
            raise ValueError(
                f"{quote(word)} names a key inside more than {MAX_DEPTH} mappings; no setting is so deep."
            )
        name, *keys = name.split(".")
        name = name.replace("-", "_")
        check_names([name], TYPES, "The command line")
        if keys and TYPES[name] is not dict:
            raise ValueError(f"{word[:100]}: {name!r} has no keys inside; only {', '.join(MAPPINGS)} have.")
        if not given:
            if words and not words[0].startswith("--"):
                value = words.pop(0)
            elif TYPES[name] is bool:
                value = "true"
            else:
                raise ValueError(f"{word[:100]} needs a value.")
        check_text(value, f"--{name}")
        if value == "null":
            value = None
        elif TYPES[name] in (dict, list[int]):
            value = read_yaml(value, f"{word.split('=')[0][:100]} {quote(value)}")
        for key in reversed(keys):
            value = {key: value}
        settings[name] = merge(settings.get(name), value)
    return settings


def merge(below, above):
    """Mappings key by key, at any depth; of anything else what lies above."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {name: merge(below.get(name), value) for name, value in above.items()}


def lay_over(below: dict, above: dict) -> dict:
    """
    Settings over others, merged key by key. A start of weights that is named above takes away those below that it
    contradicts, so that `--init_from` needs no word about the recipe's DETR; with another dataset the flags of the one
    below go, and in an evaluation of another model the fields of the one below.
    """
    gone = set()
    for name, others in EXCLUDED_STARTS.items():
        if above.get(name) is not None:
            gone.update(others)
        if any(above.get(other) is not None for other in others):
            gone.add(name)
    gone -= above.keys()
    if above.get("dataset", below.get("dataset")) != below.get("dataset"):
        gone.add("dataset_config")
    # an evaluation of a model that is named above takes it as it was saved, and not as a recipe below would train it
    if above.get("init_from") is not None and is_true(above.get("eval_only", below.get("eval_only"))):
        gone.update(("model", "tokenizer"))
    return merge({name: value for name, value in below.items() if name not in gone}, above)


def is_true(value) -> bool:
    """Return whether a setting's value, or its text, is true."""
    return value is True or (isinstance(value, str) and value.lower() == "true")


def to_type(name: str, value):
    """
    A setting's value in its field's type: numbers may be written as text, and one number for a list of one.

    Raises:
        ValueError: if it is none.
    """
    kind = TYPES[name]
    if kind == list[int] and type(value) is int:
        return [value]
    if kind is bool and (isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))):
        return is_true(value)
    if kind is dict and isinstance(value, dict):
        return value
    if kind == list[int] and isinstance(value, list) and all(type(item) is int for item in value):
        return value
    if kind in (str, int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            return kind(str(value))
        except ValueError:
            pass  # the sentence below says it
    raise ValueError(f"{name}={quote(value)} must be {TYPE_NAMES[kind]}.")


def parse_arguments(argv: list[str]) -> TrainingArguments:
    """
    `[RECIPE.yaml ...] [--field value ...]`; the command line wins over the recipes, of them the later one, and a
    recipe over what it inherits and over the defaults. `--print_config` writes the settings that result, a recipe
    again, to stdout and ends; `--help` explains them.

    Raises:
        OSError: if a recipe is not there.
        ValueError: if a recipe is not a mapping, has a field that does not exist, or a value makes no sense.
        SystemExit: after `--help` and `--print_config`.
    """
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(describe_settings([word.lstrip("-").replace("-", "_") for word in argv]))
        sys.exit()
    words = [word for word in argv if word != "--print_config"]
    settings = {}
    while words and not words[0].startswith("-"):
        for layer in read_recipe(find_recipe(words.pop(0))).values():
            settings = lay_over(settings, layer)
    given = read_words(words)
    settings = lay_over(settings, given)
    args = TrainingArguments(**{name: to_type(name, value) for name, value in settings.items() if value is not None})
    if args.eval_only:
        refuse_start(args, given)
    if "--print_config" in argv:
        sys.stdout.write(to_recipe(args))
        sys.exit()
    return args


def refuse_start(args: TrainingArguments, given: dict):
    """
    Refuse settings of a training's start on the command line of an evaluation, which would ignore them. In a recipe
    they tell how the model was trained.

    Raises:
        ValueError: naming the first.
    """
    for name in ("init_detr", "init_backbone", "init_text", "resume"):
        if given.get(name) not in (None, "auto"):  # a script may ask for --resume auto whatever it starts
            raise ValueError(
                f"{name}={quote(given[name])} says where a training starts from, and eval_only trains nothing: name "
                "the model to evaluate in init_from, or leave both out to evaluate the one in output_dir."
            )
    if given.get("tokenizer") is not None and args.init_from is None:
        raise ValueError(
            f"tokenizer={quote(given['tokenizer'])} cannot be given beside output_dir={args.output_dir!r}, whose "
            "model brings the tokenizer that it was trained with: leave tokenizer out."
        )


def describe_settings(names: list[str]) -> str:
    """What `--help` says: the names of all settings, or what those named beside it are for."""
    chosen = [item for item in fields(TrainingArguments) if item.name in names or "all" in names]
    if not chosen:
        listed = textwrap.fill(", ".join(TYPES), width=100, initial_indent="  ", subsequent_indent="  ")
        return HELP.format(settings=listed)
    described = []
    for item in chosen:
        default = item.default if item.default is not MISSING else item.default_factory()
        described.append(f"{item.name} = {'none' if default is None else default}")
        described.append(textwrap.fill(item.metadata["help"], 100, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(described) + "\n"


def to_recipe(args: TrainingArguments, without: list[str] = (), comments: list[str] = ()) -> str:
    """
    Return the settings as a recipe.

    Args:
        args ([`TrainingArguments`]): the settings.
        without (`list[str]`, *optional*): names of settings to leave out.
        comments (`list[str]`, *optional*): lines to write before them as comments.
    """
    settings = {name: value for name, value in asdict(args).items() if name not in without}
    lines = "".join(f"# {for_terminal(' '.join(comment.split()))}\n" for comment in comments)
    return lines + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


HELP = """usage: reftr train [RECIPE.yaml ...] [--setting value ...]
       accelerate launch train_reftr.py [RECIPE.yaml ...] [--setting value ...]

Train RefTR and report on it, or with --eval_only only that. Recipes are YAML files of settings, later ones over
earlier ones, the command line over all: --learning_rate 1e-4, --model.decoder_layers 3, --eval_only. Without arguments
the demo runs; settings need a recipe, except for --eval_only --init_from MODEL --dataset NAME.

  reftr train recipes/demo.yaml --output_dir runs/demo
  reftr train recipes/demo.yaml --output_dir runs/demo --resume auto
  reftr train recipes/demo.yaml --output_dir runs/demo --eval_only
  reftr train recipes/demo.yaml --print_config      what will run, as a recipe
  reftr train --help learning_rate batch_size       what settings are for, with their defaults; all: --help all

settings:
{settings}
"""

TYPES = {
    # int | None -> int
    name: get_args(hint)[0] if isinstance(hint, UnionType) else hint
    for name, hint in get_type_hints(TrainingArguments).items()
}
TYPE_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping of names to values",
    list[int]: "a list of whole numbers",
}
MAX_DEPTH = 10  # of mappings that the name of a setting goes into
MAPPINGS = [name for name, kind in TYPES.items() if kind is dict]
