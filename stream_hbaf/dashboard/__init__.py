"""The dashboard: a page that shows what is recognised, plays recordings and takes corrections."""
