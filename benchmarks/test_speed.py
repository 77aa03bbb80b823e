"""Our providers on the quick problems, for pytest-benchmark: compare two runs to find a regression."""

import pytest
import torch

from benchmarks.cases import CASES
from benchmarks.harness import Row, check_provider
from iresnet_fast.report.benchmark_figures import is_ours

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", CASES)
def test_speed(benchmark, name):
    problem = next(iter(CASES[name].problems(DEVICE, True)))
    provider = next(provider for provider in reversed(problem.providers) if is_ours(provider.name))
    row: Row = check_provider(name, problem, provider, DEVICE)
    assert row.status == "measured", row.reason
    benchmark.extra_info["error"] = row.error

    def run():
        provider.run(problem.inputs[0])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
