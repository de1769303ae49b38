"""Thin adapters to the libraries of the Hugging Face ecosystem. Importing one registers us there."""
