"""The authors' parameter names and ours."""

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.nn.rotary import grid_angles
from zoo.tokenizers.xar.entities import partition
from zoo.tokenizers.xar.generator import XARConfig
from zoo.weights import rename

NAMES = {
    "encoder_pos_embed_learned": "encoder_positions",
    "decoder_pos_embed_learned": "decoder_positions",
    "class_emb": "class_embedding",
    "time_embed": "time_embedding",
    "z_proj": "embed",
    "z_proj_ln": "embed_norm",
    "pred": "head",
}
BLOCK_NAMES = {"mlp.fc1_g": "mlp.gate", "mlp.fc1_x": "mlp.value", "mlp.fc2": "mlp.out", "ada_lin": "modulation"}


def names(config: XARConfig) -> dict[str, str]:
    """{theirs: ours}."""
    table = dict(NAMES)
    for part, depth in (("encoder", config.encoder_depth), ("decoder", config.decoder_depth)):
        for i in range(depth):
            table |= {f"{part}_blocks.{i}.{k}": f"{part}_blocks.{i}.{v}" for k, v in BLOCK_NAMES.items()}
    return table


def buffers(config: XARConfig) -> dict[str, Tensor]:
    """What the authors' files hold beside parameters: the mask, and in every block the tables of angles."""
    cut = partition(config.entity, config.grid, config.entity_size, config.scales)
    mask = torch.zeros(cut.length, cut.length).masked_fill(~cut.mask(), -torch.inf)
    found = {"mask": mask[None, None]}
    for part in ("encoder", "decoder"):
        head_dim = config.width // getattr(config, f"{part}_heads")
        cosines, sines = grid_angles(cut.rows, cut.columns, head_dim)
        half = head_dim // 2
        frequencies = 1.0 / 10_000.0 ** (torch.arange(0, half, 2).float() / half)
        for i in range(getattr(config, f"{part}_depth")):
            prefix = f"{part}_blocks.{i}.attn.rope"
            found |= {
                f"{prefix}.freqs": frequencies,
                f"{prefix}.freqs_cos": cosines,
                f"{prefix}.freqs_sin": sines,
            }
    return found


def from_published(state: Mapping[str, Tensor], config: XARConfig) -> dict[str, Tensor]:
    """The authors' state dict in our names. Buffers that are in the file must be those of the configuration."""
    known, rest = buffers(config), dict(state)
    for name, expected in known.items():
        found = rest.pop(name, None)
        if found is not None and (
            found.shape != expected.shape or not torch.allclose(found.float(), expected, atol=1e-5)
        ):
            raise ZooError(f"the file's '{name}' is not that of this partition ({config.entity} {config.entity_size}).")
    return rename(rest, names(config))


def to_published(state: Mapping[str, Tensor], config: XARConfig) -> dict[str, Tensor]:
    """Our state dict in the authors' names, with the buffers that their strict loader wants."""
    return rename(state, {ours: theirs for theirs, ours in names(config).items()}) | buffers(config)


def config_from_published(arguments: Mapping) -> XARConfig:
    """The authors' constructor arguments as our configuration."""
    a = {"img_size": 256, "vae_stride": 16, "vae_embed_dim": 16, "class_num": 1000, "clusters": 4} | dict(arguments)
    grid = a["img_size"] // a["vae_stride"]
    if a["encoder_embed_dim"] != a["decoder_embed_dim"]:
        raise ZooError("xAR has one width; encoder_embed_dim and decoder_embed_dim differ.")
    return XARConfig(
        grid=grid,
        latent_dim=a["vae_embed_dim"],
        num_classes=a["class_num"],
        width=a["encoder_embed_dim"],
        encoder_depth=a["encoder_depth"],
        encoder_heads=a["encoder_num_heads"],
        decoder_depth=a["decoder_depth"],
        decoder_heads=a["decoder_num_heads"],
        mlp_ratio=float(a.get("mlp_ratio", 4)),
        entity_size=grid // round(a["clusters"] ** 0.5),
        attention_dropout=float(a["attn_dropout"]),
        dropout=float(a["proj_dropout"]),
        label_dropout=float(a["label_drop_prob"]),
    )
