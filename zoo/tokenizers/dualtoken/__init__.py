"""DualToken (arXiv 2503.14324)."""
