"""The engine: ComfyUI graphs on live frames, served over gRPC. Knows no HTTP and no orchestrator."""
