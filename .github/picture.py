"""Draw session.svg: the server's log, below it alice and bob, from a real session.

    python .github/picture.py

It starts the real scripts in the terminals of test_chat.py, types what alice and bob type, and
draws what the three screens then show. It needs pytest, because test_chat.py does.
"""
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import test_chat

PORT = test_chat.free()
# Columns and rows: so many that nothing wraps.
SIZES = {"python server.py": (121, 10), "alice: python client.py": (58, 11),
         "bob: python client.py": (58, 11)}
CHARACTER, LINE, MARGIN = 7, 17, 10      # pixels
STYLE = """
text { font: 11.5px ui-monospace, Menlo, Consolas, monospace; fill: #e6e6e6 }
.title, .notice { fill: #a0a8b8 } .name { fill: #7fc8ff } .prompt { fill: #ffd479 }
"""


def session():
    """Let alice and bob talk; return {title: (lines on the screen, row and column)}."""
    terminals = []

    def start(size, *command):
        terminals.append(test_chat.Terminal(*command, columns=size[0], height=size[1],
                                            stderr=subprocess.STDOUT))
        return terminals[-1]

    try:
        server_size, *client_sizes = SIZES.values()
        server = start(server_size, "server.py", PORT)
        shows(server, "listening on")
        for name, size in zip(("alice", "bob"), client_sizes):
            person = start(size, "client.py", "127.0.0.1", PORT)
            shows(person, "Your name:")
            person.types(f"{name}\r")
            shows(person, "Welcome")
        alice, bob = people = terminals[1:]
        say(alice, "hi bob", people)
        say(bob, "hello, alice", people)
        alice.types("Did you find the b")            # half a line, while bob goes on
        say(bob, "I am in the lobby", people)
        bob.types("/who\r")
        shows(bob, "in this room")
        bob.types("/join den\r")
        shows(alice, "bob left")
        shows(bob, "You are bob in den.")
        test_chat.settled(server)
        return {title: (terminal.look()[0], terminal.screen.row, terminal.screen.column)
                for title, terminal in zip(SIZES, terminals)}
    finally:
        for terminal in reversed(terminals):
            terminal.stop()


def shows(terminal, text):
    test_chat.eventually(lambda: text in " ".join(" ".join(terminal.look()[0]).split()), text)


def say(speaker, text, people):
    speaker.types(f"{text}\r")
    for person in people:
        shows(person, f": {text}")


def drawn(line):
    """Return a line as SVG: a notice, a prompt, a message with its name, or plain."""
    name, colon, text = line.partition(": ")
    if line.startswith("* "):
        return f'<tspan class="notice">{escape(line)}</tspan>'
    if line.startswith(">"):
        return f'<tspan class="prompt">&gt;</tspan>{escape(line[1:])}'
    if colon and name.isalpha():
        return f'<tspan class="name">{escape(name)}</tspan>: {escape(text)}'
    return escape(line)


def picture(screens):
    """Return the screens, the first above the others, as an SVG for light pages and dark ones."""
    parts, left, top = [], 0, 0
    for title, (lines, row, column) in screens.items():
        columns, rows = SIZES[title]
        width, height = columns * CHARACTER + 2 * MARGIN, (rows + 2) * LINE + MARGIN
        parts.append(f'<rect x="{left + 1}" y="{top + 1}" width="{width - 2}" height="{height - 2}" '
                     'rx="6" fill="#1d2230" stroke="#6b7385"/>')
        parts.append(f'<text class="title" x="{left + MARGIN}" y="{top + LINE}">{title} …</text>')
        for number, line in enumerate(lines):
            if line:
                parts.append(f'<text x="{left + MARGIN}" y="{top + (number + 2) * LINE + 4}" '
                             f'xml:space="preserve" textLength="{len(line) * CHARACTER}">'
                             f'{drawn(line)}</text>')
        parts.append(f'<rect x="{left + MARGIN + column * CHARACTER}" '
                     f'y="{top + (row + 1) * LINE + 8}" width="{CHARACTER}" height="{LINE - 3}" '
                     'fill="#e6e6e6" opacity="0.6"/>')
        if top == 0:
            total, top = width, height + MARGIN
        else:
            left += width + MARGIN
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {top + height}">\n'
            f'<style>{STYLE}</style>\n' + "\n".join(parts) + "\n</svg>\n")


if __name__ == "__main__":
    (HERE / "session.svg").write_text(picture(session()), encoding="utf-8")
