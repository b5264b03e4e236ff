"""Turn documents into contexts of token ids."""
