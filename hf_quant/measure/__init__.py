"""What a quantized model is worth: measured beside full precision, method beside method, part by part."""
