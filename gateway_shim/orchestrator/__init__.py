"""How an orchestrator learns of this worker."""
