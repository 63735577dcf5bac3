"""Evaluation during training, which keeps the best model. `validate` is a collective: all processes call it."""

from collections.abc import Callable

import datasets
from accelerate import Accelerator

from data_scripts.quoting import quote
from training_reftr.checkpoints import save_best
from training_reftr.evaluation import default_best_metric, evaluate, summarize
from training_reftr.publishing import Publisher
from training_reftr.run import Run, describe_best
from training_reftr.sources import split_of
from training_reftr.tracking import Tracking


def validate(
    run: Run,
    rows: dict[str, datasets.Dataset],
    tracking: Tracking,
    publisher: Publisher,
    should_stop: Callable[[], bool],
    accelerator: Accelerator,
) -> bool:
    """
    Evaluate on the validation split and save the model if it is the best so far. A collective.

    Returns:
        `bool`: whether the evaluation was completed; False if `should_stop` ended it.
    """
    settings, state = run.settings, run.state
    split = split_of(rows, settings.data.validation_split)
    arguments = run.result, run.processor, split, settings, accelerator
    records = evaluate(*arguments, settings.data.validation_split, should_stop, run.evaluation)
    if records is None:
        return False
    metrics = summarize(records)
    name = settings.evaluation.best_metric or default_best_metric(
        metrics, accelerator.unwrap_model(run.result).config.predict_presence
    )
    if name not in metrics:
        raise ValueError(f"best_metric={quote(name)} is not one of {', '.join(sorted(metrics))}.")
    tracking.log_evaluation(state, settings.data.validation_split, metrics, records, split)
    if state.best is None or metrics[name] > state.best:
        state.best, state.best_step = metrics[name], state.step
        save_best(run.result, run.processor, settings.checkpoints.output_dir, accelerator)
        if accelerator.is_main_process:
            describe_best(settings, state.changes)
        publisher.push_best(state.step)
    state.is_evaluation_due = False
    return True
