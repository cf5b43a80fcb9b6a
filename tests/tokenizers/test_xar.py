"""What xAR promises beyond the numbers of the reference."""

import pytest
import torch

import zoo
from zoo import ZooError
from zoo.tokenizers.xar.entities import ENTITIES, partition
from zoo.tokenizers.xar.generator import XARConfig, XARGenerator, check_space
from zoo.tokenizers.xar.training import drop_labels, flow_loss

SIZES = {
    **{"grid": 4, "latent_dim": 3, "num_classes": 5, "width": 32, "entity_size": 2, "scales": (1, 2, 4)},
    **{"encoder_depth": 2, "decoder_depth": 2, "encoder_heads": 2, "decoder_heads": 4},
    **{"attention_dropout": 0.0, "dropout": 0.0},
}


def make(**changes):
    torch.manual_seed(0)
    generator = XARGenerator(XARConfig(**SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return generator


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


@pytest.mark.parametrize("entity", ENTITIES)
def test_a_grid_becomes_a_sequence_and_a_grid_again(entity):
    cut = partition(entity, 4, 2, (1, 2, 4))
    latents = torch.arange(2 * 3 * 16.0).view(2, 3, 4, 4)
    sequence = cut.to_sequence(latents)
    assert sequence.shape == (2, cut.length, 3)
    assert torch.equal(cut.to_grid(sequence), latents)
    assert len(cut.lengths) == {"patch": 16, "cell": 4, "subsample": 4, "scale": 3, "image": 1}[entity]


def test_entities_have_their_tokens_in_raster_order():
    values = torch.arange(16.0).view(1, 1, 4, 4)
    expected = {
        "cell": [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15],
        "subsample": [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15],
        "patch": list(range(16)),
        "image": list(range(16)),
    }
    for entity, order in expected.items():
        cut = partition(entity, 4, 2)
        assert cut.to_sequence(values).flatten().tolist() == order
        assert (cut.rows * 4 + cut.columns).tolist() == order
    scale = partition("scale", 4, scales=(1, 2, 4))
    assert scale.to_sequence(values).flatten()[:5].tolist() == [7.5, 2.5, 4.5, 10.5, 12.5]
    assert scale.rows[:5].tolist() == [1.5, 0.5, 0.5, 2.5, 2.5]


def test_a_token_looks_at_its_own_entity_and_earlier_ones():
    mask = partition("cell", 4, 2).mask()
    assert mask[0].tolist() == [True] * 4 + [False] * 12
    assert mask[5].tolist() == [True] * 8 + [False] * 8


@pytest.mark.parametrize("entity", ENTITIES)
def test_an_image_does_not_depend_on_its_batch(entity):
    generator = make(entity=entity)
    labels = torch.tensor([1, 4, 1])
    batch = generator.sample(labels, 3, 2.5, generator=generators(3))
    assert batch.shape == (3, 3, 4, 4)
    for i in range(3):
        alone = generator.sample(labels[i : i + 1], 3, 2.5, generator=generators(1, seed=i))
        torch.testing.assert_close(alone, batch[i : i + 1], rtol=1e-4, atol=1e-4)


def test_the_first_entity_does_not_depend_on_guidance():
    generator = make()
    labels = torch.tensor([2])
    one, other = (generator.sample(labels, 3, g, generator=generators(1)) for g in (1.0, 4.0))
    first = partition("cell", 4, 2).to_sequence
    torch.testing.assert_close(first(one)[:, :4], first(other)[:, :4])
    assert not torch.allclose(first(one)[:, 4:], first(other)[:, 4:])


def test_without_guidance_the_embedding_of_no_class_plays_no_part():
    generator = make()
    before = generator.sample(torch.tensor([2]), 3, 1.0, generator=generators(1))
    with torch.no_grad():
        generator.class_embedding.weight[generator.no_class] += 1
    torch.testing.assert_close(generator.sample(torch.tensor([2]), 3, 1.0, generator=generators(1)), before)


def test_a_velocity_does_not_see_later_entities():
    generator = make()
    tokens = torch.randn(2, 16, 3)
    labels, times = torch.tensor([0, 3]), torch.rand(2, 4)
    changed = tokens.clone()
    changed[:, 8:] += 1
    one, other = generator(tokens, labels, times), generator(changed, labels, times)
    torch.testing.assert_close(one[:, :8], other[:, :8])
    assert not torch.allclose(one[:, 8:], other[:, 8:])


def test_a_label_is_dropped_below_its_share_and_not_at_it():
    labels = torch.tensor([1, 2, 3])
    assert drop_labels(labels, 5, 0.1, torch.tensor([0.05, 0.1, 0.2])).tolist() == [5, 2, 3]


def test_the_loss_of_a_network_of_zeros_is_that_of_the_velocities():
    generator = make()
    with torch.no_grad():
        generator.head.weight.zero_()
        generator.head.bias.zero_()
    noise, latents = torch.randn(64, 16, 3), torch.randn(64, 3, 4, 4)
    loss = flow_loss(generator, latents, torch.zeros(64, dtype=torch.int64), torch.rand(64, 4), noise).loss
    assert loss.item() == pytest.approx(2, abs=0.15)


def test_euler_comes_closer_to_heun_with_more_steps():
    generator = make()
    start = [torch.randn(1, 4, 3) for _ in range(4)]
    exact = generator.sample(torch.tensor([1]), 100, 1.5, "heun", start)
    few, many = ((generator.sample(torch.tensor([1]), n, 1.5, "euler", start) - exact).abs().mean() for n in (20, 200))
    assert many < few / 4


def test_clean_context_is_what_sampling_sees():
    """A velocity after clean entities is that of a pass over them at time 0; later entities do not count."""
    generator = make()
    clean, noisy, labels, times = torch.randn(2, 16, 3), torch.randn(2, 16, 3), torch.tensor([0, 3]), torch.rand(2, 4)
    together = generator(noisy, labels, times, clean)
    for s in range(4):
        tokens, t = clean.clone(), torch.zeros(2, 4)
        tokens[:, 4 * s : 4 * s + 4], t[:, s] = noisy[:, 4 * s : 4 * s + 4], times[:, s]
        alone = generator(tokens, labels, t)[:, 4 * s : 4 * s + 4]
        torch.testing.assert_close(together[:, 4 * s : 4 * s + 4], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"labels": torch.tensor([6])}, "from 0 to 5"),
        ({"labels": torch.tensor([-1])}, "from 0 to 5"),
        ({"labels": torch.tensor([0.5])}, "labels are integers"),
        ({"num_steps": 1}, "num_steps must be an integer of at least 2 and at most 100000, got 1"),
        ({"guidance": -0.5}, "guidance must not be below 0, and a finite number, got -0.5"),
        ({"guidance": float("nan")}, "guidance must not be below 0, and a finite number, got nan"),
        ({"sampler": "sdf"}, "sampler must be one of sde, euler, heun, got 'sdf'"),
    ],
)
def test_what_cannot_be_sampled_is_refused(arguments, complaint):
    with pytest.raises(ZooError, match=complaint):
        make().sample(**{"labels": torch.tensor([0])} | arguments)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"entity": "row"}, "entity must be one of patch, cell, subsample, scale, image, got 'row'"),
        ({"entity_size": 3}, "4 x 4 latents cannot be cut by cell 3"),
        ({"entity": "scale", "scales": (1, 2)}, "scales must rise from at least 1 to the grid's side 4"),
        ({"encoder_heads": 3}, "width 32 must be a multiple of 4 times encoder_heads 3"),
        ({"class_names": ("a",)}, "has 5 classes and 1 class_names"),
        ({"guidance": -1.0}, "guidance must not be below 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, complaint):
    with pytest.raises(ZooError, match=complaint):
        XARConfig(**SIZES | changes)


def test_a_space_must_be_continuous_and_of_the_same_shape():
    with torch.device("meta"):
        generator, discrete, large = (
            zoo.create_generator("xar-tiny"),
            zoo.create_tokenizer("vqgan-tiny"),
            zoo.create_tokenizer("kl-f16"),
        )
    with pytest.raises(ZooError, match="generates continuous latents, and vqgan-tiny has discrete tokens"):
        check_space(generator, discrete)
    with pytest.raises(ZooError, match="generates 8 x 8 latents of 8 values, and kl-f16 has 256 of 16"):
        check_space(generator, large)
