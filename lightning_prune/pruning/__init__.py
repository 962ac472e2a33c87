"""What pruning is, in pure torch: patterns, masks, ramps. No Lightning, no W&B, no data."""
