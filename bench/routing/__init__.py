"""Routing quality in virtual time: the router's own scheduler and admission over simulated engines."""
