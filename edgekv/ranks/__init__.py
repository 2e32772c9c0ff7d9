"""Processes that hold a part of the same model each, and compute its steps together."""
