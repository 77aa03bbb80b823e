"""The density of a table of numbers, and what it is good for: rows that do not belong.

    python examples/tabular.py
    python examples/tabular.py --data rows.npy

Without --data it takes scikit-learn's measurements of breast tumours (30 numbers of each): a flow learns the density of
benign ones, is compared with a normal distribution of full covariance on benign ones held out, and tells malignant ones
by their likelihood. With --data it learns the rows of an .npy array (N, D), a fifth of them held out.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score

import iresnet_fast as irf
from iresnet_fast.training import fit_flow


def read(path, seed):
    """Rows to train on, rows held out, and rows of another kind, if there are any; none of them scaled."""
    if path is None:
        table, label = load_breast_cancer(return_X_y=True)
        rows, others = table[label == 1], table[label == 0]
    else:
        rows, others = np.load(path, allow_pickle=False), None
        if rows.ndim != 2 or not np.isfinite(rows).all():
            raise SystemExit(f"{path} must hold finite rows (N, D), got shape {rows.shape}")
    rows = rows[np.random.default_rng(seed).permutation(len(rows))]
    held_out = len(rows) // 5
    return rows[held_out:], rows[:held_out], others


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an .npy array (N, D)")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train, test, others = read(options.data, options.seed)
    mean, scale = train.mean(0), train.std(0)
    if not (scale > 0).all():
        raise SystemExit(f"columns {np.flatnonzero(scale == 0).tolist()} are constant, and have no density")
    train, test, others = (
        None if rows is None else torch.as_tensor((rows - mean) / scale, dtype=torch.float32)
        for rows in (train, test, others)
    )

    torch.manual_seed(options.seed)
    size = train.shape[1]
    flow = irf.models.IResNetFlow.from_config(
        {"in_shape": (size,), "fc_blocks": 6, "fc_hidden": (32, 32), "coeff": 0.95, "estimator": "exact"}
    )

    def jittered(n):
        """Few rows are learned by heart without it."""
        rows = train[torch.randint(len(train), (n,))]
        return rows + 0.2 * torch.randn_like(rows)

    def show(step, loss):
        if step % max(1, options.steps // 10) == 0:
            print(f"step {step}: {loss * size:.2f} nats", flush=True)

    report = fit_flow(
        flow, jittered, steps=options.steps, batch_size=128, lr=5e-3, average=0.99, seed=options.seed, on_step=show
    )
    certificate = irf.enforce(flow.eval())
    print(f"{report.steps} steps, {report.skipped} skipped; invertible, proven: {certificate.guaranteed}")

    covariance = torch.cov(train.T) + 0.04 * torch.eye(size)  # of the same jittered rows
    normal = torch.distributions.MultivariateNormal(train.mean(0), covariance)
    models = {"flow": flow.log_prob, "normal distribution": normal.log_prob}
    with torch.no_grad():
        for name, log_prob in models.items():
            known = log_prob(test)
            line = f"{name}: {float(known.mean()):.2f} nats on {len(test)} rows held out"
            if others is not None:
                labels = [0] * len(test) + [1] * len(others)
                area = roc_auc_score(labels, -torch.cat([known, log_prob(others)]).numpy())
                line += f"; malignant told from benign: area under the curve {area:.3f}"
            print(line)


if __name__ == "__main__":
    main()
