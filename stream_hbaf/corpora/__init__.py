"""A recorded corpus: each reader gives labelled dialogues, in one shape."""
