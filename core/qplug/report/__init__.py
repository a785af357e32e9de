"""A page on what a quantized folder holds, and on what several do side by side."""
