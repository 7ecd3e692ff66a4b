"""Plug-ins for evaluation programs of others. Nothing here is imported by the rest of the package."""
