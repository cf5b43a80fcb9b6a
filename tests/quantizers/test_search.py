import pytest
import torch
import torch.nn.functional as F

from zoo import ZooError
from zoo.quantizers import nearest_code


@pytest.mark.parametrize(("codes", "dim"), [(7, 3), (128, 64), (3000, 16), (1025, 8)])
def test_the_nearest_code_is_found_for_any_number_of_codes(codes, dim):
    generator = torch.Generator().manual_seed(codes)
    vectors = torch.randn(700, dim, generator=generator)
    codebook = torch.randn(codes, dim, generator=generator)
    exact = torch.cdist(vectors.double(), codebook.double()).argmin(1)
    assert torch.equal(nearest_code(vectors, codebook), exact)


def test_ids_do_not_depend_on_what_is_searched_together():
    generator = torch.Generator().manual_seed(0)
    codebook = F.normalize(torch.randn(2048, 32, generator=generator))
    # nearly as near to two codes: rounding of the products decides
    pairs = torch.randint(2048, (600, 2), generator=generator)
    vectors = codebook[pairs].mean(1) + 1e-7 * torch.randn(600, 32, generator=generator)
    together = nearest_code(vectors, codebook)
    assert torch.equal(together, torch.cat([nearest_code(v[None], codebook) for v in vectors]))
    assert torch.equal(together, torch.cat([nearest_code(part, codebook) for part in vectors.split(77)]))
    assert torch.equal(together.view(2, 300), nearest_code(vectors.view(2, 300, 32), codebook))


@pytest.mark.parametrize("codes", [40, 9000])
def test_the_lowest_index_wins_among_equal_codes(codes):
    codebook = torch.randn(codes, 4, generator=torch.Generator().manual_seed(1))
    copies = torch.arange(5, codes, 7)
    codebook[copies] = codebook[5].clone()
    assert nearest_code(codebook[copies], codebook).unique().tolist() == [5]
    assert nearest_code(codebook[5], codebook).item() == 5


def test_huge_codes_do_not_cost_the_others_their_accuracy():
    generator = torch.Generator().manual_seed(2)
    codebook = torch.randn(4096, 8, generator=generator)
    vectors = codebook[torch.randperm(4096, generator=generator)[:500]] + 1e-3
    exact = torch.cdist(vectors.double(), codebook.double()).argmin(1)
    huge = torch.where(torch.rand(4096, 1, generator=generator) < 0.5, 1e5 * codebook, codebook)
    huge[exact] = codebook[exact]
    assert torch.equal(nearest_code(vectors, huge), exact)


def test_the_search_is_in_float32_under_autocast():
    codebook = 1 + torch.arange(64)[:, None] * torch.full((1, 4), 1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_code(codebook, codebook), torch.arange(64))
    coarse = codebook.bfloat16()
    assert torch.equal(nearest_code(coarse, codebook), nearest_code(coarse.float(), codebook))


def test_the_matmul_precision_stays_as_the_user_has_set_it():
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "highest"):
            torch.set_float32_matmul_precision(precision)
            nearest_code(torch.zeros(2, 4), torch.zeros(5, 4))
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("codes", [50, 2000])
def test_vectors_that_are_not_finite_get_id_0_and_codes_that_are_not_finite_no_vector(codes):
    generator = torch.Generator().manual_seed(3)
    codebook, vectors = torch.randn(codes, 6, generator=generator), torch.randn(20, 6, generator=generator)
    expected = nearest_code(vectors, codebook)
    broken = torch.cat([codebook, codebook * float("nan"), codebook * float("inf")])
    vectors[3, 0], vectors[7, 5], expected[[3, 7]] = float("nan"), -float("inf"), 0
    assert torch.equal(nearest_code(vectors, broken), expected)


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(ZooError, match=r"got \(2, 3\) and \(5, 4\)"):
        nearest_code(torch.zeros(2, 3), torch.zeros(5, 4))
    with pytest.raises(ZooError, match="K >= 1"):
        nearest_code(torch.zeros(2, 3), torch.zeros(0, 3))
    assert nearest_code(torch.zeros(0, 4), torch.zeros(5, 4)).shape == (0,)
