"""Many sessions and apps: switching, restoring, sharing.

A benchmark is `run_...(what it measures, progress, watch)`, which gives rows; `progress` is told of
a download, `watch` of what runs, how much of it is done, and of how much. It raises ConfigError for
an option that is out of range or does not fit the model or the machine, ModelError where a model
cannot be had, and what requests fail with.
"""
