"""`edgekv serve`: dialects of HTTP over the runtime's one event stream; keys, limits, metrics.

A dialect is pure: JSON to what is asked, and events to its own JSON or SSE, without a socket.
"""
