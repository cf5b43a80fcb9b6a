"""SigLIP: the encoder of images and texts that other systems learn from."""
