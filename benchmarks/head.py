"""How long the head takes to train on large features, beside scikit-learn's MLP: `python -m benchmarks.head`.

The goal: 100,000 x 1,536 features, network 1536-512-256-1, 20 epochs, on 2 cores, under 9 seconds with matrix
units (AMX), at the average precision of scikit-learn's MLPClassifier.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--columns", type=int, default=1_536)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2_048)
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scikit-learn", action="store_true", help="also train MLPClassifier (minutes)")
    args = parser.parse_args()
    x, y, x_test, y_test = make_data(args.rows, args.columns)
    print(
        f"{args.rows} x {args.columns}, {args.epochs} epochs, batch {args.batch_size}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}"
    )
    results = []
    for precision in args.precision:
        head = MisalignmentMLP(
            hidden_sizes=(512, 256), dropout=0.0, batch_size=args.batch_size, max_epochs=args.epochs,
            validation_fraction=0, precision=precision, device=args.device,
        )  # fmt: skip
        start = time.perf_counter()
        head.fit(x, y)
        seconds = time.perf_counter() - start
        ap = average_precision(y_test, head.decision_function(x_test))
        results.append({"what": f"itemkit {head.device_} {precision}", "seconds": seconds, "ap": ap})
        print(f"{results[-1]['what']:28s} {seconds:8.1f} s   AP {ap:.4f}", flush=True)
    if args.scikit_learn:
        model = MLPClassifier(
            (512, 256), batch_size=args.batch_size, max_iter=args.epochs, random_state=0, alpha=0.0
        )
        start = time.perf_counter()
        ignore_warnings(category=ConvergenceWarning)(model.fit)(x, y)
        seconds = time.perf_counter() - start
        ap = average_precision(y_test, model.predict_proba(x_test)[:, 1])
        results.append({"what": "scikit-learn MLPClassifier", "seconds": seconds, "ap": ap})
        print(f"{results[-1]['what']:28s} {seconds:8.1f} s   AP {ap:.4f}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
