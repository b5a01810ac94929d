"""The systems that the papers compare themselves with, rebuilt on this project's features.

Sound and words only: what the originals do with vision is left out, and so is what they do before
the features. One file each; its docstring says what is kept. Those that see the future refuse to
listen live.
"""
