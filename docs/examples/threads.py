"""Threads that share one model: every method may be called from any of them.

python threads.py [MODEL]
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import edgekv

CITIES = ["Bern", "Lisbon", "Oslo", "Vienna"]
SHORT = edgekv.SamplingParams(max_tokens=40)

with edgekv.Runtime.open(*sys.argv[1:]) as runtime:
    app = runtime.app("guide")

    def describe(city: str) -> str:
        with app.session() as session:  # one answers one request at a time: each thread has its own
            reply = session.respond(f"Describe {city} in one sentence.", sampling=SHORT)
            return f"{city}: {reply.text}"

    with ThreadPoolExecutor(len(CITIES)) as pool:
        for line in pool.map(describe, CITIES):
            print(line)
