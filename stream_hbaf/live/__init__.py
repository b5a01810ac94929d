"""The live pipeline: sound in, events out, without blocking the event loop."""
