"""KL autoencoder: the continuous convolutional autoencoder that KARL distils from and xAR generates in."""
