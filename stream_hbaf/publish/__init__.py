"""Where emotions go: MQTT, and a broker of our own when there is none."""
