"""Jobs seen from outside: which there are, in what state, and how one is started that needs no terminal."""
