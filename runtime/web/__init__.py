"""The page and its server: `diffusionact serve`. docs/serve.md has the protocol."""
