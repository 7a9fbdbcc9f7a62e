"""The logs that another implementation's figures were frozen on: arithmetic alone, so that they never change."""

import numpy as np


def _uniform(*shape, salt):
    """In (0, 1): fractional parts of multiples of irrational numbers, well spread and the same everywhere."""
    n = np.arange(1, int(np.prod(shape)) + 1, dtype=np.float64)
    return np.mod(n * np.sqrt(salt) + np.mod(n * n, 7919.0) * np.sqrt(salt + 1.0) / 7919.0, 1.0).reshape(shape)


def one_item_log(rows=600, actions=4):
    """reward [N], action [N], p and pi [N, A] (the logger's and the policy's probabilities), q [N, A] (a reward model)."""
    p, pi = 0.1 + _uniform(rows, actions, salt=2), 0.1 + _uniform(rows, actions, salt=3) ** 2
    p, pi = p / p.sum(axis=1, keepdims=True), pi / pi.sum(axis=1, keepdims=True)
    action = (p.cumsum(axis=1) < _uniform(rows, salt=5)[:, None]).sum(axis=1).clip(max=actions - 1)
    reward = (_uniform(rows, salt=7) < 0.1 + 0.2 * action).astype(float)
    return {"reward": reward, "action": action, "p": p, "pi": pi, "q": np.clip(_uniform(rows, actions, salt=11), 0.05, 0.95)}


def list_log(requests=300, places=3):
    """reward, p and pi [R, K]: what was clicked, and both policies' probabilities of the item at its place."""
    reward = (_uniform(requests, places, salt=13) < 0.3).astype(float)
    return {"reward": reward, "p": 0.2 + 0.7 * _uniform(requests, places, salt=17), "pi": 0.1 + 0.8 * _uniform(requests, places, salt=19)}
