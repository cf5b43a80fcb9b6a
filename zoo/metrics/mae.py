from zoo.metrics.base import PerImage, Row


class MAE(PerImage):
    """Mean absolute error of values in [0, 1]."""

    rows = (Row("mae", "mean absolute error", "lower", ".4f"),)

    def scores(self, prediction, target):
        return (prediction - target).abs().flatten(1).mean(1)[:, None]
