"""The view of an analysis: a static site, and the page of one latent as one file."""

from sae_analysis.site.export import export_site

__all__ = ["export_site"]
