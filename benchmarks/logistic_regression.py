"""Time the sweep over C beside scikit-learn's, on the same features, with the same threads.

Both fit every C of the published protocol in float64, tolerance 1e-12 and 1,000 iterations at most.
scikit-learn (L-BFGS of scipy) stops as well where a step decreases its objective by less than 64
times the rounding of max(objective, 1); ours where two steps in a row do. The objectives are of one
definition, sum of cross-entropies times C plus half the squared norm, divided by C n, and computed
here from the coefficients of both.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
import threadpoolctl
import torch
from dinov3_classify.configs import published_strengths
from dinov3_classify.logistic import solve
from dinov3_datasets.configs import FashionMnistConfig
from dinov3_datasets.fashion import FashionMnist
from sklearn.linear_model import LogisticRegression

Fit = tuple[np.ndarray, np.ndarray, int, bool]  # coefficients, intercepts, iterations, converged


def clusters(n: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clusters whose principal components decay as those of features do."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, width + 1) ** -0.5
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
    centers, labels = 0.8 * rng.normal(size=(classes, width)), rng.integers(0, classes, n)
    noisy = (centers[labels] + rng.normal(size=(n, width))) * spectrum
    return 1.5 * noisy @ turn + rng.normal(size=width), labels


def clothes(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Raw pixels of Fashion-MNIST."""
    data = FashionMnist(FashionMnistConfig(split="train"), channels=1)
    order = np.random.default_rng(0).permutation(len(data))[:n]
    samples = [data[int(index)] for index in order]
    pixels = np.stack([sample.image.numpy().ravel() for sample in samples]) / 255
    return pixels, np.array([sample.label for sample in samples])


def ours(x: np.ndarray, y: np.ndarray, strengths: list[float]) -> list[Fit]:
    found = solve(torch.from_numpy(x), torch.from_numpy(y), int(y.max()) + 1, strengths)
    return [
        (each.coefficients.numpy(), each.intercepts.numpy(), each.iterations, each.converged)
        for each in found
    ]


def theirs(x: np.ndarray, y: np.ndarray, strengths: list[float]) -> list[Fit]:
    found = []
    for c in strengths:
        model = LogisticRegression(C=c, tol=1e-12, max_iter=1000).fit(x, y)
        iterations = int(model.n_iter_[0])
        found.append((model.coef_, model.intercept_, iterations, iterations < 1000))
    return found


def timed(run: Callable[[], list[Fit]]) -> tuple[list[Fit], float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    found = run()
    return found, time.perf_counter() - wall, time.process_time() - processor


def objective(x: np.ndarray, y: np.ndarray, fit: Fit, c: float) -> float:
    scores = x @ fit[0].T + fit[1]
    top = scores.max(axis=1)
    totals = np.log(np.exp(scores - top[:, None]).sum(axis=1)) + top
    loss = (totals - scores[np.arange(len(y)), y]).mean()
    return float(loss + (fit[0] ** 2).sum() / (2 * c * len(y)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the sweep over C beside scikit-learn.")
    parser.add_argument("--data", choices=["clusters", "clothes"], default="clusters")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--width", type=int, default=384, help="of clusters")
    parser.add_argument("--classes", type=int, default=10, help="of clusters")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="take each so many-th C")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    threadpoolctl.threadpool_limits(options.threads)
    if options.data == "clothes":
        x, y = clothes(options.images)
    else:
        x, y = clusters(options.images, options.width, options.classes)
    strengths = list(published_strengths()[:: options.every])
    print(f"{options.data}, {len(x):,} x {x.shape[1]}, {y.max() + 1} classes, ", end="")
    print(f"{len(strengths)} values of C, {options.threads} thread(s)")
    results = {}
    for name, run in (("ours", ours), ("scikit-learn", theirs)):
        found, wall, processor = timed(lambda run=run: run(x, y, strengths))  # type: ignore[misc]
        results[name] = found, wall, processor
        iterations, done = sum(fit[2] for fit in found), sum(fit[3] for fit in found)
        print(
            f"{name}: {wall:.1f} s wall, {processor:.1f} s of processors, {iterations:,} "
            f"iterations, {done} of {len(found)} converged",
            flush=True,
        )
    ratio = [results["scikit-learn"][i] / results["ours"][i] for i in (1, 2)]
    print(f"scikit-learn over ours: {ratio[0]:.1f} wall, {ratio[1]:.1f} processor")
    gaps = [
        objective(x, y, other, c) - objective(x, y, mine, c)
        for mine, other, c in zip(
            results["ours"][0], results["scikit-learn"][0], strengths, strict=True
        )
    ]
    print(f"objective, scikit-learn's less ours: {min(gaps):.1e} to {max(gaps):.1e}")
    moved = [
        np.abs(mine[0] - other[0]).max() / np.abs(other[0]).max()
        for mine, other in zip(results["ours"][0], results["scikit-learn"][0], strict=True)
    ]
    places = range(0, len(strengths), max(1, len(strengths) // 6))
    shown = ", ".join(f"C={strengths[i]:.0e} {moved[i]:.0e}" for i in places)
    print(f"largest difference of coefficients, relative to the largest: {shown}")


if __name__ == "__main__":
    main()
