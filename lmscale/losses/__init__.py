"""Training losses, one file each: what the trainer asks of them is in training_loss.py."""
