"""A base model: its kinds, files, quantized copies, memory and engines; knows no run."""
