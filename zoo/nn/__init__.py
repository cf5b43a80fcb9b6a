"""Networks that systems share."""
