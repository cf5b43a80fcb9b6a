"""What an evaluation measures, a small torchmetrics.Metric in each file; states are sums, reduced over ranks once."""
