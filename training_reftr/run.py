"""
The parts of a training run. `build_accelerator` and `prepare_run` are collectives: all processes call them.
"""

import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    set_seed,
)
from torch.optim.swa_utils import AveragedModel
from transformers.utils.logging import disable_progress_bar

from data_scripts.atomic_files import write_file
from data_scripts.escaping import TerminalFormatter
from data_scripts.progress import disable_library_bars
from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from modeling_reftr.locating_reftr import HUB_ID
from training_reftr.averaging import build_average, load_average
from training_reftr.banner import announce
from training_reftr.batch_norm import synchronize_batch_norm
from training_reftr.build import build_model, load_reftr, refuse_model_changes, refuse_tokenizer
from training_reftr.checkpoints import AVERAGE, TrainingState, find_checkpoint, load_optimizer, load_state
from training_reftr.data import EvaluationData, TrainingData
from training_reftr.fingerprint import Fingerprint
from training_reftr.optimization import build_optimizer, build_scheduler, num_warmup_steps
from training_reftr.preflight import (
    find_unfinished_warmup,
    refuse_empty_splits,
    refuse_few_samples,
    refuse_idle_model,
    refuse_missing_labels,
)
from training_reftr.recipes import to_recipe
from training_reftr.resuming import find_changes, with_model_of, with_sizes_of
from training_reftr.settings import OptimizationSettings, Scope, TrainingSettings, names_in_scope
from training_reftr.sources import split_of
from training_reftr.streams import StreamedRows, StreamFingerprint, count_together


logger = logging.getLogger(__name__)


@dataclass
class Run:
    """
    Hold the parts of a run and its progress.

    Args:
        model, optimizer: model and optimizer, prepared by the accelerator.
        processor (`RefTRProcessor`): processor of the model.
        scheduler (`torch.optim.lr_scheduler.LRScheduler`): learning rate schedule, stepped once per optimizer step.
        data (`TrainingData`): training batches of this process.
        state (`TrainingState`): progress of the run.
        global_batch_size (`int`): number of samples per batch on all processes together.
        settings ([`TrainingSettings`]): settings in effect.
        evaluation (`EvaluationData`, *optional*): batches of the validation split.
        average (`AveragedModel`, *optional*): moving average of the weights, with `ema_decay`.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    processor: RefTRProcessor
    scheduler: torch.optim.lr_scheduler.LRScheduler
    data: TrainingData
    state: TrainingState
    global_batch_size: int
    settings: TrainingSettings
    evaluation: EvaluationData | None = None
    average: AveragedModel | None = None

    @property
    def result(self) -> torch.nn.Module:
        """Return the model that is evaluated and saved: the average of the weights if there is one."""
        return self.model if self.average is None else self.average.module

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of the complete run, with epochs of their current length."""
        num_steps = self.state.steps_per_epoch * self.settings.schedule.num_epochs
        return min(num_steps, self.settings.schedule.max_steps) if self.settings.schedule.max_steps else num_steps

    @property
    def is_done(self) -> bool:
        """Return whether the run has completed all its epochs or optimizer steps."""
        state, settings = self.state, self.settings
        return state.epoch >= settings.schedule.num_epochs or 0 < settings.schedule.max_steps <= state.step

    @property
    def is_at_last_step(self) -> bool:
        """Return whether no optimizer step comes after this one, also before its epoch is closed."""
        return self.is_done or self.state.schedule_step >= self.num_steps

    def steps(self) -> Iterator[list[dict]]:
        """Yield the batches of each optimizer step left in this epoch, until the run is done."""
        seen = [tuple(cut) for cut in self.state.seen]
        batches = self.data.batches(self.state.epoch, seen)
        accumulated = self.settings.optimization.gradient_accumulation_steps
        for _ in range(self.data.num_batches(self.state.epoch, seen) // accumulated):
            yield [next(batches) for _ in range(accumulated)]
            if self.is_done:
                return
        self.state.start_epoch(self.state.epoch + 1)

    def advance(self) -> None:
        """Record an optimizer step, average the weights, and set the learning rates of the next step."""
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.scheduler.step()
        self.state.step += 1
        self.state.schedule_step += 1
        num_batches = self.settings.optimization.gradient_accumulation_steps
        self.state.count(self.global_batch_size, num_batches, self.data.layout)


def build_accelerator(settings: TrainingSettings) -> Accelerator:
    """Return the accelerator as accelerate was configured or launched, and set up logging."""
    accelerator = Accelerator(
        # Without this, CPU processes that torchrun started would each train alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=settings.optimization.mixed_precision,
        log_with=settings.tracking.tracker_names or None,
        project_dir=settings.checkpoints.output_dir,
        # A process that waits longer for another one fails.
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=settings.checkpoints.watchdog_minutes)),
            # Without this, DDP changes the order in which it adds up gradients after the first step of a process, and
            # a run that resumes has other last bits; the sum of two processes has one order.
            DistributedDataParallelKwargs(find_unused_parameters=int(os.environ.get("WORLD_SIZE", 1)) > 2),
        ],
    )
    disable_progress_bar()  # the library shows one for every file it reads or writes
    disable_library_bars()
    handler = logging.StreamHandler()
    handler.setFormatter(TerminalFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(
        handlers=[handler],
        level=logging.INFO if accelerator.is_main_process else logging.WARNING,
    )
    return accelerator


def prepare_run(rows: dict, settings: TrainingSettings, accelerator: Accelerator) -> Run:
    """
    Build a run, or restore it from the checkpoint of `resume`. The returned run has the settings in effect, some of
    which the model or the checkpoint decide. A collective; no file is written.

    Raises:
        OSError, ValueError: see `find_checkpoint`, `build_model`, `with_model_of`, `TrainingData`, and `preflight` for
            runs that cannot learn.
    """
    refuse_empty_splits(rows, settings.data)
    train_rows = split_of(rows, settings.data.train_split)
    checkpoint = find_checkpoint(settings.checkpoints, accelerator)
    set_seed(settings.optimization.seed)  # equal weights on all processes
    model, processor, state, settings = start_or_resume(settings, train_rows, checkpoint)
    refuse_idle_model(model, settings.optimization, settings.data.negative_ratio)
    if accelerator.num_processes > 1 and not model.config.freeze_backbone_batch_norm:
        synchronize_batch_norm(model, accelerator.device)
    contents = None
    if isinstance(train_rows, StreamedRows):
        limit = settings.data.sentences_per_sample
        contents = count_together(train_rows, limit, accelerator, model.config.predict_presence)
    data = TrainingData(
        train_rows,
        processor,
        settings,
        accelerator.process_index,
        accelerator.num_processes,
        with_masks=model.config.predict_masks,
        contents=contents,
        learns_absence=model.config.predict_presence,
    )
    num_batches = data.num_batches(0)
    refuse_few_samples(num_batches, settings.optimization, accelerator.num_processes)
    warnings = [refuse_missing_labels(train_rows, settings.data, model.config.predict_masks)]
    configure_deepspeed(settings.optimization, accelerator)
    announce(rows, model, settings, accelerator)
    average = build_average(model, settings.optimization, accelerator)
    if average is not None and checkpoint is not None:
        load_average(checkpoint / AVERAGE, average)
    if settings.optimization.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, build_optimizer(model, settings.optimization))
    global_batch_size = settings.optimization.batch_size * accelerator.num_processes
    if checkpoint is not None:
        load_optimizer(checkpoint, model, optimizer, state, accelerator)
        changes = ", ".join(find_changes(state, settings, global_batch_size, data))
        if any(len(cut) != 2 + len(data.layout) for cut in state.seen):  # the orders of streams and others differ
            state.start_epoch(state.epoch + 1)
        if changes:
            state.changes.append(f"from step {state.step} on: {changes}")
            warnings.append(f"This run is not quite the one of the checkpoint: {changes}.")
    if accelerator.is_main_process:  # the only one that writes checkpoints
        note_data(state, data.fingerprint)
    state.settings = settings.to_flat()
    state.rescale_schedule(num_batches // settings.optimization.gradient_accumulation_steps)
    validation = {settings.data.validation_split: split_of(rows, settings.data.validation_split)}
    evaluation = EvaluationData(
        validation,
        processor,
        settings,
        accelerator.process_index,
        accelerator.num_processes,
    )
    run = Run(model, optimizer, processor, None, data, state, global_batch_size, settings, evaluation, average)
    run.scheduler = build_scheduler(
        optimizer, settings.schedule, state.steps_per_epoch, run.num_steps, done=state.schedule_step
    )
    if not settings.checkpoints.dry_run:
        warnings.append(
            find_unfinished_warmup(num_warmup_steps(settings.schedule, state.steps_per_epoch), run.num_steps)
        )
    if accelerator.is_main_process:
        for warning in filter(None, warnings):
            logger.warning(warning)
    model.train()
    return run


def start_or_resume(
    settings: TrainingSettings, train_rows: datasets.Dataset | StreamedRows, checkpoint: Path | None
) -> tuple[RefTRForVisualGrounding, RefTRProcessor, TrainingState, TrainingSettings]:
    """
    Build the initial model of a run, or load that of a checkpoint. A collective.

    Returns:
        `tuple`: the model, its processor, the state of the run, and the settings with what the model decides.
    """
    if checkpoint is None:
        model, processor = build_model(settings, train_rows)
        run_id = [uuid.uuid4().hex]
        broadcast_object_list(run_id)
        if settings.checkpoints.resume:
            logger.info(f"There is no checkpoint in {settings.checkpoints.output_dir!r} yet: a new run.")
        return model, processor, TrainingState(run_id=run_id[0]), with_sizes_of(settings, processor)
    model, processor = load_checkpoint(checkpoint, settings.initialization.attn_implementation)
    state = load_state(checkpoint)
    settings = with_model_of(settings, model.config, processor, state.settings, checkpoint)
    if not settings.checkpoints.folder.weights.exists():
        state.best = state.best_step = None  # the best so far is of another folder
    logger.info(f"Going on from {str(checkpoint)!r}: step {state.step}, epoch {state.epoch}.")
    return model, processor, state, settings


def configure_deepspeed(optimization: OptimizationSettings, accelerator: Accelerator) -> None:
    """Tell DeepSpeed what it cannot infer, because the accelerator does not prepare the loader."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": optimization.batch_size,
            "gradient_accumulation_steps": optimization.gradient_accumulation_steps,
            "gradient_clipping": optimization.max_grad_norm,
        }


def load_checkpoint(path: Path, attn_implementation: str | None) -> tuple[RefTRForVisualGrounding, RefTRProcessor]:
    """
    Load the model and the processor of a checkpoint.

    Raises:
        OSError: if a file cannot be loaded or weights are missing.
    """
    try:
        model, info = RefTRForVisualGrounding.from_pretrained(
            path, dtype=torch.float32, attn_implementation=attn_implementation, output_loading_info=True
        )
        processor = RefTRProcessor.from_pretrained(path)
    except Exception as error:  # the library raises exceptions of many types
        raise OSError(f"The checkpoint {str(path)!r} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise OSError(
            f"The checkpoint {str(path)!r} lacks {len(names)} weights of its model, the first is {names[0]!r}."
        )
    # Copy tensors out of the mapped file, whose alignment changes how sums are rounded.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model, processor


def describe_best(settings: TrainingSettings, changes: Iterable[str] = ()) -> None:
    """
    Write the recipe of a new best model into its folder, and remove the report and origin of the former one.

    Args:
        settings ([`TrainingSettings`]): settings of the run.
        changes (`list[str]`, *optional*): settings changed on resuming, see `TrainingState`.
    """
    folder = settings.checkpoints.folder
    folder.remove_report()
    folder.origin.unlink(missing_ok=True)
    recipe = to_recipe(with_local_paths(settings), without=names_in_scope(Scope.MACHINE), comments=changes)
    write_file(folder.recipe, recipe)


def with_local_paths(settings: TrainingSettings) -> TrainingSettings:
    """Return settings in which folders of starting weights cannot be mistaken for Hub ids: "./runs/boxes"."""
    names = ("init_from", "init_detr", "init_text", "tokenizer")
    starts = {name: getattr(settings.initialization, name) for name in names}
    folders = {name: f"./{start}" for name, start in starts.items() if start and is_folder_like_id(start)}
    return settings.replace(**folders)


def is_folder_like_id(start: str) -> bool:
    """Return whether starting weights are an existing folder whose path looks like a Hub id."""
    return HUB_ID.fullmatch(start) is not None and Path(start).exists()


def load_for_report(settings: TrainingSettings) -> tuple[RefTRForVisualGrounding, RefTRProcessor]:
    """
    Return the model of the report: the run's best model, or with `eval_only` the one of `init_from`, if given.

    Raises:
        OSError, ValueError: see `load_reftr`, or if the settings of an evaluation describe another model.
    """
    output_dir, init_from = Path(settings.checkpoints.output_dir), settings.initialization.init_from
    if not settings.evaluation.eval_only:
        return load_reftr(output_dir, settings)
    if init_from is not None:
        refuse_tokenizer(settings.initialization)
    source = output_dir if init_from is None else init_from
    model, processor = load_reftr(source, settings)
    refuse_model_changes(model.config, settings.initialization, str(source))
    return model, processor


def note_data(state: TrainingState, fingerprint: Fingerprint | StreamFingerprint) -> None:
    """Record the fingerprint of the training data in the state of a run, and warn if it has changed."""
    found = fingerprint.num_rows, fingerprint.hexdigest()
    if state.fingerprint and found != (state.num_rows, state.fingerprint):
        logger.warning(
            f"The training data changed since the checkpoint was written: {found[0]} rows with fingerprint {found[1]} "
            f"now, {state.num_rows} rows with fingerprint {state.fingerprint} then. Losses will differ, and the epoch "
            "may leave samples out or show some twice."
        )
    state.num_rows, state.fingerprint = found
