"""Learn the density of MNIST on a CPU, and measure bits per dimension on all test images.

    python examples/mnist_density.py --data path/to/mnist --minutes 60

takes the folder that torchvision stored MNIST in (or the four IDX files themselves), trains the configuration
mnist-flow by maximum likelihood, certifies it, and writes mnist.json (settings and figures), mnist.png (samples, and
test images beside their reconstructions) and mnist.pt to --out.
"""

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure

import iresnet_fast as irf
from iresnet_fast.data import load_mnist, midpoints
from iresnet_fast.finite import finite_or_none
from iresnet_fast.training import fit_flow

SHOWN = 48


def train(flow, images, minutes, batch_size, lr, seed):
    """Steps that fit into the time, of which the first twenty tell how many, and the report."""
    started = time.perf_counter()
    fit_flow(flow, images, steps=20, batch_size=batch_size, lr=1e-5, seed=seed)
    per_step = (time.perf_counter() - started) / 20
    steps = max(20, int(60 * minutes / per_step) - 20)

    def show(step, loss):
        if step % max(1, steps // 50) == 0:
            bits = loss / math.log(2) + 8
            print(f"step {step} of {steps}, {time.perf_counter() - started:.0f} s: {bits:.3f} bits/dim", flush=True)

    return fit_flow(flow, images, steps=steps, batch_size=batch_size, lr=lr, average=0.998, seed=seed, on_step=show)


def draw(samples, images, reconstructions, path):
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    rows = {"samples": samples, "test images": images, "their reconstructions": reconstructions}
    for axis, (title, shown) in zip(figure.subplots(3, 1, height_ratios=(2, 1, 1)), rows.items(), strict=True):
        grid = shown[:SHOWN].clamp(0, 1).view(2 if title == "samples" else 1, -1, 28, 28)
        axis.imshow(grid.permute(0, 2, 1, 3).reshape(grid.shape[0] * 28, -1).numpy(), cmap="gray")
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's files")
    parser.add_argument("--minutes", type=float, default=60.0, help="of training")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("mnist-density"))
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error("--minutes must be positive")
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_mnist(options.data)
    torch.manual_seed(options.seed)
    flow = irf.models.IResNetFlow.from_config("mnist-flow")
    wall, cpu = time.perf_counter(), time.process_time()
    report = train(flow, data.train_images, options.minutes, options.batch_size, options.lr, options.seed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    certificate = irf.enforce(flow.eval())
    torch.save(flow.state_dict(), options.out / "mnist.pt")

    test = data.test_images[: options.test_images]
    torch.manual_seed(options.seed)
    bits = flow.bits_per_dim(test.split(100))
    images = midpoints(test[:24])
    reconstructions = flow.reconstruct(images, tol=1e-5)
    error = float(((reconstructions - images).flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1)).max())
    samples = flow.sample(SHOWN, generator=torch.Generator().manual_seed(options.seed))
    draw(samples, images, reconstructions, options.out / "mnist.png")
    figures = {
        "bits_per_dim": finite_or_none(bits._asdict()),
        "steps": report.steps,
        "skipped": report.skipped,
        "training_minutes": wall / 60,
        "training_cpu_minutes": cpu / 60,
        "threads": torch.get_num_threads(),
        "guaranteed": certificate.guaranteed,
        "worst_relative_reconstruction_error": error,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "batch_size": options.batch_size,
        "lr": options.lr,
        "seed": options.seed,
        "torch": torch.__version__,
        "config": asdict(flow.config),
    }
    (options.out / "mnist.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    print(
        f"{bits.mean:.3f} ± {bits.standard_error:.3f} bits/dim on {bits.n_samples:,} test images after {report.steps} "
        f"steps ({report.skipped} skipped) in {wall / 60:.0f} minutes; invertible, proven: {certificate.guaranteed}; "
        f"worst reconstruction error {error:.1e}"
    )


if __name__ == "__main__":
    main()
