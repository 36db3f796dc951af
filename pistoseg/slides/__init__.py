"""Slides: found, fetched and opened, and read at the model's resolution where there is tissue."""
