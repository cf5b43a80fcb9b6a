"""Networks that a tokenizer learns from."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import zoo
from zoo import ZooError, registry
from zoo.training.teacher import Teacher

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A vision transformer of timm with random weights and the file of them."""
    torch.manual_seed(0)
    model = timm.create_model(VIT, img_size=64).eval()
    path = tmp_path_factory.mktemp("vit") / "model.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def test_an_encoder_of_the_zoo_teaches_by_its_name():
    teacher, encoder = Teacher("siglip-tiny"), zoo.load_encoder("siglip-tiny")
    assert (teacher.num_features, teacher.width) == (64, 128)
    assert torch.equal(teacher(IMAGES), encoder.features(IMAGES))
    assert torch.equal(Teacher("siglip-tiny", layer=2)(IMAGES), encoder.features(IMAGES, layer=2))
    assert not teacher.train().model.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_tokenizer_of_the_zoo_teaches_by_its_features(tmp_path):
    torch.manual_seed(0)
    tokenizer = zoo.create_tokenizer("mingtok-tiny").eval()
    registry.save(tokenizer, tmp_path / "mingtok.safetensors")
    teacher = Teacher("mingtok-tiny", weights=tmp_path / "mingtok.safetensors")
    assert torch.equal(teacher(IMAGES), tokenizer.features(IMAGES))
    with pytest.raises(ZooError, match="last layer alone; leave out layer=1"):
        Teacher("mingtok-tiny", weights=tmp_path / "mingtok.safetensors", layer=1)
    with pytest.raises(ZooError, match="kl-tiny has no features"):
        Teacher("kl-tiny")


def test_a_model_of_timm_sees_its_own_normalisation_and_gives_patches_alone(vit):
    model, path = vit
    teacher = Teacher(f"timm/{VIT}", weights=path, image_size=64)
    assert (teacher.num_features, teacher.width) == (16, 192)
    with torch.no_grad():
        values = (IMAGES - 0.5) / 0.5
        torch.testing.assert_close(teacher(IMAGES), model.forward_features(values)[:, 1:])
        x = model.patch_embed(values)
        x = torch.cat([model.cls_token.expand(2, -1, -1), x], 1) + model.pos_embed
        for block in model.blocks[:3]:
            x = block(x)
    third = Teacher(f"timm/{VIT}", weights=path, image_size=64, layer=3)
    torch.testing.assert_close(third(IMAGES), x[:, 1:])


def test_images_are_resized_to_what_the_teacher_was_made_for(vit):
    teacher = Teacher(f"timm/{VIT}", weights=vit[1], image_size=64)
    larger = F.interpolate(IMAGES, (96, 96), mode="bicubic").clamp(0, 1)
    assert teacher(larger).shape == (2, 16, 192)
    back = F.interpolate(larger, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(teacher(larger), teacher(back))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"name": "siglip-tinny"}, "no tokenizer is called 'siglip-tinny'"),
        ({"name": "timm/vit_of_nobody"}, "timm has no model 'vit_of_nobody'"),
        ({"name": "timm/resnet18", "weights": "x.pt"}, "resnet18 has no features of patches"),
        ({"name": f"timm/{VIT}", "weights": "nowhere.pt"}, "'nowhere.pt' does not exist"),
        ({"name": "siglip-tiny", "layer": 9}, r"layers 0\.\.4"),
    ],
)
def test_what_cannot_teach_is_refused_in_one_sentence(arguments, complaint):
    with pytest.raises(ZooError, match=complaint):
        Teacher(**arguments)


def test_layers_and_files_of_timm_that_do_not_fit_are_refused(vit, tmp_path):
    _, path = vit
    with pytest.raises(ZooError, match=r"has layers 1\.\.12, got 13"):
        Teacher(f"timm/{VIT}", weights=path, image_size=64, layer=13)
    with pytest.raises(ZooError, match=r"pos_embed \(1, 17, 192\) instead of \(1, 197, 192\)"):
        Teacher(f"timm/{VIT}", weights=path)


def test_published_weights_that_cannot_be_had_are_named(monkeypatch):
    def fail(*args, **kwargs):
        raise FileNotFoundError("no network")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(ZooError, match=r"vit_tiny.* its published weights \(no network\).*weights="):
        Teacher(f"timm/{VIT}")
