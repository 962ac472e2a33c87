"""Numbers come from here: distances with their intervals, the cost ledger, latency. No Lightning, no W&B."""
