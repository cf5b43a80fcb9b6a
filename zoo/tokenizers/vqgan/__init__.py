"""VQGAN: the convolutional autoencoder with a codebook that KARL distils from."""
