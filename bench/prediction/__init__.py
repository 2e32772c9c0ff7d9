"""What predicted KV costs, and what it brings."""
