"""The embedding API over a daemon (`edgekv serve`): what it runs, this process does not load.

    with edgekv.connect() as daemon:
        session = daemon.app("mail").session("inbox")
        for delta in session.stream("Summarise: ..."):
            print(delta.text, end="")

Apps, sessions, streams and errors are those of `edgekv.runtime`: a program changes one line.
"""

from edgekv.client.connection import Connection as Connection
from edgekv.client.connection import connect as connect
