#!/usr/bin/env python3
"""A chatroom client: one thread at the keyboard, one at the socket. The server is server.py.

    python client.py 127.0.0.1 12345
    echo "hello from a script" | python client.py 127.0.0.1 12345 --name robot

The main thread waits for a line to be typed and sends it. The reader thread waits for a line from
the server and shows it, above the line that is just being typed.
"""
import argparse
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import unicodedata
import zlib

try:
    import readline                      # gives input() line editing and a history
except ImportError:                      # Windows
    readline = None

MAX_TEXT = 1024 - len("MSG ")            # bytes of text that fit into one request
MAX_LINE = 64 * 1024                     # bytes of a line from the server that are kept
CONNECT_SECONDS = 10                     # a server that has not answered by then is not there
GOODBYE_SECONDS = 1                      # how long Ctrl-C waits for the server's BYE

# No control character may reach the terminal, whatever the server says. (It has the same table.)
UNSAFE = [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
SAFE_TEXT = {**dict.fromkeys(UNSAFE, "\ufffd"), ord("\t"): " "}

# Colours of names, from the 256 of a terminal: those with a contrast of 4 or more to white and black.
COLOURS = [27, 28, 30, 31, 64, 98, 129, 130, 161, 163]

HELP = """\
/who        who is in this room?
/rooms      which rooms are there?
/join ROOM  go to another room, which is made if it is not there
/name NAME  take another name
/quit       leave; so does Ctrl-D
//text      say "/text"; whatever else you type is said as it is"""


class Terminal:
    """Keyboard and screen: the main thread waits in ask(), the reader thread calls show()."""

    def __init__(self):
        sys.stdin.reconfigure(errors="replace")
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
        escape_codes = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.colours = escape_codes and "NO_COLOR" not in os.environ
        # libedit, which macOS calls readline too, does not say what has been typed so far.
        gnu = readline and "libedit" not in readline.__doc__
        self.redraws = bool(self.interactive and escape_codes and gnu)
        self.prompt = None               # what stands on the screen, waiting for a line
        self.lock = threading.Lock()     # one thread at a time writes to the screen
        if self.redraws:
            readline.parse_and_bind("set enable-bracketed-paste off")    # a pasted line is a line

    def ask(self, prompt):
        """Return the next line typed (str). Raises EOFError and KeyboardInterrupt."""
        def shown():
            self.prompt = prompt
        if self.redraws:
            readline.set_pre_input_hook(shown)       # is called when the prompt is on the screen
        elif self.interactive:
            shown()
        try:
            return input(prompt if self.interactive else "")
        except (EOFError, KeyboardInterrupt):
            if self.interactive:
                print()                              # leave the line of the prompt
            raise
        finally:
            self.prompt = None

    def show(self, text):
        """Print a line; a prompt and what has been typed behind it stand below it again."""
        with self.lock:
            if self.prompt is None:
                output = f"{text}\n"
            elif self.redraws:
                output = self.above_prompt(text, readline.get_line_buffer(), os.get_terminal_size().columns)
            else:
                output = f"\r{text}\n{self.prompt}"
            sys.stdout.write(output)
            sys.stdout.flush()

    def above_prompt(self, text, typed, columns):
        """Return what prints `text` in the place of prompt and typed line, and these two below it."""
        cursor = self.prompt + typed.encode()[:bytes_before_cursor()].decode(errors="ignore")
        row, column = position(cursor, columns)
        last_row, last_column = position(self.prompt + typed, columns)
        return "".join((
            f"\033[{row}A" if row else "", "\r\033[J", text, "\n", self.prompt, typed,
            " \r" if last_row and not last_column else "",           # a full row: go to the next
            f"\033[{last_row - row}A" if last_row > row else "", "\r", f"\033[{column}C" if column else ""))

    def dim(self, text):
        """Return `text` as a notice."""
        return f"\033[2m{text}\033[0m" if self.colours else text

    def coloured(self, name):
        """Return `name` in the colour that is always its own."""
        colour = COLOURS[zlib.crc32(name.casefold().encode()) % len(COLOURS)]
        return f"\033[38;5;{colour}m{name}\033[0m" if self.colours else name


def position(text, columns):
    """Return row and column of the cursor (from 0) after `text` in a terminal of that width."""
    row = column = 0
    for character in text:
        if character == "\t":
            width = 8 - column % 8
        elif unicodedata.category(character) in ("Mn", "Me", "Cf"):
            width = 0
        else:
            width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if column + width > columns:
            row, column = row + 1, 0
        column += width
    return (row + 1, 0) if column == columns else (row, column)


def bytes_before_cursor():
    """Return how much of the typed line stands before the cursor; None (all) where that is not known.

    GNU readline keeps it in `rl_point`, which Python's module does not offer.
    """
    try:
        return ctypes.c_int.in_dll(ctypes.CDLL(readline.__file__), "rl_point").value
    except (AttributeError, OSError, ValueError):
        return None


class Chat:
    """The conversation: main sends what is typed in talk(), the reader thread shows in read() what comes.

    The threads share no more than the attributes below. The reader thread assigns them, each in one
    step, and main only looks at them (all but `leaving`, where it is the other way round).
    """

    def __init__(self, sock, terminal):
        self.sock = sock
        self.terminal = terminal
        self.name = None                     # who we are: what the last WELCOME said
        self.refusal = None                  # what the last ERROR said
        self.answered = threading.Event()    # set when either of them has come
        self.end = None                      # (exit status, reason) when the connection has ended
        self.leaving = False                 # main has sent LEAVE, and waits for the end
        self.reader = threading.Thread(target=self.read, name="reader", daemon=True)

    # The main thread

    def run(self, name, room):
        """Join, say what is typed, leave. Ends the process with an exit status."""
        try:
            self.reader.start()
            with contextlib.suppress(EOFError, OSError):     # OSError: cannot send; read() knows why
                self.enter(name, room)
                self.talk()
            self.leaving = True
            with contextlib.suppress(OSError):
                self.send("LEAVE")
            self.reader.join()               # BYE comes when all that was said has been delivered
        except KeyboardInterrupt:            # Ctrl-C, or the reader thread woke us
            self.leaving = True
        signal.signal(signal.SIGINT, lambda *_: None)        # too late to interrupt
        if not self.end:                     # Ctrl-C, perhaps in the middle of a line: so no LEAVE
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
            self.reader.join(GOODBYE_SECONDS)
            self.end = (0, "you have left")
        status, reason = self.end
        if status:
            sys.exit(f"client.py: {reason}")
        self.terminal.show(self.terminal.dim(f"* {reason}"))

    def enter(self, name, room):
        """Join under `name`, or as what is typed, until the server accepts it."""
        while not self.name and not self.end:
            typed = self.terminal.ask("Your name: ").strip() if name is None else name
            self.join(typed, room if typed else None)
            if self.refusal and not self.terminal.interactive:
                sys.exit(f"client.py: {self.refusal}")
            name = None
        if room and not typed:               # a guest: the server takes no room without a name
            self.join(self.name, room)

    def talk(self):
        """Say each line that is typed, or carry it out if it is a command."""
        while not self.end:
            for line in self.terminal.ask("> ").split("\n"):
                if line.startswith("/") and not line.startswith("//"):
                    self.command(*line.split())
                else:
                    self.say(line[1:] if line.startswith("//") else line)

    def say(self, text):
        """Send `text` as MSG; in several, cut between characters, if it is longer than MAX_TEXT."""
        data = text.encode("utf-8", "replace") if text.strip() else b""
        start = 0
        while start < len(data):
            piece = data[start:start + MAX_TEXT].decode("utf-8", "ignore")   # ignores half a character
            self.send(f"MSG {piece}")
            start += len(piece.encode())

    def command(self, command, *words):
        """Carry out a command with its arguments. Raises EOFError to leave."""
        if command in ("/join", "/name") and len(words) != 1:
            self.terminal.show(self.terminal.dim(f"* {command} wants one word: {command} {command[1:].upper()}"))
        elif command == "/join":
            self.join(self.name, words[0])
        elif command == "/name":
            self.join(words[0])
        elif command == "/who":
            self.send("WHO")
        elif command == "/rooms":
            self.send("ROOMS")
        elif command == "/help":
            self.terminal.show(HELP)
        elif command == "/quit":
            raise EOFError
        else:
            self.terminal.show(self.terminal.dim(
                f"* no command {command}: there are /who, /rooms, /join, /name, /quit and /help"))

    def join(self, name, room=None):
        """Send JOIN and wait for the answer, so that the next JOIN bears the right name."""
        self.refusal = None
        self.answered.clear()
        self.send(" ".join(["JOIN", *filter(None, ["_".join(name.split()), room])]))
        self.answered.wait()

    def send(self, line):
        """Send one request (str). Raises OSError."""
        self.sock.sendall(line.encode("utf-8", "replace") + b"\n")

    # The reader thread

    def read(self):
        """Show what the server says, until its BYE or the end of the connection; then wake main."""
        end = (1, "connection lost: the server has gone")
        try:
            for line in lines(self.sock):
                verb, _, rest = line.partition(" ")
                if verb == "BYE":
                    end = (0, "you have left" if self.leaving else rest or "the server said BYE")
                    break
                self.terminal.show(self.hear(verb, rest))
                if verb in ("WELCOME", "ERROR"):
                    self.answered.set()
        except OSError as error:
            end = (1, f"connection lost: {error.strerror}")
        self.end = end
        self.answered.set()
        if not self.leaving and hasattr(signal, "pthread_kill"):
            # Like Ctrl-C: it gets main out of input(), which puts the terminal back in order.
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        elif not self.leaving:
            self.terminal.show(f"* {end[1]}; press Enter")       # Windows cannot interrupt input()

    def hear(self, verb, rest):
        """Return what to show (str) for a line from the server, and note who we are or what was refused."""
        dim, coloured = self.terminal.dim, self.terminal.coloured
        word, _, text = rest.partition(" ")
        if verb == "MSG" and word:
            return f"{coloured(word)}: {text}"
        if verb in ("JOINED", "LEFT") and word:
            return dim(f"* {word} {verb.lower()}")
        if verb == "WELCOME" and text:
            self.name, _, greeting = text.partition(" ")
            return dim(f"* {greeting} You are {self.name} in {word}.")
        if verb == "ERROR":
            self.refusal = rest or "refused"
            return dim(f"! {self.refusal}")
        if verb == "WHO":
            return dim(f"* in this room: {rest.replace(' ', ', ')}")
        if verb == "ROOMS":
            rooms = [f"{name} with {count}" for name, _, count in (room.partition("=") for room in rest.split())]
            return dim(f"* rooms: {', '.join(rooms) or 'none'}")
        return dim(f"? {verb} {rest}")


def lines(sock):
    """Yield each line (str, safe to show) that comes from the socket. Raises OSError.

    Of a line longer than MAX_LINE bytes a notice is given and nothing kept; one that the end of the
    connection cuts off is dropped.
    """
    unfinished, skipping = b"", False
    for data in iter(lambda: sock.recv(4096), b""):
        *whole, unfinished = (unfinished + data).split(b"\n")
        for line in whole:
            if not skipping:
                yield line.decode("utf-8", "replace").rstrip("\r").translate(SAFE_TEXT)
            skipping = False
        if len(unfinished) > MAX_LINE and not skipping:
            skipping = True
            yield "ERROR the server sent a line that is too long; it is not shown"
        if skipping:
            unfinished = b""


def parse_arguments():
    """Return the command line's options; exit with status 2 and a usage line if it makes no sense."""
    parser = argparse.ArgumentParser(description="A chatroom client. While you chat, /help lists the commands.")
    parser.add_argument("host", help="address of the server, 127.0.0.1 for this machine")
    parser.add_argument("port", type=int, help="the server's port")
    parser.add_argument("--name", help="your name; asked for if not given")
    parser.add_argument("--room", help="the room to join; the server's oldest if not given")
    options = parser.parse_args()
    if not 1 <= options.port <= 65535:
        parser.error("the port is a number from 1 to 65535")
    if options.name is not None and not options.name.strip():
        parser.error("--name must not be empty")
    if options.room is not None and len(options.room.split()) != 1:
        parser.error("--room is one word")
    return options


def connect(host, port):
    """Return a connected socket; ends the process with status 1 where that is not possible."""
    try:
        sock = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    except ConnectionRefusedError:
        sys.exit(f"client.py: no server at {host}:{port}; start it, or check the port")
    except socket.timeout:
        sys.exit(f"client.py: {host}:{port} does not answer; check the address, and the firewall there")
    except (OSError, UnicodeError) as error:
        sys.exit(f"client.py: cannot connect to {host}:{port}: {error}; check the address")
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)       # send each line at once
    return sock


def main():
    """Run the client. Exit status: 0 when one left or the server said BYE, 1 when there is no connection."""
    options = parse_arguments()
    try:
        chat = Chat(connect(options.host, options.port), Terminal())
        chat.run(options.name, options.room)
    except KeyboardInterrupt:            # before there was anything to leave
        pass


if __name__ == "__main__":
    main()
