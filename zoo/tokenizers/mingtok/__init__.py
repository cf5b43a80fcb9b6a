"""MingTok: continuous latents that become semantic features first and pixels then."""
