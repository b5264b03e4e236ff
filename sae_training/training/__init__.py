"""The training step: losses the fast way, gradients, optimizer, dead latents."""
