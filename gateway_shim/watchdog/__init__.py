"""A small program beside the engines, under supervisord: it restarts those that hang, and notes why others ended."""
