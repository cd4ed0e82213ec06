"""How gRPC waits for its sockets in both programs; imported before gRPC, which reads the choice when it is imported.

Its event engine hands each event on through a pool: four frames there and back wake three or four of its threads in
each process, for 60 us of CPU each. Without it one thread waits and does the rest: the shared-memory lane at 720p
takes 0.17 ms a picture in place of 0.20, the trip 0.182 of its codec in place of 0.187 at 1080p, 0.224 for 0.235 at
512x512 (medians of four runs by turns). A gRPC that knows the choice no more prints a line and does as it likes; the
environment's own ``GRPC_EXPERIMENTS`` holds.
"""

import os

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
