"""The commands: their options, and what they run. What that needs is imported when it runs."""
