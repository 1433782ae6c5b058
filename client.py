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
import re
import signal
import socket
import sys
import threading
import time
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
SEND_BUFFER = 64 * 1024                  # bytes that may wait to be sent: the kernel's 4 MiB would
                                         # keep a server that reads slowly busy for minutes
CAN_INTERRUPT = hasattr(signal, "pthread_kill")      # not on Windows

# What must not reach the terminal, whatever the server says; it has the same table.
UNSAFE = [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
SAFE_TEXT = {**dict.fromkeys(UNSAFE, "\ufffd"), ord("\t"): " "}

DIM = 2                                  # the style of notices
# The colours of names: those of the 256 that can be read on white and on black.
COLOURS = [27, 28, 30, 31, 64, 98, 129, 130, 161, 163]

HELP = """\
/who        who is in this room?
/rooms      which rooms are there?
/join ROOM  go to another room, which is made if it is not there
/name NAME  take another name
/quit       leave; so does Ctrl-D
//text      say "/text"; whatever else you type is said as it is"""


class Terminal:
    """Keyboard and screen: main waits in ask() while the reader thread (or main) calls show()."""

    def __init__(self):
        sys.stdin = sys.stdin or open(os.devnull)            # None: closed by who started us
        sys.stdout = sys.stdout or open(os.devnull, "w")
        sys.stderr = sys.stderr or open(os.devnull, "w")
        sys.stdin.reconfigure(errors="replace")
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        escape_codes = self.interactive and os.environ.get("TERM") != "dumb"
        self.colours = escape_codes and "NO_COLOR" not in os.environ
        self.rl_line, self.rl_point = readline_variables()
        self.redraws = escape_codes and self.rl_line is not None
        self.prompt = None               # the prompt that stands on the screen, if any
        # Held while show() writes, and from ask() until the prompt is drawn. An RLock, because
        # Ctrl-C may come before that: then main still holds it, and has its last notice to show.
        self.lock = threading.RLock()
        if self.redraws:
            readline.parse_and_bind("set enable-bracketed-paste off")    # a pasted line is a line
            readline.set_pre_input_hook(self.lock.release)   # called when the prompt has been drawn

    def ask(self, prompt):
        """Return the next line typed (str). Raises EOFError and KeyboardInterrupt."""
        if self.redraws:
            self.lock.acquire()          # the hook above lets go of it
        self.prompt = prompt if self.interactive else None
        try:
            return input(prompt if self.interactive else "")
        except (EOFError, KeyboardInterrupt):
            if self.interactive:
                print()                  # leave the line of the prompt
            raise
        finally:
            self.prompt = None

    def show(self, *lines):
        """Print lines (str); the prompt and what has been typed stand below them again."""
        with self.lock:
            prompt, typed, cursor = self.settled_screen()
            text = "".join(f"{line}\n" for line in lines)
            try:
                if prompt and self.redraws:
                    text = above_prompt(text, prompt, typed, cursor)
                elif prompt:
                    text = f"\r{text}{prompt}"
                elif self.redraws:
                    text = f"\r\033[J{text}"         # keys typed before the prompt: it shows them
                sys.stdout.write(text)
                sys.stdout.flush()
            except OSError:
                # Nobody reads our output any more: leave. Python would fail again at exit, so see
                # "Note on SIGPIPE" in the documentation of `signal`.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                interrupt_main()

    def settled_screen(self):
        """Return what stands on the screen: prompt (or None), typed line (bytes), cursor in it.

        In the other thread readline first takes a key in and then draws it. So look twice: what
        has not changed for 10 ms is drawn. Known flaw: a key pressed just after the second look
        may be missing from the screen, or in the wrong place; what is sent is right.
        """
        before, now = None, self.look()
        while self.redraws and self.prompt and now != before:
            time.sleep(0.01)
            before, now = now, self.look()
        return now

    def look(self):
        """Return the same as it is just now, perhaps not drawn yet."""
        if not self.redraws:
            return self.prompt, None, None
        return self.prompt, self.rl_line.value, self.rl_point.value

    def styled(self, text, style):
        """Return `text` with the codes that give it a style, where they are wanted."""
        return f"\033[{style}m{text}\033[0m" if self.colours else text


def readline_variables():
    """Return readline's variables rl_line_buffer, what has been typed, and rl_point, the cursor.

    They are ctypes objects, whose `value` (bytes, int) may be read while the other thread types.
    What is read may be half old, half new, or garbage while readline moves a long line: the next
    look corrects it. readline.get_line_buffer() must not be called then: the line changes while it
    is converted, and the C library aborts the process (seen in tests under load).
    (None, None) where there are no such variables, and with libedit, which macOS calls readline:
    it does not keep them up to date.
    """
    if not readline or "libedit" in readline.__doc__:
        return None, None
    try:
        library = ctypes.CDLL(readline.__file__)
        return (ctypes.c_char_p.in_dll(library, "rl_line_buffer"),
                ctypes.c_int.in_dll(library, "rl_point"))
    except (AttributeError, OSError, ValueError):    # readline is a part of Python itself
        return None, None


def above_prompt(text, prompt, typed, cursor):
    """Return what prints `text` where prompt and typed line stand, and these below it again."""
    columns = os.get_terminal_size().columns or 80       # 0: the terminal does not know
    before_cursor = typed[:cursor].decode("utf-8", "ignore")
    typed = typed.decode("utf-8", "replace")
    row, column = position(prompt + before_cursor, columns)
    last_row, last_column = position(prompt + typed, columns)
    return "".join((
        f"\033[{row}A" if row else "", "\r\033[J", text, prompt, typed,
        " \r" if last_row and not last_column else "",       # the row is full: go on to the next
        f"\033[{last_row - row}A" if row < last_row else "",
        "\r", f"\033[{column}C" if column else ""))


def position(text, columns):
    """Return row and column, from 0, of the cursor behind `text` on a screen with `columns`."""
    row = column = 0
    for character in text:
        width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if unicodedata.category(character) in ("Mn", "Me", "Cf"):        # drawn over the one before
            width = 0
        elif character == "\t":
            width = 8 - column % 8
        if column + width > columns:
            row, column = row + 1, 0
        column += width
    return (row + 1, 0) if column == columns else (row, column)


class Chat:
    """The conversation: main sends what is typed, the reader thread shows what the server says.

    What the two share needs no lock, because each thing has one writer. Only main sends on the
    socket, only the reader thread receives. The reader thread assigns `name`, `refusal` and `end`,
    main assigns `leaving`, each in one step; the other only looks.
    """

    def __init__(self, sock, terminal):
        self.sock = sock
        self.terminal = terminal
        self.name = None                     # who we are, as the last WELCOME said
        self.refusal = None                  # what the last ERROR said; "" after a WELCOME
        self.answered = threading.Event()    # set when it has come
        self.end = None                      # (exit status, reason) when the connection has ended
        self.leaving = False                 # main waits for the end and need not be woken
        self.reader = threading.Thread(target=self.read, name="reader", daemon=True)

    # The main thread

    def run(self, name, room):
        """Join, say what is typed, leave. Return the exit status and the reason (str)."""
        try:
            self.reader.start()
            with contextlib.suppress(EOFError, OSError):     # OSError: cannot send
                self.enter(name, room)
                self.talk()
            self.leaving = True
            with contextlib.suppress(OSError):
                self.send("LEAVE")
            self.reader.join()               # BYE comes when all that was said has been delivered
        except KeyboardInterrupt:            # Ctrl-C, or the reader thread has woken us
            signal.signal(signal.SIGINT, lambda *_: None)    # one Ctrl-C is enough
            self.leaving = True
            if not self.end:
                with contextlib.suppress(OSError):           # no LEAVE: Ctrl-C may have come
                    self.sock.shutdown(socket.SHUT_WR)       # in the middle of a line
                self.reader.join(GOODBYE_SECONDS)
        return self.end or (0, "you have left")

    def enter(self, name, room):
        """Join under `name`, or else as what is typed, until the server accepts it."""
        while not self.name and not self.end:
            wanted = self.terminal.ask("Your name: ") if name is None else name
            wanted = "_".join(wanted.split())    # what follows a space would be a room
            self.join(wanted, room if wanted else None)
            if self.refusal and not self.terminal.interactive:
                sys.exit(f"client.py: {self.refusal}; start again with another --name")
            name = None
        if self.name and room and not wanted:    # a guest: JOIN takes no room without a name
            self.join(self.name, room)

    def talk(self):
        """Say each line that is typed, or carry it out if it is a command."""
        while not self.end:
            for line in self.terminal.ask("> ").split("\n"):     # Ctrl-V Ctrl-J types a newline
                if line.startswith("//"):
                    self.say(line[1:])
                elif line.startswith("/"):
                    self.command(*line.split())
                else:
                    self.say(line)

    def say(self, text):
        """Send `text` as MSG; in several, cut between characters, if it is longer than MAX_TEXT."""
        data = text.encode("utf-8", "replace")
        while data.strip():
            piece = data[:MAX_TEXT].decode("utf-8", "ignore")    # without half a character
            self.send(f"MSG {piece}")
            data = data[len(piece.encode()):]

    def command(self, command, *words):
        """Carry out a command with its arguments. Raises EOFError to leave."""
        if command == "/join" and len(words) == 1:
            self.join(self.name, words[0])
        elif command == "/name" and len(words) == 1:
            self.join(words[0])
        elif command == "/who":
            self.send("WHO")
        elif command == "/rooms":
            self.send("ROOMS")
        elif command == "/quit":
            raise EOFError
        else:
            if command != "/help":
                self.notice(f"not a command: {' '.join([command, *words])}; the commands are")
            self.terminal.show(HELP)

    def join(self, name, room=None):
        """Send JOIN and wait for the answer, so that the next JOIN bears the right name."""
        self.answered.clear()
        self.send(" ".join(filter(None, ["JOIN", name, room])))
        if not self.end:                     # else no answer will come
            self.answered.wait()

    def send(self, request):
        """Send one request (str). Raises OSError."""
        self.sock.sendall(request.encode("utf-8", "replace") + b"\n")

    def notice(self, text):
        """Show a notice of our own."""
        self.terminal.show(self.terminal.styled(f"* {text}", DIM))

    # The reader thread

    def read(self):
        """Show what the server says, until its BYE or the end of the connection; then wake main."""
        with contextlib.suppress(OSError):           # a reset is an end as well
            for lines in received_lines(self.sock):
                shown = [self.hear(line) for line in lines]
                self.terminal.show(*filter(None, shown))
                if any(line.split(" ")[0] in ("WELCOME", "ERROR") for line in lines):
                    self.answered.set()
                if self.end:
                    break
        self.end = self.end or (1, "connection lost; start again when the server is back")
        self.answered.set()
        if CAN_INTERRUPT:
            while not self.leaving:
                interrupt_main()
                time.sleep(0.5)                      # again, if readline has swallowed it
        elif not self.leaving:
            self.notice(f"{self.end[1]}; press Enter")

    def hear(self, line):
        """Return what to show (str or None) for a line from the server; note what it says of us."""
        verb, _, rest = line.partition(" ")
        word, _, text = rest.partition(" ")
        notice = f"? {line}"                 # a verb that we do not know
        if verb == "MSG" and word:
            colour = COLOURS[zlib.crc32(word.casefold().encode()) % len(COLOURS)]
            return f"{self.terminal.styled(word, f'38;5;{colour}')}: {text}"
        if verb == "BYE":
            self.end = (0, "you have left" if self.leaving else rest or "the server said BYE")
            return None                      # main shows it, when the prompt has gone
        if verb == "WELCOME" and text:       # WELCOME room name greeting
            self.name, _, greeting = text.partition(" ")
            self.refusal = ""
            notice = f"* {greeting} You are {self.name} in {word}."
        elif verb == "ERROR":
            self.refusal = rest or "refused"
            notice = f"! {self.refusal}"
        elif verb in ("JOINED", "LEFT") and word:
            notice = f"* {word} {verb.lower()}"
        elif verb == "WHO" and word:
            notice = "* in this room: " + ", ".join(rest.split())
        elif verb == "ROOMS":
            notice = "* rooms: " + (", ".join(rest.split()).replace("=", " with ") or "none")
        return self.terminal.styled(notice, DIM)


def received_lines(sock):
    """Yield lists of lines (str, safe to show): those that come together. Raises OSError.

    A line longer than MAX_LINE (than twice that, if its end comes at once) is replaced by a notice;
    a line that the end of the connection cuts off is dropped.
    """
    unfinished, skipping = b"", False
    while True:
        data = sock.recv(MAX_LINE)
        if not data:                         # the end of the connection
            return
        *lines, unfinished = (unfinished + data).split(b"\n")
        if skipping and lines:
            skipping = False
            del lines[0]                     # the end of the line that is too long
        if len(unfinished) > MAX_LINE and not skipping:
            skipping = True
            lines.append(b"a line that is too long has been left out")
        if skipping:
            unfinished = b""
        yield [line.decode("utf-8", "replace").rstrip("\r").translate(SAFE_TEXT) for line in lines]


def interrupt_main():
    """Do as Ctrl-C does: end input() in the main thread; readline leaves the terminal in order.

    (_thread.interrupt_main() would not wake a thread that waits in a system call.)
    """
    if CAN_INTERRUPT:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def parse_arguments():
    """Return the command line's options; status 2 and a usage line if it makes no sense."""
    parser = argparse.ArgumentParser(description="A chatroom client. Type /help for its commands.")
    parser.add_argument("host", help="address of the server, 127.0.0.1 for this machine")
    parser.add_argument("port", type=int, help="the server's port")
    parser.add_argument("--name", help="your name; asked for if not given")
    parser.add_argument("--room", help="the room to join; the server's oldest if not given")
    options = parser.parse_args()
    if not 1 <= options.port <= 65535:
        parser.error("the port is a number from 1 to 65535")
    if options.name is not None and not options.name.strip():
        parser.error("--name must not be empty")
    if options.room is not None and not re.fullmatch(r"[\w-]{1,20}", options.room):
        parser.error("--room is 1 to 20 letters, digits, _ or -")
    return options


def connect(host, port):
    """Return a connected socket; end the process with status 1 where that is not possible."""
    try:
        sock = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    except (OSError, UnicodeError) as error:         # UnicodeError: not even a host name
        sys.exit(f"client.py: cannot connect to {host}:{port}: {error}; "
                 "is the server running, are address and port right?")
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return sock


def main():
    """Run the client. Exit status: 0 after leaving or BYE, 1 without a connection or a name."""
    options = parse_arguments()
    signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's & would have it ignored
    try:
        chat = Chat(connect(options.host, options.port), Terminal())
        status, reason = chat.run(options.name, options.room)
    except KeyboardInterrupt:                        # before there was anything to leave
        sys.exit(0)
    if status:
        sys.exit(f"client.py: {reason}")
    with contextlib.suppress(OSError):
        chat.notice(reason)


if __name__ == "__main__":
    main()
