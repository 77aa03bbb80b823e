"""Fused models among several processes, on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
]

DATA_PARALLEL = """
import os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
import iresnet_fast as irf

def run(rank, address):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    config = {"blocks": (1, 2), "hidden": (8, 8), "n_power_iterations": 2}
    model = irf.models.IResNetClassifier.from_config("digits", **config).train()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(5):
        optimizer.zero_grad()
        parallel(torch.randn(6, 1, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()
    assert any(isinstance(part, irf.nn.ActNorm) for part in model.modules())  # initialised from the batch of both
    for name, value in model.state_dict().items():
        other = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(other, value.contiguous())
        assert torch.equal(*other), name
    assert irf.nn.weights._frame() is None
    dist.barrier()
    # Without destructors: that of DDP's Reducer joins gloo's thread while it holds the GIL, for which that thread may
    # be waiting to release the tensors of its last collective (torch 2.13 hangs there now and then).
    os._exit(0)

if __name__ == "__main__":
    mp.spawn(run, args=(sys.argv[1],), nprocs=2)
    print("equal on both")
"""

SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import iresnet_fast as irf

dist.init_process_group("gloo", init_method=sys.argv[1], rank=0, world_size=1)
model = torch.nn.Sequential(irf.nn.SpectralLinear(4, 4), irf.nn.SpectralLinear(4, 4)).train()
mesh = init_device_mesh("cpu", (1,))
irf.fuse(model)
fully_shard(model[1], mesh=mesh)
try:
    model(torch.randn(2, 4))
except TypeError as error:
    print(error)
dist.destroy_process_group()
"""


SHARDED_TRAINING = """
import os, sys, copy, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import iresnet_fast as irf

def run(rank, address):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    blocks = [irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(4, (16,), coeff=0.8)) for _ in range(2)]
    plain = irf.nn.InvertibleSequential(*blocks)
    model = copy.deepcopy(plain)
    for part in (*model, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    x, target = torch.randn(8, 4), 3 * torch.randn(8, 4)
    for either in (plain, model):
        optimizer = torch.optim.SGD(either.train().parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (either(x) - target).square().mean().backward()
            optimizer.step()
        either.eval()
    torch.testing.assert_close(model(x), plain(x))
    assert irf.certify(model).guaranteed
    result = model.solve_inverse(model(x).detach())
    torch.testing.assert_close(result.x, x, rtol=0, atol=1e-5)
    assert result.certified.all() and not model.inverse(x).requires_grad
    try:
        irf.enforce(model)
    except TypeError as error:
        assert "Call enforce before fully_shard" in str(error)
    else:
        raise AssertionError("enforce")
    dist.barrier()
    os._exit(0)  # without destructors, as above

if __name__ == "__main__":
    mp.spawn(run, args=(sys.argv[1],), nprocs=2)
    print("certified on both")
"""


def run(tmp_path, program):
    script = tmp_path / "program.py"
    script.write_text(program)
    address = f"file://{tmp_path / 'meeting'}"
    done = subprocess.run(
        [sys.executable, script, address],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # the ranks share the cores: spinning threads would starve them
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_data_parallel_ranks_stay_bit_equal(tmp_path):
    assert "equal on both" in run(tmp_path, DATA_PARALLEL)


def test_sharded_models_train_and_their_inverse_is_certified(tmp_path):
    assert "certified on both" in run(tmp_path, SHARDED_TRAINING)


def test_sharded_weights_are_an_error(tmp_path):
    assert "fully_shard (FSDP2) keeps a part of each weight" in run(tmp_path, SHARDED)
