import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from zoo import ZooError
from zoo.quantizers import EMAQuantizer, perplexity


def quantizer(**options):
    torch.manual_seed(0)
    return EMAQuantizer(8, 4, **options).train()


def vectors(count=64, seed=3):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def test_one_update_is_that_of_the_formula():
    q, z = quantizer(decay=0.9), vectors()
    codebook, sums = q.codebook.clone(), q.embed_sum.clone()
    ids = q(z).ids
    assert torch.equal(ids, torch.cdist(z, codebook).argmin(1))  # looked up before the codes moved
    counts = 0.1 * torch.bincount(ids, minlength=8).float()
    total = counts.sum()
    counts = (counts + 1e-5) / (total + 8e-5) * total
    means = 0.9 * sums + 0.1 * torch.stack([z[ids == k].sum(0) for k in range(8)])
    torch.testing.assert_close(q.cluster_size, counts)
    torch.testing.assert_close(q.codebook, means / counts[:, None])


def test_nothing_moves_in_evaluation():
    q = quantizer().eval()
    before = {name: buffer.clone() for name, buffer in q.named_buffers()}
    q(vectors())
    assert all(torch.equal(buffer, before[name]) for name, buffer in q.named_buffers())


def test_gradients_pass_straight_through_and_the_loss_pulls_vectors_to_their_codes():
    q, z = quantizer(commitment=0.5).eval(), vectors().requires_grad_()
    out = q(z)
    torch.testing.assert_close(out.quantized, q.codebook[out.ids])
    (gradient,) = torch.autograd.grad(out.quantized.sum(), z, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(z))
    (gradient,) = torch.autograd.grad(out.loss, z)
    torch.testing.assert_close(gradient, 0.5 * 2 * (z - q.codebook[out.ids]) / z.numel())


def rows_in(rows, table):
    """(K,) bool: whether each row is one of the table."""
    return (rows[:, None] == table).all(2).any(1)


def test_smoothed_counts_are_kept_and_unused_codes_explode_as_published():
    q = EMAQuantizer(2, 1, decay=0.99).train()
    q.codebook.copy_(torch.tensor([[0.0], [10.0]]))
    q.embed_sum.copy_(torch.tensor([[1.0], [2.0]]))
    z = torch.full((4, 1), 0.5)
    out = q(z)
    assert out.ids.tolist() == [0, 0, 0, 0]
    assert out.loss.item() == pytest.approx(0.25 * 0.25)
    # n = 0.01 * 4: the used code is (0.99 * 1 + 0.01 * 2) / 0.04, the other has a count of about eps alone
    smooth = 0.04 / (0.04 + 2e-5)
    first, second = (0.04 + 1e-5) * smooth, 1e-5 * smooth
    torch.testing.assert_close(q.cluster_size, torch.tensor([first, second]))
    torch.testing.assert_close(q.codebook, torch.tensor([[1.01 / first], [1.98 / second]]))
    assert q.codebook[1] > 1e5
    q(z)  # 0.5 is nearest to the first code still
    n = 0.99 * 0.04 + 0.04
    counts = (0.99 * torch.tensor([first, second]) + torch.tensor([0.04, 0.0]) + 1e-5) / (n + 2e-5) * n
    torch.testing.assert_close(q.cluster_size, counts)
    torch.testing.assert_close(q.codebook, torch.tensor([[0.99 * 1.01 + 0.02], [0.99 * 1.98]]) / counts[:, None])


def test_starting_from_data_makes_every_code_another_vector_of_the_first_batch():
    q, z = quantizer(init="data", decay=1.0), vectors()
    assert q(z).perplexity > 5
    assert rows_in(q.codebook, z).all()
    assert len(q.codebook.unique(dim=0)) == 8
    before = q.codebook.clone()
    q(vectors(seed=4) + 10)
    torch.testing.assert_close(q.codebook, before)


def test_starting_from_fewer_vectors_than_codes_uses_all_of_them():
    q, z = quantizer(init="data", decay=1.0), vectors(3)
    q(z)
    assert rows_in(q.codebook, z).all()
    assert rows_in(z, q.codebook).all()


def test_a_start_from_data_is_not_repeated_after_loading():
    q = quantizer(init="data", decay=1.0)
    q(vectors())
    loaded = quantizer(init="data", decay=1.0)
    loaded.load_state_dict(q.state_dict())
    loaded(vectors(seed=4) + 10)
    torch.testing.assert_close(loaded.codebook, q.codebook)


def test_dead_codes_are_restarted_from_the_batch():
    q = quantizer(restart_below=0.5, decay=0.5)
    z = vectors() * 0.01 + 5  # far from most codes
    used = q(z).ids.unique()
    restarted = torch.tensor([k for k in range(8) if k not in used])
    assert len(restarted) > 0
    assert rows_in(q.codebook[restarted], z).all()
    assert not rows_in(q.codebook[used], z).any()
    assert torch.equal(q.cluster_size[restarted], torch.ones(len(restarted)))


def test_vectors_that_are_not_finite_do_not_poison_the_codes():
    for options in ({}, {"init": "data"}, {"restart_below": 1.0}):
        q, z = quantizer(**options), vectors()
        q(torch.full_like(z, float("nan")))
        assert all(buffer.isfinite().all() for buffer in q.buffers()), options
        z[::2] = float("nan")
        z[1] = float("inf")
        q(z)
        assert all(buffer.isfinite().all() for buffer in q.buffers()), options
    mixed, clean, z = quantizer(), quantizer(), vectors()
    assert mixed(torch.cat([z, z[:5] * float("nan")])).perplexity == clean(z).perplexity
    assert torch.equal(mixed.codebook, clean.codebook)


def test_codes_move_in_float32_under_autocast():
    plain, mixed, z = quantizer(), quantizer(), vectors().bfloat16()
    plain(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed(z)
    assert torch.equal(plain.codebook, mixed.codebook)


def test_buffers_are_moved_in_place():
    q = quantizer(init="data", restart_below=1.0)
    held = dict(q.named_buffers())
    q(vectors())
    assert all(buffer.data_ptr() == held[name].data_ptr() for name, buffer in q.named_buffers())


def test_perplexity_counts_codes_in_even_use():
    assert perplexity(torch.tensor([5.0, 5.0, 5.0, 0.0])).item() == pytest.approx(3, rel=1e-5)
    assert perplexity(torch.tensor([0.0, 7.0])).item() == pytest.approx(1, rel=1e-5)
    assert perplexity(torch.zeros(2)).item() == 1


def test_an_unknown_start_is_refused():
    with pytest.raises(ZooError, match="'published' or 'data'"):
        EMAQuantizer(8, 4, init="random")


OPTIONS = [{}, {"init": "data"}, {"init": "data", "restart_below": 2.0}]


def train_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    states = []
    for options in OPTIONS:
        q = quantizer(**options)
        torch.manual_seed(rank)  # as in training, where ranks draw different numbers
        scores = [q(z.chunk(2)[rank]).perplexity for z in (vectors(seed=s) for s in range(3))]
        states.append({"perplexity": torch.stack(scores), **q.state_dict()})
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one_rank_with_both_batches(tmp_path):
    mp.spawn(train_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for options, one, other in zip(OPTIONS, first, second, strict=True):
        alone = quantizer(**options)
        torch.manual_seed(0)
        scores = torch.stack([alone(vectors(seed=s)).perplexity for s in range(3)])
        expected = {"perplexity": scores, **alone.state_dict()}
        for name, value in expected.items():
            torch.testing.assert_close(one[name], value, msg=lambda m, n=name, o=options: f"{o} {n}: {m}")
            assert torch.equal(one[name], other[name])


def test_normalised_codes_stay_on_the_sphere():
    q, z = quantizer(normalize=True, init="data", restart_below=0.5), 3 * vectors()
    for _ in range(3):
        out = q(z)
    torch.testing.assert_close(q.codebook.norm(dim=1), torch.ones(8))
    unit = torch.nn.functional.normalize(z, dim=1)
    assert torch.equal(q.encode(z), (unit @ q.codebook.T).argmax(1))
    torch.testing.assert_close(out.quantized.norm(dim=1), torch.ones(64))
    assert torch.equal(q.codes(out.ids), q.codebook[out.ids])
