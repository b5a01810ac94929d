"""Audio sources: microphone, recordings, streams, and servers that sound is sent to."""
