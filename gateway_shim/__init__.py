"""The shim: trickle and HTTP towards the orchestrator, gRPC towards the engine. Never imports torch."""
