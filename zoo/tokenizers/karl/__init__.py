"""KARL: as many tokens as an image needs, found in one pass."""
