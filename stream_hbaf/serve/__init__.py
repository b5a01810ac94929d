"""Many streams as a service: sound comes in over WebSockets, events go back on the same ones."""
