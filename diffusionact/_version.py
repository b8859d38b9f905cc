"""The version, read by the build, the bundles and `diffusionact --version`."""

__version__ = "0.1.0"
