"""Backbones: the options every one shares, and the adapter for transformers' audio language models."""
