import torch

from zoo.metrics.zeroshot import text_classifier


def test_texts_count_alike_whatever_their_length():
    direction = text_classifier(torch.tensor([[[3.0, 0.0], [0.0, 0.1]], [[2.0, 0.0], [1.0, 0.0]]]))
    torch.testing.assert_close(direction, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))
