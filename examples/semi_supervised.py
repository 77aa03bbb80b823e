"""Does the density of unlabelled images help to classify? Fifty labelled digits, the others without their labels.

    python examples/semi_supervised.py --seeds 5

trains one network twice for every seed: on the labelled images alone, and on all images with the likelihood as a second
loss (labels of the others are hidden), and prints the test errors.
"""

import argparse
import statistics

import torch

import iresnet_fast as irf
from iresnet_fast.data import load_digits, midpoints
from iresnet_fast.training import UNLABELLED, fit_flow


def hide(labels, n_labelled, seed):
    """The labels of so many images, equally many of each class; −1 for the others."""
    generator = torch.Generator().manual_seed(seed)
    shown = torch.full_like(labels, UNLABELLED)
    for kind in range(10):
        of_kind = (labels == kind).nonzero().flatten()
        chosen = of_kind[torch.randperm(len(of_kind), generator=generator)[: n_labelled // 10]]
        shown[chosen] = kind
    return shown


def batches(images, labels, batch_size):
    """Without end: all labelled images, and so many of the others that the batch is full."""
    labelled, others = (labels != UNLABELLED).nonzero().flatten(), (labels == UNLABELLED).nonzero().flatten()
    while True:
        drawn = others[torch.randperm(len(others))[: max(0, batch_size - len(labelled))]]
        chosen = torch.cat([labelled, drawn])
        yield images[chosen], labels[chosen]


def test_error(data, labels, density_weight, options, seed):
    torch.manual_seed(seed)
    flow = irf.models.IResNetFlow.from_config("digits-flow")
    images = data.train_images
    if not density_weight:
        images, labels = images[labels != UNLABELLED], labels[labels != UNLABELLED]
    settings = {"steps": options.steps, "lr": options.lr, "average": 0.99, "seed": seed}
    fit_flow(flow, batches(images, labels, options.batch_size), density_weight=density_weight, **settings)
    flow.eval()
    with torch.no_grad():
        found = flow.logits(midpoints(data.test_images, data.n_levels)).argmax(1)
    return float((found != data.test_labels).float().mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--density-weights", type=float, nargs="+", default=[0.0, 0.1, 1.0])
    options = parser.parse_args()
    if options.labels < 10 or options.labels % 10:
        parser.error("--labels must be a multiple of 10")
    errors = {weight: [] for weight in options.density_weights}
    for seed in range(options.seeds):
        data = load_digits(seed=seed)
        labels = hide(data.train_labels, options.labels, seed)
        for weight, found in errors.items():
            found.append(test_error(data, labels, weight, options, seed))
            print(f"seed {seed}, density weight {weight:g}: test error {found[-1]:.1%}", flush=True)
    for weight, found in errors.items():
        spread = statistics.stdev(found) if len(found) > 1 else float("nan")
        print(f"density weight {weight:g}: {statistics.mean(found):.1%} ± {spread:.1%} over {len(found)} seeds")


if __name__ == "__main__":
    main()
