import pytest
import torch
import torch.nn.functional as F

from zoo.metrics.retrieval import Retrieval, chance_at, recall_at


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


def test_chance_is_what_random_orders_find():
    relevant = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]).bool()
    draws = torch.rand(20_000, 1, 5, generator=torch.Generator().manual_seed(0)).expand(-1, 2, -1)
    for k in (1, 2, 4, 5, 9):
        found = torch.stack([recall_at(draw, relevant, k) for draw in draws[:2000]]).mean()
        assert chance_at(relevant, k).item() == pytest.approx(found.item(), abs=0.03)
    assert chance_at(relevant, 1).item() == pytest.approx((2 / 5 + 1 / 5) / 2)
