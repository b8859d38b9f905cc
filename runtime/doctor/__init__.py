"""The parts of `diffusionact check`: what is here, what runs, what is damaged."""
