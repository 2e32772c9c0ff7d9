"""A sketch of a menu-bar app for macOS: a question, and its answer as it is written.

pip install rumps && python menu_bar.py [MODEL]
"""

import sys
import threading

import edgekv

try:
    import rumps
except ImportError:
    sys.exit("menu_bar.py needs macOS and rumps: pip install rumps")

SHORT = edgekv.SamplingParams(max_tokens=80)


class MenuBar(rumps.App):
    def __init__(self, session: edgekv.Session) -> None:
        super().__init__("edgekv", menu=["Ask…", "–"])
        self.session = session
        self.said = "–"
        self.timer = rumps.Timer(self.show, 0.1)
        self.timer.start()

    @rumps.clicked("Ask…")
    def ask(self, _: object) -> None:
        asked = rumps.Window("What do you want to know?", ok="Ask", cancel="Cancel").run()
        if asked.clicked and asked.text.strip() and not self.session.busy:
            threading.Thread(target=self.answer, args=[asked.text], daemon=True).start()

    def answer(self, question: str) -> None:
        """On a thread of its own, so that the menu stays alive."""
        with self.session.stream(question, sampling=SHORT) as stream:
            for _ in stream:
                self.said = stream.text

    def show(self, _: object) -> None:
        """On the main thread, which alone may touch the menu."""
        self.title = "edgekv …" if self.session.busy else "edgekv"
        self.menu["–"].title = self.said


with edgekv.Runtime.open(*sys.argv[1:]) as runtime:
    # A session with a name goes on where it was when the app is started again.
    MenuBar(runtime.app("menu-bar").session("questions")).run()
