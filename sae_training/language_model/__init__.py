"""The frozen language model: loading it, finding a place in it, reading and replacing activations there."""
