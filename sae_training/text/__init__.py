"""From documents to contexts of token ids."""
