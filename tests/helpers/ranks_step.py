"""Compare a training step on two ranks, each with a share of the batch, with a step on the full batch."""

import copy
import json
import sys
from types import SimpleNamespace

import torch
from accelerate import Accelerator

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding
from training_reftr.checkpoints import TrainingState
from training_reftr.optimization import build_optimizer
from training_reftr.run import Run
from training_reftr.settings import TrainingSettings
from training_reftr.step import train_step


SHARES = [slice(0, 3), slice(3, 4)]  # with different numbers of sentences


def make_batch() -> dict:
    """Four images with one sentence each, of two phrases in the first."""
    torch.manual_seed(1)
    labels = [{"boxes": torch.tensor([[0.5, 0.4, 0.3, 0.2]])} for _ in range(4)]
    names = [[{"image_id": str(number), "sentence_id": "0"}] for number in range(4)]
    names[3] *= 2
    return {
        "pixel_values": torch.randn(4, 3, 64, 64),
        "input_ids": torch.randint(5, 30, (4, 6)),
        "labels": labels,
        "targets": names,
    }


def share_of(batch: dict, part: slice) -> dict:
    return {name: value[part] for name, value in batch.items()}


def main(settings: dict):
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    text_config = {**settings["text_config"], "vocab_size": 30}
    model = RefTRForVisualGrounding(RefTRConfig(**{**settings["model"], "text_config": text_config})).train()
    torch.nn.init.normal_(model.box_head.layers[-1].weight, std=0.5)
    batch, alone = make_batch(), copy.deepcopy(model)
    loss = alone(**{name: value for name, value in batch.items() if name != "targets"}).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), float("inf"))
    gradients = {name: parameter.grad for name, parameter in alone.named_parameters()}

    args = TrainingSettings.from_flat(max_grad_norm=1e9)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, args.optimization))
    run = Run(prepared, optimizer, None, None, SimpleNamespace(layout=()), TrainingState(), 4, args)
    seen = {}
    clip = accelerator.clip_grad_norm_

    def record_gradients(parameters, limit):
        seen.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        return clip(parameters, limit)

    accelerator.clip_grad_norm_ = record_gradients
    totals, num_expressions = train_step(run, [share_of(batch, SHARES[accelerator.process_index])], accelerator)
    assert num_expressions == 5
    torch.testing.assert_close(totals["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(totals["gradient_norm"], norm, rtol=1e-4, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-3, atol=1e-4 * norm.item(), msg=name)
    sys.stdout.write("equal\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
