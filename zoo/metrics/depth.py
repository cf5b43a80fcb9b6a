import torch
from torch import Tensor

from zoo.metrics.base import PerImage, Row

DEPTH_ERRORS = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")


def depth_errors(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The usual errors of a depth map, over the places where the target is above 0.

    prediction, target: positive, of one shape and unit. d1, d2, d3: share of places whose ratio is below 1.25, 1.25^2
    and 1.25^3; abs_rel, sq_rel: mean of |p - t| / t and (p - t)^2 / t; rmse, rmse_log: root mean square of p - t and of
    d = log p - log t; log10: mean |log10 p - log10 t|; silog: sqrt(mean d^2 - 0.5 (mean d)^2), as in AiT.
    """
    valid = target > 0
    p, t = prediction[valid], target[valid]
    ratio = torch.maximum(p / t, t / p)
    error, log_error = p - t, p.log() - t.log()
    values = (
        *((ratio < 1.25**k).to(p.dtype).mean() for k in (1, 2, 3)),
        (error.abs() / t).mean(),
        (error.square() / t).mean(),
        error.square().mean().sqrt(),
        log_error.square().mean().sqrt(),
        (p.log10() - t.log10()).abs().mean(),
        (log_error.square().mean() - 0.5 * log_error.mean().square()).sqrt(),
    )
    return dict(zip(DEPTH_ERRORS, values, strict=True))


class DepthErrors(PerImage):
    """depth_errors of each map in [0, 1], averaged over images.

    A map is scored as if stored in 8 bits, the form of relative depth: a target below half a step of 1/255 is 0,
    "no value", and a prediction is one step at least.
    """

    rows = (
        Row("abs_rel", "AbsRel", "lower"),
        Row("rmse", "RMSE", "lower", ".4f"),
        Row("d1", "delta < 1.25", "higher", ".1%"),
    )
    kinds = ("depth",)
    names = DEPTH_ERRORS

    def scores(self, prediction, target):
        target = target.where(target >= 0.5 / 255, 0)
        maps = zip(prediction.clamp(min=1 / 255), target, strict=True)
        return torch.stack([torch.stack([*depth_errors(p, t).values()]) for p, t in maps])
