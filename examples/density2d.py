"""Learn a density in the plane, and draw what was learned.

    python examples/density2d.py --density checkerboard

trains a flow of invertible residual blocks by maximum likelihood for a few minutes on a CPU, certifies it, and writes
density.png (true samples, the learned density, samples of the flow) and depth.png (the data on their way through the
blocks to the normal distribution) to --out.
"""

import argparse
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

import iresnet_fast as irf
from iresnet_fast.data import DENSITIES_2D, density2d
from iresnet_fast.training import fit_flow

HELD_OUT = 20_000
CELLS = 300
# From so many steps on, compiling pays.
MANY = 2000


def train(name, steps, batch_size, seed):
    """A certified flow."""
    density = density2d(name)
    generator = torch.Generator().manual_seed(seed + 1)
    torch.manual_seed(seed)
    flow = irf.models.IResNetFlow.from_config("density2d")
    started = time.perf_counter()

    def draw(n):
        return density.draw(n, generator)

    def show(step, loss):
        if step % max(1, steps // 20) == 0:
            seconds = time.perf_counter() - started
            print(f"step {step} of {steps}, {seconds:.0f} s: {2 * loss:.3f} nats", flush=True)

    options = {"batch_size": batch_size, "lr": 1e-2, "average": 0.998, "compile": steps >= MANY, "seed": seed}
    report = fit_flow(flow, draw, steps=steps, on_step=show, **options)
    certificate = irf.enforce(flow.eval())
    print(f"{report.steps} steps in {time.perf_counter() - started:.0f} s, {report.skipped} skipped")
    print(f"invertible, proven: {certificate.guaranteed}")
    return flow


@torch.no_grad()
def draw_density(flow, density, path):
    ticks = (torch.arange(CELLS) + 0.5) / CELLS * 2 * density.extent - density.extent
    grid = torch.cartesian_prod(ticks, ticks)
    log_prob = torch.cat([flow.log_prob(part) for part in grid.split(10_000)])
    image = log_prob.exp().view(CELLS, CELLS).T
    mass = float(log_prob.double().exp().sum() * (2 * density.extent / CELLS) ** 2)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    window = [-density.extent, density.extent]
    bins = {"bins": 120, "range": [window, window], "cmap": "magma"}
    left.hist2d(*density.sample(200_000).T.numpy(), **bins)
    left.set_title("samples of the truth")
    middle.imshow(image.numpy(), origin="lower", extent=window * 2, cmap="magma")
    middle.set_title(f"learned density (mass in view {mass:.3f})")
    right.hist2d(*flow.sample(200_000, batch_size=50_000).T.numpy(), **bins)
    right.set_title("samples of the flow")
    for axis in (left, middle, right):
        axis.set_aspect("equal")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=110)


@torch.no_grad()
def draw_depth(flow, density, path):
    """The data after every second block; colour is the angle of where a point started."""
    x = density.sample(20_000)
    color = torch.atan2(x[:, 1], x[:, 0]).numpy()
    stages, z = [x], x
    for part in flow.trunk:
        z = part(z)
        if isinstance(part, irf.nn.InvertibleResidualBlock):
            stages.append(z)
    shown = stages[:: max(1, (len(stages) - 1) // 5)]
    figure = Figure(figsize=(3 * len(shown), 3.2), layout="constrained")
    for index, (axis, points) in enumerate(zip(figure.subplots(1, len(shown)), shown, strict=True)):
        axis.scatter(*points.T.numpy(), c=color, s=0.6, cmap="twilight", linewidths=0)
        axis.set_title("data" if not index else f"after block {index * max(1, (len(stages) - 1) // 5)}")
        axis.set_aspect("equal")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", choices=DENSITIES_2D, default="checkerboard")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("density2d"))
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps must be positive")
    options.out.mkdir(parents=True, exist_ok=True)
    density = density2d(options.density)
    flow = train(options.density, options.steps, options.batch_size, options.seed)
    if density.log_prob is not None:
        with torch.no_grad():
            found = -float(
                torch.cat([flow.log_prob(x) for x in density.sample(HELD_OUT, seed=99).split(10_000)]).mean()
            )
        print(f"held-out negative log-likelihood {found:.3f} nats; the truth has {density.entropy:.3f}")
    draw_density(flow, density, options.out / f"{options.density}.png")
    draw_depth(flow, density, options.out / f"{options.density}-depth.png")
    torch.save(flow.state_dict(), options.out / f"{options.density}.pt")
    print(f"wrote {options.out}/{options.density}.png, {options.density}-depth.png and {options.density}.pt")


if __name__ == "__main__":
    main()
