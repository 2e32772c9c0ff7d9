"""Many sessions and apps: switching, restoring, sharing."""
