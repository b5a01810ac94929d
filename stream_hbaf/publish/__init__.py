"""Publishing: MQTT with its contract, an embedded broker, and the terminal."""
