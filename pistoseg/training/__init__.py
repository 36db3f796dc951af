"""The one Ray Train loop and what feeds it."""
