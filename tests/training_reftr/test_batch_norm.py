"""Batch norm synchronized over processes equals one process, with the module of torch where it is supported."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers.processes import free_port
from tests.helpers.tiny import ROOT
from training_reftr.batch_norm import CpuSyncBatchNorm2d, synchronize_batch_norm


TIMM = {"backbone": "test_resnet", "out_indices": [1, 2, 3, 4]}


def test_batch_norm_on_two_processes_equals_one_process(run):
    ranks = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port())
    printed = run(*ranks, "-m", "tests.helpers.ranks_batch_norm", PYTHONPATH=str(ROOT)).stdout
    assert printed.count("equal") == 2


@pytest.mark.parametrize(("device", "kind"), [("cpu", CpuSyncBatchNorm2d), ("cuda", nn.SyncBatchNorm)])
def test_synchronize_batch_norm_keeps_weights_and_names(make_model, device, kind):
    model = make_model(backbone_config=TIMM).train()
    before = {name: id(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
    num_norms = sum(type(module) is nn.BatchNorm2d for module in model.modules())
    synchronize_batch_norm(model, torch.device(device))
    assert sum(type(module) is kind for module in model.modules()) == num_norms > 0
    assert not any(type(module) is nn.BatchNorm2d for module in model.modules())
    assert {name: id(value) for name, value in (*model.named_parameters(), *model.named_buffers())} == before
    assert all(module.training for module in model.modules())
    frozen = nn.Sequential(nn.BatchNorm2d(3)).eval()
    synchronize_batch_norm(frozen, torch.device(device))
    assert not any(module.training for module in frozen.modules())
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()


def test_synchronize_batch_norm_refuses_unknown_subclass():
    class NormWithActivation(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="0 is a NormWithActivation"):
        synchronize_batch_norm(nn.Sequential(NormWithActivation(3)), torch.device("cuda"))
