"""Features and the dialogue's state become an emotion and the next state: torch only, no I/O."""
