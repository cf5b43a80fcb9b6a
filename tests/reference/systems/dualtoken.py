"""DualToken: outputs of the reference cases by name."""

from __future__ import annotations

import io
import math
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from vectors import Vectors

from zoo import weights
from zoo.data import images
from zoo.losses import reconstruction_loss
from zoo.losses.adversarial import ResidualPatchDiscriminator, adaptive_weight, discriminator_loss
from zoo.losses.perceptual import PerceptualLoss
from zoo.metrics.psnr import PSNR
from zoo.metrics.ssim import SSIM
from zoo.metrics.storage import cut_off
from zoo.metrics.tokens import TokenStatistics
from zoo.metrics.zeroshot import text_classifier
from zoo.nn.autoencoder import AutoencoderConfig
from zoo.quantizers import ResidualQuantizer
from zoo.tokenizer import TokenizerInfo, Tokens
from zoo.tokenizers.dualtoken import published
from zoo.tokenizers.dualtoken.projection import AttentionProjection
from zoo.tokenizers.dualtoken.tokenizer import DualTokenTokenizer
from zoo.tokenizers.dualtoken.training import DualTokenTraining, distances
from zoo.tokenizers.siglip import published as siglip
from zoo.tokenizers.siglip.encoder import SigLIPEncoder
from zoo.training.module import parameter_groups
from zoo.training.schedules import cosine, late_cosine


def run(vectors: Vectors, case: str) -> dict[str, Tensor]:
    return FUNCTIONS[vectors.cases[case]["function"]](vectors, vectors.cases[case])


def published_state(config: dict) -> dict[str, Tensor]:
    if not config:
        return PerceptualLoss().state_dict()
    if "ndf" in config:
        return discriminator(config).state_dict()
    config_of = published.config_from_published(config["rqvaesiglip"], config["siglip"])
    return published.to_published(DualTokenTokenizer(config_of).state_dict(), config_of)


def filled(vectors: Vectors, module: str) -> dict[str, Tensor]:
    """The authors' state dict; set_after_fill names a stored tensor, or takes the absolute value."""
    state = vectors.state(module)
    for name, action in vectors.modules[module].get("set_after_fill", {}).items():
        state[name] = vectors.tensors[action] if action in vectors.tensors else state[name].abs()
    return state


def dualtoken(vectors: Vectors, module: str) -> DualTokenTokenizer:
    config = vectors.modules[module]["config"]
    tokenizer = DualTokenTokenizer(published.config_from_published(config["rqvaesiglip"], config["siglip"]))
    weights.load(tokenizer, published.from_published(filled(vectors, module), tokenizer.config))
    return tokenizer.eval()


def discriminator(config: dict) -> ResidualPatchDiscriminator:
    return ResidualPatchDiscriminator(config["input_nc"], config["ndf"], config["n_layers"])


def as_map(tokens: Tensor) -> Tensor:
    """(B, N, ...) to (B, h, w, ...)."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.unflatten(1, (side, side))


class Recorder:
    """Outputs of modules while it is open."""

    def __init__(self, outputs: dict[str, nn.Module]):
        self.found: dict[str, Tensor] = {}
        self.hooks = [m.register_forward_hook(self._keep(name)) for name, m in outputs.items()]

    def _keep(self, name):
        def keep(module, args, output):
            self.found[name] = output

        return keep

    def __enter__(self):
        return self.found

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def encode(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer, values = dualtoken(vectors, about["module"]), vectors.input(about["name"], "image")
    tower = tokenizer.encoder.vision
    parts = {"prequant_pix": tokenizer.prequant_pixel, "prequant_sem": tokenizer.prequant_semantic}
    if hasattr(tokenizer, "prequant_shortcut"):
        parts["prequant_shortcut"] = tokenizer.prequant_shortcut
    with Recorder(parts | {f"hidden_{i + 1}": block for i, block in enumerate(tower.blocks)}) as found:
        output = tokenizer(values, decode=False)
        # the tower runs on quantised features from layer_semantic on
        latents = tokenizer.latents(values)
        tokenizer.finish(output.features)
    pixel, semantic = output.quantized["pixel"], output.quantized["semantic"]
    return found | {
        "hidden_0": tower.embed(values),
        "z_q_pix": pixel.quantized,
        "loss_pix": pixel.loss,
        "code_pix": as_map(pixel.ids),
        "z_q_sem": output.features,
        "loss_sem": semantic.loss,
        "code_sem": as_map(semantic.ids),
        "pooler": output.pooled,
        "pix_latent": as_map(latents.pixel),
        "sem_latent": as_map(latents.semantic),
    }


@torch.no_grad()
def decode(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer = dualtoken(vectors, about["module"])
    decoder, stages = tokenizer.decoder, {}
    for i, level in enumerate(decoder.up):
        stages |= {f"up_{i}_block_{b}": block for b, block in enumerate(level.block)}
        stages |= {f"up_{i}_attn_{b}": block for b, block in enumerate(level.attn)}
        stages[f"up_{i}_block_last"] = level.block[-1]
        if hasattr(level, "upsample"):
            stages[f"up_{i}_upsample"] = level.upsample
    stages |= {"postquant_pix": tokenizer.postquant_pixel, "post_quant_conv": tokenizer.bridge}
    stages |= {"conv_in": decoder.conv_in, "mid": decoder.mid.block_2}
    inputs = {}
    hook = tokenizer.bridge.register_forward_pre_hook(lambda module, args: inputs.update(resized_latent=args[0]))
    with Recorder(stages) as found:
        reconstruction = tokenizer.to_values(vectors.input(about["name"], "z_q_pix"))
    hook.remove()
    return found | inputs | {"recon": reconstruction}


@torch.no_grad()
def forward(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer, case = dualtoken(vectors, about["module"]), about["name"]
    values, text = vectors.input(case, "image"), vectors.input(case, "text")
    output = tokenizer(values)
    ids = {name: one.ids for name, one in output.quantized.items()}
    tokens = Tokens(ids)
    embeddings = tokenizer.code_embeddings(tokens)
    found = {
        "z_q_sem": output.features,
        "pooler": output.pooled,
        "recon": output.reconstruction,
        "code_pix": as_map(ids["pixel"]),
        "code_sem": as_map(ids["semantic"]),
        "loss_pix": output.quantized["pixel"].loss,
        "loss_sem": output.quantized["semantic"].loss,
        "recon_from_codes": tokenizer.to_values(embeddings["pixel"].sum(2)),
        "z_q_sem_from_codes": tokenizer.to_features(tokenizer.quantizers["semantic"].codes(ids["semantic"])),
        "emb_pix_with_depth": as_map(embeddings["pixel"]),
        "emb_sem_with_depth": as_map(embeddings["semantic"]),
        "image_features": tokenizer.embedding_of(tokens),
        "logit_scale": tokenizer.encoder.logit_scale,
        "logit_bias": tokenizer.encoder.logit_bias,
    }
    if text is not None:
        embeds = tokenizer.encoder.text(text)
        found |= {"text_embeds": embeds, "text_features": F.normalize(embeds, dim=-1)}
    return found


@torch.no_grad()
def prefix(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer, z = dualtoken(vectors, about["module"]), vectors.input(about["name"], "z")
    return {"postquant_pix": tokenizer.postquant_pixel(z), "postquant_sem": tokenizer.to_features(z)}


class Draws:
    """Gives the stored draws of code restarts in place of torch.randperm and torch.rand_like."""

    def __init__(self, vectors: Vectors, case: str):
        self.vectors, self.case, self.count, self.order = vectors, case, 0, None

    def randperm(self, n: int, **_) -> Tensor:
        self.order = self.vectors.input(self.case, f"randperm_{self.count}")
        assert len(self.order) == n, f"draw {self.count} is of {n} vectors, {len(self.order)} are stored"
        self.count += 1
        return self.order

    def rand_like(self, drawn: Tensor, **_) -> Tensor:
        """Stored for all copies of all vectors; asked for those that were chosen."""
        noise = self.vectors.input(self.case, f"rand_{self.count - 1}")
        return noise[self.order[: len(drawn)]]

    def __enter__(self):
        self.patches = [mock.patch("torch.randperm", self.randperm), mock.patch("torch.rand_like", self.rand_like)]
        for patch in self.patches:
            patch.start()

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()


def quantizer_names(about: dict) -> dict:
    """Ours of what describes a quantizer of theirs."""
    stream = published.stream_from_published(about | {"bottleneck_type": about["kind"]})
    (height, width, dim), (rows, columns, _) = about["latent_shape"], about["code_shape"]
    return {
        "num_codes": stream.codebook_size,
        "dim": dim,
        "levels": stream.levels,
        "decay": stream.decay,
        "kind": stream.kind,
        "shared": stream.shared,
        "restart": stream.restart,
        "cell": (height // rows, width // columns),
    }


def quant(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    module = vectors.modules[about["module"]]
    config = {"restart_unused_codes": True} | module["config"] | {"kind": module["kind"]}
    quantizer = ResidualQuantizer(**quantizer_names(config)).eval()
    theirs, state = filled(vectors, about["module"]), {}
    for name, tensor in theirs.items():
        _, level, kind = name.split(".")
        if int(level) < len(quantizer.codebooks):
            tensor = tensor[:-1] if kind == "weight" else tensor
            state[f"codebooks.{level}.{published.CODEBOOK_NAMES[kind]}"] = tensor
    weights.load(quantizer, state)
    x, w = vectors.input(about["name"], "x"), vectors.input(about["name"], "w")
    with torch.no_grad():
        given = quantizer(x)
        embeddings = quantizer.embeddings(given.ids)
    found = {
        "eval_z_q": given.quantized,
        "eval_loss": given.loss,
        "eval_codes": given.ids,
        "eval_embed_code": quantizer.codes(given.ids),
        "eval_embed_code_with_depth": embeddings,
        "to_code_shape": quantizer.to_cells(x),
    }
    for i, total in enumerate(embeddings.cumsum(-2).unbind(-2)):
        found[f"eval_level_{i}"] = total
    x.requires_grad_()
    quantizer.train()
    with Draws(vectors, about["name"]):
        output = quantizer(x)
    (5 * output.loss + (output.quantized * w).sum()).backward()
    found |= {
        "train_z_q": output.quantized,
        "train_loss": output.loss,
        "train_codes": output.ids,
        "train_grad_x": x.grad,
    }
    for level in range(quantizer.levels):
        book = quantizer.codebook(level)
        for theirs, ours in published.CODEBOOK_NAMES.items():
            tensor = getattr(book, ours)
            tensor = F.pad(tensor, (0, 0, 0, 1)) if ours == "codebook" else tensor
            found[f"after/codebooks.{level}.{theirs}"] = tensor
    return found


def proj(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    c = vectors.modules[about["module"]]["config"]
    projection = AttentionProjection(c["in_dim"], c["out_dim"], c["num_heads"], c["is_causal"])
    weights.load(projection, filled(vectors, about["module"]))
    x, w = (vectors.input(about["name"], name) for name in ("x", "w"))
    x.requires_grad_()
    with Recorder({"attn": projection.attn, "mlp": projection.mlp}) as found:
        y = projection(x)
    (y * w).sum().backward()
    grads = {f"grad/{name}": p.grad for name, p in projection.named_parameters()}
    return found | {"y": y, "grad_x": x.grad} | grads


class Pooled(nn.Module):
    """What the authors' training was run with in place of LPIPS."""

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        return 0.5 * (F.avg_pool2d(images, 4) - F.avg_pool2d(others, 4)).square().mean((1, 2, 3), keepdim=True)


STAGES = {
    0: {"pooled_mse": 5, "pooled_cosine": 5, "quantizer_pixel": 5, "quantizer_semantic": 5, "pixels": 5, "lpips": 1},
    1: {
        **{"features_mse": 5, "features_cosine": 5, "pooled_mse": 1, "pooled_cosine": 1},
        **{"quantizer_pixel": 5, "quantizer_semantic": 5, "pixels": 5, "lpips": 1},
    },
    2: {"features_cosine": 1, "pooled_mse": 5, "pooled_cosine": 5, "quantizer_semantic": 5},
}
LOSS_NAMES = {
    "semantic_loss": "features_mse",
    "semantic_loss_cos": "features_cosine",
    "semantic_loss_pooler": "pooled_mse",
    "semantic_loss_pooler_cos": "pooled_cosine",
    "quant_loss_semantic": "quantizer_semantic",
    "quant_loss_pixel": "quantizer_pixel",
    "recon_loss": "pixels",
    "pcpt_loss": "lpips",
    "gen_loss": "adversarial",
    "total_loss": "loss",
}


def train(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    case, meta = about["name"], about["meta"]
    stage, gan = meta["stage"], meta.get("gan", False)
    module = training_module(vectors, about)
    tokenizer, values = module.tokenizer, vectors.input(case, "image")
    outputs, norms = [], []
    tokenizer.register_forward_hook(lambda module, args, output: outputs.append(output))

    def recorded(reconstruction, adversarial, layer, *bounds):
        grads = [torch.autograd.grad(one, layer, retain_graph=True)[0] for one in (reconstruction, adversarial)]
        norms.extend(grad.norm() for grad in grads)
        return adaptive_weight(reconstruction, adversarial, layer, *bounds)

    learners = module.optimized()
    optimizers = {"tokenizer": torch.optim.AdamW(parameter_groups(learners["tokenizer"]), 1e-3, (0.5, 0.9), 1e-8, 1e-4)}
    if gan:
        optimizers["discriminator"] = torch.optim.Adam(module.discriminator.parameters(), 1e-3, (0.5, 0.9))
    found = {}
    with Draws(vectors, case), mock.patch("zoo.tokenizers.dualtoken.training.adaptive_weight", recorded):
        for name, loss, logs in module.losses({"image": (values + 1) / 2}):
            inputs = [p for group in optimizers[name].param_groups for p in group["params"]]
            loss.backward(inputs=inputs)
            if name == "tokenizer":
                found |= {f"loss/{theirs}": logs[ours] for theirs, ours in LOSS_NAMES.items() if ours in logs}
                found |= {f"grad/{n}": grad for n, grad in published_gradients(tokenizer).items()}
                found["number_of_parameters_without_gradient"] = without_gradient(tokenizer)
                if gan:
                    found |= {
                        "g_weight": logs["adversarial_weight"],
                        "nll_grad_norm": norms[0],
                        "gen_grad_norm": norms[1],
                    }
            else:
                factor = module.discriminator_factor()
                found |= {f"disc/grad/{n}": p.grad.clone() for n, p in module.discriminator.named_parameters()}
                found |= {"disc/disc_loss": logs["discriminator"] / factor}
                found |= {f"disc/{n}_mean": logs[n] for n in ("logits_real", "logits_fake")}
            optimizers[name].step()
    output = outputs[0]
    state = published.to_published(tokenizer.state_dict(), tokenizer.config)
    found |= {f"after/{n}": tensor for n, tensor in state.items() if ".codebooks." in n}
    found |= {f"after_step/{n}": tensor for n, tensor in state.items()}
    if gan:
        found |= {f"disc/after_step/{n}": p for n, p in module.discriminator.named_parameters()}
    # what stage 2 does not need and the authors log
    reference = training_module(vectors, about)
    reference.tokenizer.eval()
    with torch.no_grad():
        tower = reference.tokenizer.encoder.vision
        last = reference.tokenizer.finish(output.features)
        if last is output.features:  # there is no layer behind; what they log is not quantised
            last = tower.layers(tower.embed(values))
        taught = reference.teacher.layers(reference.teacher.embed(values))
        for ours, value in distances("loss/semantic_loss_last", last, taught).items():
            found[ours.replace("_mse", "").replace("cosine", "cos")] = value
        reconstruction = output.reconstruction
        if reconstruction is None:
            reconstruction = reference.tokenizer.to_values(output.quantized["pixel"].quantized)
        found |= {
            "recon": reconstruction,
            "loss/recon_loss": F.mse_loss(reconstruction, values),
            "loss/pcpt_loss": Pooled()(reconstruction, values).mean(),
            "code_pix": as_map(output.quantized["pixel"].ids),
            "code_sem": as_map(output.quantized["semantic"].ids),
        }
    assert stage != 2 or output.reconstruction is None
    return found


def training_module(vectors: Vectors, about: dict) -> DualTokenTraining:
    meta, tokenizer = about["meta"], dualtoken(vectors, about["module"])
    teacher = SigLIPEncoder(tokenizer.config.encoder)
    state = siglip.from_published(filled(vectors, meta["teacher"]), tokenizer.config.encoder)
    weights.load(teacher.vision, {name.removeprefix("vision."): tensor for name, tensor in state.items()})
    stage, gan = meta["stage"], meta.get("gan", False)
    factors = dict(STAGES[stage])
    factors.pop("lpips", None)
    for name in factors:
        if name.startswith(("features", "pooled")):
            factors[name] *= meta.get("sem_weight", 1)
    frozen = {0: tokenizer.config.layer_semantic, 1: -1, 2: tokenizer.config.layer_shortcut}[stage]
    module = DualTokenTraining(
        tokenizer,
        teacher,
        factors,
        started_from="the reference",
        frozen_layers=frozen,
        train_pixels=stage < 2,
        adversarial_weight=0.75 if gan else 0.0,
        optimizers={"tokenizer": None},
    )
    if stage < 2:
        module.perceptual, module.weights["lpips"] = Pooled(), 1.0
    if gan:
        config = vectors.modules[meta["discriminator"]]["config"]
        module.discriminator = discriminator(config)
        weights.load(module.discriminator, filled(vectors, meta["discriminator"]))
    run = SimpleNamespace(global_step=0, current_epoch=meta.get("epoch", 0), num_training_batches=1)
    module.trainer, module.kept = run, run  # the module has a weak reference alone
    return module.train()


def published_gradients(tokenizer: DualTokenTokenizer) -> dict[str, Tensor]:
    """Of all tensors of the state, by the authors' names; NaN where there is none."""
    parameters = dict(tokenizer.named_parameters())
    grads = {}
    for name, tensor in tokenizer.state_dict().items():
        grad = parameters[name].grad if name in parameters else None
        grads[name] = torch.full_like(tensor, torch.nan) if grad is None else grad.clone()
    return published.to_published(grads, tokenizer.config)


def without_gradient(tokenizer: DualTokenTokenizer) -> Tensor:
    """How many of the authors' parameters have no gradient; of their codebooks the tables are parameters."""
    buffers, seen = ("zero_k_bias", "cluster_size_ema", "embed_ema"), 0
    for name, grad in published_gradients(tokenizer).items():
        shared = (
            ".codebooks." in name
            and tokenizer.config.streams[{"sem": "semantic", "pix": "pixel"}[name.split(".")[0][-3:]]].shared
        )
        repeated = shared and name.split(".")[2] != "0"
        seen += not name.endswith(buffers) and not repeated and bool(grad.isnan().any())
    return torch.tensor(seen)


@torch.no_grad()
def zeroshot(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    case, tokenizer = about["name"], dualtoken(vectors, about["module"])
    values, text, target = (vectors.input(case, name) for name in ("image", "text", "target"))
    embeddings = tokenizer.encoder.text(text.flatten(0, 1)).unflatten(0, text.shape[:2])
    classifier = text_classifier(embeddings)
    logits = 100 * tokenizer.encode_image((values + 1) / 2) @ classifier.T
    hits = [(logits.topk(k).indices == target[:, None]).any(1).sum() for k in (1, 2)]
    return {"classifier": classifier.T, "logits": logits, "top1_top2_correct": torch.stack(hits)}


def disc(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    inputs = partial(vectors.input, about["name"])
    module, grads = discriminator(vectors.modules[about["module"]]["config"]), about["meta"]["grads"]
    weights.load(module, vectors.state(about["module"]))
    fake, real = inputs("fake").requires_grad_(), module(inputs("real"))
    with Recorder({f"main_{i}": layer for i, layer in enumerate(module.main)}) as out:
        logits = module(fake)
    adversarial = -logits.mean()
    hinge, _ = discriminator_loss(real, logits, 1.0, slope=0.01)
    out |= {
        "logits_fake": logits,
        "logits_real": real,
        "gen_loss": adversarial,
        "grad_gen_wrt_fake": torch.autograd.grad(adversarial, fake, retain_graph=True)[0],
        "hinge_d_loss": hinge,
        "hinge_d_loss_x8": discriminator_loss(8 * real, 8 * logits, 1.0, slope=0.01)[0],
        "vanilla_d_loss": 0.5 * (F.softplus(-real).mean() + F.softplus(logits).mean()),
    }
    hinge.backward()
    return out | {f"grad/{name}": module.get_parameter(name).grad for name in grads}


def lpips(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    inputs = partial(vectors.input, about["name"])
    perceptual, image, recon = PerceptualLoss(), inputs("image"), inputs("recon").requires_grad_()
    weights.load(perceptual, filled(vectors, about["module"]))
    per_image = perceptual(recon, image)
    features, scaling = perceptual.features(recon), perceptual.scaling_layer
    return {
        "lpips": per_image.mean(),
        "lpips_per_image": per_image.flatten(),
        "grad_wrt_recon": torch.autograd.grad(per_image.mean(), recon)[0],
        "relu5_3": features[4],
        "relu3_3_mean_per_channel": features[2].mean((0, 2, 3)),
        "scaled": (recon - scaling.shift) / scaling.scale,
    }


def schedule(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    meta = about["meta"]
    rate, epoch, total = meta["lr"], meta["steps_per_epoch"], meta["steps_per_epoch"] * meta["max_epoch"]
    generator = partial(cosine, warmup_steps=meta["warmup"], warmup_offset=1)
    late = partial(late_cosine, warmup_epochs=0.5, min_ratio=4e-5 / rate)
    return {
        "generator_lr": torch.tensor([rate * generator(step, total, epoch) for step in range(total)]),
        "discriminator_lr": torch.tensor([rate * late(step, total, epoch) for step in range(total + 1)]),
    }


def prep(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    inputs = partial(vectors.input, about["name"])
    size, file = about["meta"]["size"], io.BytesIO()
    Image.fromarray(inputs("pixels").numpy().astype(np.uint8)).save(file, "PNG")
    raw = {"__key__": "", "__url__": "", "png": file.getvalue()}
    top, left, height, width = inputs("crop_top_left_height_width").tolist()

    def transform(**options) -> Tensor:
        sample = images.Decoder(image_size=size, **options)(raw, "relative", False)
        return AutoencoderConfig().to_values(torch.from_numpy(images.to_float(sample["image"])))

    box = left, top, left + width, top + height
    with mock.patch.object(images, "random_box", return_value=box):
        training = transform(crop="resized", crop_scale=(0.9, 1.0))
    saved = cut_off(inputs("to_save")).long()
    return {"eval_transform": transform(), "train_transform": training, "saved_uint8": saved.movedim(1, -1)}


def metrics(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    inputs = partial(vectors.input, about["name"])
    values, size, codes = (inputs("recon"), inputs("image")), about["meta"]["K"], inputs("codes")
    recon, image = (AutoencoderConfig().to_images(v).clamp(0, 1) for v in values)
    about_tokens = {"kind": "discrete", "streams": ("pixel",), "codebook_sizes": {"pixel": size}}
    info = TokenizerInfo("", "", image_size=0, size_multiple=None, channels=3, max_tokens=0, **about_tokens)
    statistics = TokenStatistics(info)
    statistics.update(Tokens({"pixel": codes.flatten(1, 2)}))
    use = statistics.compute()
    nats, bits = use["perplexity/pixel"].log(), use["image_entropy/pixel"]
    return {
        "l1": reconstruction_loss("l1")(*values),
        "l2": reconstruction_loss("mse")(*values),
        "ssim": SSIM(borders=False).scores(recon, image).mean(),
        "psnr_rgb_per_image": PSNR().scores(recon, image)[:, 0],
        "neg_cosine": distances("features", inputs("feat"), inputs("feat_gt"))["features_cosine"],
        "used": (size * use["codebook_use/pixel"]).round().to(torch.int64),
        "kl_to_uniform": math.log(size) - nats,
        "entropy_percent": 100 * nats / math.log(size),
        "mean_entropy_per_image": bits,
        "effective_percent": 100 * bits / math.log2(size),
    }


FUNCTIONS = {
    "encode": encode,
    "decode": decode,
    "forward": forward,
    "prefix": prefix,
    "quant": quant,
    "proj": proj,
    "train": train,
    "zeroshot": zeroshot,
    "disc": disc,
    "lpips": lpips,
    "schedule": schedule,
    "prep": prep,
    "metrics": metrics,
}
