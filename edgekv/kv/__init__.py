"""KV in memory: buffers per session and layer, the pool's budget, provenance and residency."""
