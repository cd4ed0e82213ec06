"""One live stream: what comes in, what goes to the engine, what goes out, and when."""
