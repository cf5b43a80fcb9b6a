"""The index quantizer against its formula with all logits held, as it was published."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from zoo import ZooError
from zoo.quantizers import IndexQuantizer, index, largest_product


def plain(quantizer, z):
    """Quantized, the loss, and the two entropies of vectors (M, D), by autograd."""
    codebook, temperature = quantizer.codebook, quantizer.temperature
    logits = z @ codebook.T
    p = logits.softmax(1)
    hard = F.one_hot(p.argmax(1), len(codebook)).to(p.dtype)
    quantized, codes = ((hard - p).detach() + p) @ codebook, hard @ codebook
    loss = F.mse_loss(quantized, z) + F.mse_loss(codes.detach(), z)
    loss = loss + quantizer.commitment * F.mse_loss(codes, z.detach())
    q, log_q = (logits / temperature).softmax(1), (logits / temperature).log_softmax(1)
    mean = q.mean(0)
    return quantized, loss, -(q * log_q).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum()


def make(num_codes=40, dim=6, **options):
    torch.manual_seed(num_codes)
    return IndexQuantizer(num_codes, dim, **({"temperature": 0.5} | options))


def gradients(output, *leaves):
    return torch.autograd.grad(output, leaves, retain_graph=True)


@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_chunks_have_the_losses_and_gradients_of_the_whole(chunk, monkeypatch):
    monkeypatch.setattr(index, "_chunk", lambda codebook: chunk)
    quantizer = make(sample_weight=0.7, average_weight=1.3)
    z = torch.randn(30, 6, requires_grad=True)
    out, (quantized, loss, sample, average) = quantizer(z), plain(quantizer, z)
    torch.testing.assert_close(out.entropy, 0.7 * sample - 1.3 * average)
    direction = torch.randn(30, 6)
    pairs = [
        ((out.quantized * direction).sum(), (quantized * direction).sum()),
        (out.loss, loss),
        (out.sample_entropy, sample),
        (out.average_entropy, average),
        (out.loss + out.entropy + out.quantized.sum(), loss + 0.7 * sample - 1.3 * average + quantized.sum()),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
        for found, expected in zip(
            gradients(ours, z, quantizer.codebook), gradients(theirs, z, quantizer.codebook), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_every_code_gets_the_gradient_of_the_formula():
    quantizer = make()
    z, g = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 6)
    out = quantizer(z)
    of_z, of_codes = gradients((out.quantized * g).sum(), z, quantizer.codebook)
    codebook = quantizer.codebook.detach()
    p, along = (z.detach() @ codebook.T).softmax(-1), g @ codebook.T
    s = p * (along - (p * along).sum(-1, keepdim=True))
    torch.testing.assert_close(of_z, s @ codebook)
    chosen = F.one_hot(out.ids, 40).float()
    expected = torch.einsum("bnk,bnd->kd", s, z.detach()) + torch.einsum("bnk,bnd->kd", chosen, g)
    torch.testing.assert_close(of_codes, expected)
    assert of_codes.ne(0).all()


def test_what_comes_out_are_codes_of_the_largest_product():
    quantizer, z = make(3000), torch.randn(4, 50, 6)
    out = quantizer(z)
    assert torch.equal(out.ids, (z @ quantizer.codebook.T).argmax(-1))
    assert torch.equal(out.quantized, quantizer.codes(out.ids))
    assert torch.equal(out.ids, quantizer.encode(z))
    assert 1 < out.perplexity < len(out.ids.unique()) + 0.01


def test_a_long_code_attracts_ids():
    quantizer, z = make(), torch.randn(500, 6)
    before = (quantizer.encode(z) == 3).sum()
    with torch.no_grad():
        quantizer.codebook[3] *= 10
    assert (quantizer.encode(z) == 3).sum() > 5 * before
    assert quantizer.encode(torch.zeros(6)) == 0


def test_ids_do_not_depend_on_autocast_and_outputs_keep_the_dtype():
    quantizer, z = make(), torch.randn(64, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(z)
        coarse = quantizer(z.bfloat16())
    assert torch.equal(out.ids, quantizer.encode(z))
    torch.testing.assert_close(out.entropy, quantizer(z).entropy)
    assert (out.quantized.dtype, coarse.quantized.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(coarse.ids, quantizer.encode(z.bfloat16().float()))


def test_clear_choices_and_even_use_have_the_least_entropy_loss():
    quantizer = make(8, 8, temperature=0.01)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.eye(8))
    even = quantizer(torch.eye(8))
    torch.testing.assert_close(even.sample_entropy, torch.tensor(0.0))
    assert even.average_entropy.item() == pytest.approx(torch.tensor(8.0).log().item(), abs=1e-3)
    assert quantizer(torch.eye(8)[:1].expand(8, -1)).average_entropy.abs() < 1e-4
    assert quantizer(torch.zeros(3, 8)).sample_entropy.item() == pytest.approx(torch.tensor(8.0).log().item(), abs=1e-3)


def test_without_a_temperature_there_is_no_entropy():
    quantizer = make(temperature=0.0)
    out = quantizer(torch.randn(10, 6, requires_grad=True))
    assert out.entropy == out.sample_entropy == out.average_entropy == 0
    (out.loss + out.entropy).backward()
    assert quantizer.codebook.grad.isfinite().all()
    with pytest.raises(ZooError, match=r"temperature must be above 0, or 0 for no entropies, got -1"):
        make(temperature=-1.0)


def test_products_with_codes_that_are_not_finite_are_never_the_largest():
    codebook, z = torch.randn(50, 6), torch.randn(20, 6)
    expected = largest_product(z, codebook)
    broken = torch.cat([codebook, codebook * float("nan"), codebook.abs() * float("inf"), -float("inf") * codebook])
    assert torch.equal(largest_product(z, broken), expected)


def test_ids_do_not_depend_on_what_is_searched_together():
    generator = torch.Generator().manual_seed(0)
    codebook = F.normalize(torch.randn(2048, 32, generator=generator))
    pairs = torch.randint(2048, (300, 2), generator=generator)
    vectors = codebook[pairs].mean(1) + 1e-7 * torch.randn(300, 32, generator=generator)
    together = largest_product(vectors, codebook)
    assert torch.equal(together, torch.cat([largest_product(v[None], codebook) for v in vectors]))
    codebook[5::7] = codebook[5].clone()
    assert largest_product(codebook[[12, 19]], codebook).tolist() == [5, 5]


class Step(nn.Module):
    """All outputs of a quantizer in one scalar."""

    def __init__(self):
        super().__init__()
        self.quantizer = make()

    def forward(self, z):
        out = self.quantizer(z)
        return out.loss + out.entropy + out.quantized.square().mean(), out.average_entropy, out.perplexity


def vectors():
    return torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(7))


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    step = nn.parallel.DistributedDataParallel(Step())
    loss, *statistics = step(vectors().chunk(2)[rank])
    loss.backward()
    torch.save([step.module.quantizer.codebook.grad, *statistics], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one_with_both_batches(tmp_path):
    step = Step()
    loss, *statistics = step(vectors())
    loss.backward()
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    expected = [step.quantizer.codebook.grad, *statistics]
    for rank in (0, 1):
        for found, one in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, one)
