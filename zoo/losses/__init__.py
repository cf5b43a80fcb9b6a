"""Losses that systems share."""

from zoo.losses.reconstruction import RECONSTRUCTION, reconstruction_loss

__all__ = ["RECONSTRUCTION", "reconstruction_loss"]
