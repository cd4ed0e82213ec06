"""Workflows and how they run. Knows torch and ComfyUI, knows no gRPC."""
