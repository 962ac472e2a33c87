"""The embedded default: data, extractor and networks, and what made them."""
