"""All that is read off diffusers and its devices."""
