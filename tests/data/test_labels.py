import pytest
import torch

from zoo import ZooError
from zoo.data.labels import ATTRIBUTES, class_field, values_present


def test_values_present_are_those_of_any_object():
    thing = {"color": "red", "material": "matte", "shape": "cube", "size": "small"}
    batch = {"objects": [[thing, thing | {"shape": "ring"}], []]}
    found = values_present(batch, "shape")
    assert found.shape == (2, len(ATTRIBUTES["shape"]))
    assert [name for name, there in zip(ATTRIBUTES["shape"], found[0], strict=True) if there] == ["cube", "ring"]
    assert not torch.any(found[1])
    with pytest.raises(ZooError, match="no field 'objects'"):
        values_present({}, "shape")


def test_classes_are_numbers():
    assert class_field({"class": [2, 0]}).tolist() == [2, 0]
    with pytest.raises(ZooError, match=r"must hold numbers .* got 'cat'"):
        class_field({"class": ["cat", "dog"]})
    with pytest.raises(ZooError, match="no field 'class'"):
        class_field({"image": 0})
