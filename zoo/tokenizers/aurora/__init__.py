"""AURORA perception tokens: a VQ-VAE turns depth maps into words that a multimodal language model can reason with."""
