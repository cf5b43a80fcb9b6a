"""Flow matching (arXiv 2210.02747) on straight paths: x_t = (1 - t) x + t e, from data x at t = 0 to noise e at t = 1.

A network learns the velocity v = dx_t / dt = e - x; a sampler follows it from t = 1 down to t = 0.
"""

from zoo.flow.guidance import guide, guide_twice, linear_scale, renormalize
from zoo.flow.paths import data_at, interpolate, score, velocity
from zoo.flow.solvers import adaptive, euler, euler_maruyama, heun
from zoo.flow.times import check_steps, falling, logit_normal, shift

__all__ = [
    "adaptive",
    "check_steps",
    "data_at",
    "euler",
    "euler_maruyama",
    "falling",
    "guide",
    "guide_twice",
    "heun",
    "interpolate",
    "linear_scale",
    "logit_normal",
    "renormalize",
    "score",
    "shift",
    "velocity",
]
