"""Speed of one runtime, beside a peer or not."""
