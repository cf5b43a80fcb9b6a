"""Frechet distance of generated images to a reference, and Inception Score."""

import numpy as np
import pytest
import torch

from zoo import ZooError
from zoo.metrics.frechet import extractor
from zoo.metrics.generated import batches, frechet_distance, inception_score, read_reference
from zoo.weights import MissingWeights

FEATURES = "aurora-tiny"


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)


def test_moments_of_the_reference_do_as_well_as_its_images(images, tmp_path):
    with torch.no_grad():
        features = torch.cat([extractor(FEATURES)(batch) for batch in batches(images)]).double().numpy()
    np.savez(tmp_path / "images.npz", arr_0=images)
    np.savez(tmp_path / "moments.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    others = images // 2
    one, other = (
        frechet_distance(others, tmp_path / f"{name}.npz", FEATURES, torch.device("cpu"))
        for name in ("images", "moments")
    )
    assert one == pytest.approx(other, rel=1e-3)
    assert one > 1e-3


def test_files_that_are_no_reference_are_refused(tmp_path):
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "pickled.npz", arr_0=np.array([{}], dtype=object))
    for name, complaint in (
        *(("floats", "neither mu and sigma nor images"), ("half", "neither mu and sigma nor images")),
        *(("text", "is no .npz"), ("pickled", "is no .npz"), ("absent", "is no .npz")),
    ):
        with pytest.raises(ZooError, match=complaint):
            read_reference(tmp_path / f"{name}.npz")


def test_moments_of_other_features_are_refused(images, tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ZooError, match=r"a mean of shape \(3,\)"):
        frechet_distance(images, tmp_path / "other.npz", FEATURES, torch.device("cpu"))


def test_without_the_weights_of_inception_it_is_said_which_are_missing(images, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match="weights-inception"):
        inception_score(images, torch.device("cpu"))


class Sure(torch.nn.Module):
    """Is sure of one of four classes by the brightness of the image."""

    def __init__(self, output):
        super().__init__()
        assert output == "logits_unbiased"

    def forward(self, images):
        return 100 * torch.nn.functional.one_hot((images.mean((1, 2, 3)) * 4).long(), 4).float()


def test_the_inception_score_of_sure_and_even_classes_is_their_number(monkeypatch):
    monkeypatch.setattr("zoo.metrics.generated.Inception", Sure)
    even = np.repeat(np.array([30, 90, 150, 210], dtype=np.uint8), 400)[:, None, None, None].repeat(3, -1)
    first, again = (inception_score(even, torch.device("cpu")) for _ in range(2))
    assert first == again == pytest.approx(4, abs=0.1)
    assert inception_score(even[:400], torch.device("cpu")) == pytest.approx(1)
