"""The judge of pictures of scenes."""

import pytest
import torch

from zoo.data import Loader, scenes
from zoo.errors import ZooError
from zoo.lm.facts import fact_scores, facts_of_scenes
from zoo.lm.judge import JudgeConfig, judge_file, load_judge, moved, save_judge, targets, train_judge

FIELDS = ["image", "depth", "caption", "count", "objects", "floor"]


@pytest.fixture(scope="module")
def val():
    batch = next(iter(Loader(scenes("val"), batch_size=128, fields=FIELDS)))
    return batch | {"count": torch.tensor(batch["count"])}


@pytest.mark.parametrize("field", ["image", "depth"])
def test_the_shipped_judges_see_what_is_in_real_scenes(field, val):
    judge = load_judge(judge_file(field))
    assert judge.config.field == field
    seen, true = judge.describe(val[field]), facts_of_scenes(val)
    scores, others = fact_scores(seen, true), fact_scores(seen[1:] + seen[:1], true)
    for name in ("shape, recall", "number stated", *(("colour, recall", "floor") if field == "image" else ())):
        assert scores[name] > others[name] + 0.3, name
    assert seen[:3] == [judge.describe(image[None])[0] for image in val[field][:3]]


def test_a_training_is_the_same_again_and_its_file_comes_back(val, tmp_path):
    few = {name: value[:16] for name, value in val.items()}
    judges = [train_judge(few, JudgeConfig(width=8), epochs=4, batch_size=8) for _ in range(2)]
    for ours, theirs in zip(*(judge.state_dict().values() for judge in judges), strict=True):
        assert torch.equal(ours, theirs)
    save_judge(judges[0], tmp_path / "judge.safetensors")
    loaded = load_judge(tmp_path / "judge.safetensors")
    assert loaded.config == judges[0].config
    assert loaded.describe(val["image"]) == judges[0].describe(val["image"])


def test_objects_are_learned_at_the_middle_of_their_boxes():
    scene = [{"box": [0.25, 0.5, 0.5, 1.0], "size": "large", "color": "red", "material": "metal", "shape": "cone"}]
    wanted = targets([scene, []], 32)
    assert (wanted["heat"] == 1).nonzero().tolist() == [[0, 0, 24, 12]]
    assert wanted["heat"][0, 0, 24, 13] < 1
    assert wanted["heat"][1].max() == 0
    assert (wanted["shape"] >= 0).nonzero().tolist() == [[0, 24, 12]]
    assert wanted["shape"][0, 24, 12] == 3


def test_maps_are_moved():
    grid = torch.arange(9.0).view(1, 3, 3)
    assert moved(grid, 1, 0, fill=-1)[0].tolist() == [[-1, -1, -1], [0, 1, 2], [3, 4, 5]]
    assert moved(grid, 0, -1, edge=True)[0].tolist() == [[1, 2, 2], [4, 5, 5], [7, 8, 8]]


def test_a_judge_looks_at_pictures_or_depth():
    with pytest.raises(ZooError, match="looks at image or depth, got 'sound'"):
        JudgeConfig("sound")
