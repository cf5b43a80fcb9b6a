import os

import pytest

# Several test processes share two cores: more threads each are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--vectors",
        metavar="DIR",
        help="run the reference tests over DIR/<system>/golden-*.json in addition to the repository's own",
    )


@pytest.fixture
def watch():
    """A callback of Lightning; watch.moved has, for each batch, the parts of the module whose parameters changed."""
    import lightning as L
    import torch

    class Watch(L.Callback):
        moved = ()

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.before = {name: p.detach().clone() for name, p in module.named_parameters()}

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            changed = [n for n, p in module.named_parameters() if not torch.equal(p, self.before[n])]
            self.moved = [*self.moved, {name.split(".")[0] for name in changed}]

    return Watch()
