"""Corpora in, a bundle out: encoder layers, commonsense heads, acoustic selection, network."""
