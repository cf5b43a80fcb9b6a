"""FSQ: an autoencoder whose codes are the points of a small grid, so that no codebook has to be learned."""
