"""Canaries for library behavior that the project relies on, so that a change is noticed here first."""

import subprocess
import sys

import accelerate
import datasets
import numpy as np
import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from transformers import AutoConfig, BertConfig, BertModel, DetrConfig
from transformers.utils.generic import ModelOutput

from modeling_reftr import RefTRForVisualGrounding
from tests.helpers.processes import free_port


pytestmark = pytest.mark.row("R20")


def test_optimizer_state_dict_is_keyed_by_parameter_name():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state_dict = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    assert state_dict.keys() == {"state", "param_groups"}
    assert state_dict["state"].keys() == {"weight", "bias"}
    assert state_dict["state"]["weight"].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_lambda_lr_starts_at_last_epoch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    optimizer.param_groups[0]["initial_lr"] = 2.0
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step), last_epoch=2)
    assert scheduler.get_last_lr() == [0.5]


def test_accelerate_has_methods_of_training_loop(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with accelerator.no_sync(model):
        accelerator.backward(model(torch.ones(1, 2)).sum())
    assert accelerator.clip_grad_norm_(model.parameters(), 0.1).ndim == 0
    assert isinstance(optimizer.optimizer, torch.optim.AdamW)
    assert accelerate.utils.gather_object([{"a": 1}]) == [{"a": 1}]
    assert accelerator.scaler is None


def test_accelerate_gathers_objects_of_two_processes(run, tmp_path):
    code = (
        "import accelerate, sys; a = accelerate.Accelerator(cpu=True); n = a.process_index;"
        "o = accelerate.utils.gather_object([n] * (n + 1)); box = [n]; accelerate.utils.broadcast_object_list(box);"
        "a.end_training();"  # a process may be aborted at exit if its group is still open
        "sys.exit(o != [0, 1, 1] or box != [0])"
    )
    path = tmp_path / "gather.py"
    path.write_text(code)
    port = free_port()
    run("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", port, path)


def test_faulthandler_ends_process_with_stack_traces():
    code = "import faulthandler, time; faulthandler.dump_traceback_later(0.2, exit=True); time.sleep(60)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert result.returncode == 1
    assert "Timeout" in result.stderr


def test_from_pretrained_keeps_frozen_parameters_of_reftr_only(make_model, tmp_path):
    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    model.requires_grad_(False).save_pretrained(tmp_path / "bert")
    assert all(parameter.requires_grad for parameter in BertModel.from_pretrained(tmp_path / "bert").parameters())
    model = make_model()
    model.save_pretrained(tmp_path / "reftr")
    loaded = RefTRForVisualGrounding.from_pretrained(tmp_path / "reftr")
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_transformers_has_base_classes_of_config_and_output(tmp_path):
    DetrConfig().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "detr"
    assert ModelOutput.__subclasses__()


def test_builder_with_same_hash_reuses_cache(tmp_path):
    class Builder(datasets.GeneratorBasedBuilder):
        value = 1

        def _info(self):
            return datasets.DatasetInfo(features=datasets.Features({"value": datasets.Value("int32")}))

        def _split_generators(self, dl_manager):
            return [datasets.SplitGenerator(name="testA")]

        def _generate_examples(self):
            if self.value is None:
                raise ValueError("a sentence")
            yield 0, {"value": self.value}

    def build(**flags):
        builder = Builder(cache_dir=str(tmp_path), **flags)
        builder.download_and_prepare()
        return builder.as_dataset(split="testA")[0]["value"]

    assert build() == 1
    Builder.value = 2
    assert (build(), build(hash="other")) == (1, 2)
    Builder.value = None
    with pytest.raises(DatasetGenerationError) as error:
        build(hash="third")
    assert "a sentence" in str(error.value.__cause__)


def test_image_feature_applies_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert datasets.Image().decode_example({"path": str(tmp_path / "a.jpg"), "bytes": None}).size == (10, 20)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.size == (20, 10)


def test_safetensors_round_trip_is_bit_identical(tmp_path):
    values = {"a": torch.tensor([0.1, float("nan"), -0.0]), "b": torch.tensor(3.0)}
    save_file(values, tmp_path / "a.safetensors")
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(np.array_equal(values[name].numpy(), loaded[name].numpy(), equal_nan=True) for name in values)
