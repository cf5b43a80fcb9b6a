"""ETT and IBQ, the tokenizer that it tunes: outputs of the reference cases by name."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from vectors import Vectors

from systems import ett_language
from zoo import weights
from zoo.commands import cli
from zoo.data import images
from zoo.losses.adversarial import PatchDiscriminator
from zoo.losses.perceptual import PerceptualLoss
from zoo.nn.autoencoder import AutoencoderConfig
from zoo.quantizers import IndexQuantized, IndexQuantizer
from zoo.tokenizers.ibq import published
from zoo.tokenizers.ibq.tokenizer import IBQTokenizer
from zoo.tokenizers.ibq.training import IBQTraining
from zoo.training.schedules import annealed, constant, floored_cosine

Inputs = Callable[[str], Tensor]


def run(vectors: Vectors, case: str) -> dict[str, Tensor]:
    about = vectors.cases[case]
    found = CASES[case](vectors, about, partial(vectors.input, case))
    return {name: stored(tensor, str(about["outputs"].get(name, ""))) for name, tensor in found.items()}


def stored(tensor: Tensor, meaning: str) -> Tensor:
    """The part of an output that is kept: every n-th channel (axis 1), or every n-th number."""
    if part := re.search(r"STORED: (channels|flattened) 0::(\d+)", meaning):
        kind, step = part[1], int(part[2])
        return tensor[:, ::step] if kind == "channels" else tensor.flatten()[::step]
    return tensor


def shape_of(about: dict, output: str) -> list[int]:
    """The shape that the description of an output ends in."""
    return json.loads(re.findall(r"\[[\d, ]*\]", about["outputs"][output])[-1])


def numbers(pattern: str, about: dict, default: tuple[float, ...] = ()) -> tuple[float, ...]:
    """The numbers that a pattern catches in the description of a case."""
    found = re.search(pattern, about["what"])
    return tuple(map(float, found.groups())) if found else default


def published_state(config: dict) -> dict[str, Tensor]:
    if "lossconfig" not in config:
        return ett_language.published_state(config)
    tokenizer = IBQTokenizer(published.config_from_published(config))
    losses = nn.ModuleDict({"perceptual_loss": PerceptualLoss(), "discriminator": discriminator(config)})
    state = published.to_published(tokenizer.state_dict(), tokenizer.config)
    trained = state | {f"loss.discriminator.{name}": p for name, p in losses["discriminator"].named_parameters()}
    averages = {average: trained[name] for name, average in published.averaged_names(trained).items()}
    counters = {f"model_ema.{name}": torch.zeros(()) for name in ("decay", "num_updates")}
    return state | {f"loss.{name}": tensor for name, tensor in losses.state_dict().items()} | averages | counters


def discriminator(config: dict) -> PatchDiscriminator:
    sizes = config["lossconfig"]["params"]
    return PatchDiscriminator(sizes["disc_in_channels"], sizes.get("disc_ndf", 64), sizes.get("disc_num_layers", 3))


def ibq(vectors: Vectors, module: str) -> IBQTokenizer:
    about, state = vectors.modules[module], vectors.state(module)
    tokenizer = IBQTokenizer(published.config_from_published(about["config"]))
    if "model_ema.*" in about.get("set_after_fill", {}):
        own = [name for name in state if not name.startswith("loss.")]
        state |= {average: state[name] for name, average in published.averaged_names(own).items()}
    with warnings.catch_warnings(action="ignore"):  # of files without averages
        weights.load(tokenizer, published.from_published(state, tokenizer.config))
    return tokenizer.eval()


class StandIn(nn.Module):
    """What the authors' training was run with in place of LPIPS."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        one, other = (F.conv2d(x, self.weight, padding=1).tanh() for x in (one, other))
        return 4 * (one - other).square().mean((1, 2, 3), keepdim=True)


def training(vectors: Vectors, module: str, step: int = 0) -> IBQTraining:
    """In training mode, at a step of the run."""
    config, state = vectors.modules[module]["config"], vectors.state(module)
    sizes = config["lossconfig"]["params"]
    constant = sizes["gen_loss_weight"]
    of_codes = ("quant_loss_weight",) if config["use_entropy_loss"] else ("codebook_weight", 1.0)
    made = IBQTraining(
        ibq(vectors, module),
        quantizer_weight=sizes.get(*of_codes),
        entropy_weight=sizes["entropy_loss_weight"],
        adversarial_weight=sizes["disc_weight"] if constant is None else constant,
        adaptive=constant is None,
        adversarial="non_saturating",
        adversarial_start=sizes["disc_start"],
        lecam_weight=sizes["lecam_loss_weight"] or 0.0,
        optimizers={},
    )
    made.discriminator = discriminator(config)
    prefix = "loss.discriminator."
    filled = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    weights.load(made.discriminator, made.discriminator.state_dict() | filled)
    made.perceptual, made.perceptual_weight = StandIn(state["loss.perceptual_loss.w"]), 1.0
    made.kept = SimpleNamespace(global_step=step)
    made._trainer = made.kept  # all that a loss asks of a trainer; the module has a weak reference alone
    return made.train()


def record(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """A dict that receives what these modules return."""
    found = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda module, args, output, name=name: found.update({name: output}))
    return found


def stages(net: nn.Module, levels: str, resample: str) -> dict[str, nn.Module]:
    """The parts of an encoder or a decoder by the names of the reference."""
    parts = {name: getattr(net, name) for name in ("conv_in", "norm_out", "conv_out")}
    parts |= {f"mid.{name}": part for name, part in net.mid.named_children()}
    for i, level in enumerate(getattr(net, levels)):
        parts |= {f"{levels}{i}": level} | {f"{levels}{i}.block{j}": block for j, block in enumerate(level.block)}
        if hasattr(level, resample):
            parts[f"{levels}{i}.{resample}"] = getattr(level, resample)
    return parts


def of_quantizer(out: IndexQuantized) -> dict[str, Tensor]:
    return {
        "ids": out.ids.flatten(),
        "z_q": out.quantized.movedim(-1, 1),
        "quant": out.loss,
        "sample_entropy": out.sample_entropy,
        "avg_entropy": out.average_entropy,
        "entropy": out.entropy,
    }


@torch.no_grad()
def encode(vectors: Vectors, about: dict, inputs: Inputs) -> dict[str, Tensor]:
    tokenizer = ibq(vectors, about["module"])
    found = record(stages(tokenizer.encoder, "down", "downsample"))
    z = tokenizer.latents(inputs("image"))
    quantizer = tokenizer.quantizer
    logits = z[0].flatten(1).T @ quantizer.codebook.T
    return found | of_quantizer(quantizer(z.movedim(1, -1))) | {"quant_conv": z, "logits": logits}


@torch.no_grad()
def decode(vectors: Vectors, about: dict, inputs: Inputs) -> dict[str, Tensor]:
    tokenizer = ibq(vectors, about["module"])
    parts = {"post_quant_conv": tokenizer.post_quant_conv} | stages(tokenizer.decoder, "up", "upsample")
    found = record(parts)
    return {"image": tokenizer.decode_codes(inputs("z_q"))} | found


@torch.no_grad()
def rect(vectors: Vectors, about: dict, inputs: Inputs) -> dict[str, Tensor]:
    reconstruction, out = ibq(vectors, about["module"])(inputs("image"))
    return {"ids": out.ids.flatten(), "image": reconstruction}


@torch.no_grad()
def lookup(vectors: Vectors, about: dict, inputs: Inputs) -> dict[str, Tensor]:
    tokenizer = ibq(vectors, about["module"])
    rows, (batch, _, height, width) = tokenizer.quantizer.codes(inputs("ids")), shape_of(about, "z_q")
    codes = rows.view(batch, height, width, -1).movedim(-1, 1)
    return {"rows": rows, "z_q": codes, "image": tokenizer.decode_codes(codes)}


def index_quantizer(config: dict, codebook: Tensor) -> IndexQuantizer:
    names = {"sample_minimization_weight": "sample_weight", "batch_maximization_weight": "average_weight"}
    options = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    temperature = config["entropy_temperature"] if config["use_entropy_loss"] else 0.0
    quantizer = IndexQuantizer(config["n_e"], config["e_dim"], config["beta"], temperature, **options)
    weights.load(quantizer, {"codebook": codebook})
    return quantizer


def quantizer(vectors: Vectors, about: dict, inputs: Inputs) -> dict[str, Tensor]:
    name = about["module"]
    made = index_quantizer(vectors.modules[name]["config"], vectors.state(name)["embedding.weight"])
    z = inputs("z").requires_grad_()
    found = of_quantizer(made(z.movedim(1, -1)))
    for letter, loss in {"a": (found["z_q"] * inputs("g")).sum(), "b": found["quant"], "c": found["entropy"]}.items():
        grads = torch.autograd.grad(loss, [z, made.codebook], retain_graph=True)
        found |= {f"grad_{letter}.z": grads[0], f"grad_{letter}.embedding": grads[1]}
    return found


@torch.no_grad()
def ties(vectors: Vectors, about: dict, inputs: Inputs) -> dict[str, Tensor]:
    codebook, z = inputs("codebook").clone(), inputs("z").movedim(1, -1)
    config = vectors.modules[about["module"]]["config"]
    found = of_quantizer(index_quantizer(config, codebook).eval()(z))
    codebook[5] = 0
    return found | {"ids_row5_zeroed": index_quantizer(config, codebook).encode(z).flatten()}


def generator(vectors: Vectors, about: dict, inputs: Inputs) -> dict[str, Tensor]:
    """gen_loss, adaptive, disc_start, no_entropy."""
    made = training(vectors, about["module"], *map(int, numbers(r"global_step[ =](\d+)", about)))
    values, config = inputs("image"), vectors.modules[about["module"]]["config"]
    regularized = made.regularized(values)
    total, logs = made.autoencoder_loss(values, regularized)
    total.backward()
    factor = torch.tensor(float(made.discriminates))
    of_codes = {
        "codebook_quant_loss": logs["quantizer"] if config["use_entropy_loss"] else regularized.loss,
        "codebook_entropy_loss": logs["entropy"],
        "codebook_sample_entropy_loss": logs["sample_entropy"],
        "codebook_avg_entropy_loss": logs["average_entropy"],
        "codebook_loss": regularized.loss,
    }
    adversarial, weight = (logs.get(name, factor) for name in ("adversarial", "adversarial_weight"))
    of_images = {
        "nll_loss": logs["pixels"] + logs["lpips"],
        "reconstruct_loss": logs["pixels"],
        "perceptual_loss": logs["lpips"],
        "d_weight": weight,
        "disc_factor": factor,
        "g_loss": weight * adversarial,
        "unsacled_g_loss": adversarial,
    }
    found = {"reconstruction": regularized.reconstruction, "total": total}
    found |= {f"log.{name}": value for name, value in (of_codes | of_images).items()}
    grads = {name: p.grad for name, p in made.tokenizer.named_parameters()}
    found |= {f"grad.{n}": grad for n, grad in published.to_published(grads, made.tokenizer.config).items()}
    found |= {f"after.discriminator.{n}": tensor.clone() for n, tensor in made.discriminator.state_dict().items()}
    real, fake = made.discriminator(values), made.discriminator(regularized.reconstruction)
    vanilla = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    return found | {"disc_total": vanilla + made.lecam_weight * made.lecam(real, fake)}


def disc_loss(vectors: Vectors, about: dict, inputs: Inputs) -> dict[str, Tensor]:
    made, found = training(vectors, about["module"]), {}
    real, fake = inputs("real"), inputs("fake")
    for i, pair in enumerate([(real, fake), (fake, real), (real, fake)]):
        total, logs = made.discriminator_loss(*pair)
        if not i:
            total.backward()
            found |= {f"grad.{name}": p.grad for name, p in made.discriminator.named_parameters()}
        logs = {"total": total, "r": made.lecam.real.clone(), "f": made.lecam.fake.clone()} | logs
        found |= {f"{i}.{name}": value for name, value in logs.items()}
    found |= {f"after.{name}": tensor for name, tensor in made.discriminator.state_dict().items()}
    return found | {"logits_eval": made.discriminator.eval()(real)}


def train_step(vectors: Vectors, about: dict, inputs: Inputs) -> dict[str, Tensor]:
    made, found = training(vectors, about["module"]), {}
    recipe = cli.compose("train", ["experiment=ibq", "data.path=none"])
    adam = partial(instantiate(recipe.optimizer), lr=vectors.modules[about["module"]]["config"]["learning_rate"])
    optimizers = {name: adam(module.parameters()) for name, module in made.optimized().items()}
    averaged = AveragedModel(made.tokenizer, multi_avg_fn=get_ema_multi_avg_fn(recipe.callbacks.ema.decay))
    averaged.n_averaged.fill_(1)  # theirs begins from the weights before the first step, ours from those behind it
    names = {"loss": "G", "adversarial": "g", "nll": "nll", "quantizer": "quant", "entropy": "entropy"}
    for i in range(2):
        for name, loss, logs in made.losses({"image": (inputs("image") + 1) / 2}):
            optimizers[name].zero_grad()
            loss.backward(inputs=list(made.optimized()[name].parameters()))
            optimizers[name].step()
            if name == "discriminator":
                found[f"{i}.D"] = loss
            else:
                found |= {f"{i}.{theirs}": logs[ours] for ours, theirs in names.items()}
        averaged.update_parameters(made.tokenizer)
    states = {"after": made.tokenizer.state_dict(), "ema": averaged.module.state_dict()}
    for name, state in states.items():
        state = published.to_published(state, made.tokenizer.config)
        found |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    return found


def schedule(vectors: Vectors, about: dict, inputs: Inputs) -> dict[str, Tensor]:
    number = r"([\d.e-]+)"
    (linear,) = numbers(rf"LinearWarmup\({number}\)", about)
    warmup, total, floor = numbers(rf"CosineDecay\({number}, {number}, {number}\)", about)
    annealing = rf"peak {number}, it, wp_it {number}, max_it {number}, wp0 {number}, wpe {number}\)"
    peak, start, end, first, last = numbers(annealing, about)
    ratios = {"warmup_steps": int(start), "first_ratio": first, "last_ratio": last}

    def rates(function: Callable, end: float, scale: float = 1.0, **options) -> Tensor:
        return torch.tensor([scale * function(step, int(end), -1, **options) for step in inputs("steps").tolist()])

    return {
        "warmup": rates(constant, -1, warmup_steps=int(linear)),
        "cosine": rates(floored_cosine, total, warmup_steps=int(warmup), min_ratio=floor),
        "var_lin0_x1e4": rates(annealed, end, 1e4 * peak, shape="linear", **ratios),
        "var_cos_x1e4": rates(annealed, end, 1e4 * peak, shape="cosine", **ratios),
    }


def prep(vectors: Vectors, about: dict, inputs: Inputs) -> dict[str, Tensor]:
    found = {}
    for name in about["outputs"]:
        file, size = io.BytesIO(), shape_of(about, name)[0]
        Image.fromarray(inputs(name).numpy().astype(np.uint8)).save(file, "PNG")
        raw = {"__key__": "", "__url__": "", "png": file.getvalue()}
        pixels = images.Decoder(image_size=size, interpolation="opencv")(raw, "relative", False)["image"]
        found[name] = AutoencoderConfig().to_values(torch.from_numpy(images.to_float(pixels)).movedim(0, -1))
    return found


def alignment(vectors: Vectors, about: dict, inputs: Inputs) -> dict[str, Tensor]:
    return ett_language.alignment(vectors, ibq(vectors, "ett_tokenizer"))


def tuning(vectors: Vectors, about: dict, inputs: Inputs) -> dict[str, Tensor]:
    return ett_language.tuning(vectors, training(vectors, "ett_tokenizer"))


def generation(vectors: Vectors, about: dict, inputs: Inputs) -> dict[str, Tensor]:
    return ett_language.generation(vectors, ibq(vectors, "ett_tokenizer"))


CASES = {
    "encode": encode,
    "decode": decode,
    "rect": rect,
    "lookup": lookup,
    "quantizer": quantizer,
    "quantizer_soft": quantizer,
    "ties": ties,
    "gen_loss": generator,
    "adaptive": generator,
    "disc_start": generator,
    "no_entropy": generator,
    "disc_loss": disc_loss,
    "train_step": train_step,
    "schedule": schedule,
    "prep": prep,
    "ett_stage1": alignment,
    "ett_stage2": tuning,
    "ett_gen": generation,
}
