"""How long the head takes to train on large features, beside scikit-learn's MLP: `python -m benchmarks.head`.

The goal: 100,000 x 1,536 features, network 1536-512-256-1, 20 epochs, on 2 cores, under 9 seconds with matrix
units (AMX), at the average precision of scikit-learn's MLPClassifier. The machine decides the seconds, so the
bare matrix products are timed beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.utils._testing import ignore_warnings

from itemkit.devices import choose_device
from itemkit.head import MisalignmentMLP
from itemkit.metrics import average_precision


def make_data(
    rows: int, columns: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features with a weak linear and a weak quadratic trace of the label; a fifth more rows for the test."""
    rng = np.random.default_rng(seed)
    n = rows + rows // 5
    y = rng.integers(0, 2, n)
    x = rng.standard_normal((n, columns), dtype=np.float32)
    x[:, : columns // 2] += 0.06 * y[:, None]
    x[:, columns // 2 :] *= 1 + 0.06 * y[:, None]
    return x[:rows], y[:rows], x[rows:], y[rows:]


def floor_seconds(rows: int, columns: int, epochs: int, batch: int, device: str) -> float:
    """Seconds of nothing but the matrix products of 1536-512-256-1: forward, and both gradients."""
    x, g1, g2 = (torch.randn(batch, n, device=device) for n in (columns, 512, 256))
    w1, w2 = (torch.randn(*n, device=device) for n in ((columns, 512), (512, 256)))
    steps, times = (lambda: (x @ w1, g1 @ w2, g2 @ w2.T, g1.T @ g2, x.T @ g1)), []
    for _ in range(12):
        start = time.perf_counter()
        steps()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:])) * epochs * rows / batch


def compare_members(n_rows: int, columns: int, members: int, device: str) -> None:
    """Several seeds as one batched network, beside the same number of heads one after another."""
    x, y, _, _ = make_data(n_rows, columns)
    options = {"max_epochs": 10, "validation_fraction": 0, "device": device}
    MisalignmentMLP(**options).fit(x, y)  # what only a first call does
    start = time.perf_counter()
    MisalignmentMLP(members=members, **options).fit(x, y)
    together = time.perf_counter() - start
    start = time.perf_counter()
    for seed in range(members):
        MisalignmentMLP(seed=seed, **options).fit(x, y)
    apart = time.perf_counter() - start
    print(
        f"{members} seeds of {n_rows} x {columns}: together {together:.2f} s, one by one {apart:.2f} s, "
        f"{apart / together:.2f} times as quick"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--columns", type=int, default=1_536)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2_048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scikit-learn", action="store_true", help="also train MLPClassifier (minutes)")
    parser.add_argument(
        "--scikit-epochs", type=int, default=0, help="fewer epochs for it; its time is then scaled up"
    )
    parser.add_argument(
        "--members", type=int, default=0, help="instead: so many seeds at once against one by one"
    )
    args = parser.parse_args()
    if args.members:
        for rows, columns in ((600, 384), (20_000, 384)):
            compare_members(rows, columns, args.members, args.device)
        return
    x, y, x_test, y_test = make_data(args.rows, args.columns)
    print(
        f"{args.rows} x {args.columns}, {args.epochs} epochs, batch {args.batch_size}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}"
    )
    head = MisalignmentMLP(
        hidden_sizes=(512, 256), dropout=0.0, batch_size=args.batch_size, max_epochs=args.epochs,
        validation_fraction=0, device=args.device,
    )  # fmt: skip
    start = time.perf_counter()
    head.fit(x, y)
    seconds = time.perf_counter() - start
    ap, device = average_precision(y_test, head.decision_function(x_test)), str(choose_device(args.device))
    floor = floor_seconds(args.rows, args.columns, args.epochs, args.batch_size, device)
    results = [{"what": f"itemkit {device}", "seconds": seconds, "ap": ap, "floor": floor}]
    print(
        f"{results[0]['what']:28s} {seconds:8.1f} s   AP {ap:.4f}   bare matrix products {floor:.1f} s",
        flush=True,
    )
    if args.scikit_learn:
        epochs = args.scikit_epochs or args.epochs
        model = MLPClassifier(
            (512, 256), batch_size=args.batch_size, max_iter=epochs, random_state=0, alpha=0.0
        )
        start = time.perf_counter()
        ignore_warnings(category=ConvergenceWarning)(model.fit)(x, y)
        seconds = (time.perf_counter() - start) * args.epochs / epochs
        ap = average_precision(y_test, model.predict_proba(x_test)[:, 1])
        results.append({"what": "scikit-learn MLPClassifier", "seconds": seconds, "ap": ap})
        ratio = seconds / results[0]["seconds"]
        print(
            f"{results[-1]['what']:28s} {seconds:8.1f} s   AP {ap:.4f} after {epochs} epochs; takes "
            f"{ratio:.1f} times as long",
            flush=True,
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
