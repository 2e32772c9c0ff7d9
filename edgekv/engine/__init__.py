"""Executes plans: one thread that owns the model, the KV pool and every MLX call."""
