"""The training step: losses by the sparse way, gradients, optimizer, dead latents."""
