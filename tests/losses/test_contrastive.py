import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from zoo.losses.contrastive import contrastive_loss_over_ranks, sigmoid_loss, sigmoid_loss_over_ranks

DRAWN = torch.Generator().manual_seed(0)
IMAGES, TEXTS, OTHERS = (F.normalize(torch.randn(6, 4, generator=DRAWN, dtype=torch.float64), dim=-1) for _ in range(3))


def gradients(rows: slice):
    """Loss and gradients of the pairs of a rank, by the loss that looks at all ranks."""
    numbers = [torch.tensor([number], dtype=torch.float64) for number in (3, -2)]
    inputs = [IMAGES[rows].clone(), TEXTS[rows].clone(), *numbers, OTHERS[rows].clone()]
    loss = sigmoid_loss_over_ranks(*(one.requires_grad_() for one in inputs))
    loss.backward()
    return [loss.detach(), *(one.grad for one in inputs)]


def contrastive_gradients(rows: slice, gathers_gradient: bool):
    """The same for the symmetric cross entropy."""
    inputs = [IMAGES[rows].clone(), TEXTS[rows].clone(), torch.tensor(0.1), OTHERS[rows].clone()]
    images, texts, temperature, others = (one.requires_grad_() for one in inputs)
    loss = contrastive_loss_over_ranks(images, texts, temperature, 0.1, gathers_gradient, others)
    loss.backward()
    grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in inputs]
    return [loss.detach(), *grads]


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(3 * rank, 3 * rank + 3)
    found = {"sigmoid": gradients(rows)} | {flag: contrastive_gradients(rows, flag) for flag in (True, False)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """By loss, what each of two ranks got for its half of the pairs."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (str(folder),), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    return {loss: (first[loss], second[loss]) for loss in first}


@pytest.mark.parametrize("gathers_gradient", [True, False])
def test_two_ranks_have_the_cross_entropy_and_the_gradients_of_one_with_all_pairs(two_ranks, gathers_gradient):
    first, second = two_ranks[gathers_gradient]
    loss, images, texts, temperature, others = contrastive_gradients(slice(0, 6), gathers_gradient)
    for number, expected in ((0, loss), (3, temperature)):
        torch.testing.assert_close((first[number] + second[number]) / 2, expected)
    for number, expected in ((1, images), (2, texts), (4, others)):
        torch.testing.assert_close(torch.cat([first[number], second[number]]) / 2, expected, rtol=1e-5, atol=1e-7)


def test_without_gathered_gradients_each_side_learns_from_its_own_rows_alone():
    whole, own = (contrastive_gradients(slice(0, 6), flag) for flag in (True, False))
    torch.testing.assert_close(whole[0], own[0])
    assert not torch.allclose(whole[1], own[1])
    assert whole[4].abs().sum() > 0
    assert own[4].abs().sum() == 0


def test_the_cross_entropy_is_that_of_clip():
    images, texts, others = IMAGES.float(), TEXTS.float(), OTHERS.float()
    logits = 10 * images @ torch.cat([texts, others]).T
    rows = torch.arange(6)
    expected = -(logits.log_softmax(1)[rows, rows] + (10 * texts @ images.T).log_softmax(1)[rows, rows]).mean() / 2
    loss = contrastive_loss_over_ranks(images, texts, torch.tensor(0.1), negatives=others)
    torch.testing.assert_close(loss, expected)


def test_two_ranks_have_the_loss_and_the_gradients_of_one_with_all_pairs(two_ranks):
    first, second = two_ranks["sigmoid"]
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
