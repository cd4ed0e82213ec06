"""MPEG-TS bytes to decoded frames and back. Knows no network."""
