"""The gateway to transformers: importing it registers the zoo's configs and models with the Auto classes."""

from zoo._families import register

register()
