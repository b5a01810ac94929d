"""Evaluation: a bundle in, figures out, offline on features and streaming through the live path."""
