"""Optimizer steps match AdamW written out, and non-finite losses and gradients are refused."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from tests.helpers.processes import run_ranks
from tests.helpers.tiny import TINY_MODEL, TINY_TEXT
from training_reftr.checkpoints import TrainingState
from training_reftr.data import GroundingCollator
from training_reftr.optimization import build_optimizer, build_scheduler
from training_reftr.run import Run
from training_reftr.settings import ScheduleSettings, TrainingSettings
from training_reftr.step import seed_of, train_step


# every value differs from its default and from the others
SETTINGS = {
    "learning_rate": 1e-3,
    "backbone_learning_rate": 3e-4,
    "text_learning_rate": 5e-4,
    "mask_head_learning_rate": 2e-3,
    "weight_decay": 0.3,
    "adam_beta2": 0.7,
    "max_grad_norm": 0.5,
    "warmup_steps": 4,
    "lr_schedule": "constant",
    "seed": 3,
}
LEARNING_RATES = {"model.backbone.": 3e-4, "model.text_backbone.": 5e-4, "mask_head.": 2e-3, "": 1e-3}


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def batches(shapes, processor):
    """Collate two batches with different numbers of sentences and phrases."""
    collate = GroundingCollator(processor, with_masks=True)
    return [collate([shapes["train"][index] for index in part]) for part in ((0, 1), (2,))]


@pytest.fixture
def make_run(make_model, accelerator):
    """Make a run of a tiny model with masks before its first step."""

    def make(model=None, **overrides):
        args = TrainingSettings.from_flat(**SETTINGS)
        model = (model or make_model(predict_masks=True, **overrides)).train()
        model, optimizer = accelerator.prepare(model, build_optimizer(model, args.optimization))
        run = Run(model, optimizer, None, None, SimpleNamespace(layout=()), TrainingState(steps_per_epoch=9), 4, args)
        run.scheduler = build_scheduler(optimizer, args.schedule, 9, run.num_steps)
        return run

    return make


def learning_rate_of(name: str) -> float:
    return next(learning_rate for prefix, learning_rate in LEARNING_RATES.items() if name.startswith(prefix))


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name != "targets"}


def adamw(model, batches, steps: int):
    """Apply `steps` steps of AdamW to a model; return (loss, gradient norm before clipping) per step."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    first, second = ({name: torch.zeros_like(value) for name, value in named.items()} for _ in range(2))
    num_sentences, expected_totals = sum(len(batch["labels"]) for batch in batches), []
    for step in range(1, steps + 1):
        model.zero_grad()
        losses = [model(**inputs_of(batch), num_items_in_batch=num_sentences).loss for batch in batches]
        sum(losses).backward()
        norm = torch.stack([p.grad.square().sum() for p in named.values() if p.grad is not None]).sum().sqrt()
        expected_totals.append((sum(losses).item(), norm.item()))
        with torch.no_grad():
            for name, parameter in named.items():
                if parameter.grad is None:
                    continue
                gradient = parameter.grad * min(1.0, 0.5 / (norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.7 * second[name] + 0.3 * gradient.square()
                learning_rate = learning_rate_of(name) * step / 4  # during warmup
                parameter.mul_(1 - learning_rate * 0.3)
                mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.7**step)
                parameter.sub_(learning_rate * mean / (square.sqrt() + 1e-8))
    return expected_totals


def test_train_step_matches_adamw_written_out(make_run, batches, accelerator):
    run = make_run()
    start, expected = copy.deepcopy(run.model.state_dict()), copy.deepcopy(run.model)
    expected_totals = adamw(expected, batches, 2)
    for number, (loss, norm) in enumerate(expected_totals):
        totals, num_expressions = train_step(run, batches, accelerator)
        run.advance()
        assert totals["loss"].item() == pytest.approx(loss, rel=1e-4), number
        assert totals["gradient_norm"].item() == pytest.approx(norm, rel=1e-3)
        parts = {"loss_bbox", "loss_giou", "loss_bbox_0", "loss_giou_0", "loss_mask", "loss_dice"}
        assert totals.keys() == {"loss", "gradient_norm", *parts}
        assert sum(totals[name].item() for name in parts) == pytest.approx(loss, rel=1e-4)
        assert num_expressions == sum(len(targets) for batch in batches for targets in batch["targets"])
    assert expected_totals[0][1] > 0.5, "the gradient is clipped"
    assert (run.state.step, run.state.schedule_step) == (2, 2)
    found, num_compared = run.model.state_dict(), 0
    for name, parameter in expected.named_parameters():
        moved = (parameter - start[name]).abs()
        num_compared += (moved > 0.1 * learning_rate_of(name)).any().item()
        # AdamW amplifies rounding where a gradient is almost zero, so a few values may differ
        away = (found[name] - parameter).abs()
        assert (away <= 0.01 * learning_rate_of(name) + 1e-7).float().mean() > 0.97, name
    assert num_compared > 100, "too few weights moved to compare"


def test_train_step_on_unequal_ranks_has_gradients_of_one():
    settings = json.dumps({"model": TINY_MODEL, "text_config": TINY_TEXT})
    assert run_ranks(["-m", "tests.helpers.ranks_step", settings], 2).stdout == "equal\n"


def test_optimizer_has_only_parameters_requiring_gradients(make_run):
    run = make_run(num_frozen_backbone_stages=1)
    trained = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in run.model.parameters() if parameter.requires_grad}
    assert len(trained) < len(list(run.model.parameters()))


def test_train_step_seeds_dropout_by_step_and_seed(make_run, batches, accelerator):
    def first_loss(step, seed=3):
        run = make_run(dropout=0.5)
        run.state.step, run.settings.optimization.seed = step, seed
        torch.rand(7)  # earlier random numbers do not matter
        return train_step(run, batches, accelerator)[0]["loss"].item()

    losses = [first_loss(step, seed) for step, seed in ((0, 3), (1, 3), (0, 4))]
    assert len(set(losses)) == 3
    assert first_loss(1) == losses[1]
    seeds = [seed_of(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_train_step_refuses_non_finite_loss_or_gradient(make_run, batches, accelerator, what):
    run = make_run()
    last = run.model.box_head.layers[-1]
    if what == "loss":
        batches[1]["pixel_values"][:] = float("nan")
        message = "The loss is not finite in step 1"
    else:
        last.weight.register_hook(lambda gradient: gradient * float("inf"))
        message = "The gradient is not finite, though the loss is in step 1"
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(FloatingPointError, match=re.escape(message)) as raised:
        train_step(run, batches, accelerator)
    targets = batches[1]["targets"][0][0]
    assert f"{targets['image_id']}/{targets['sentence_id']}" in str(raised.value)
    after = run.model.state_dict()
    for name, parameter in run.model.named_parameters():
        assert torch.equal(after[name], before[name]), parameter.shape


def schedule(steps_per_epoch=10, num_steps=100, done=0, **settings):
    """Return the learning rate factor before each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = build_scheduler(optimizer, ScheduleSettings(**settings), steps_per_epoch, num_steps, done)
    factors = []
    for _ in range(num_steps - done):
        factors.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        scheduler.step()
    return factors


def test_step_schedule_divides_by_ten_after_each_drop():
    factors = schedule(lr_drop_epochs=[3, 5])
    assert factors == pytest.approx([1] * 30 + [0.1] * 20 + [0.01] * 50)
    assert schedule(lr_drop_epochs=[1, 2, 3])[-1] == pytest.approx(0.01), "never below a hundredth"


def test_cosine_schedule_falls_to_a_hundredth():
    factors = schedule(lr_schedule="cosine", warmup_steps=20)
    assert factors[20] == pytest.approx(1)
    assert factors[60] == pytest.approx(0.5)
    assert factors[40] == pytest.approx((1 + 0.5**0.5) / 2)
    assert factors[-1] == pytest.approx(0.01)
    assert factors[20:] == sorted(factors[20:], reverse=True)


@pytest.mark.parametrize("lr_schedule", ["step", "cosine", "constant"])
def test_schedule_warms_up_and_continues_after_resume(lr_schedule):
    by_steps = schedule(lr_schedule=lr_schedule, warmup_steps=5)
    assert by_steps[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert by_steps == schedule(lr_schedule=lr_schedule, warmup_epochs=0.5)
    for done in (3, 5, 40):
        assert schedule(lr_schedule=lr_schedule, warmup_steps=5, done=done) == pytest.approx(by_steps[done:])
    assert schedule(lr_schedule="constant") == [1.0] * 100
