"""`bench serve`: load over real sockets, on edgekv's daemon and on any server that speaks OpenAI."""
