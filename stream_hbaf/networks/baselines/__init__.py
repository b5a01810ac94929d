"""Other systems for emotion recognition in conversation, rebuilt on this project's features.

Each network's docstring, or its file's, cites the paper and lists what is kept of it, what is left
out (vision, and everything before the features, always) and what is changed. A network whose
paper uses the whole dialogue exists in mode ``offline`` only and refuses to run live.
"""
