"""What a person sees of a run: pages and tables, made from its folder alone."""
