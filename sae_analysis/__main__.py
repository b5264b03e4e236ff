"""`python -m sae_analysis`."""

from sae_analysis.cli import main

if __name__ == "__main__":
    main()
