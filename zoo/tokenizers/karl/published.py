"""The authors' parameter names and ours."""

from collections.abc import Mapping

from torch import Tensor

from zoo.errors import ZooError
from zoo.tokenizers.karl.tokenizer import KarlConfig
from zoo.tokenizers.kl import published as kl
from zoo.tokenizers.vqgan import published as vqgan
from zoo.tokenizers.vqgan.tokenizer import VQGANConfig
from zoo.weights import rename

NAMES = {
    "encoder_positional_embedding": "encoder.positions",
    "latent_tokens": "encoder.latent_tokens",
    "rec_loss_embeddings": "encoder.quality_embedding",
    "patch_embed": "encoder.patch_embed",
    "encoder_ln_pre": "encoder.norm_pre",
    "encoder_ln_post_halt": "encoder.halting.0",
    "halting_mlp.0": "encoder.halting.1",
    "halting_mlp.2": "encoder.halting.3",
    "encoder_ln_post": "encoder.to_latent.0",
    "pre_quantizer_mlp": "encoder.to_latent.1",
    "quantize.embedding.weight": "quantizer.codebook",
    "decoder_embed": "decoder.embed",
    "decoder_latent_tokens_timestep_embed": "decoder.slot_positions",
    "decoder_mask_token": "decoder.mask_token",
    "decoder_positional_embedding": "decoder.positions",
    "decoder.ln_pre": "decoder.norm_pre",
    "decoder.ln_post": "decoder.norm_post",
    "decoder.ffn": "decoder.head",
}
BLOCK_NAMES = {
    "ln_1": "norm1",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj": "attn.proj",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BASES = {"vqgan": vqgan, "vae": kl}


def names(config: KarlConfig) -> dict[str, str]:
    """{theirs: ours} of everything but the base."""
    table = dict(NAMES)
    for part, depth in (("encoder", config.encoder_depth), ("decoder", config.decoder_depth)):
        for i in range(depth):
            blocks = {f"{part}.transformer.{i}.{k}": f"{part}.blocks.{i}.{v}" for k, v in BLOCK_NAMES.items()}
            table |= blocks
    return table


def base_name(config: KarlConfig) -> str:
    """What the authors call the base."""
    return "vqgan" if isinstance(config.base, VQGANConfig) else "vae"


def from_published(state: Mapping[str, Tensor], config: KarlConfig) -> dict[str, Tensor]:
    """The authors' state dict in our names, without the losses of stage 2 (`gan_losses`).

    Raises ZooError for a file on the other base, or with the other kind of latents.
    """
    base, kinds = base_name(config), {True: "quantised", False: "continuous"}
    for other in BASES.keys() - {base}:
        if any(name.startswith(f"base_tokenizer.{other}.") for name in state):
            raise ZooError(
                f"this file holds KARL on the base '{other}', and the configuration has '{base}'; load it under a name "
                f"with '{other}' in it."
            )
    if (quantized := "quantize.embedding.weight" in state) != config.quantize:
        raise ZooError(
            f"this file holds KARL with {kinds[quantized]} latents, and the configuration has {kinds[config.quantize]} "
            f"ones; load it under a name {'without' if quantized else 'with'} 'continuous' in it."
        )
    prefix = f"base_tokenizer.{base}."
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    outer = {n: t for n, t in state.items() if not n.startswith(("gan_losses.", prefix))}
    ours = {f"base.{name}": tensor for name, tensor in BASES[base].from_published(inner, config.base).items()}
    return rename(outer, names(config)) | ours


def to_published(state: Mapping[str, Tensor], config: KarlConfig) -> dict[str, Tensor]:
    """Our state dict in the authors' names."""
    inner = {name.removeprefix("base."): tensor for name, tensor in state.items() if name.startswith("base.")}
    outer = {name: tensor for name, tensor in state.items() if not name.startswith("base.")}
    base = base_name(config)
    theirs = {f"base_tokenizer.{base}.{n}": t for n, t in BASES[base].to_published(inner, config.base).items()}
    return rename(outer, {ours: theirs for theirs, ours in names(config).items()}) | theirs


def base_from_published(kind: str, sizes: Mapping) -> VQGANConfig | kl.KLConfig:
    """The authors' constructor arguments of a base ("vqgan" or "vae") as our configuration."""
    common = {
        "image_size": sizes["resolution"],
        "channels": sizes["ch"],
        "multipliers": tuple(sizes["ch_mult"]),
        "num_blocks": sizes["num_res_blocks"],
        "embed_dim": sizes["embed_dim"],
    }
    return VQGANConfig(codebook_size=sizes["n_embed"], **common) if kind == "vqgan" else kl.KLConfig(**common)


def config_from_published(config: Mapping) -> KarlConfig:
    """The authors' constructor arguments {"base": ..., "karl": ...} as our configuration; those that have no effect
    there are left out here.
    """
    sizes, base = config["karl"], config["base"]
    return KarlConfig(
        base=base_from_published("vqgan" if "n_embed" in base else "vae", base),
        quantize=sizes["quantize_latent"],
        latent_dim=sizes["vq_token_dim"],
        codebook_size=sizes["vq_codebook_size"],
        position_grid=sizes["max_grid_tokens"],
        **{
            f"{part}_{ours}": sizes[f"{part}_{theirs}"]
            for part in ("encoder", "decoder")
            for ours, theirs in (("width", "width"), ("depth", "num_layers"), ("heads", "num_heads"))
        },
    )
