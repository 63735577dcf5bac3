"""Compare synchronized batch norm on unequal shares, on two ranks, with one batch norm on the full batch."""

import sys
import warnings

import torch
from torch import distributed, nn

from training_reftr.batch_norm import synchronize_batch_norm


SHARES = [slice(0, 3), slice(3, 5)]


def main():
    warnings.simplefilter("error")  # deprecated collectives warn
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(0)
    batch, weights = torch.randn(5, 4, 6, 7) * 3 + 1, torch.randn(5, 4, 6, 7)
    whole = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=0.3))
    nn.init.uniform_(whole[1].weight)
    nn.init.uniform_(whole[1].bias)
    shared = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=0.3))
    shared.load_state_dict(whole.state_dict())
    synchronize_batch_norm(shared, torch.device("cpu"))

    for _ in range(2):
        expected = whole(batch)
        (expected * weights).sum().backward()
        found = shared(batch[SHARES[rank]])
        torch.testing.assert_close(found, expected[SHARES[rank]], atol=1e-5, rtol=1e-5)
        (found * weights[SHARES[rank]]).sum().backward()
    for parameter, other in zip(shared.parameters(), whole.parameters(), strict=True):
        distributed.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-4, rtol=1e-4)
    for name, value in shared.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], atol=1e-5, rtol=1e-5)
    assert shared[1].num_batches_tracked == 2
    with torch.no_grad():
        torch.testing.assert_close(shared.eval()(batch), whole.eval()(batch), atol=1e-5, rtol=1e-5)
    distributed.destroy_process_group()
    sys.stdout.write("equal\n")


if __name__ == "__main__":
    main()
