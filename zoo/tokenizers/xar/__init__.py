"""xAR: next-X prediction with flow matching over entities of continuous latents."""
