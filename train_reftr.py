"""
Train RefTR, or evaluate it:

    accelerate launch train_reftr.py recipes/demo.yaml --output_dir runs/demo
    python train_reftr.py recipes/demo.yaml --output_dir runs/demo --eval_only
"""

import logging
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from training_reftr.arguments import TrainingArguments, parse_arguments
from training_reftr.batch_norm import synchronize_batch_norm
from training_reftr.build import build_model
from training_reftr.data import TrainingData, move
from training_reftr.evaluation import constant_box, evaluate, summarize, swapped_expressions
from training_reftr.optimization import build_optimizer, build_scheduler
from training_reftr.report import format_table, write_report
from training_reftr.sources import load_rows, split_of


logger = logging.getLogger("train_reftr")


def main(argv: list[str] | None = None):
    """Parse, build, train or evaluate, report."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    accelerator = Accelerator()
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s",
        level=logging.INFO if accelerator.is_main_process else logging.WARNING,
    )
    # the main process builds the set, the others take it from the cache
    with accelerator.main_process_first():
        rows = load_rows(args)

    if not args.eval_only:
        set_seed(args.seed)  # equal weights on all processes
        model, processor = build_model(args, split_of(rows, args.train_split))
        set_seed(args.seed, device_specific=True)  # but not equal dropout
        train(model, processor, rows, args, accelerator)
        args.init_from = args.output_dir

    report(rows, args, accelerator)
    accelerator.end_training()


def train(model, processor, rows, args: TrainingArguments, accelerator: Accelerator):
    """Train, and leave the best model by validation, with its processor, in the run's folder."""
    data = TrainingData(
        split_of(rows, args.train_split),
        processor,
        args,
        accelerator.process_index,
        accelerator.num_processes,
        with_masks=model.config.predict_masks,
    )
    steps_per_epoch = max(1, data.num_batches(0) // args.gradient_accumulation_steps)
    num_steps = steps_per_epoch * args.num_epochs
    num_steps = min(num_steps, args.max_steps) if args.max_steps else num_steps
    if accelerator.num_processes > 1 and not model.config.freeze_backbone_batch_norm:
        synchronize_batch_norm(model)
    optimizer = build_optimizer(model, args)
    scheduler = build_scheduler(optimizer, args, steps_per_epoch, num_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()

    best = -1.0
    step = 0
    with tqdm(total=num_steps, desc="training", unit="step", disable=not accelerator.is_main_process) as progress:
        for epoch in range(args.num_epochs):
            batches = data.batches(epoch)
            for _ in range(steps_per_epoch):
                losses = update(model, optimizer, scheduler, batches, args, accelerator)
                step += 1
                progress.update()
                if step % args.log_every == 0 or step == num_steps:
                    losses = {name: value.item() for name, value in losses.items()}
                    progress.set_postfix(loss=f"{losses['loss']:.3f}")
                    log_losses(step, epoch, losses, scheduler)
                if step == num_steps:
                    break
            if (epoch + 1) % args.evaluate_every == 0 or step == num_steps:
                best = validate_and_save(model, processor, rows, args, accelerator, best, step)
            if step == num_steps:
                break


def update(model, optimizer, scheduler, batches, args: TrainingArguments, accelerator: Accelerator) -> dict:
    """
    One update of the weights from the next batches. Holds a collective: the loss is divided by the sentences of all
    processes and accumulation steps together, which must be known before the first backward.
    """
    batches = [move(next(batches), accelerator.device) for _ in range(args.gradient_accumulation_steps)]
    num_sentences = torch.tensor(sum(len(batch["labels"]) for batch in batches), device=accelerator.device)
    num_sentences = accelerator.reduce(num_sentences.float(), reduction="sum")
    totals = {}
    for number, batch in enumerate(batches):
        # gradients travel between processes once an update
        context = accelerator.no_sync(model) if number + 1 < len(batches) else accelerator.accumulate(model)
        with context:
            with accelerator.autocast():
                outputs = model(**batch, num_items_in_batch=num_sentences)
            # the processes' gradients are averaged, while the loss is a sum over them
            accelerator.backward(outputs.loss * accelerator.num_processes)
        for name, value in {"loss": outputs.loss, **outputs.loss_dict}.items():
            totals[name] = totals.get(name, 0) + value.detach()
    totals["gradient_norm"] = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return sum_over_processes(totals, accelerator)


def sum_over_processes(totals: dict, accelerator: Accelerator) -> dict:
    """The loss parts of all processes together. A collective; the gradient norm is the same on all of them."""
    gradient_norm = totals.pop("gradient_norm")
    summed = accelerator.reduce(torch.stack(list(totals.values())), reduction="sum")
    return {**dict(zip(totals, summed, strict=True)), "gradient_norm": gradient_norm}


def log_losses(step: int, epoch: int, losses: dict[str, float], scheduler):
    """One line of loss parts, gradient norm and rates."""
    parts = " ".join(f"{name}={value:.6f}" for name, value in losses.items())
    rates = " ".join(f"{rate:.2e}" for rate in scheduler.get_last_lr())
    logger.info(f"step {step} epoch {epoch} {parts} rates {rates}")


def validate_and_save(model, processor, rows, args, accelerator: Accelerator, best: float, step: int) -> float:
    """Evaluate on the validation split; save the model if it is the best so far. All processes call it."""
    metrics = summarize(
        evaluate(model, processor, split_of(rows, args.validation_split), args, accelerator, "validation")
    )
    name = args.best_metric or ("mask_mean_iou" if "mask_mean_iou" in metrics else "accuracy@0.5")
    if name not in metrics:
        raise ValueError(f"best_metric={name!r} is not one of {', '.join(sorted(metrics))}.")
    figures = " ".join(f"{key}={value:.3f}" for key, value in metrics.items() if isinstance(value, float))
    logger.info(f"step {step} {args.validation_split} of {metrics['num_phrases']} phrases: {figures}")
    if metrics[name] <= best:
        return best
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        processor.save_pretrained(args.output_dir)
    accelerator.wait_for_everyone()
    return metrics[name]


def report(rows, args: TrainingArguments, accelerator: Accelerator):
    """Evaluate on the test split, and write figures and pictures. All processes call it."""
    source = args.init_from or args.output_dir
    model = RefTRForVisualGrounding.from_pretrained(source, dtype=torch.float32).to(accelerator.device)
    processor = RefTRProcessor.from_pretrained(source)
    records = evaluate(model, processor, split_of(rows, args.test_splits), args, accelerator, "test")
    if not accelerator.is_main_process:
        return
    metrics = {
        "model": str(source),
        "dataset": args.dataset,
        "split": args.test_splits,
        **summarize(records),
        "constant_box": constant_box(split_of(rows, args.train_split), records),
        "swapped_expressions": swapped_expressions(records),
    }
    write_report(Path(args.output_dir), metrics, records, split_of(rows, args.test_splits), args.num_pictures)
    sys.stdout.write(f"{format_table(metrics)}\n{Path(args.output_dir) / 'predictions.png'}\n")


if __name__ == "__main__":
    main()
