"""What residual quantizers promise beyond the numbers of the reference."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from zoo import ZooError
from zoo.quantizers import ResidualQuantizer

KINDS = [{"kind": "rq"}, {"kind": "rq_ema"}, {"kind": "rq_ema", "ema_vectors": "level"}]


def quantizer(num_codes=8, levels=3, **options):
    torch.manual_seed(0)
    return ResidualQuantizer(num_codes, 4, levels, **options).train()


def vectors(count=64, seed=3, dim=4):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_ids_are_the_nearest_codes_of_what_is_left():
    q, z = quantizer().eval(), vectors()
    out, left = q(z), z
    for level in range(3):
        ids = torch.cdist(left, q.codebook(level).codebook).argmin(1)
        assert torch.equal(out.ids[:, level], ids)
        left = left - q.codebook(level).codebook[ids]
    torch.testing.assert_close(out.quantized, z - left)
    assert torch.equal(q.encode(z), out.ids)
    torch.testing.assert_close(q.codes(out.ids), out.quantized)
    assert q.embeddings(out.ids).shape == (64, 3, 4)


def test_the_first_levels_are_a_coarser_value():
    q, z = quantizer(num_codes=32).eval(), vectors()
    ids = q.encode(z)
    for levels in (1, 2, 3):
        assert torch.equal(q.encode(z, levels), ids[:, :levels])
    torch.testing.assert_close(q.codes(ids[:, :2]), q.embeddings(ids)[:, :2].sum(1))


@pytest.mark.parametrize("options", KINDS)
def test_codes_move_in_training_alone_and_without_a_backward_pass(options):
    q = quantizer(**options)
    before = {name: buffer.clone() for name, buffer in q.named_buffers()}
    q.eval()(vectors())
    q.encode(vectors())
    assert all(torch.equal(buffer, before[name]) for name, buffer in q.named_buffers())
    q.train()(vectors())
    assert not any(torch.equal(buffer, before[name]) for name, buffer in q.named_buffers())


def test_kinds_differ_in_when_codes_move():
    inside, after = quantizer(kind="rq"), quantizer(kind="rq_ema")
    one, other = inside(vectors()).ids, after(vectors()).ids
    assert torch.equal(one[:, 0], other[:, 0])
    assert not torch.equal(one[:, 1:], other[:, 1:])
    assert torch.equal(quantizer(kind="rq_ema").eval()(vectors()).ids, other)


def left_over(q, z):
    return (q.eval()(z).quantized - z).square().mean().item()


def test_learning_from_the_searched_vectors_approximates_them_better():
    z, errors = vectors(512), {}
    for which in ("final", "level"):
        q = quantizer(num_codes=16, kind="rq_ema", ema_vectors=which, restart=False, decay=0.8)
        for book in q.codebooks:  # as after some training, where every code is in use
            book.cluster_size.fill_(32)
            book.embed_sum.copy_(32 * book.codebook)
        errors[which] = [left_over(q, z)]
        for _ in range(30):
            q.train()(z)
        errors[which].append(left_over(q, z))
    assert errors["level"][1] < 0.6 * errors["level"][0]
    assert errors["level"][1] < 0.5 * errors["final"][1]


def test_codes_that_are_hardly_used_become_vectors_of_the_batch():
    q, z = quantizer(levels=1), vectors()
    q(z)  # none of 8 codes has 100 of 64 vectors
    distance = (q.codebooks[0].codebook[:, None] - z).abs().amax(2).amin(1)
    assert (distance < 1e-4).all()
    assert len(q.codebooks[0].codebook.unique(dim=0)) == 8
    assert torch.equal(q.codebooks[0].cluster_size, torch.ones(8))


def test_of_fewer_vectors_than_codes_there_are_noisy_copies():
    q, z = quantizer(num_codes=32, levels=1), vectors(5)
    q(z)
    codes = q.codebooks[0].codebook
    offset = codes - z[torch.cdist(codes, z).argmin(1)]
    assert -1e-4 < offset.min() < 1e-3 < offset.max() < 0.01 / 2 + 1e-4
    assert len(codes.unique(dim=0)) == 32


def test_gradients_pass_straight_through_and_the_loss_pulls_vectors():
    q, z = quantizer().eval(), vectors().requires_grad_()
    out = q(z)
    (gradient,) = torch.autograd.grad(out.quantized.sum(), z, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(z))
    partial = q.embeddings(out.ids).cumsum(1)
    expected = sum((z.detach() - partial[:, i]).square().mean() for i in range(3)) / 3
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(out.loss, z)
    torch.testing.assert_close(gradient, (z[:, None] - partial).sum(1).detach() * 2 / z.numel() / 3)


def test_use_is_counted_over_all_levels_of_a_shared_codebook():
    q = quantizer(num_codes=4, levels=2).eval()
    q.codebooks[0].codebook.copy_(torch.eye(4) * torch.tensor([10.0, 1.0, 50.0, 60.0])[:, None])
    out = q(torch.tensor([[10.0, 1.0, 0.0, 0.0]]))
    assert out.ids.tolist() == [[0, 1]]
    assert out.perplexity.item() == pytest.approx(2, rel=1e-4)
    assert out.usage.item() == 0.5


def test_codebooks_of_their_own_may_have_other_sizes():
    q = quantizer(num_codes=[4, 16], levels=2, shared=False, decay=[0.9, 0.8], kind="rq_ema")
    out = q(vectors())
    assert [len(book.codebook) for book in q.codebooks] == [4, 16]
    assert out.ids[:, 0].max() < 4 <= out.ids[:, 1].max() < 16
    assert q.codes(out.ids).shape == (64, 4)


def test_cells_of_several_vectors_share_their_ids():
    q = quantizer(num_codes=16, levels=2, cell=(2, 3)).eval()
    z = vectors(2 * 4 * 6).view(2, 4, 6, 4)
    out = q(z)
    assert out.ids.shape == (2, 2, 2, 2)
    assert out.quantized.shape == z.shape
    torch.testing.assert_close(q.from_cells(q.to_cells(z)), z)
    torch.testing.assert_close(q.codes(out.ids), out.quantized)


@pytest.mark.parametrize("options", KINDS)
def test_ids_and_codes_are_those_of_float32_under_autocast(options):
    plain, mixed, z = quantizer(num_codes=64, **options), quantizer(num_codes=64, **options), vectors().bfloat16()
    torch.manual_seed(1)
    expected = plain(z.float())
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixed(z)
    assert out.quantized.dtype == torch.bfloat16
    assert torch.equal(out.ids, expected.ids)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), mixed.buffers(), strict=True))


@pytest.mark.parametrize("options", KINDS)
def test_vectors_that_are_not_finite_do_not_poison_the_codes(options):
    q, z = quantizer(**options), vectors()
    held = dict(q.named_buffers())
    q(torch.full_like(z, torch.nan))
    z[::2] = torch.nan
    z[1] = torch.inf
    q(z)
    assert all(buffer.isfinite().all() for buffer in q.buffers())
    assert all(buffer.data_ptr() == held[name].data_ptr() for name, buffer in q.named_buffers())


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ZooError, match="kind rq or rq_ema"):
        quantizer(kind="pq")
    with pytest.raises(ZooError, match="ema_vectors final or level"):
        quantizer(ema_vectors="first")
    with pytest.raises(ZooError, match="at least one level"):
        quantizer(levels=0)
    with pytest.raises(ZooError, match=r"num_codes must be one value, or one for each of 1 codebooks, got \[8, 8\]"):
        quantizer(num_codes=[8, 8], levels=2)


OPTIONS = [
    *KINDS,
    {"num_codes": 64, "kind": "rq"},  # more than all vectors of both ranks
    {"num_codes": 300, "kind": "rq_ema"},
    {"num_codes": [8, 5, 6], "shared": False, "kind": "rq_ema", "ema_vectors": "level"},
    {"restart": False},
]


def train_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    states = []
    for options in OPTIONS:
        q = quantizer(**options)
        torch.manual_seed(rank)  # as in training, where ranks draw different numbers
        outputs = [q(vectors(32, seed=s).chunk(2)[rank]) for s in range(3)]
        scores = {name: torch.stack([getattr(o, name) for o in outputs]) for name in ("perplexity", "usage")}
        states.append({**scores, **q.state_dict()})
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one_rank_with_both_batches(tmp_path):
    mp.spawn(train_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for options, one, other in zip(OPTIONS, first, second, strict=True):
        alone = quantizer(**options)
        torch.manual_seed(0)
        outputs = [alone(vectors(32, seed=s)) for s in range(3)]
        expected = {name: torch.stack([getattr(o, name) for o in outputs]) for name in ("perplexity", "usage")}
        for name, value in (expected | alone.state_dict()).items():
            torch.testing.assert_close(one[name], value, msg=lambda m, n=name, o=options: f"{o} {n}: {m}")
            assert torch.equal(one[name], other[name])
