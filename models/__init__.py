"""Networks and their weights: model reference → checkpoint → decoder over packed segments."""
