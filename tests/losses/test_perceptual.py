import pytest
import torch
import torchvision

from zoo import ZooError, weights
from zoo.losses import perceptual
from zoo.losses.perceptual import PerceptualLoss
from zoo.weights import MissingWeights


@pytest.fixture
def vgg(tmp_path, monkeypatch):
    """A VGG16 of random weights where torch.hub would keep the trained one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    network = torchvision.models.vgg16()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    path = tmp_path / "hub/checkpoints/vgg16.pth"
    torch.save(network.state_dict(), path)
    path = path.rename(path.with_stem(f"vgg16-{weights.sha256_of(path)[:8]}"))
    monkeypatch.setattr(perceptual, "VGG16", f"https://download.pytorch.org/models/{path.name}")
    return network


def test_its_network_is_torchvisions_vgg16_and_its_heads_are_trained(vgg):
    loss = PerceptualLoss.pretrained()
    images = torch.rand(1, 3, 32, 32)
    expected, found = loss.scaling_layer.shift.new_tensor(()), loss.features(images)
    x = (images - loss.scaling_layer.shift) / loss.scaling_layer.scale
    for i, layer in enumerate(vgg.features[:30]):
        x = layer(x)
        if i in (3, 8, 15, 22, 29):
            expected = torch.cat([expected, x.flatten()])
    torch.testing.assert_close(torch.cat([f.flatten() for f in found]), expected)
    assert (loss.lin0.model[1].weight >= 0).all()  # as LPIPS trains them
    assert loss(images, images).item() == 0
    assert loss(images, 1 - images).item() > 0


def test_dropout_acts_only_where_it_is_asked_for(vgg):
    images, others = torch.rand(2, 1, 3, 32, 32)
    for dropout in (False, True):
        loss = torch.nn.ModuleList([PerceptualLoss.pretrained(dropout=dropout)]).train()[0]
        assert (loss(images, others) == loss(images, others)).item() is not dropout
        loss.eval()
        assert loss(images, others) == loss(images, others)


def test_it_is_read_from_one_file_alone_or_within_a_checkpoint(vgg, tmp_path):
    loss = PerceptualLoss.pretrained()
    state = {f"gan_losses.0.perceptual_loss.{name}": tensor for name, tensor in loss.state_dict().items()}
    weights.save(tmp_path / "all.safetensors", state | {"gan_losses.0.discriminator.main.0.bias": torch.zeros(64)})
    again = PerceptualLoss.pretrained(tmp_path / "all.safetensors")
    images = torch.rand(2, 1, 3, 32, 32)
    assert torch.equal(again(*images), loss(*images))


def test_a_missing_or_wrong_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"vgg16-397923af.pth is missing: download https://"):
        PerceptualLoss.pretrained()
    weights.save(tmp_path / "some.safetensors", {"weight": torch.zeros(1)})
    with pytest.raises(ZooError, match="does not fit PerceptualLoss"):
        PerceptualLoss.pretrained(tmp_path / "some.safetensors")
