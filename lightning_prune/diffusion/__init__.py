"""Diffusion processes, samplers and the backbone families. Pure torch and diffusers, no Lightning."""
