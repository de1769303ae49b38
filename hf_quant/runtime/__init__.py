"""What a loaded model runs: quantized layers and what hangs on them. Never imports stages, plugins or a method."""
