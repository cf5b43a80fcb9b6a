"""What can be read off features by a linear map."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Shares of the mean variance of a feature that are tried as the penalty of a probe."""


def linear_probe(train: Tensor, targets: Tensor, test: Tensor, ridges: Sequence[float] = RIDGES) -> Tensor:
    """Scores (M, K) of test rows (M, D) by ridge regression from train rows (N, D) to targets (N, K).

    Features are standardised and a constant is added. The penalty is the one of the ridges that errs least on every
    fifth of the training rows, which may be sorted, when it is fitted on the others; the probe is then fitted on all.
    For classes, targets are one-hot and the highest score is the guess.
    """
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    targets = targets.double()
    held = torch.arange(1, len(train) + 1) % min(len(train), 5) == 0
    errors = [
        (scores - targets[held]).square().mean().item()
        for scores in _fits(train[~held], targets[~held], train[held], ridges)
    ]
    best = ridges[errors.index(min(errors))]
    return next(_fits(train, targets, test, [best]))


def _fits(train: Tensor, targets: Tensor, test: Tensor, ridges: Sequence[float]) -> Iterator[Tensor]:
    """Scores for each of the ridges, from the smaller one of the products of features and of rows."""
    center, offset = train.mean(0), targets.mean(0)
    train, test, targets = train - center, test - center, targets - offset
    rows_are_fewer = len(train) < train.shape[1]
    gram = (train @ train.T if rows_are_fewer else train.T @ train).double()
    scale = train.square().mean().double() * len(train)  # of the mean variance of a feature
    across = (test @ train.T if rows_are_fewer else test).double()
    right = targets if rows_are_fewer else train.T.double() @ targets
    for ridge in ridges:
        penalty = ridge * scale * torch.eye(len(gram), dtype=gram.dtype)
        yield across @ torch.linalg.solve(gram + penalty, right) + offset


def probe_classes(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Classes (M,) of test rows (M, D) by a linear probe on train rows (N, D) with labels (N,) 0, 1, ..."""
    return linear_probe(train, F.one_hot(labels), test).argmax(1)


def probe(
    train: Tensor, learned: Mapping[str, Tensor], test: Tensor, expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """How well each of several things is read off test rows (M, D) by one linear map that is fitted on rows (N, D).

    learned and expected, by name: classes (N,) and (M,) int64, or (N, K) and (M, K) bool, what each row has. Returns
    the accuracy of classes, and of what rows have the area under the ROC curve, averaged over those of the K that some
    test rows have and others have not (0.5: chance); NaN where there is none.
    """
    return judge(probe_scores(train, learned, test), expected)


def probe_scores(train: Tensor, learned: Mapping[str, Tensor], test: Tensor) -> dict[str, Tensor]:
    """Scores (M, K) of test rows for each thing, as `probe` fits them."""
    columns = {name: F.one_hot(one) if one.ndim == 1 else one.long() for name, one in learned.items()}
    scores = linear_probe(train, torch.cat(list(columns.values()), 1), test)
    return dict(zip(columns, scores.split([one.shape[1] for one in columns.values()], dim=1), strict=True))


def judge(scores: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """What `probe` returns, from scores (M, K) and what is expected of these rows."""
    return {name: (_accuracy if one.ndim == 1 else _auroc)(scores[name], one) for name, one in expected.items()}


def most_frequent(learned: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Accuracy of one who always says the most frequent class that was learned; targets as for `probe`."""
    classes = {name: one.mode().values for name, one in learned.items() if one.ndim == 1}
    return {name: (expected[name] == one).double().mean().item() for name, one in classes.items()}


def _accuracy(scores: Tensor, right: Tensor) -> float:
    return (scores.argmax(1) == right).double().mean().item()


def _auroc(scores: Tensor, right: Tensor) -> float:
    pairs = zip(scores.unbind(1), right.unbind(1), strict=True)
    areas = [binary_auroc(score, one.long()).item() for score, one in pairs if one.any() and not one.all()]
    return sum(areas) / len(areas) if areas else math.nan
