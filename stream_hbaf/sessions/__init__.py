"""Recorded sessions: audio and events of a run, to be replayed, corrected and trained on."""
