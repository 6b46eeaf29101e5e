"""How sure a mean is."""

from __future__ import annotations

import numpy as np

from rlhf_tasks.seeds import derive_seed


def interval(name: str, values: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    """Mean of N values with its 95 % percentile bootstrap interval (Efron 1979): `name`, `name_low`, `name_high`."""
    random = np.random.Generator(np.random.Philox(derive_seed(seed, "evaluate", "bootstrap", name)))
    means = values[random.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {name: float(values.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
