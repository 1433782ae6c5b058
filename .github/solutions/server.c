/* Chatroom in C, a reference solution: a thread for each client, one lock, and no wait is long.

       cc -O2 -Wall -Wextra -pthread server.c -o server
       ./server [--rate N] [--max-clients N] [--host H] [--name N] PORT

   What threads share is used with the lock held, and nothing waits while it is held: a send that
   would have to wait fails instead. Only a client's own thread says BYE, leaves the room and
   closes the socket; others write down a reason, and that thread finds it within half a second,
   the longest wait. Rule 14 has no counterpart here: C knows no exceptions, a crash ends it all.
   Short cuts: names and white space (see is_name), IPv4 only, no log, without memory it ends. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_REQUEST 1024                            /* bytes */
#define NAME_SIZE (20 * 4 + 1)                      /* 20 characters of up to 4 bytes, a 0 */
#define JOIN_SECONDS 300
#define FLOOD_SECONDS 60
#define FAREWELL_SECONDS 1.5

struct room {
    char name[NAME_SIZE];
    int count;                                      /* of its members, never 0 for long */
    struct room *next;
};
struct client {
    int sock;
    char name[NAME_SIZE], line[MAX_REQUEST + 2];    /* line: what has come of the next request */
    size_t length;                                  /* of line */
    struct room *room;                              /* NULL: has not joined */
    struct client *next;                            /* who has joined after it */
    const char *reason;                             /* why it is no longer served, or NULL */
    bool cut;                                       /* part of a line is missing: send no more */
    double connected, moved, last_pause, rest_until;    /* seconds */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct room *rooms;                          /* the oldest first */
static struct client *joined;                       /* of all rooms, in order of arrival */
static int served;                                  /* clients without a reason to go */
static atomic_int threads, closing, interrupts;     /* used without the lock */
static int rate = 8192, max_clients = 100;          /* these are set before any thread starts */
static const char *host = "127.0.0.1", *server_name = "Chatroom";
static char full_reason[80], late_reason[80], flood_reason[80];

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static bool wait_for(int sock, double seconds)      /* for input; sock -1: just wait */
{
    struct pollfd one = {.fd = sock, .events = POLLIN};
    return poll(&one, 1, (int)(seconds * 1000) + 1) > 0;
}

/* ---- Text ---- */

/* Read one character of UTF-8 (anything else is U+FFFD); return how many bytes it takes. */
static int decode(const char *text, const char *end, unsigned *character)
{
    const unsigned char *byte = (const unsigned char *)text;
    unsigned first = *byte, low = 0x80, high = 0xBF;            /* bounds of the second byte */
    int more = first < 0x80 ? 0 : first < 0xE0 ? 1 : first < 0xF0 ? 2 : 3;
    unsigned value = more ? first & (0x3F >> more) : first;
    *character = more ? 0xFFFD : first;
    if (first == 0xE0 || first == 0xF0) low = first == 0xE0 ? 0xA0 : 0x90;   /* not too short */
    if (first == 0xED || first == 0xF4) high = first == 0xED ? 0x9F : 0x8F;  /* surrogates, end */
    if (!more || first < 0xC2 || first > 0xF4) return 1;
    for (int i = 1; i <= more; i++, low = 0x80, high = 0xBF) {
        if (text + i == end || byte[i] < low || byte[i] > high) return i;
        value = value << 6 | (byte[i] & 0x3F);
    }
    *character = value;
    return more + 1;
}

/* Copy a line with its unsafe characters replaced; the copy is up to three times as long. */
static void make_safe(const char *line, const char *end, char *copy)
{
    for (unsigned c; line < end; ) {
        int size = decode(line, end, &c);
        bool unsafe = c < 0x20 || (c >= 0x7F && c < 0xA0) || (c >= 0x2028 && c <= 0x202E)
                      || (c >= 0x2066 && c <= 0x2069) || c == 0xFFFD;
        const char *safe = c == '\t' ? " " : unsafe ? "\xEF\xBF\xBD" : line;
        int safe_size = safe == line ? size : (int)strlen(safe);
        memcpy(copy, safe, safe_size);
        copy += safe_size;
        line += size;
    }
    *copy = 0;
}

/* A short cut: letters, marks and digits would need Unicode's tables. These are the blocks that
   hold mostly something else, and what shows nothing; all other characters count as letters. A
   name must not begin with the commonest marks. Names are not brought to NFC, only for ASCII do
   they compare without regard to case, and only ASCII spaces are white space. */
static bool is_name(const char *name)
{
    static const unsigned refused[][2] = {
        {0xA0, 0xA9}, {0xAB, 0xB4}, {0xB6, 0xB9}, {0xBB, 0xBF}, {0xD7, 0xD7}, {0xF7, 0xF7},
        {0x34F, 0x34F}, {0x115F, 0x1160}, {0x17B4, 0x17B5}, {0x180B, 0x180F}, {0x2000, 0x2BFF},
        {0x3000, 0x3004}, {0x3007, 0x3029}, {0x3164, 0x3164}, {0xE000, 0xF8FF}, {0xFE00, 0xFE0F},
        {0xFEFF, 0xFEFF}, {0xFFA0, 0xFFA0}, {0xFFF0, 0xFFFF}, {0x1F000, 0x1FAFF},
        {0xE0000, 0x10FFFF}};
    const char *at = name, *end = name + strlen(name);
    int count = 0;
    for (unsigned c; at < end; count++) {
        at += decode(at, end, &c);
        if (c < 0x80 && !isalnum(c) && c != '_' && c != '-') return false;
        for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
            if (c >= refused[i][0] && c <= refused[i][1]) return false;
        unsigned place = c >= 0x900 && c < 0xD80 ? c & 0x7F : 0x10;     /* in an Indic script */
        bool mark = (c >= 0x300 && c < 0x370) || place < 4 || place == 0x3C
                    || (place >= 0x3E && place <= 0x4D);
        if (count == 0 && mark) return false;
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
    if (client->cut || send(client->sock, bytes, size, MSG_DONTWAIT) == (ssize_t)size) return;
    client->cut = true;
    stop(client, "not reading");
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
    for (struct client *it = room ? joined : NULL; it; it = it->next)
        if (it->room == room && it != client) send_bytes(it, line, size);
}

static void say_list(struct client *client, bool of_rooms)
{
    char *text;
    size_t size;
    FILE *line = open_memstream(&text, &size);      /* with many clients it is long */
    fputs(of_rooms ? "ROOMS" : "WHO", line);
    for (struct room *it = of_rooms ? rooms : NULL; it; it = it->next)
        fprintf(line, " %s=%d", it->name, it->count);
    for (struct client *it = of_rooms ? NULL : joined; it; it = it->next)
        if (it->room == client->room) fprintf(line, " %s", it->name);
    fputc('\n', line);
    fclose(line);
    send_bytes(client, text, size);
    free(text);
}

static struct client *find_client(const char *name)
{
    struct client *it = joined;
    while (it && strcasecmp(it->name, name)) it = it->next;
    return it;
}

static struct room **find_room(const char *name)    /* the link to it; else the last one, NULL */
{
    struct room **link = &rooms;
    while (*link && strcasecmp((*link)->name, name)) link = &(*link)->next;
    return link;
}

/* Leave the old room, if any, and enter the new one, if any: first the state, then the news. */
static void move(struct client *me, const char *name, struct room *room)
{
    struct room *old = me->room;
    char old_name[NAME_SIZE];
    strcpy(old_name, me->name);
    struct client **link = &joined;
    while (*link && *link != me) link = &(*link)->next;
    if (*link) *link = me->next;
    while (*link) link = &(*link)->next;
    if (room) *link = me, me->next = NULL, strcpy(me->name, name), room->count++;
    me->room = room;
    if (old && !closing) say(me, old, "LEFT %s\n", old_name);
    if (room) say(me, room, "JOINED %s\n", name);
    if (!old || --old->count) return;
    struct room **empty = find_room(old->name);
    *empty = old->next;
    free(old);
}

static void join(struct client *me, char *words)
{
    char *rest, *name = strtok_r(words, " ", &rest), *room_name = strtok_r(NULL, " ", &rest);
    char *more = strtok_r(NULL, " ", &rest), guest[20];
    for (int number = 1; !name || (name == guest && find_client(guest)); number++)
        snprintf(name = guest, sizeof guest, "guest%d", number);
    if (!room_name) room_name = me->room ? me->room->name : rooms ? rooms->name : "lobby";
    if (more || !is_name(name) || !is_name(room_name)) {
        say(me, NULL, "ERROR a name is 1 to 20 letters, digits, _ or -\n");
        return;
    }
    struct room **link = find_room(room_name);
    struct client *owner = find_client(name);
    if (owner && owner != me) {
        say(me, NULL, "ERROR the name %s is taken\n", name);
    } else if (me->room && *link == me->room && !strcmp(name, me->name)) {
        say(me, NULL, "ERROR you are %s in %s already\n", name, me->room->name);
    } else if (me->room && rate && now() < me->moved + 1) {
        say(me, NULL, "ERROR you can move or change your name once a second\n");
    } else {
        if (!*link && !(*link = calloc(1, sizeof **link))) abort();
        if (!(*link)->count) strcpy((*link)->name, room_name);
        if (me->room) me->moved = now();
        struct room *room = *link;                  /* the link may be in the one that is freed */
        move(me, name, room);
        say(me, NULL, "WELCOME %s %s Welcome to %.99s, %s!\n", room->name, name, server_name, name);
    }
}

static void answer(struct client *me, char *line)
{
    char *verb = line + strspn(line, " "), *text = verb + strcspn(verb, " ");
    if (*text) *text++ = 0;                         /* the space between them */
    if (!*verb) return;
    if (!strcasecmp(verb, "JOIN")) join(me, text);
    else if (!strcasecmp(verb, "ROOMS")) say_list(me, true);
    else if (!strcasecmp(verb, "LEAVE")) stop(me, "you said LEAVE");
    else if (strcasecmp(verb, "MSG") && strcasecmp(verb, "WHO"))
        say(me, NULL, "ERROR unknown request %s\n", verb);
    else if (!me->room) say(me, NULL, "ERROR join a room first: JOIN name\n");
    else if (!strcasecmp(verb, "WHO")) say_list(me, false);
    else if (text[strspn(text, " ")]) say(me, me->room, "MSG %s %s\n", me->name, text);
}

/* ---- One client's life, in its own thread ---- */

static void end_of_line(struct client *me)
{
    char text[3 * (MAX_REQUEST + 2) + 1];
    bool ends_in_cr = me->length && me->line[me->length - 1] == '\r';
    size_t length = me->length - ends_in_cr;
    make_safe(me->line, me->line + length, text);
    pthread_mutex_lock(&lock);
    if (me->reason || closing) ;                    /* it said LEAVE just before, for one */
    else if (length > MAX_REQUEST) say(me, NULL, "ERROR a request is at most 1024 bytes\n");
    else answer(me, text);
    pthread_mutex_unlock(&lock);
}

/* Carry out the requests that end in these bytes, and rest if they came too fast. */
static void carry_out(struct client *me, const char *bytes, size_t size)
{
    size_t cost = size;
    for (size_t i = 0; i < size; i++) {
        if (bytes[i] != '\n') {                     /* what a line has too much is not kept */
            if (me->length < sizeof me->line) me->line[me->length++] = bytes[i];
            continue;
        }
        bool empty = me->length == 0 || (me->length == 1 && *me->line == '\r');
        if (!empty && me->length < 100) cost += 100 - me->length;
        if (!empty) end_of_line(me);
        me->length = 0;
    }
    if (rate) me->rest_until = now() + (double)cost / rate;
}

/* Do one thing that takes half a second at most; return why nothing more is to come, or NULL. */
static const char *receive(struct client *me)
{
    char bytes[4096];
    size_t most = rate && rate / 100 < 4096 ? rate / 100 : 4096;    /* half a second's rest */
    double rest = me->rest_until - now();
    if (rest > 0) return wait_for(-1, rest < 0.5 ? rest : 0.5), NULL;
    ssize_t size = recv(me->sock, bytes, most, MSG_DONTWAIT);
    if (size < 0 && (errno == EAGAIN || errno == EINTR)) {          /* nothing was held back */
        wait_for(me->sock, 0.5);
        me->last_pause = now();
        return NULL;
    }
    if (size < (ssize_t)most) me->last_pause = now();               /* nor beyond this piece */
    if (size <= 0) return size ? "connection lost" : "end of file";
    if (rate && now() > me->last_pause + FLOOD_SECONDS) return flood_reason;
    carry_out(me, bytes, size);
    return NULL;
}

static bool must_go(struct client *me, const char *reason)
{
    pthread_mutex_lock(&lock);
    if (!me->room && now() > me->connected + JOIN_SECONDS) reason = late_reason;
    if (closing) reason = "the server is closing";
    if (reason) stop(me, reason);
    bool must = me->reason;
    pthread_mutex_unlock(&lock);
    return must;
}

static void *serve(void *client)
{
    struct client *me = client;
    const char *reason = NULL;
    while (!must_go(me, reason)) reason = receive(me);
    pthread_mutex_lock(&lock);
    say(me, NULL, "BYE %s\n", me->reason);
    move(me, NULL, NULL);
    pthread_mutex_unlock(&lock);
    /* A close with unread input would be a reset, which can destroy the BYE: read it off first. */
    char bytes[65536];
    double end = now() + FAREWELL_SECONDS, left;
    shutdown(me->sock, SHUT_WR);
    while ((left = end - now()) > 0)
        if (wait_for(me->sock, left) && recv(me->sock, bytes, sizeof bytes, MSG_DONTWAIT) <= 0)
            break;
    close(me->sock);
    free(me);
    threads--;
    return NULL;
}

/* ---- The main thread ---- */

static void start_client(int sock)
{
    struct client *client = calloc(1, sizeof *client);
    pthread_t thread;
    if (!client) abort();
    client->sock = sock;
    client->connected = client->last_pause = now();
    client->moved = now() - 1;
    pthread_mutex_lock(&lock);
    threads++;
    if (served++ >= max_clients) stop(client, full_reason);
    if (pthread_create(&thread, NULL, serve, client)) {             /* too many threads */
        stop(client, "");
        threads--;
        close(sock);
        free(client);
    } else {
        pthread_detach(thread);
    }
    pthread_mutex_unlock(&lock);
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
        {IPPROTO_TCP, TCP_KEEPINTVL, 5},
#ifdef TCP_USER_TIMEOUT
        {IPPROTO_TCP, TCP_KEEPIDLE, 20}, {IPPROTO_TCP, TCP_USER_TIMEOUT, 30000},
#elif defined TCP_KEEPALIVE                         /* macOS */
        {IPPROTO_TCP, TCP_KEEPALIVE, 20}, {IPPROTO_TCP, TCP_KEEPCNT, 4},
#endif
    };
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        setsockopt(listener, options[i][0], options[i][1], &options[i][2], sizeof(int));
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1
        || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1024)) {
        fprintf(stderr, "server: cannot listen on %s:%d: %s\n", host, port, strerror(errno));
        exit(1);
    }
    fcntl(listener, F_SETFL, O_NONBLOCK);            /* who waited in the queue may be gone */
    return listener;
}

int main(int argc, char **argv)
{
    int i = 1;
    for (; i + 2 < argc; i += 2) {
        if (!strcmp(argv[i], "--rate")) rate = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--max-clients")) max_clients = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--host")) host = argv[i + 1];
        else if (!strcmp(argv[i], "--name")) server_name = argv[i + 1];
        else break;
    }
    if (i + 1 != argc || max_clients < 1 || (rate != 0 && rate < 100)) {
        fprintf(stderr, "usage: server [--rate N] [--max-clients N] [--host H] [--name N] PORT\n");
        return 2;
    }
    snprintf(full_reason, 80, "the server is full (at most %d clients)", max_clients);
    snprintf(late_reason, 80, "no JOIN within %g seconds", (double)JOIN_SECONDS);
    snprintf(flood_reason, 80, "you have been held back for %g seconds", (double)FLOOD_SECONDS);
    struct sigaction action = {.sa_handler = on_signal}, before;
    sigaction(SIGHUP, NULL, &before);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    if (before.sa_handler != SIG_IGN) sigaction(SIGHUP, &action, NULL);     /* else: nohup */
    signal(SIGPIPE, SIG_IGN);                       /* a send to nobody fails, that is enough */
    int listener = listen_on(atoi(argv[i])), sock;
    while (!closing) {                              /* ten more are told that it is full */
        if (threads < max_clients + 10 && wait_for(listener, 0.5)
            && (sock = accept(listener, NULL, NULL)) >= 0) start_client(sock);
        wait_for(-1, 0.01);                         /* so it accepts 100 a second at most */
    }
    for (double end = now() + 2.5; threads && now() < end; ) wait_for(-1, 0.01);
    return 0;
}
