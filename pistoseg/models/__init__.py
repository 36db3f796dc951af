"""The networks, their losses, inference and the model bundle: PyTorch alone, no Ray."""
