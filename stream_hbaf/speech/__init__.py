"""Voice activity detection, and the boundaries of utterances."""
