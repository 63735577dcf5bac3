"""
Train RefTR, or evaluate it:

    accelerate launch train_reftr.py recipes/demo.yaml --output_dir runs/demo
    accelerate launch train_reftr.py recipes/demo.yaml --output_dir runs/demo --resume auto
    python train_reftr.py recipes/demo.yaml --output_dir runs/demo --eval_only
"""

import contextlib
import os
import signal
import sys
import threading

from data_scripts.escaping import for_terminal
from training_reftr.arguments import parse_arguments
from training_reftr.locating import check_sources
from training_reftr.recipes import with_recipe


if __name__ == "__main__":
    # End at once on a signal during the imports below, which take seconds. Only a main thread may set handlers.
    for number in (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ():
        signal.signal(number, lambda number, _: os._exit(128 + number))
    ARGV = with_recipe(sys.argv[1:])
    try:
        check_sources(parse_arguments(ARGV))  # an invalid command line fails before the imports below
    except (ValueError, OSError) as error:
        sys.exit(for_terminal(f"error: {error}"))

from accelerate import Accelerator

from training_reftr.banner import announce, describe_results
from training_reftr.calibration import calibrate
from training_reftr.card import write_card
from training_reftr.checkpoints import save_checkpoint
from training_reftr.dry_run import estimate, limited
from training_reftr.guards import Signals, Stopped, Watchdog, explain_runtime_error
from training_reftr.launch import is_main_rank, resume_command
from training_reftr.lock import exclusive
from training_reftr.progress import Progress
from training_reftr.publishing import Publisher
from training_reftr.report import format_metrics, report, select_splits
from training_reftr.run import Run, build_accelerator, load_for_report, prepare_run
from training_reftr.settings import TrainingSettings
from training_reftr.sources import load_rows, split_of
from training_reftr.step import train_step
from training_reftr.tracking import Tracking, describe_step
from training_reftr.validation import validate


def main(argv: list[str] | None = None) -> int:
    """Run the script with the arguments of a command line and return the exit code."""
    argv = with_recipe(sys.argv[1:] if argv is None else argv)
    settings = parse_arguments(argv)
    with Signals() as signals:
        try:
            run_all(settings, signals)
        except Stopped as stopped:
            if is_main_rank():
                is_training = not (settings.evaluation.eval_only or settings.checkpoints.dry_run)
                hint = f" Continue with:\n  {resume_command(argv)}" if is_training else ""
                sys.stderr.write(for_terminal(f"{stopped}{hint}\n"))
            return stopped.exit_code
        except RuntimeError as error:
            explained = explain_runtime_error(error)
            if explained is None:
                raise
            if signals.stop:  # another rank stopped first, which broke the connection
                return Stopped(signals.stop).exit_code
            raise explained from error
    return 0


def run_all(settings: TrainingSettings, signals: Signals) -> None:
    """
    Build, train or evaluate, report.

    Raises:
        Stopped: if a signal ended the run.
    """
    accelerator = build_accelerator(settings)
    output_dir, eval_only = settings.checkpoints.output_dir, settings.evaluation.eval_only
    with contextlib.nullcontext() if settings.checkpoints.dry_run else exclusive(output_dir, accelerator):
        # The main process builds the dataset, the others read it from the cache.
        with accelerator.main_process_first():
            rows = load_rows(settings.data, eval_only)
        select_splits(rows, settings.data)  # reject invalid splits now, not after hours of training
        if not eval_only:
            split_of(rows, settings.data.validation_split)
        with limited(settings, rows, accelerator) as (settings, rows):
            # Reject a run that cannot learn before anything is written or pushed.
            run = None if eval_only else prepare_run(rows, settings, accelerator)
            publisher = Publisher(settings, accelerator)
            if run is not None and not train(run, rows, publisher, signals, accelerator):
                accelerator.end_training()
                raise Stopped(signals.stop, is_saved=True)
            del run  # free its memory for the report
            model, processor = load_for_report(settings)
            if eval_only:
                announce(rows, model, settings, accelerator)
            elif model.config.predict_presence:
                calibrate(model.to(accelerator.device), processor, rows, settings, accelerator)
            metrics = report(model.to(accelerator.device), processor, rows, settings, accelerator)
            if accelerator.is_main_process:
                if not (eval_only and settings.initialization.init_from):  # the folder has no model otherwise
                    write_card(settings.checkpoints.output_dir)
                results = f"{format_metrics(metrics)}\n\n{describe_results(settings.checkpoints.folder, metrics)}"
                sys.stdout.write(for_terminal(f"{estimate(settings) if settings.checkpoints.dry_run else results}\n"))
                if revision := publisher.finish():
                    sys.stdout.write(f"Pushed to {settings.hub.push_to_hub}, revision {revision}\n")
    accelerator.end_training()


def train(run: Run, rows: dict, publisher: Publisher, signals: Signals, accelerator: Accelerator) -> bool:
    """
    Train, writing checkpoints and the best model by validation into the run's folder.

    Returns:
        `bool`: whether the run is complete; False if a signal stopped it, after a checkpoint was saved.
    """
    settings = run.settings
    checkpoint_every = settings.checkpoints.checkpoint_every
    tracking = Tracking(settings, accelerator, run.state)
    progress = Progress("training", run.num_steps, run.state.schedule_step, is_shown=accelerator.is_main_process)
    deferred = signals.deferred(is_announced=accelerator.is_main_process)
    with progress, deferred, Watchdog(settings.checkpoints.watchdog_minutes) as watchdog:

        def save() -> None:
            parts = run.model, run.optimizer, run.processor, run.state
            save_checkpoint(*parts, settings.checkpoints, accelerator, run.average)

        def should_stop() -> bool:
            """Save and stop as signals ask for, between two steps of training or evaluation. A collective."""
            watchdog.feed()
            is_save_asked, is_stop_asked = signals.poll(accelerator)
            if is_save_asked or is_stop_asked:
                save()
            return is_stop_asked

        # The checkpoint may have been written just before an evaluation.
        if run.state.is_evaluation_due and not validate(run, rows, tracking, publisher, should_stop, accelerator):
            return False
        while not run.is_done:
            for batches in run.steps():
                losses, num_expressions = train_step(run, batches, accelerator)
                run.advance()
                progress.update(lambda losses=losses: describe_step(run, losses))
                tracking.log_step(run, losses, num_expressions)
                if should_stop():
                    return False
                if checkpoint_every and run.state.step % checkpoint_every == 0:
                    save()
            run.state.is_evaluation_due = run.state.epoch % settings.evaluation.evaluate_every == 0 or run.is_done
            save()
            if run.state.is_evaluation_due and not validate(run, rows, tracking, publisher, should_stop, accelerator):
                return False
        return not should_stop()  # a signal may have come after the last step


if __name__ == "__main__":
    try:
        sys.exit(main(ARGV))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(for_terminal(f"error: {error}"))
