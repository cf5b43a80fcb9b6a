import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from zoo.losses.contrastive import sigmoid_loss, sigmoid_loss_over_ranks

DRAWN = torch.Generator().manual_seed(0)
IMAGES, TEXTS, OTHERS = (F.normalize(torch.randn(6, 4, generator=DRAWN, dtype=torch.float64), dim=-1) for _ in range(3))


def gradients(rows: slice):
    """Loss and gradients of the pairs of a rank, by the loss that looks at all ranks."""
    numbers = [torch.tensor([number], dtype=torch.float64) for number in (3, -2)]
    inputs = [IMAGES[rows].clone(), TEXTS[rows].clone(), *numbers, OTHERS[rows].clone()]
    loss = sigmoid_loss_over_ranks(*(one.requires_grad_() for one in inputs))
    loss.backward()
    return [loss.detach(), *(one.grad for one in inputs)]


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(gradients(slice(3 * rank, 3 * rank + 3)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_loss_and_the_gradients_of_one_with_all_pairs(tmp_path):
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    loss, images, texts, scale, bias, others = gradients(slice(0, 6))
    for number, expected in ((0, loss), (3, scale), (4, bias)):  # DDP averages the gradients of parameters
        torch.testing.assert_close((first[number] + second[number]) / 2, expected)
    for number, expected in ((1, images), (2, texts), (5, others)):
        torch.testing.assert_close(torch.cat([first[number], second[number]]) / 2, expected)


def test_the_loss_is_that_of_the_paper_pair_by_pair():
    expected = 0.0
    for i in range(6):
        for j in range(6):
            z = 1 if i == j else -1
            logit = 3 * float(IMAGES[i] @ TEXTS[j]) - 2
            expected += math.log1p(math.exp(-z * logit)) / 6
    loss = sigmoid_loss(IMAGES, TEXTS, torch.tensor(3.0), torch.tensor(-2.0))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_negatives_belong_to_no_image():
    scale, bias = torch.tensor(3.0), torch.tensor(-2.0)
    expected = sigmoid_loss(IMAGES, torch.cat([TEXTS, OTHERS]), scale, bias)
    with_negatives = sigmoid_loss_over_ranks(IMAGES, TEXTS, scale, bias, OTHERS)
    torch.testing.assert_close(with_negatives, expected)
    pairs = sigmoid_loss(IMAGES, TEXTS, scale, bias)
    torch.testing.assert_close(expected - pairs, F.softplus(3 * IMAGES @ OTHERS.T - 2).sum() / 6)


def test_the_text_of_an_image_may_begin_anywhere_among_the_texts():
    scale, bias = torch.tensor(3.0), torch.tensor(-2.0)
    parts = [sigmoid_loss(IMAGES[i : i + 2], TEXTS, scale, bias, first=i) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts) / 3, sigmoid_loss(IMAGES, TEXTS, scale, bias))


def test_the_loss_has_full_precision_under_autocast():
    images, texts, scale, bias = IMAGES.float(), TEXTS.float(), torch.tensor(100.0), torch.tensor(-10.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sigmoid_loss(images, texts, scale, bias)
    assert torch.equal(loss, sigmoid_loss(images, texts, scale, bias))
