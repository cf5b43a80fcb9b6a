"""KARL and its bases: outputs of the reference cases by name."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vectors import Vectors

from zoo import weights
from zoo.losses.adversarial import PatchDiscriminator, discriminator_loss, generator_loss
from zoo.losses.perceptual import PerceptualLoss
from zoo.tokenizers.karl import published
from zoo.tokenizers.karl.tokenizer import KarlTokenizer, halting_mask
from zoo.tokenizers.karl.training import KarlFinetuning, KarlPretraining
from zoo.tokenizers.kl.tokenizer import KLTokenizer
from zoo.tokenizers.vqgan.tokenizer import VQGANTokenizer
from zoo.training.schedules import cosine

BASES = {"vqgan": VQGANTokenizer, "vae": KLTokenizer}


def run(vectors: Vectors, case: str) -> dict[str, Tensor]:
    about = vectors.cases[case]
    if case in ("quality_bins", "schedule", "gan"):
        return {"quality_bins": quality_bins, "schedule": schedule, "gan": gan}[case](vectors, about)
    kind = vectors.modules[about["module"]]["config"]["kind"]
    if kind in BASES:
        return {"vqgan": vqgan, "vae": vae}[kind](vectors, about)
    return training(vectors, about) if "grads" in about["args"] else evaluation(vectors, about)


def published_state(config: dict) -> dict[str, Tensor]:
    if "disc_ndf" in config:
        discriminator = PatchDiscriminator(width=config["disc_ndf"], num_layers=config["disc_num_layers"])
        return loss_module(discriminator).state_dict()
    tokenizer = KarlTokenizer(published.config_from_published(config))
    return published.to_published(tokenizer.state_dict(), tokenizer.config)


def loss_module(discriminator: PatchDiscriminator) -> nn.ModuleDict:
    return nn.ModuleDict({"perceptual_loss": PerceptualLoss(), "discriminator": discriminator})


def filled(vectors: Vectors, module: str) -> dict[str, Tensor]:
    """The authors' state dict; set_after_fill is "constant c"."""
    about = vectors.modules[module]
    state = vectors.state(module)
    for name, action in about.get("set_after_fill", {}).items():
        state[name] = torch.full_like(state[name], float(action.removeprefix("constant ")))
    return state


def base(vectors: Vectors, module: str) -> VQGANTokenizer | KLTokenizer:
    about = vectors.modules[module]
    kind = about["config"]["kind"]
    tokenizer = BASES[kind](published.base_from_published(kind, about["config"]["base"]))
    weights.load(tokenizer, published.BASES[kind].from_published(filled(vectors, module), tokenizer.config))
    return tokenizer.eval()


def karl(vectors: Vectors, module: str) -> KarlTokenizer:
    tokenizer = KarlTokenizer(published.config_from_published(vectors.modules[module]["config"]))
    weights.load(tokenizer, published.from_published(filled(vectors, module), tokenizer.config))
    return tokenizer.eval()


class Recorder:
    """Outputs (or first inputs) of modules while it is open."""

    def __init__(self, outputs: dict[str, nn.Module] | None = None, inputs: dict[str, nn.Module] | None = None):
        self.found: dict[str, Tensor] = {}
        self.hooks = [m.register_forward_hook(partial(self._output, n)) for n, m in (outputs or {}).items()]
        self.hooks += [m.register_forward_pre_hook(partial(self._input, n)) for n, m in (inputs or {}).items()]

    def _output(self, name, module, args, output):
        self.found[name] = output

    def _input(self, name, module, args):
        self.found[name] = args[0]

    def __enter__(self):
        return self.found

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def small(tensor: Tensor) -> Tensor:
    """Activations are stored for the first image and three channels."""
    return tensor[:1, :3]


@torch.no_grad()
def vqgan(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer = base(vectors, about["module"])
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    stages = {
        "enc/conv_in": encoder.conv_in,
        "enc/level0_last_block": encoder.down[0].block[-1],
        "enc/level0_down": encoder.down[0].downsample,
        "enc/mid": encoder.mid,
    }
    with Recorder(stages) as found:
        h = encoder(vectors.input(about["name"], "image"))
    quantized = tokenizer.quantizer(h.movedim(1, -1))
    quant = quantized.quantized.movedim(-1, 1)
    stages = {"dec/conv_in": decoder.conv_in, "dec/mid": decoder.mid, "dec/level1_up": decoder.up[1].upsample}
    with Recorder(stages) as decoded:
        reconstruction = decoder(quant)
    return {name: small(value) for name, value in (found | decoded).items()} | {
        "h": h,
        "quant": quant,
        "vq_loss": quantized.loss,
        "ids": quantized.ids.flatten(1),
        "reconstruction": reconstruction,
        "decoded_code": decoder(vectors.input(about["name"], "code")),
    }


@torch.no_grad()
def vae(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer = base(vectors, about["module"])
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    stages = {
        "enc/level0_down": encoder.down[0].downsample,
        "enc/last_level": encoder.down[-1].block[-1],
        "enc/last_level_attn": encoder.down[-1].attn[-1],
        "enc/mid": encoder.mid,
        "enc/conv_out": encoder.conv_out,
        "dec/mid_attn": decoder.mid.attn_1,
    }
    with Recorder(stages) as found:
        posterior = tokenizer.posterior(vectors.input(about["name"], "image"))
        sample = posterior.sample(vectors.input(about["name"], "noise"))
        decoded = tokenizer.decode_latents(sample)
    return {name: small(value) for name, value in found.items()} | {
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "sample": sample,
        "kl": posterior.kl(),
        "decoded_sample": decoded,
        "scaled": tokenizer.config.scale_factor * sample,
    }


def quality_bins(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer = karl(vectors, about["module"])
    index = tokenizer.quality_bin(vectors.input(about["name"], "loss"))
    values = torch.tensor(tokenizer.config.quality_bins)
    return {"binned": values[index], "index": index, "embedding": tokenizer.encoder.quality_embedding[index]}


@torch.no_grad()
def evaluation(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer, name = karl(vectors, about["module"]), about["name"]
    image = vectors.input(name, "image")
    features = tokenizer.base_features(image, noise=vectors.input(name, "noise"))
    grid = tokenizer.encoder.grid_tokens(image, features)
    places, tokens = features.shape[2:], features.flatten(2).transpose(1, 2)
    on_vqgan = isinstance(tokenizer.base, VQGANTokenizer)
    out = {
        "patch": tokenizer.encoder.patch_embed(image),
        "grid_tokens": grid.flatten(2).transpose(1, 2),
        "base_target": tokenizer.base.quantizer.encode(tokens) if on_vqgan else tokens,
    }
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    for budget in about["args"]["budgets"]:
        outputs = {"enc_block0": encoder.blocks[0], "enc_out": encoder.blocks[-1], "dec_latents": decoder.embed}
        outputs |= {"dec_block0": decoder.blocks[0]}
        inputs = {"seq_in": encoder.norm_pre, "dec_seq_in": decoder.norm_pre}
        with Recorder(outputs, inputs) as found:
            bins = tokenizer.quality_bin(torch.tensor([about["args"]["eps"]]))
            logits, z = encoder(grid, bins, budget)
            keep = ~tokenizer.halts(logits)
            quantized = tokenizer.quantize(z)
            latents = z if quantized is None else quantized.quantized
            output = decoder(latents, places, mask=halting_mask(keep, places.numel())[:, None])
        code = tokenizer.code_map(output, places)
        decoded = tokenizer.decode_code(code)
        found |= {
            "halt_logit": logits,
            "halt_prob": logits.sigmoid(),
            "keep": keep.to(vectors.answers(name)[f"T{budget}/keep"].dtype),
            "count": keep.sum(1).to(vectors.answers(name)[f"T{budget}/count"].dtype),
            "z": z,
            "dec_out": output,
            "code_map": code,
            "image": decoded,
            "l1": (decoded - image).abs().flatten(1).mean(1),
        }
        if quantized is not None:
            found |= {"zq": quantized.quantized, "ids": quantized.ids, "quantizer_loss": quantized.loss}
        out |= {f"T{budget}/{key}": value for key, value in found.items()}
    return out


LOGS = {
    "active": "latent_token_active_loss_bce",
    "halted": "latent_token_halt_loss_bce",
    "quantizer": "quantization_loss",
}
IMAGE_LOGS = {"nll": "nll_loss", "lpips": "p_loss", "adversarial": "g_loss", "adversarial_weight": "d_weight"}


def training(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    name, args = about["name"], about["args"]
    tokenizer = karl(vectors, about["module"]).train()
    optimizers = {"tokenizer": None, "discriminator": None}
    order = "per_image" if args.get("fixed") else "official"
    finetuning = "opt_idx" in args
    if finetuning:
        module = KarlFinetuning(tokenizer, perceptual_weight=0.0, mask_order=order, optimizers=optimizers)
        state = filled(vectors, about["module"])
        for i, discriminator in enumerate(module.discriminators):
            prefix = f"gan_losses.{i}.discriminator."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            weights.load(discriminator, discriminator.state_dict() | own)
        module.perceptual_distance = lambda images, values: vectors.input(name, "lpips")
        module.adversarial_weight, module.discriminates = args["gan_w"], args["opt_idx"] == 1
        if not args["gan_w"]:
            module.adversarial_weights = [(0, 0.2)]
    else:
        module = KarlPretraining(tokenizer, mask_order=order, optimizers=optimizers)
    budget = int(vectors.input(name, "budget"))
    image = vectors.input(name, "image")
    bins = vectors.input(name, "eps_index")
    quality = []  # the first token of each phase
    tokenizer.encoder.norm_pre.register_forward_pre_hook(lambda module, args: quality.append(args[0][:, 0]))
    iteration = module.both_phases(image, budget, bins, vectors.input(name, "noise"))
    iteration.loss.backward()

    out = {
        "total": iteration.loss,
        "eps0": iteration.errors,
        "eps0_bin": module.quality.values[tokenizer.quality_bin(iteration.errors)],
        "q_after": module.quality.probabilities,
    }
    available = tokenizer.config.max_tokens
    for i, (key, phase) in enumerate((("estimate", iteration.first), ("tokenize", iteration.second))):
        length = available if i else budget
        logs = {n.removeprefix(f"{key}/"): v for n, v in iteration.logs.items() if n.startswith(f"{key}/")}
        with torch.no_grad():
            stages = {
                "halt_logit": phase.halt_logits,
                "z_first32": phase.z[:, :32],
                "ids": phase.ids,
                "dec_out": phase.output,
                "quality_token": quality[i],
                "image": tokenizer.decode_code(phase.code)[:1],
            }
        count = min(budget, available)  # of live tokens, which names the loss module of stage 2
        for ours, theirs in LOGS.items():
            suffix = f"{length}_0" if i == 0 and ours == "active" else f"{length}"
            if ours in logs:
                stages[f"log/{theirs}_{suffix}"] = logs[ours]
        if not finetuning:
            stages |= {f"log/{n}_loss_{length}_{i}": logs[n] for n in ("nll", "code") if n in logs}
        elif module.discriminates:
            index = module.discriminator_index(budget if i == 0 else count)
            stages |= {
                f"log/train.disc_loss_{index}": logs["discriminator"],
                f"log/train.logits_real_{index}": logs["logits_real"],
                f"log/train.logits_fake_{index}": logs["logits_fake"],
            }
        else:
            official = {theirs: logs[ours] for ours, theirs in IMAGE_LOGS.items()}
            official |= {
                "total_loss": logs["image"],
                "rec_loss": logs["nll"],
                "disc_factor": torch.tensor(float(args["gan_w"] > 0)),
                "discriminator_weight": torch.tensor(args["gan_w"] or 0.2),
            }
            stages |= {f"log/train.{n}_{budget if i == 0 else count}_{i}": v for n, v in official.items()}
        out |= {f"phase{i + 1}/{stage}": value for stage, value in stages.items() if value is not None}

    grads = {name: p.grad for name, p in tokenizer.named_parameters() if p.grad is not None}
    grads = published.to_published(grads, tokenizer.config)
    for theirs in args["grads"]:
        if theirs.startswith("gan_losses."):
            _, index, _, *rest = theirs.split(".")
            grad = module.discriminators[int(index)].get_parameter(".".join(rest)).grad
        else:
            grad = grads.get(theirs)
        out[f"grad/{theirs}"] = torch.empty(0) if grad is None else grad
    return out


def gan(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    args = vectors.modules[about["module"]]["config"]["args"]
    perceptual, discriminator = PerceptualLoss(), PatchDiscriminator(args["disc_in_channels"]).train()
    losses = nn.ModuleDict({"perceptual_loss": perceptual, "discriminator": discriminator})
    weights.load(losses, losses.state_dict() | vectors.state(about["module"]))
    image, features = vectors.input("gan", "image"), vectors.input("gan", "features")
    layer = vectors.input("gan", "last_layer").requires_grad_()

    reconstruction = F.conv2d(features, layer, padding=1) + 0.5
    lpips = perceptual(image, reconstruction)
    out = {"reconstruction": reconstruction, "lpips": lpips, "eps0": (image - reconstruction).abs().flatten(1).mean(1)}
    fake = discriminator(reconstruction)
    out["logits_fake_map"] = fake
    pixels = (image - reconstruction).abs().mean()
    total, logs = generator_loss(pixels, lpips, fake, layer, 0.8, 1.0)
    out |= {f"gen/{theirs}": logs[ours] for ours, theirs in IMAGE_LOGS.items()}
    out |= {
        "total": total,
        "gen/total_loss": total,
        "gen/rec_loss": logs["nll"],
        "gen/disc_factor": torch.tensor(1.0),
        "gen/discriminator_weight": torch.tensor(0.8),
        "total_before_gan": generator_loss(pixels, lpips, fake, layer, 0.8, 0.0)[0],
        "grad_last_layer": torch.autograd.grad(total, layer, retain_graph=True)[0],
    }
    loss, logs = discriminator_loss(discriminator(image), discriminator(reconstruction.detach()), 1.0)
    loss.backward()
    out |= {
        "disc_loss": loss,
        "disc/disc_loss": logs["discriminator"],
        "disc/logits_real": logs["logits_real"],
        "disc/logits_fake": logs["logits_fake"],
    }
    for key, parameter in discriminator.named_parameters():
        out[f"grad_disc/{key}"] = parameter.grad
    names = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
    for key, value in zip(names, perceptual.features(image), strict=True):
        out[f"vgg_mean_abs/{key}"] = value.abs().mean()
    return out


def schedule(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    rates = {"lr/pretrain": (2e-4, 200), "lr/finetune": (5.625e-5, 400)}
    epochs, steps = vectors.input("schedule", "epoch").double().tolist(), 1000
    out = {
        name: torch.tensor(
            [rate * cosine(e * steps, total * steps, steps, warmup_epochs=20) for e in epochs], dtype=torch.float32
        )
        for name, (rate, total) in rates.items()
    }
    name = next(n for n, about in vectors.modules.items() if about["config"]["kind"] == "karl_vqgan")
    module = KarlFinetuning(karl(vectors, name), perceptual_weight=0.0, optimizers={})
    answers = vectors.answers("schedule")
    weights_of_epochs = [module.weight_of_epoch(e) for e in vectors.input("schedule", "int_epoch").tolist()]
    out["gan_weight"] = torch.tensor(weights_of_epochs, dtype=answers["gan_weight"].dtype)
    module.adversarial_weight = 0.2
    passes = [module.is_discriminator_pass(i) for i in vectors.input("schedule", "step").tolist()]
    out["optimizer_idx_when_gan_on"] = torch.tensor(passes).to(answers["optimizer_idx_when_gan_on"].dtype)
    indices = [module.discriminator_index(c) for c in vectors.input("schedule", "token_count").tolist()]
    out["gan_module_index"] = torch.tensor(indices).to(answers["gan_module_index"].dtype)
    return out
