/* Chatroom in C, a reference solution: a thread for each client, one lock, and no wait is long.

       cc -O2 -Wall -Wextra -pthread -o server server.c
       ./server [--rate N] [--max-clients N] PORT
       CHAT_SERVER=./server python -m pytest -k rule    (its tests; 3 fail, see the short cuts)

   What threads share is used with the lock held, and nothing waits while it is held: a send that
   would have to wait fails instead. Only a client's own thread says BYE, leaves the room and
   closes the socket; others write down a reason, and that thread finds it after its wait, within
   a second. Rule 14 has no counterpart here: C knows no exceptions, a crash ends it all.
   Short cuts: C knows neither NFC (José in two forms) nor case folding (Straße), so names are
   compared as they come, only ASCII's case does not matter; only ASCII spaces are white space;
   this machine only; no log; options are not checked; without memory or threads it crashes. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <locale.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/queue.h>
#include <time.h>
#include <unistd.h>
#include <wchar.h>
#include <wctype.h>

#define MAX_REQUEST 1024                            /* bytes */
#define NAME_SIZE (20 * 4 + 1)                      /* 20 characters of up to 4 bytes, a 0 */

struct room {
    char name[NAME_SIZE];
    int count;                                      /* of its members, never 0 for long */
    TAILQ_ENTRY(room) links;
};
struct client {
    int sock;
    char name[NAME_SIZE], line[MAX_REQUEST + 2];    /* line: what has come of the next request */
    size_t length;                                  /* of line */
    struct room *room;                              /* NULL: has not joined, or has left */
    const char *reason;                             /* why it is no longer served, or NULL */
    double connected, moved, last_pause, rest;      /* seconds */
    TAILQ_ENTRY(client) links;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static TAILQ_HEAD(, room) rooms = TAILQ_HEAD_INITIALIZER(rooms);        /* the oldest first */
static TAILQ_HEAD(, client) joined = TAILQ_HEAD_INITIALIZER(joined);    /* in order of arrival */
static int served;                                  /* clients without a reason to go */
static atomic_int threads, closing, interrupts;     /* used without the lock */
static int rate = 8192, max_clients = 100;          /* these are set before any thread starts */
static char full[80], not_reading[] = "not reading";                /* reasons */

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

/* ---- Text ---- */

/* Copy a line, with what is unsafe or not UTF-8 replaced; the copy is up to three times as long. */
static void make_safe(const char *line, const char *end, char *copy)
{
    wchar_t c;
    for (size_t size; line < end; line += size) {
        size = mbrtowc(&c, line, end - line, &(mbstate_t){0});
        bool wrong = size > 4 || c > 0x10FFFF || iswcntrl(c)    /* -1: no UTF-8; -2: unfinished */
                     || (c >= 0x2028 && c <= 0x202E) || (c >= 0x2066 && c <= 0x2069);
        if (size > 4 || size == 0) size = size == (size_t)-2 ? (size_t)(end - line) : 1;
        const char *safe = *line == '\t' ? " " : wrong ? "\uFFFD" : line;
        copy += sprintf(copy, "%.*s", wrong ? 3 : (int)size, safe);
    }
    *copy = 0;
}

/* A short cut: C knows letters and digits, but not marks: they are what has no width, and some
   vowel signs of Indic scripts. Of what it takes for these, wrongly, some blocks are refused. */
static bool is_name(const char *name)
{
    static const wchar_t refused[][2] = {
        {0x34F, 0x34F}, {0x61C, 0x61C}, {0x115F, 0x1160}, {0x17B4, 0x17B5}, {0x180B, 0x180F},
        {0x2000, 0x2BFF}, {0x3007, 0x3007}, {0x3021, 0x3029}, {0x3164, 0x3164}, {0xFE00, 0xFE0F},
        {0xFEFF, 0xFEFF}, {0xFFA0, 0xFFA0}, {0xE0000, 0xE0FFF}};
    wchar_t letters[22];
    size_t count = mbstowcs(letters, name, 22);                 /* 22 also if there are more */
    for (size_t n = 0; n < count; n++) {
        wchar_t c = letters[n];
        int place = c >= 0x900 && c < 0xD80 ? c % 0x80 : 0;     /* the same in each Indic script */
        bool mark = wcwidth(c) == 0 || place == 3 || (place >= 0x3E && place <= 0x4C);
        if ((n == 0 && mark) || !(mark || iswalnum(c) || c == '_' || c == '-')) return false;
        for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
            if (c >= refused[i][0] && c <= refused[i][1]) return false;
    }
    return count >= 1 && count <= 20;
}

/* ---- What is done with the lock held ---- */

static void stop(struct client *client, const char *reason)
{
    if (client->reason) return;
    client->reason = reason;
    served--;
}

/* Never wait. What is unread stays in the send buffer; a client that lets it fill up must go. */
static void send_bytes(struct client *client, const char *bytes, size_t size)
{
    if (send(client->sock, bytes, size, MSG_DONTWAIT) != (ssize_t)size) stop(client, not_reading);
}

/* Send a line, made as printf does: to the client; or, given a room, to all others in it. */
static void say(struct client *client, struct room *room, const char *format, ...)
{
    char line[4 * MAX_REQUEST];
    va_list values;
    va_start(values, format);
    int size = vsnprintf(line, sizeof line, format, values);
    va_end(values);
    if (!room) send_bytes(client, line, size);
    struct client *it;
    TAILQ_FOREACH(it, &joined, links)
        if (room && it->room == room && it != client && !it->reason) send_bytes(it, line, size);
}

static void say_list(struct client *client, bool of_rooms)
{
    char *text;
    size_t size;
    FILE *line = open_memstream(&text, &size);      /* with many clients it is long */
    struct room *room;
    struct client *it;
    fputs(of_rooms ? "ROOMS" : "WHO", line);
    TAILQ_FOREACH(room, &rooms, links)
        if (of_rooms) fprintf(line, " %s=%d", room->name, room->count);
    TAILQ_FOREACH(it, &joined, links)
        if (!of_rooms && it->room == client->room) fprintf(line, " %s", it->name);
    fputc('\n', line);
    fclose(line);
    send_bytes(client, text, size);
    free(text);
}

static struct client *find_client(const char *name)
{
    struct client *it;
    TAILQ_FOREACH(it, &joined, links)
        if (!strcasecmp(it->name, name)) break;
    return it;                                      /* NULL after the last one */
}

static void leave(struct client *me)
{
    struct room *room = me->room;
    if (!room) return;
    TAILQ_REMOVE(&joined, me, links);
    me->room = NULL;
    if (!closing) say(me, room, "LEFT %s\n", me->name);
    if (--room->count) return;
    TAILQ_REMOVE(&rooms, room, links);
    free(room);
}

static void join(struct client *me, char *words)
{
    char *rest, *name = strtok_r(words, " ", &rest), *room_name = strtok_r(NULL, " ", &rest);
    char *more = strtok_r(NULL, " ", &rest), guest[20] = "";
    for (int number = 1; !name && (!*guest || find_client(guest)); number++)
        sprintf(guest, "guest%d", number);
    if (!name) name = guest;
    struct room *room = me->room ? me->room : TAILQ_FIRST(&rooms);
    if (!room_name) room_name = room ? room->name : "lobby";
    TAILQ_FOREACH(room, &rooms, links)
        if (!strcasecmp(room->name, room_name)) break;
    struct client *owner = find_client(name);
    if (more || !is_name(name) || !is_name(room_name)) {
        say(me, NULL, "ERROR a name is 1 to 20 letters, digits, _ or -\n");
    } else if (owner && owner != me) {
        say(me, NULL, "ERROR the name %s is taken\n", name);
    } else if (me->room && room == me->room && !strcmp(name, me->name)) {
        say(me, NULL, "ERROR you are %s in %s already\n", name, room->name);
    } else if (me->room && rate && now() < me->moved + 1) {
        say(me, NULL, "ERROR you can move or change your name once a second\n");
    } else {
        if (me->room) me->moved = now();
        if (!room) {
            room = calloc(1, sizeof *room);
            strcpy(room->name, room_name);
            TAILQ_INSERT_TAIL(&rooms, room, links);
        }
        room->count++;                              /* first, so that leave does not delete it */
        leave(me);
        strcpy(me->name, name);
        me->room = room;
        TAILQ_INSERT_TAIL(&joined, me, links);
        say(me, room, "JOINED %s\n", name);
        say(me, NULL, "WELCOME %s %s Welcome to Chatroom, %s!\n", room->name, name, name);
    }
}

static void answer(struct client *me)
{
    char line[3 * (MAX_REQUEST + 2) + 1];
    make_safe(me->line, me->line + me->length, line);
    char *verb = line + strspn(line, " "), *text = verb + strcspn(verb, " ");
    if (*text) *text++ = 0;                         /* the space between them */
    if (me->length > MAX_REQUEST) say(me, NULL, "ERROR a request is at most 1024 bytes\n");
    else if (!*verb) return;
    else if (!strcasecmp(verb, "JOIN")) join(me, text);
    else if (!strcasecmp(verb, "ROOMS")) say_list(me, true);
    else if (!strcasecmp(verb, "LEAVE")) stop(me, "you said LEAVE");
    else if (strcasecmp(verb, "MSG") && strcasecmp(verb, "WHO"))
        say(me, NULL, "ERROR unknown request %s\n", verb);
    else if (!me->room) say(me, NULL, "ERROR join a room first: JOIN name\n");
    else if (!strcasecmp(verb, "WHO")) say_list(me, false);
    else if (text[strspn(text, " ")]) say(me, me->room, "MSG %s %s\n", me->name, text);
}

/* Carry out the requests that end in these bytes, and note how long to rest for them. */
static void carry_out(struct client *me, const char *bytes, size_t size)
{
    size_t cost = size;
    for (const char *byte = bytes; byte < bytes + size; byte++) {
        if (*byte != '\n') {                        /* what a line has too much is not kept */
            if (me->length < sizeof me->line) me->line[me->length++] = *byte;
            continue;
        }
        if (me->length && me->line[me->length - 1] == '\r') me->length--;
        if (me->length && me->length < 100) cost += 100 - me->length;
        if (me->length && !me->reason && !closing) answer(me);
        me->length = 0;
    }
    me->rest = rate ? (double)cost / rate : 0;
}

/* ---- Threads: one for each client, and the main thread ---- */

/* Rest, then read: as recv does it, with the short timeout that listen_on sets. */
static ssize_t receive(struct client *me, char *bytes, size_t most)
{
    usleep(me->rest * 1e6);
    me->rest = 0;
    ssize_t size = recv(me->sock, bytes, most, MSG_DONTWAIT);
    if (size >= 0 || errno != EAGAIN) return size;
    size = recv(me->sock, bytes, most, 0);          /* nothing has been held back */
    me->last_pause = now();
    return size;
}

static void *serve(void *sock)
{
    struct client me = {.sock = (intptr_t)sock, .connected = now(), .last_pause = now()};
    char bytes[65536];
    size_t most = rate && rate / 100 < 4096 ? rate / 100 : 4096;    /* so that a rest is not long */
    pthread_mutex_lock(&lock);
    if (served++ >= max_clients) stop(&me, full);
    while (!me.reason) {
        pthread_mutex_unlock(&lock);
        ssize_t size = receive(&me, bytes, most);
        bool nothing = size < 0 && (errno == EAGAIN || errno == EINTR);
        pthread_mutex_lock(&lock);
        if (closing) stop(&me, "the server is closing");
        else if (!me.room && now() > me.connected + 300) stop(&me, "no JOIN within 300 seconds");
        else if (nothing) continue;
        else if (size <= 0) stop(&me, size ? "connection lost" : "end of file");
        else if (rate && now() > me.last_pause + 60)
            stop(&me, "you have been held back for 60 seconds");
        else carry_out(&me, bytes, size);
    }
    if (me.reason != not_reading)                   /* else its last line may be cut */
        say(&me, NULL, "BYE %s\n", me.reason);
    leave(&me);
    pthread_mutex_unlock(&lock);
    /* A close with unread input would be a reset, which can destroy the BYE: read it off first. */
    shutdown(me.sock, SHUT_WR);
    ssize_t size = 1;
    for (double end = now() + 1.5; size && now() < end && (size > 0 || errno == EAGAIN); )
        size = recv(me.sock, bytes, sizeof bytes, 0);
    close(me.sock);
    threads--;
    return NULL;
}

static void on_signal(int signum)
{
    if (signum == SIGINT && interrupts++) _exit(1);                 /* a second Ctrl-C */
    closing = 1;
}

static int listen_on(int port)
{
    static const int options[][3] = {               /* accepted sockets inherit them */
        {SOL_SOCKET, SO_REUSEADDR, 1}, {SOL_SOCKET, SO_KEEPALIVE, 1}, {IPPROTO_TCP, TCP_NODELAY, 1},
        {SOL_SOCKET, SO_SNDBUF, 256 * 1024}, {SOL_SOCKET, SO_RCVBUF, 64 * 1024},
        {IPPROTO_TCP, TCP_KEEPINTVL, 5}, {IPPROTO_TCP, TCP_KEEPCNT, 4},
#ifdef TCP_USER_TIMEOUT
        {IPPROTO_TCP, TCP_KEEPIDLE, 20}, {IPPROTO_TCP, TCP_USER_TIMEOUT, 30000},
#else                                               /* macOS */
        {IPPROTO_TCP, TCP_KEEPALIVE, 20},
#endif
    };
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval longest_wait = {.tv_usec = 250000};
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &longest_wait, sizeof longest_wait);
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        setsockopt(listener, options[i][0], options[i][1], &options[i][2], sizeof(int));
    if (!bind(listener, (struct sockaddr *)&address, sizeof address) && !listen(listener, 1024))
        return listener;
    perror("server: cannot listen");
    exit(1);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"rate", required_argument, NULL, 'r'}, {"max-clients", required_argument, NULL, 'm'}, {0}};
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1; )
        if (option == 'r') rate = atoi(optarg);
        else if (option == 'm') max_clients = atoi(optarg);
    setlocale(LC_CTYPE, "C.UTF-8");                 /* for mbrtowc, iswalnum, wcwidth */
    snprintf(full, sizeof full, "the server is full (at most %d clients)", max_clients);
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    if (signal(SIGHUP, on_signal) == SIG_IGN) signal(SIGHUP, SIG_IGN);      /* nohup */
    signal(SIGPIPE, SIG_IGN);                       /* a send to nobody fails, that is enough */
    int listener = listen_on(atoi(argv[argc - 1]));
    while (!closing) {                              /* ten more are told that it is full */
        intptr_t sock = threads < max_clients + 10 ? accept(listener, NULL, NULL) : -1;
        pthread_t thread;
        if (sock >= 0) {
            threads++;
            if (pthread_create(&thread, NULL, serve, (void *)sock)) abort();
            pthread_detach(thread);
        }
        usleep(10000);                              /* so it accepts 100 a second at most */
    }
    for (double end = now() + 2.3; threads && now() < end; ) usleep(10000);
    return 0;
}
