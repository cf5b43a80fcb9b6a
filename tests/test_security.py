"""Nothing that comes from outside is executed."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from ruff import find_ruff_bin
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from zoo import ZooError
from zoo.metrics import lpips
from zoo.metrics.frechet import Inception
from zoo.weights import sha256_of

ROOT = Path(__file__).parents[1]


def test_the_package_has_no_eval_no_unpickling_and_no_shell_but_those_justified():
    command = [find_ruff_bin(), "check", "--select", "S", "--ignore", "S311", "zoo", "train.py", "evaluate.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Puts a file where torch.hub would have it, and gives its address."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()

    def publish(content):
        path = tmp_path / "checkpoints/net.pth"
        torch.save(content, path)
        path = path.rename(path.with_stem(f"net-{sha256_of(path)[:8]}"))
        return f"https://example.org/{path.name}"

    return publish


def test_networks_of_metrics_are_read_without_executing_what_is_in_their_files(published, tmp_path, monkeypatch):
    url = published({"a": torch.zeros(1), "evil": Evil()})
    monkeypatch.setattr(fidelity, "URL_INCEPTION_V3", url)
    monkeypatch.setitem(lpips.BACKBONES, "alex", type("Weights", (), {"url": url}))
    for make in (Inception, lpips.LPIPS):
        with pytest.raises(ZooError, match="execute code"):
            make()
    assert not (tmp_path / "executed").exists()


def test_inception_computes_with_the_weights_of_its_file(published, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **options: {})
        made = FeatureExtractorInceptionV3("inception", ["2048"], "nothing")
    monkeypatch.setattr(fidelity, "URL_INCEPTION_V3", published(made.state_dict()))
    state = Inception().net.state_dict()
    assert state.keys() == made.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.state_dict().items())
