import pytest
from torch.utils.data import ConcatDataset, DataLoader

from zoo import ZooError
from zoo.tokenizers.aurora.curriculum import CurriculumSampler


def test_perception_gives_way_to_reasoning_epoch_by_epoch():
    sampler = CurriculumSampler(20, 4, epochs=5)
    loader = DataLoader(ConcatDataset([range(20), range(100, 104)]), batch_size=None, sampler=sampler)
    seen = [int(sample) for sample in loader]
    assert len(seen) == len(sampler)
    shares = [(20, 0), (16, 1), (12, 2), (8, 3), (4, 4)]
    for perception, repetitions in shares:
        drawn, seen = seen[:perception], seen[perception:]
        assert len(set(drawn)) == perception
        assert all(sample < 20 for sample in drawn)
        assert seen[: 4 * repetitions] == [100, 101, 102, 103] * repetitions
        seen = seen[4 * repetitions :]
    assert seen == []


def test_the_order_depends_on_the_seed_alone():
    assert list(CurriculumSampler(20, 4)) == list(CurriculumSampler(20, 4))
    assert list(CurriculumSampler(20, 4)) != list(CurriculumSampler(20, 4, seed=1))


def test_empty_data_are_refused():
    with pytest.raises(ZooError, match="at least one"):
        CurriculumSampler(0, 4)
