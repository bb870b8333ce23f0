"""Routers side by side in real time, over the same simulated engines."""
