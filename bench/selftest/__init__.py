"""Checks of `edgekv doctor`: whether this machine computes what edgekv relies on."""
