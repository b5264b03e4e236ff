"""The store of analyses: tables, and what writes and reads them."""
