"""Records of networks, as the sweep of the claims has them."""

from __future__ import annotations

from typing import Any

import numpy as np

OUTLIERS = np.array([2.0] * 10 + [0.24, 0.23, 0.1])  # at an edge of 0.2


def measures(left: int = 0, loss: float = 0.01, accuracy: float = 1.0, ratio: float = 5.0) -> dict[str, Any]:
    """Of a cell, with the outliers that are left without class means, by subtraction."""
    found: dict[str, Any] = {"loss": loss, "accuracy": accuracy, "test_accuracy": 0.9, "epoch": 200}
    for prefix in ("hessian_", ""):
        of = {
            "value": OUTLIERS,
            "outliers": 10,
            "bulk_edge": 0.2,
            "overlap_class": 0.9,
            "overlap_cross_class": 0.97,
        }
        of |= {"share_class": 0.6, "share_logit": 0.3, "share_interaction": 0.05, "share_within": 0.05}
        for name, num in (("class", left), ("class_logit", 0)):
            of[f"value_without_{name}_subtraction"] = np.array([2.0] * num + [0.1] * (13 - num))
            of[f"value_without_{name}_projection"] = np.full(13, 0.1)
        found |= {f"{prefix}{name}": value for name, value in of.items()}
    found |= {"value": OUTLIERS * ratio / 5, "norm": 2.0, "norm_residual": 0.5}
    for removed in ("class", "class_logit", "interaction"):
        found[f"shift_{removed}"] = np.array([0.5, 0.1, 0.0])
    found |= {"shift_cross": np.array([0.1, 0.4, 0.2]), "shift_within": np.array([0.0, 1.0, 3.0])}
    found["layer"] = ["fc1", "fc2"]
    ups = {"features_between": 0.2, "features_top_over_bulk": 1.0, "errors_top_over_bulk": -1.0}
    found |= {f"layer_{name}": [step, 2 * step] for name, step in ups.items()}
    found |= {f"layer_{name}": [0.95, 0.5] for name in ("class_cosine", "cross_cosine")}
    found |= {f"layer_{name}": [0.2, 0.1] for name in ("simplex", "nc1", "errors_class")}
    return found | {"clustering": np.array([0.6, 0.2, 0.3, 0.0])}


def record(model: str = "mlp", seed: int = 0, **options: Any) -> dict[str, Any]:
    point = {"model": model, "data": "fashion", "per_class": 13, "progress": 1.0, "seed": seed}
    return point | measures(**options)


def settings(num: int, **options: Any) -> list[dict[str, Any]]:
    """A network of each of several sizes."""
    return [record(**options) | {"per_class": 10 + j} for j in range(num)]
