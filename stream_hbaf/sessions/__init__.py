"""What was heard and what was said of it, kept to be replayed, corrected and learnt from."""
