"""A KARL that is small enough for tests, and whose tokens halt or not depending on the image."""

import torch

import zoo

BASE = {"image_size": 32, "channels": 8, "multipliers": (1, 2, 2), "num_blocks": 1, "norm_groups": 4, "embed_dim": 8}
SIZES = {
    **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in (("width", 32), ("depth", 2))},
    **{"encoder_heads": 4, "decoder_heads": 2, "image_size": 32, "halting_width": 16, "codebook_size": 16},
    **{"latent_dim": 6, "num_slots": 96, "max_tokens": 64, "trained_slots": 92, "position_grid": 16},
}


def make(name="karl-small-vqgan", **changes):
    torch.manual_seed(0)
    base = BASE | ({"codebook_size": 16} if "vqgan" in name else {"attention": (8,)})
    tokenizer = zoo.create_tokenizer(name, base=base, **SIZES | changes).eval()
    with torch.no_grad():
        for parameter in tokenizer.encoder.blocks.parameters():
            parameter.mul_(4)
        tokenizer.encoder.halting[3].weight.mul_(40)
        tokenizer.encoder.halting[3].bias.fill_(1.1)
        tokenizer.base.decoder.conv_out.bias.fill_(0.5)
    return tokenizer
