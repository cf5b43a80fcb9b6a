import pytest
import torch
import torch.nn.functional as F

from zoo.metrics.retrieval import Retrieval, recall_at


def test_recall_counts_the_queries_whose_own_candidate_is_near_enough():
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.2, 0.1]])
    own = torch.eye(3, dtype=torch.bool)
    assert [recall_at(similarity, own, k).item() for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_embeddings_that_are_all_alike_find_nothing():
    assert recall_at(torch.ones(4, 4), torch.eye(4, dtype=torch.bool), 1) == 0


def test_an_equal_caption_of_another_image_is_right():
    images = F.normalize(torch.eye(3) + 0.1, dim=1)
    metric, swapped = Retrieval(ks=(1,)), images[[1, 0, 2]]  # each of the first two is nearest to the other's text
    metric.update(images[:2], swapped[:2], ["a", "b"])
    metric.update(images[2:], swapped[2:], ["c"])
    assert metric.compute()["image_to_text_recall@1"].item() == pytest.approx(1 / 3)
    metric.reset()
    metric.update(images, swapped, ["a", "a", "c"])
    assert metric.compute() == {"image_to_text_recall@1": 1, "text_to_image_recall@1": 1}


def test_both_directions_are_told_apart():
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.9, 0.1]])  # the first image is nearest to both texts
    metric = Retrieval(ks=(1,))
    metric.update(images, texts, ["a", "b"])
    assert metric.compute() == {"image_to_text_recall@1": 1, "text_to_image_recall@1": 0.5}
