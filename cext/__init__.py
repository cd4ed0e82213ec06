"""Pixel conversion between decoded pictures and ComfyUI's IMAGE."""
