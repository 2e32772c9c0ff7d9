"""The `edgekv` command: Typer commands over the embedding API.

Modules that define commands are light, so that `--help` costs milliseconds; what is heavy is
imported inside the commands. stdout is data, stderr is talk.
"""
