"""
Checkpoints that survive a crash at any moment. `save_checkpoint`, `save_best`, `load_optimizer` and `find_checkpoint`
are collectives: all processes call them; only the main process writes.

    output_dir/
        checkpoints/
            step_00001200/
                config.json, model.safetensors, processor files    a folder for `from_pretrained`
                optimizer.safetensors                               by the parameters' names
                average.safetensors                                 moving average of the weights, with `ema_decay`
                state.json                                          progress of the run, see `TrainingState`
                manifest.json                                       sizes and SHA-256 of all the others, written last
        config.json, model.safetensors, ...                         the best model so far, with its processor

A checkpoint is written under another name, flushed to disk, and renamed when it is complete. It has no random state:
the random numbers of a step depend only on the seed, the step and the process.
"""

import contextlib
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel

from data_scripts.atomic_files import atomic_folder, remove_folder, remove_leftovers, replaced_files, sha256_of
from data_scripts.quoting import quote
from modeling_reftr import RefTRProcessor
from modeling_reftr.saving_reftr import save_tensors
from training_reftr.guards import explain_runtime_error
from training_reftr.json_files import read_json
from training_reftr.run_folder import RunFolder
from training_reftr.settings import CheckpointSettings


logger = logging.getLogger(__name__)

MANIFEST, STATE, OPTIMIZER = "manifest.json", "state.json", "optimizer.safetensors"
AVERAGE = "average.safetensors"
NAME = re.compile(r"step_(\d{8,})")
# files without which a checkpoint is not complete
REQUIRED = ("config.json", "model*.safetensors", OPTIMIZER, STATE, "processor_config.json", "tokenizer_config.json")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class TrainingState:
    """
    Hold the progress of a run.

    Args:
        step (`int`): optimizer steps taken.
        epoch (`int`): current epoch, from 0.
        seen (`list`): progress of the epoch, [global batch size, batches] for each batch size it was trained with; for
            a stream [global batch size, batches, processes, readers of a process], see `training_reftr.streams`.
        is_evaluation_due (`bool`): whether the model must be evaluated before it is trained further.
        best (`float`, *optional*): best validation metric so far, reached at `best_step`.
        schedule_step (`int`): step of the learning rate schedule, in epochs of `steps_per_epoch` steps.
        scaler (`dict`, *optional*): state of the gradient scaler of fp16.
        run_id (`str`): identifier of the run for trackers.
        settings (`dict`): flat settings of the run, to detect changes when it resumes.
        changes (`list[str]`): one sentence on the changed settings for each time the run was resumed.
        num_rows (`int`), fingerprint (`str`): rows of the training data and a hash of them, see
            `training_reftr.fingerprint`; 0 and empty in checkpoints of earlier versions.
    """

    step: int = 0
    epoch: int = 0
    seen: list[list[int]] = field(default_factory=list)
    is_evaluation_due: bool = False
    best: float | None = None
    best_step: int | None = None
    schedule_step: int = 0
    steps_per_epoch: int = 0
    scaler: dict | None = None
    run_id: str = ""
    settings: dict = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    num_rows: int = 0
    fingerprint: str = ""

    def count(self, global_batch_size: int, num_batches: int, layout: tuple[int, ...] = ()) -> None:
        """Add batches to the progress of the epoch; `layout` is that of a stream."""
        if self.seen and [self.seen[-1][0], *self.seen[-1][2:]] == [global_batch_size, *layout]:
            self.seen[-1][1] += num_batches
        else:
            self.seen.append([global_batch_size, num_batches, *layout])

    def start_epoch(self, epoch: int) -> None:
        """Move to the start of an epoch."""
        self.epoch, self.seen = epoch, []

    def rescale_schedule(self, steps_per_epoch: int) -> None:
        """Convert the schedule to another number of steps per epoch, as after a change of batch size or processes."""
        if self.steps_per_epoch not in (0, steps_per_epoch):
            self.schedule_step = round(self.schedule_step * steps_per_epoch / self.steps_per_epoch)
        self.steps_per_epoch = steps_per_epoch


def save_checkpoint(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    processor: RefTRProcessor,
    state: TrainingState,
    checkpoints: CheckpointSettings,
    accelerator: Accelerator,
    average: AveragedModel | None = None,
) -> None:
    """
    Write a checkpoint of this step, then delete the oldest beyond `keep_checkpoints`. A collective.

    Args:
        average (`AveragedModel`, *optional*): moving average of the weights.

    Raises:
        OSError: on all processes, if it cannot be written; existing checkpoints stay.
    """
    weights = weights_of(model, accelerator)
    moments = {}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        logger.warning("DeepSpeed keeps AdamW's moments to itself: the checkpoint is without them.")
    else:
        moments = get_optimizer_state_dict(model, optimizer.optimizer, options=FULL).get("state", {})
    state.scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    path = checkpoints.folder.checkpoint(state.step)

    def write(folder: Path) -> None:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=weights)
        processor.save_pretrained(folder)
        # Hyperparameters such as learning rates are not saved: they come from the settings.
        tensors = {f"{name}/{key}": value for name, values in moments.items() for key, value in values.items()}
        save_tensors(tensors, folder / OPTIMIZER)
        if average is not None:
            save_tensors(average.state_dict(), folder / AVERAGE)
        (folder / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")

    with on_main_process(accelerator, f"The checkpoint of step {state.step} was not written"):
        if accelerator.is_main_process and not path.exists():
            write_checkpoint(path, write)
            for old in checkpoints_of(checkpoints.output_dir)[checkpoints.keep_checkpoints :]:
                remove_folder(old)


def save_best(
    model: torch.nn.Module, processor: RefTRProcessor, output_dir: str | Path, accelerator: Accelerator
) -> None:
    """
    Save a model as the best one of the run. A collective.

    The weights are replaced last and by one rename. The other files are the same throughout a run, so that the folder
    can be loaded at any moment.

    Raises:
        OSError: on all processes, if it cannot be written; the existing model stays.
    """
    weights = weights_of(model, accelerator)
    with on_main_process(accelerator, "The best model was not written"):
        if accelerator.is_main_process:
            output_dir = Path(output_dir)
            remove_leftovers(output_dir)  # left by a run that was killed while writing
            with replaced_files(output_dir, last="*.safetensors") as folder:
                accelerator.unwrap_model(model).save_pretrained(folder, state_dict=weights)
                processor.save_pretrained(folder)


def weights_of(model: torch.nn.Module, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Return all weights on the main process, gathered if they are sharded. A collective."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.get_state_dict(model)
    return get_model_state_dict(model, options=FULL)


def find_checkpoint(checkpoints: CheckpointSettings, accelerator: Accelerator) -> Path | None:
    """
    Return the checkpoint to resume from: the folder of `resume`, or with "auto" the latest valid checkpoint of the
    run; None for a new run. A collective: all processes get the same checkpoint.

    Later checkpoints of an "auto" run that are damaged are renamed, so that their names are free.

    Raises:
        OSError: if the checkpoint is missing or damaged, if all checkpoints of an "auto" run are damaged, or if the
            folder has checkpoints of another run or later ones.
    """
    found = [None]
    with on_main_process(accelerator):
        if accelerator.is_main_process:
            if checkpoints.resume == "auto":
                found = [find_latest_valid_checkpoint(checkpoints.output_dir)]
                rename_later(checkpoints.output_dir, found[0])
            elif checkpoints.resume is not None:
                found = [Path(checkpoints.resume)]
                problem = validate_checkpoint(found[0])
                if problem:
                    raise OSError(f"--resume {checkpoints.resume!r}: {problem}.")
            refuse_others(checkpoints.output_dir, found[0])
    broadcast_object_list(found)
    return found[0]


def refuse_others(output_dir: str | Path, checkpoint: Path | None) -> None:
    """Raise an OSError if a folder has checkpoints of another run, or later ones than the one to resume from."""
    found = checkpoints_of(output_dir)
    known = [path for path in found if checkpoint is not None and path.resolve() == checkpoint.resolve()]
    others = found[: found.index(known[0])] if known else found
    if others:
        names = ", ".join(path.name for path in others)
        raise OSError(
            f"{str(output_dir)!r} has checkpoints of another run, or later ones: {names}. Go on from the newest by "
            f"--resume auto, choose another --output_dir, or take them out of {str(found[0].parent)!r}."
        )


def load_state(path: Path) -> TrainingState:
    """
    Return the progress of the run that wrote a checkpoint.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it was written by a later version, or a field is missing, of another type or out of range.
    """
    file = path / STATE
    values = read_json(file)
    known = [item.name for item in fields(TrainingState)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(
            f"{str(file)!r} was written by a later version of this code, which adds the field {quote(unknown[0])}: "
            "continue it with that version"
        )
    missing = [name for name in known if name not in values and name not in ADDED_FIELDS]
    if missing:
        raise ValueError(f"{str(file)!r} has no field {missing[0]!r}")
    for name, value in values.items():
        expected, is_valid = STATE_FIELDS[name]
        if not is_valid(value):
            raise ValueError(f"{str(file)!r} has {name}={quote(value)}, expected {expected}")
    state = TrainingState(**values)
    folder = NAME.fullmatch(path.name)
    if folder and state.step != int(folder[1]):
        raise ValueError(f"{str(file)!r} is of step {state.step}, but its folder is {path.name!r}")
    if (state.best is None) != (state.best_step is None) or (state.best_step or 0) > state.step:
        raise ValueError(
            f"{str(file)!r} has best={quote(state.best)} and best_step={quote(state.best_step)}, expected both or "
            f"neither, of step {state.step} or earlier"
        )
    return state


def is_count(value: Any, minimum: int = 0) -> bool:
    """Return whether a JSON value is an integer of at least a minimum that 64 bits hold."""
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value < 2**63


def is_finite(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_progress(value: Any) -> bool:
    """Return whether a JSON value is a list as `TrainingState.seen`."""
    return isinstance(value, list) and all(
        isinstance(cut, list) and len(cut) in (2, 4) and all(is_count(number, 1) for number in cut) for cut in value
    )


def is_scaler(value: Any) -> bool:
    """Return whether a JSON value is the state of a gradient scaler, or null."""
    return value is None or (
        isinstance(value, dict) and all(isinstance(number, int | float) for number in value.values())
    )


def is_texts(value: Any) -> bool:
    """Return whether a JSON value is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


COUNT = ("an integer from 0 to 2**63 - 1", is_count)
# field of `TrainingState` -> (what its value must be, whether a JSON value is so)
STATE_FIELDS = {
    "step": COUNT,
    "epoch": COUNT,
    "seen": ("a list of [global batch size, number of batches]", is_progress),
    "is_evaluation_due": ("true or false", lambda value: isinstance(value, bool)),
    "best": ("a finite number or null", lambda value: value is None or is_finite(value)),
    "best_step": ("an integer from 0 to 2**63 - 1, or null", lambda value: value is None or is_count(value)),
    "schedule_step": COUNT,
    "steps_per_epoch": COUNT,
    "scaler": ("the numbers of a gradient scaler or null", is_scaler),
    "run_id": ("text", lambda value: isinstance(value, str)),
    "settings": ("a mapping", lambda value: isinstance(value, dict)),
    "changes": ("a list of texts", is_texts),
    "num_rows": COUNT,
    "fingerprint": ("text", lambda value: isinstance(value, str)),
}
ADDED_FIELDS = ("changes", "num_rows", "fingerprint")  # missing in checkpoints of earlier versions


def load_optimizer(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    accelerator: Accelerator,
) -> None:
    """Load the moments and gradient scaler of a checkpoint; learning rates are kept. A collective."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        logger.warning("AdamW's moments start at zero: DeepSpeed kept them to itself when the checkpoint was written.")
        return
    moments = {}
    for key, value in load_file(path / OPTIMIZER).items():
        name, _, moment = key.rpartition("/")
        moments.setdefault(name, {})[moment] = value
    if not moments:
        logger.warning(f"AdamW's moments start at zero: {str(path / OPTIMIZER)!r} was written without them.")
        return
    groups = get_optimizer_state_dict(model, optimizer.optimizer)["param_groups"]
    try:
        set_optimizer_state_dict(model, optimizer.optimizer, {"state": moments, "param_groups": groups}, options=FULL)
    except (KeyError, RuntimeError, ValueError) as error:
        raise OSError(f"{str(path / OPTIMIZER)!r} does not fit the model: {error}.") from error
    if accelerator.scaler is not None and state.scaler is not None:
        accelerator.scaler.load_state_dict(state.scaler)


def checkpoints_of(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, latest first, without validating them."""
    folder = RunFolder(Path(output_dir)).checkpoints
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name)[1]), reverse=True)


def find_latest_valid_checkpoint(output_dir: str | Path) -> Path | None:
    """
    Return the latest valid checkpoint of a run, None if there is none. Warn of later ones that are damaged.

    Raises:
        OSError: if there are checkpoints, but all of them are damaged.
    """
    found, problems = checkpoints_of(output_dir), {}
    for path in found:
        problem = validate_checkpoint(path)
        if problem is None:
            return path
        logger.warning(f"{problem}; the previous checkpoint is used.")
        problems[path] = problem
    if found:
        raise OSError(
            f"All {len(found)} checkpoints in {str(found[0].parent)!r} are damaged, the latest because "
            f"{problems[found[0]]}. Move them away to start from scratch."
        )
    return None


def rename_later(output_dir: str | Path, checkpoint: Path | None) -> None:
    """Rename the damaged checkpoints after the latest valid one, so that their names are free and nothing is lost."""
    for path in itertools.takewhile(lambda path: path != checkpoint, checkpoints_of(output_dir)):
        names = (f"{path.name}.damaged{number or ''}" for number in itertools.count())
        path.rename(next(path.with_name(name) for name in names if not path.with_name(name).exists()))


def validate_checkpoint(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if it is complete, unmodified and can be resumed."""
    try:
        manifest = read_json(path / MANIFEST)
        check_manifest(path, manifest)
        for name, (size, digest) in manifest.items():
            file = path / name
            if file.stat().st_size != size or sha256_of(file) != digest:
                return f"{str(file)!r} is not as it was written"
        load_state(path)
        check_optimizer(path)
    except FileNotFoundError as error:
        return f"{str(path)!r} is not a complete checkpoint: {error}"
    except (OSError, ValueError, SafetensorError) as error:
        return str(error).rstrip(".") if str(path) in str(error) else f"{str(path)!r} is damaged: {error}"
    return None


def check_manifest(path: Path, manifest: dict) -> None:
    """
    Validate what a checkpoint's manifest says, without looking at the files.

    Raises:
        ValueError: if a required file is not listed, an entry is malformed, or one is outside of the folder.
    """
    where = f"{str(path / MANIFEST)!r}"
    for name, entry in manifest.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
            raise ValueError(f"{where} lists {quote(name)}, which is not a file in its folder")
        if not (
            isinstance(entry, list)
            and len(entry) == 2
            and is_count(entry[0])
            and isinstance(entry[1], str)
            and re.fullmatch("[0-9a-f]{64}", entry[1])
        ):
            raise ValueError(f"{where} has {quote(entry)} for {quote(name)}, expected [size in bytes, SHA-256]")
    missing = [pattern for pattern in REQUIRED if not any(fnmatchcase(name, pattern) for name in manifest)]
    if missing:
        raise ValueError(f"{str(path)!r} is not a complete checkpoint: {MANIFEST} does not list {', '.join(missing)}")


def check_optimizer(path: Path) -> None:
    """
    Compare a checkpoint's optimizer with its weights, by the headers of their files.

    Raises:
        SafetensorError: if a file is malformed.
        ValueError: if a moment belongs to no weight, or is of another shape.
    """
    weights = {name: shape for file in path.glob("model*.safetensors") for name, shape in shapes_in(file).items()}
    for key, shape in shapes_in(path / OPTIMIZER).items():
        name, _, moment = key.rpartition("/")
        if name not in weights:
            raise ValueError(f"{str(path / OPTIMIZER)!r} does not fit the model, which has no weight {quote(name)}")
        if moment != "step" and shape != weights[name]:
            raise ValueError(
                f"{str(path / OPTIMIZER)!r} does not fit the model: {quote(key)} has shape {shape}, the weight has "
                f"{weights[name]}"
            )


def shapes_in(file: Path) -> dict[str, list[int]]:
    """Return name -> shape of the tensors in a safetensors file, of which the header is read."""
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118


def write_checkpoint(path: Path, write: Callable[[Path], None]) -> None:
    """
    Write a checkpoint's folder atomically: `write(folder)` fills it, the manifest is added.

    Raises:
        OSError: if it cannot be written; nothing is left of it.
    """
    remove_leftovers(path.parent)  # left by a run that was killed while writing
    with atomic_folder(path) as folder:
        write(folder)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        manifest = {str(file.relative_to(folder)): [file.stat().st_size, sha256_of(file)] for file in files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


@contextlib.contextmanager
def on_main_process(accelerator: Accelerator, what: str = "") -> Iterator[None]:
    """
    Run a block in which the main process writes files, and make all processes fail if it fails. A collective.

    Raises:
        OSError: on all processes, with the message of the exception that the main process raised.
    """
    error = [None]
    try:
        yield
    except Exception as raised:  # safetensors and tokenizers raise their own exceptions for a full disk
        error = [raised]
    message = [None if error[0] is None else f"{what}: {error[0]}" if what else str(error[0])]
    if isinstance(error[0], RuntimeError) and (explained := explain_runtime_error(error[0])):
        message = [str(explained)]  # torch raises for a lost loader process at any point of the main thread
    broadcast_object_list(message)
    if message[0] is not None:
        raise OSError(message[0]) from error[0]
