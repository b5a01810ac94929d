"""The page: what is recognised, to look at, to listen to again, and to correct."""
