"""Scores of reconstructions, against numbers worked out by hand."""

import math

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

import zoo
from zoo.metrics.depth import DEPTH_ERRORS, DepthErrors, depth_errors
from zoo.metrics.frechet import Encoder, FrechetDistance
from zoo.metrics.lpips import LPIPS
from zoo.metrics.mae import MAE
from zoo.metrics.psnr import PSNR
from zoo.metrics.ssim import SSIM
from zoo.weights import MissingWeights


def score(metric, prediction, target):
    metric.update(prediction, target, [str(i) for i in range(len(target))])
    return {name: value.item() for name, value in metric.compute().items()}


def test_psnr_is_that_of_each_image_averaged():
    target = torch.full((2, 3, 16, 16), 0.5)
    prediction = torch.stack([target[0] + 0.1, target[1] + 0.01])  # 20 dB and 40 dB; of the mean error: 23 dB
    assert score(PSNR(), prediction, target)["psnr"] == pytest.approx(30, abs=1e-3)


def test_the_mean_absolute_error_is_over_all_values():
    target = torch.full((2, 3, 16, 16), 0.5)
    prediction = torch.stack([target[0] + 0.1, target[1] - 0.3])
    assert score(MAE(), prediction, target)["mae"] == pytest.approx(0.2)


def test_an_image_without_error_counts_as_100_db():
    image = torch.rand(1, 3, 16, 16)
    assert score(PSNR(), image, image)["psnr"] == 100


def test_ssim_of_constant_images_is_its_luminance_term():
    target, prediction = torch.full((1, 1, 16, 16), 0.6), torch.full((1, 1, 16, 16), 0.4)
    c = 0.01**2
    assert score(SSIM(), prediction, target)["ssim"] == pytest.approx((2 * 0.24 + c) / (0.36 + 0.16 + c), abs=1e-3)


def test_ssim_without_borders_is_that_of_windows_within_the_picture():
    prediction, target = torch.rand(2, 2, 3, 24, 20, generator=torch.Generator().manual_seed(0)).unbind()
    weights = torch.exp(-torch.arange(-5.0, 6).square() / (2 * 1.5**2))
    weights = weights[:, None] * weights / weights.sum() ** 2

    def mean(values):
        return (values * weights).sum((-2, -1))

    p, t = (images.unfold(2, 11, 1).unfold(3, 11, 1) for images in (prediction, target))
    m, n, covariance = mean(p), mean(t), mean(p * t) - mean(p) * mean(t)
    spread = mean(p * p) - m * m + mean(t * t) - n * n
    ssim = (2 * m * n + 1e-4) * (2 * covariance + 9e-4) / ((m * m + n * n + 1e-4) * (spread + 9e-4))
    assert score(SSIM(borders=False), prediction, target)["ssim"] == pytest.approx(ssim.mean().item(), abs=1e-5)
    with_borders = structural_similarity_index_measure(prediction, target, data_range=1.0)
    assert score(SSIM(), prediction, target)["ssim"] == pytest.approx(with_borders.item(), abs=1e-6)


def test_batches_of_any_size_give_the_mean_over_images():
    target, prediction = torch.rand(5, 3, 16, 16), torch.rand(5, 3, 16, 16)
    for metric in (PSNR, SSIM):
        parts = metric()
        for part in (slice(0, 4), slice(4, 5)):
            parts.update(prediction[part], target[part])
        whole = score(metric(), prediction, target)
        assert {k: v.item() for k, v in parts.compute().items()} == pytest.approx(whole)


def test_depth_errors_by_hand():
    errors = depth_errors(
        torch.tensor([1.0, 2.0, 4.0, 9.0]), torch.tensor([1.0, 1.0, 4.0, 0.0])
    )  # the last is no value
    expected = {
        "d1": 2 / 3,
        "d2": 2 / 3,
        "d3": 2 / 3,  # 2 is above 1.25^3 = 1.953
        "abs_rel": 1 / 3,
        "sq_rel": 1 / 3,
        "rmse": math.sqrt(1 / 3),
        "rmse_log": math.log(2) / math.sqrt(3),
        "log10": math.log10(2) / 3,
        "silog": math.sqrt(math.log(2) ** 2 / 3 - 0.5 * (math.log(2) / 3) ** 2),
    }
    assert tuple(expected) == DEPTH_ERRORS
    assert {name: value.item() for name, value in errors.items()} == pytest.approx(expected)


def test_depth_is_scored_as_eight_bit_maps_are():
    target = torch.tensor([0.001, 0.5, 1.0, 1.0]).view(1, 1, 2, 2)  # the first rounds to 0: no value there
    prediction = torch.tensor([0.9, 0.5, 0.9, 0.0]).view(1, 1, 2, 2)
    scores = score(DepthErrors(), prediction, target)
    assert scores["d1"] == pytest.approx(2 / 3)
    assert scores["abs_rel"] == pytest.approx((0 + 0.1 + 254 / 255) / 3)


class Means(torch.nn.Module):
    """Two features whose distribution is known: the means of the first two channels."""

    num_features = 2

    def forward(self, images):
        return images.mean((2, 3))[:, :2]


@pytest.fixture
def frechet(monkeypatch):
    monkeypatch.setattr("zoo.metrics.frechet.extractor", lambda features: Means())
    return FrechetDistance("means")


def test_frechet_distance_of_two_gaussians(frechet):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, 2, 1, 1, generator=generator, dtype=torch.float64)
    values = (values - values.mean(0)) / values.std(0)
    frechet.update(2 * values + 3, values)
    (distance,) = frechet.compute().values()
    # |m|^2 + tr(S + T - 2 (S T)^(1/2)) with m = (3, 3) and T = 4 S, whose diagonal is 1: 18 + tr(S)
    assert distance.item() == pytest.approx(18 + 2, rel=1e-9)


class Rows(zoo.Tokenizer):
    """The mean grey of each of four rows in two steps; the last is not live."""

    def __init__(self):
        super().__init__(None)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        kind = {"kind": "discrete", "streams": ("image",), "codebook_sizes": {"image": 2}, "max_tokens": 4}
        self.info = zoo.TokenizerInfo("test", "", image_size=4, size_multiple=None, channels=1, **kind)

    def _encode(self, images):
        ids = images.mean((1, 3)).round().long()
        return zoo.Tokens({"image": ids}, mask=torch.tensor([True, True, True, False]).expand(len(ids), -1))


def test_the_features_of_a_tokenizer_with_ids_only_are_the_shares_of_its_live_codes(monkeypatch):
    monkeypatch.setattr("zoo.metrics.frechet.load_tokenizer", lambda name: Rows())
    image = torch.tensor([0.0, 1.0, 1.0, 1.0]).view(1, 1, 4, 1).expand(-1, 3, -1, 4)
    assert torch.allclose(Encoder("rows")(image), torch.tensor([[1 / 3, 2 / 3]]))


def test_a_frechet_distance_on_other_features_is_not_called_fid(frechet):
    assert [row.title for row in frechet.rows] == ["FD[means]"]
    assert [row.title for row in FrechetDistance.rows] == ["rFID"]


@pytest.mark.parametrize(
    ("metric", "file"),
    [(LPIPS, "alexnet-owt-7be5be79.pth"), (FrechetDistance, "weights-inception-2015-12-05-6726825d.pth")],
)
def test_missing_weights_are_named_with_the_folder_they_belong_in(metric, file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match=file) as error:
        metric()
    assert str(tmp_path / "hub" / "checkpoints") in str(error.value)
