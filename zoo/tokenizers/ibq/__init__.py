"""IBQ: the convolutional autoencoder whose codebook of any size is learned by index backpropagation."""
