"""Methods that know the denoising step."""
