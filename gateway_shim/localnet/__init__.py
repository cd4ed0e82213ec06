"""A whole Livepeer network on one machine: broker, orchestrator, source, probe. For the demo and the tests."""
