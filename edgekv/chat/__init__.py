"""What is asked of a model and what it answers, whatever the protocol: values, and text to events.

Pure: no MLX, no threads, no sockets.
"""
