"""KV Prediction: a cheap auxiliary fills the base model's KV cache (arXiv 2410.08391)."""
