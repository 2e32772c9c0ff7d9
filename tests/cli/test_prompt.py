import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from edgekv.cli.prompt import ChatPrompt, Command

PASTE = "\x1b[200~{}\x1b[201~"
ALT_ENTER = "\x1b\r"


@pytest.fixture
def keys():
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.fixture
def prompt(keys):
    return ChatPrompt(InMemoryHistory())


def then(prompt, keys, answers):
    """Type `answers[text]` when the buffer holds `text`: separate reads, as by hand."""
    pending = dict(answers)

    def on_text_changed(buffer):
        if buffer.text in pending:
            keys.send_text(pending.pop(buffer.text))

    prompt._session.default_buffer.on_text_changed += on_text_changed


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("hello\r", "hello"),
        ("/exit\r", Command("/exit", "")),
        ("/nope\r", Command("/nope", "")),
        ("exit\r", "exit"),
        ("\r", ""),
        (f"a{ALT_ENTER}b\r", "a\nb"),
        (f"/exit{ALT_ENTER}b\r", "/exit\nb"),
        ("nonsense\x03hello\r", "hello"),  # Ctrl-C clears the line
        ("hello\r\x1b[12;1R", "hello"),  # an answer of the terminal is not a paste
        ("/clear\r/exit\r", "/clear\n/exit"),  # a paste without brackets
        # Pasted text never runs a command.
        (PASTE.format("/exit") + "\r", "/exit"),
        (PASTE.format("/exit\r\n/clear\r\n") + "\r", "/exit\n/clear"),
        (PASTE.format('"""doc"""\ndef f(): ...') + "\r", '"""doc"""\ndef f(): ...'),
        ("see: " + PASTE.format("/exit") + "\r", "see: /exit"),
        ("/" + PASTE.format("exit") + "\r", "/exit"),
        ("/system " + PASTE.format("Be brief.") + "\r", Command("/system", "Be brief.")),
        ('"""' + PASTE.format("/exit\n'''") + '"""\r', "/exit\n'''"),
        # Ctrl-U removes the pasted text; what is typed then is typed.
        (PASTE.format("secret") + "\x15/exit\r", Command("/exit", "")),
    ],
)
def test_typed_or_pasted(prompt, keys, typed, expected):
    keys.send_text(typed)
    assert prompt.read() == expected


def test_literal_is_forgotten_at_the_next_prompt(prompt, keys):
    keys.send_text(PASTE.format("/exit") + "\r")
    assert prompt.read() == "/exit"
    keys.send_text("/exit\r")
    assert prompt.read() == Command("/exit", "")


def test_triple_quotes_go_on_over_lines(prompt, keys):
    then(prompt, keys, {'"""one': "\r", '"""one\n': "/exit", '"""one\n/exit': '\r"""\r'})
    keys.send_text('"""one')
    assert prompt.read() == "one\n/exit"


def test_history_comes_back(prompt, keys):
    keys.send_text("first\r")
    prompt.read()
    keys.send_text("\x1b[A\r")
    assert prompt.read() == "first"


def test_ctrl_c_and_ctrl_d_on_an_empty_line(prompt, keys):
    keys.send_text("\x03")
    with pytest.raises(KeyboardInterrupt):
        prompt.read()
    keys.send_text("\x04")
    with pytest.raises(EOFError):
        prompt.read()
