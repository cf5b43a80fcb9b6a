"""Steps that are not finite, half precision, and codebooks that collapse, on tokenizers of a few numbers."""

import os
import socket
from functools import partial
from itertools import pairwise

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp
from hydra.utils import instantiate
from torch import nn

from zoo.commands import cli
from zoo.commands.train import precision
from zoo.distributed import leave
from zoo.errors import ZooError
from zoo.nn.normalization import BatchNorm2d
from zoo.quantizers import EMAQuantizer, ResidualQuantizer
from zoo.tokenizer import Tokenizer, TokenizerInfo
from zoo.training.callbacks import CodebookHealth
from zoo.training.module import TrainingModule
from zoo.training.precision import CPUPrecision

CODES = 16


class Coded(Tokenizer):
    """Images (B, 2, 4, 4) through a layer, a norm with batch statistics, and codes that are running means."""

    def __init__(self, codes=CODES):
        super().__init__(None)
        self.encoder, self.norm = nn.Conv2d(2, 4, 1, bias=False), BatchNorm2d(4)
        self.quantizer = EMAQuantizer(codes, 4, init="data", restart_below=0.01)
        self.decoder = nn.Conv2d(4, 2, 1)
        self.info = TokenizerInfo("test", "", 4, None, 2, "discrete", ("image",), 16, codebook_sizes={"image": codes})

    def forward(self, images):
        quantized = self.quantizer(self.norm(self.encoder(images)).movedim(1, -1))
        return self.decoder(quantized.quantized.movedim(-1, 1)), quantized.loss


class Autoencoding(TrainingModule):
    """`spoils` makes a loss of what it should be, for a batch."""

    def __init__(self, spoils=lambda loss, batch: loss, tokenizer=None, **arguments):
        torch.manual_seed(0)
        arguments = {"optimizers": {"tokenizer": partial(torch.optim.AdamW, lr=1e-3, fused=True)}} | arguments
        super().__init__(tokenizer or Coded(), **arguments)
        self.spoils, self.logged = spoils, []

    def losses(self, batch):
        reconstruction, loss = self.tokenizer(batch["image"])
        loss = loss + (reconstruction - batch["image"]).square().mean()
        yield "tokenizer", self.spoils(loss, batch), {"loss": loss.detach()}

    def log_row(self, logs, images):
        self.logged.append({name: float(value) for name, value in logs.items()})
        super().log_row(logs, images)

    def values(self, name):
        return [row[name] for row in self.logged if name in row]


def images(count=8, seed=0):
    """What batches of 4 are made of; `bad` marks the third batch."""
    drawn = torch.rand(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    return [{"image": image, "bad": i // 4 == 2, "key": f"image-{i}"} for i, image in enumerate(drawn)]


def trainer(steps, **options):
    return L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        log_every_n_steps=options.pop("log_every_n_steps", 1), use_distributed_sampler=False, **options,
    )  # fmt: skip


def fit(module, steps, data, batch_size=4, **options):
    made = trainer(steps, **options)
    made.fit(module, torch.utils.data.DataLoader(data, batch_size))
    return made


def bfloat():
    return {"plugins": CPUPrecision("bf16-mixed")}


def half(scale=256.0):
    """float16 with a loss scale that gradients begin with."""
    plugin = CPUPrecision("16-mixed")
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return {"plugins": plugin}


class State(L.Callback):
    """What training moves, before each batch and after the last."""

    def __init__(self):
        self.states = []

    def on_train_batch_start(self, trainer, module, *_):
        state = {name: tensor.clone() for name, tensor in module.tokenizer.state_dict().items()}
        for group in trainer.optimizers[0].state_dict()["state"].values():
            state |= {f"{len(state)} {name}": tensor.clone() for name, tensor in group.items()}
        self.states.append(state)

    def on_train_end(self, trainer, module):
        self.on_train_batch_start(trainer, module)


def nan_images(loss, batch):
    return loss


def infinite_loss(loss, batch):
    return loss + float("inf") if batch["bad"].any() else loss


def nan_gradient(loss, batch):
    return loss + (loss.detach() - loss).abs().sqrt() if batch["bad"].any() else loss  # the root's slope at 0


@pytest.mark.parametrize("precision", [dict, bfloat, half])
@pytest.mark.parametrize("spoils", [nan_images, infinite_loss, nan_gradient])
def test_a_bad_step_leaves_weights_codebooks_and_optimizer_alone_and_is_counted(spoils, precision, capsys):
    data = images(16)
    if spoils is nan_images:
        data[9]["image"] = torch.full((2, 4, 4), float("nan"))  # the other images of its batch are as they should be
    module, state = Autoencoding(spoils), State()
    fit(module, 4, data, callbacks=[state], **precision())
    first, before, after, last = state.states[1:]
    assert first.keys() == before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
        assert after[name].isfinite().all(), name
    moved = {name for name in before if not torch.equal(first[name], before[name])}
    assert {"quantizer.codebook", "quantizer.cluster_size", "norm.running_mean", "encoder.weight"} <= moved
    assert not torch.equal(last["encoder.weight"], after["encoder.weight"])
    assert module.values("skipped_steps") == [0, 0, 1, 1]
    what = "gradient" if spoils is nan_gradient else "loss"
    told = f"step 3 was skipped: the {what} of the tokenizer is not finite (batch of image-8, "
    # a gradient alone may be the fault of the scale
    assert (told in capsys.readouterr().out) != (precision is half and spoils is nan_gradient)


def test_accumulated_batches_of_a_bad_step_leave_no_trace():
    module, state = Autoencoding(infinite_loss, accumulate=2), State()
    fit(module, 2, images(16), callbacks=[state])
    *_, before, _, after = state.states  # the third batch is bad, the fourth completes its step
    assert module.values("skipped_steps") == [0, 1]
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


class TwoOptimizers(Autoencoding):
    """The loss of the tokenizer is never finite, that of the critic always."""

    def __init__(self, **arguments):
        adamw = partial(torch.optim.AdamW, lr=1e-3)  # not fused
        super().__init__(optimizers={"critic": adamw, "tokenizer": adamw}, **arguments)
        self.critic = nn.Conv2d(2, 1, 1)

    def optimized(self):
        return {"critic": self.critic, "tokenizer": self.tokenizer}

    def losses(self, batch):
        yield "critic", self.critic(batch["image"]).square().mean(), {}
        for name, loss, logs in super().losses(batch):
            yield name, loss * float("nan"), logs


@pytest.mark.parametrize("precision", [dict, half])
def test_an_optimizer_that_never_steps_ends_the_run_whatever_others_do(precision):
    module = TwoOptimizers(max_bad_steps=2)
    with pytest.raises(ZooError, match=r"3 steps in a row had no finite loss and gradient of the tokenizer, .*image-8"):
        fit(module, 6, images(24), **precision())
    assert module.values("skipped_steps") == [1, 2, 3]


def test_overflows_of_float16_halve_the_scale_once_a_step_and_are_no_bad_steps():
    class Both(TwoOptimizers):
        def losses(self, batch):
            yield from ((name, loss.nan_to_num(1.0) if name == "critic" else self.loss(batch), logs)
                        for name, loss, logs in super().losses(batch))  # fmt: skip

        def loss(self, batch):
            reconstruction, loss = self.tokenizer(batch["image"])
            return loss + 1000 * (reconstruction - batch["image"]).square().mean()

    module = Both(max_bad_steps=0)
    fit(module, 12, images(), **half(65536.0))
    scales, skipped = module.values("loss_scale"), module.values("skipped_steps")
    assert scales[0] == 65536
    assert skipped[0] == 1  # 65,536 * 1,000 is far beyond float16
    steps = [after - before for before, after in pairwise(skipped)]
    assert 0 in steps  # in the end it fits
    assert scales == [65536 / 2**count for count in [0, *skipped[:-1]]]


@pytest.mark.parametrize("precision", [bfloat, half])
def test_half_precision_learns_as_float32_does(precision):
    losses = []
    for options in ({}, precision()):
        module = Autoencoding(optimizers={"tokenizer": partial(torch.optim.AdamW, lr=1e-2, fused=True)})
        fit(module, 30, images(16), **options)
        losses.append(sum(module.values("loss")[-4:]) / 4)
        assert losses[-1] < 0.7 * module.values("loss")[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]  # it was another precision


@pytest.mark.parametrize(("name", "dtype"), [("16-mixed", torch.float16), ("bf16-mixed", torch.bfloat16)])
def test_half_precision_on_the_cpu_is_that_of_gpus(name, dtype):
    cfg = cli.compose("train", ["experiment=aurora-tiny", f"trainer.precision={name}"])
    made = instantiate(cfg.trainer, **precision(cfg.trainer))
    assert made.precision == name
    assert (made.precision_plugin.scaler is not None) == (dtype == torch.float16)
    layer, norm, x = nn.Linear(8, 8), nn.GroupNorm(2, 8), torch.randn(4, 8)
    with made.precision_plugin.forward_context():
        given = layer(x)
        assert given.dtype == dtype
        for wide in (norm(given), given.softmax(-1), torch.nn.functional.layer_norm(given, (8,)), given.exp()):
            assert wide.dtype == torch.float32
        torch.testing.assert_close(norm(given), norm(given.float()), rtol=0, atol=0)
        assert layer(norm(given)).dtype == dtype
    assert norm(given.float()).requires_grad


def run(rank=0, ranks=1, seed=0, **options):
    """A training whose bad images are all of the last rank; what it leaves and logs."""
    data = images(16)
    for number, one in enumerate(data):
        one["bad"] = number in (10, 11)
    own = [one for number, one in enumerate(data) if number % 4 * ranks // 4 == rank]
    health, module = CodebookHealth(), Autoencoding(infinite_loss)
    ddp = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    fit(module, 6, own, 4 // ranks, callbacks=[health], log_every_n_steps=2, **ddp, **options)
    logged = {name: module.values(name) for name in ("skipped_steps", "perplexity/image", "codebook_use/image")}
    return {"state": module.tokenizer.state_dict(), "logged": logged}


def run_rank(rank, folder, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    found = [run(rank, 2), run(rank, 2, **half())]
    # one rank alone has a loss that is never finite, and both have to stop
    module = Autoencoding(lambda loss, batch: loss * (float("nan") if rank else 1), max_bad_steps=1)
    with pytest.raises(ZooError, match="2 steps in a row"):
        fit(module, 6, images(), 2, strategy="ddp", devices=2, **half())
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def test_two_ranks_skip_what_is_bad_on_one_and_count_codes_as_one_rank(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run_rank, (str(tmp_path), port), nprocs=2)
    alone = [run(), run(**half())]
    for rank in (0, 1):
        for found, expected in zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True):
            assert found["logged"]["skipped_steps"] == [0, 0, 1, 1, 1, 1]
            for name, values in expected["logged"].items():
                assert found["logged"][name] == pytest.approx(values, rel=1e-5), name
            for name, tensor in expected["state"].items():
                torch.testing.assert_close(found["state"][name], tensor, rtol=2e-3, atol=2e-3)


def test_a_collapsed_codebook_is_told_once_until_it_recovers(capsys):
    module, health = Autoencoding(), CodebookHealth(collapsed_below=0.2, ids_per_code=1)
    data = images(24)
    for one in data[8:16]:
        one["image"] = torch.full((2, 4, 4), 0.5)  # all vectors are one
    fit(module, 6, data, callbacks=[health])
    told = [line for line in capsys.readouterr().out.splitlines() if "codebook" in line]
    assert len(told) == 2
    assert "step 3: the codebook 'image' has collapsed: the last 64 ids have a perplexity of 1.0, below 3.2" in told[0]
    assert "step 5: the codebook 'image' has recovered" in told[1]
    assert module.values("collapsed_codebooks") == [0, 0, 1, 1, 0, 0]
    assert module.values("perplexity/image")[2] == pytest.approx(1)
    assert module.values("codebook_use/image")[2] == pytest.approx(1 / CODES)
    assert min(module.values("perplexity/image")[:2]) > 3.2


def test_each_level_can_have_a_codebook_of_its_own(capsys):
    tokenizer = Coded()
    tokenizer.quantizer = ResidualQuantizer([CODES, 8], 4, levels=2, decay=1.0, shared=False, restart=False)
    second = tokenizer.quantizer.codebook(1).codebook
    second[0], second[1:] = 0, 1000  # what the first level leaves is nearest to the first of these
    module = Autoencoding(tokenizer=tokenizer)
    fit(module, 2, images(), callbacks=[CodebookHealth(collapsed_below=0.2, ids_per_code=1)])
    told = [line for line in capsys.readouterr().out.splitlines() if "codebook" in line]
    assert len(told) == 1
    assert "the codebook 'image', level 1, has collapsed" in told[0]
    assert "of 8 codes), and use 12.5% of the codes" in told[0]
    assert min(module.values("perplexity/image/0")) > 3.2
    assert module.values("codebook_use/image/1") == [1 / 8] * 2


def test_levels_may_use_different_codes_of_one_codebook(capsys):
    tokenizer = Coded()
    tokenizer.quantizer = ResidualQuantizer(CODES, 4, levels=2, decay=1.0, restart=False)
    tokenizer.quantizer.codebook(0).codebook[0] = 0  # in the second level most are nearest to this one
    module = Autoencoding(tokenizer=tokenizer)
    fit(module, 2, images(), callbacks=[CodebookHealth(collapsed_below=0.3, ids_per_code=1)])
    assert "codebook" not in capsys.readouterr().out
    assert module.values("collapsed_codebooks") == [0, 0]
    for name in ("perplexity/image", "perplexity/image/0", "perplexity/image/1"):
        assert all(1 <= value <= CODES for value in module.values(name))
    assert min(module.values("perplexity/image")) > 4.8 > max(module.values("perplexity/image/1"))


@pytest.mark.parametrize(("ids_per_code", "step", "number"), [(1, 2, 16), (3, 3, 48)])
def test_few_ids_are_no_collapse_and_add_up(ids_per_code, step, number, capsys):
    health = CodebookHealth(collapsed_below=1.0, ids_per_code=ids_per_code)
    fit(Autoencoding(), 4, images(16), 1, callbacks=[health])  # 16 ids a step, all different in the first one
    assert f"step {step}: the codebook 'image' has collapsed: the last {number} ids" in capsys.readouterr().out


def test_counts_go_on_in_a_run_that_is_resumed():
    health = CodebookHealth()
    fit(Autoencoding(), 3, images(16), callbacks=[health], log_every_n_steps=50)
    state = health.state_dict()
    assert state["counts"]["image"].sum() == 3 * 4 * 16
    resumed = CodebookHealth()
    resumed.load_state_dict(state)
    fit(Autoencoding(), 1, images(16), callbacks=[resumed], log_every_n_steps=50)
    assert resumed.state_dict()["counts"]["image"].sum() == 4 * 4 * 16


def test_a_share_of_codes_is_a_share():
    with pytest.raises(ZooError, match=r"from 0 to 1, got 5"):
        CodebookHealth(collapsed_below=5)
    with pytest.raises(ZooError, match="at least 1, got 0"):
        CodebookHealth(ids_per_code=0)
