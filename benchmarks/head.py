"""How long the head takes to train on large features, beside scikit-learn's MLP: `python -m benchmarks.head`.

The goal: 100,000 x 1,536 features, network 1536-512-256-1, 20 epochs, at the average precision of
scikit-learn's MLPClassifier. The machine decides the seconds, so bare matrix products are timed beside them.
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


def make_head(epochs: int, device: str, members: int = 1) -> MisalignmentMLP:
    """The network of all these measurements."""
    return MisalignmentMLP(
        hidden_sizes=(512, 256), dropout=0.0, batch_size=2048, max_epochs=epochs, validation_fraction=0,
        members=members, device=device,
    )  # fmt: skip


def floor_seconds(rows: int, columns: int, epochs: int, device: str) -> float:
    """Seconds of nothing but the matrix products of 1536-512-256-1: forward, and both gradients."""
    x, g1, g2 = (torch.randn(2048, n, device=device) for n in (columns, 512, 256))
    w1, w2 = (torch.randn(*n, device=device) for n in ((columns, 512), (512, 256)))
    times = []
    for _ in range(12):
        start = time.perf_counter()
        _ = (x @ w1, g1 @ w2, g2 @ w2.T, g1.T @ g2, x.T @ g1)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:])) * epochs * rows / 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--columns", type=int, default=1_536)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--members", type=int, default=1, help="networks trained at once (default: 1)")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--scikit-epochs", type=int, default=0, help="also train MLPClassifier so long; its time is scaled up"
    )
    args = parser.parse_args()
    x, y, x_test, y_test = make_data(args.rows, args.columns)
    print(
        f"{args.rows} x {args.columns}, {args.epochs} epochs, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}"
    )
    head, device = make_head(args.epochs, args.device, args.members), str(choose_device(args.device))
    start = time.perf_counter()
    head.fit(x, y)
    seconds = time.perf_counter() - start
    ap = average_precision(y_test, head.decision_function(x_test))
    floor = args.members * floor_seconds(args.rows, args.columns, args.epochs, device)
    results = [{"what": f"itemkit {device}", "seconds": seconds, "ap": ap, "floor": floor}]
    print(f"itemkit {device}: {seconds:.1f} s, AP {ap:.4f}, bare matrix products {floor:.1f} s", flush=True)
    if epochs := args.scikit_epochs:
        model = MLPClassifier((512, 256), batch_size=2048, max_iter=epochs, random_state=0, alpha=0.0)
        start = time.perf_counter()
        ignore_warnings(category=ConvergenceWarning)(model.fit)(x, y)
        seconds = (time.perf_counter() - start) * args.epochs / epochs
        ap = average_precision(y_test, model.predict_proba(x_test)[:, 1])
        results.append({"what": "scikit-learn MLPClassifier", "seconds": seconds, "ap": ap})
        print(f"scikit-learn MLPClassifier: {seconds:.1f} s, AP {ap:.4f} after {epochs} epochs", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
