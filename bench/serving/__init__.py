"""`bench serve`: load over real sockets, on edgekv's daemon and on any other server."""
