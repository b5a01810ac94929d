"""Corpora: read, augmented, and turned into the features of datasets."""
