/* Memory that the workers of a machine share, and the quick decision on a limit in it.
 *
 * `opsguard.limiter.shared` is the reference, `opsguard.limiter.layout` says what lies where. The
 * memory is a System V segment: its size is fixed for good, so nobody can cut it short under us,
 * and it is marked for removal as soon as it is made, so that it goes with its last worker.
 *
 * A set is locked by a word that names its owner: the seat, and who of those that sat there. A waiter
 * asks the kernel whether the owner lives, and takes the lock of a dead one over. A decision in C
 * holds the GIL and a lock for some hundred nanoseconds and waits for nothing: if the set is taken
 * for longer, or full, or it is time to look at the file, the Python function decides that it was
 * given.
 *
 * A file that is mapped can be cut short: a Net keeps the process that mapped it alive.
 *
 * A process may be killed between any two of its stores, so their order matters: a state is never
 * worth more, half written, than it was, and a slot gets its new name last.
 */

#define PY_SSIZE_T_CLEAN
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <Python.h>
#include <structmember.h>

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <time.h>
#include <unistd.h>

#include "_c/tools.h"

#ifdef Py_GIL_DISABLED
#error "decisions rely on the GIL"
#endif

enum {
    SEATS = 192, SLOTS = 8, SLOT = 64, SET = SLOTS * SLOT, PAGE = 4096, SPINS = 64, YIELDS = 16,
    LOOKS = 90, MOST_SETS = 64
};
enum { FIXED = 1, SLIDING = 2, GCRA = 3 };

static const double REQUESTS = 1e-6, SECONDS = 1e-9; /* as in opsguard.limiter.algorithms */
static const uint64_t COUNT = (1ull << 30) - 1;

typedef _Atomic uint64_t Word;

/* The segment ---------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    char *base;
    size_t size;
    int id;
    int file;         /* where the seats are */
    uint64_t owner;   /* what our locks say; 0 before `sit` */
    size_t locks;     /* where they begin */
    double look_at;   /* from when on decisions are for Python, which looks at the file */
    pid_t pid;
    int waiting;      /* threads that wait for a lock without the GIL */
    int closed;
} Segment;

static PyTypeObject SegmentType;

static void
detach(Segment *self)
{
    char *base = self->base;
    self->base = NULL;
    if (base != NULL)
        shmdt(base);
}

static Segment *
attached(int id, int made)
{
    Segment *self = PyObject_New(Segment, &SegmentType);
    if (self == NULL) {
        if (made)
            shmctl(id, IPC_RMID, NULL);
        return NULL;
    }
    void *base = shmat(id, NULL, 0);
    int error = errno;
    /* Who has its id may join for as long as somebody is there: so it is on Linux. */
    if (made)
        shmctl(id, IPC_RMID, NULL);
    struct shmid_ds facts = {.shm_segsz = 0};
    self->base = base == (void *)-1 ? NULL : base;
    self->id = id;
    self->file = -1;
    self->owner = 0;
    self->locks = 0;
    self->look_at = -INFINITY;
    self->pid = getpid();
    self->waiting = self->closed = 0;
    if (self->base == NULL || shmctl(id, IPC_STAT, &facts) < 0) {
        errno = self->base == NULL ? error : errno;
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    self->size = facts.shm_segsz;
    return self;
}

static PyObject *
segment_create(PyObject *module, PyObject *argument)
{
    size_t size = PyLong_AsSize_t(argument);
    if (size == (size_t)-1 && PyErr_Occurred())
        return NULL;
    int id = shmget(IPC_PRIVATE, size, IPC_CREAT | IPC_EXCL | 0600);
    return id < 0 ? PyErr_SetFromErrno(PyExc_OSError) : (PyObject *)attached(id, 1);
}

static PyObject *
segment_attach(PyObject *module, PyObject *args)
{
    int id;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "in", &id, &size))
        return NULL;
    Segment *self = attached(id, 0);
    if (self != NULL && self->size < (size_t)size) {
        PyErr_SetString(PyExc_OSError, "the segment is too small to be the table");
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static int
is_open(Segment *self)
{
    if (self->base != NULL && !self->closed)
        return 1;
    PyErr_SetString(PyExc_OSError, "the segment is closed");
    return 0;
}

static int
is_inside(Segment *self, Py_ssize_t at, Py_ssize_t size)
{
    if (at >= 0 && size >= 0 && (size_t)at <= self->size && (size_t)size <= self->size - (size_t)at)
        return 1;
    PyErr_SetString(PyExc_ValueError, "outside of the segment");
    return 0;
}

static PyObject *
segment_read(Segment *self, PyObject *args)
{
    Py_ssize_t at, size;
    if (!PyArg_ParseTuple(args, "nn", &at, &size) || !is_open(self) || !is_inside(self, at, size))
        return NULL;
    return PyBytes_FromStringAndSize(self->base + at, size);
}

/* Word by word and in order, see above. */
static PyObject *
segment_write(Segment *self, PyObject *args)
{
    Py_ssize_t at;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "ny*", &at, &data))
        return NULL;
    int fits = is_open(self) && is_inside(self, at, data.len);
    if (fits && at % 8 == 0) {
        Word *to = (Word *)(self->base + at);
        const char *from = data.buf;
        Py_ssize_t words = data.len / 8;
        for (Py_ssize_t i = 0; i < words; i++) {
            uint64_t word;
            memcpy(&word, from + i * 8, 8);
            atomic_store_explicit(to + i, word, memory_order_release);
        }
        memcpy(self->base + at + words * 8, from + words * 8, (size_t)data.len % 8);
    }
    else if (fits)
        memcpy(self->base + at, data.buf, (size_t)data.len);
    PyBuffer_Release(&data);
    if (!fits)
        return NULL;
    Py_RETURN_NONE;
}

static uint64_t
sat(Segment *self, unsigned seat)
{
    return atomic_load((Word *)(self->base + PAGE + seat * 16)) & 0xffffffffu;
}

static PyObject *
segment_sit(Segment *self, PyObject *args)
{
    int file;
    unsigned seat;
    Py_ssize_t locks;
    if (!PyArg_ParseTuple(args, "iIn", &file, &seat, &locks) || !is_open(self))
        return NULL;
    if (seat >= SEATS || locks % 8 || !is_inside(self, locks, 0) || self->size < 2 * PAGE) {
        PyErr_SetString(PyExc_ValueError, "there is no such seat");
        return NULL;
    }
    self->file = file;
    self->locks = (size_t)locks;
    self->owner = sat(self, seat) << 32 | (seat + 1);
    Py_RETURN_NONE;
}

/* Locks ---------------------------------------------------------------------------------------- */

/* Whether that owner holds nothing any more. An error counts as life. */
static int
is_dead(Segment *self, uint64_t owner)
{
    uint64_t seat = (owner & 0xffffffffu) - 1;
    if (seat >= SEATS)
        return 1; /* nobody ever was: somebody wrote what he liked */
    if (sat(self, (unsigned)seat) != owner >> 32)
        return 1; /* another one sits there */
    if (seat + 1 == (self->owner & 0xffffffffu))
        return 0;
    struct flock asked = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t)seat, .l_len = 1};
    return fcntl(self->file, F_OFD_GETLK, &asked) == 0 && asked.l_type == F_UNLCK;
}

static int
try_lock(Word *word, uint64_t owner)
{
    uint64_t nobody = 0;
    return atomic_compare_exchange_strong(word, &nobody, owner);
}

/* Who did not get the processor for long has not seen much of the lock: so he looks LOOKS times at
 * least, which takes less than 25 ms where there is a processor; once, if he is in a hurry.
 *
 * Without the GIL, so a word of our own may be that of a decision in C that another thread is within. */
static int
wait_for(Segment *self, Word *word, double until, int looks)
{
    static const struct timespec PAUSE = {0, 100000};
    double ask_at = 0.0;
    for (int tried = 0;; tried++) {
        uint64_t owner = atomic_load(word);
        if (owner == 0 && atomic_compare_exchange_strong(word, &owner, self->owner))
            return 1;
        if (tried < YIELDS) {
            sched_yield();
            continue;
        }
        double at = now();
        if (at >= ask_at) {
            ask_at = at + 0.001;
            if (owner != 0 && is_dead(self, owner)
                && atomic_compare_exchange_strong(word, &owner, self->owner))
                return 1;
        }
        if (at >= until && tried > looks) /* and who holds it lives */
            return 0;
        nanosleep(&PAUSE, NULL);
    }
}

static void
free_lock(Segment *self, Word *word)
{
    uint64_t owner = self->owner;
    atomic_compare_exchange_strong(word, &owner, 0);
}

/* The words of a sequence of sets; how many, -1 with an exception. */
static Py_ssize_t
words_of(Segment *self, PyObject *sets, Word **words)
{
    PyObject *items = PySequence_Fast(sets, "sets are a sequence");
    if (items == NULL)
        return -1;
    Py_ssize_t many = PySequence_Fast_GET_SIZE(items);
    if (!is_open(self))
        many = -1;
    else if (many > MOST_SETS || self->owner == 0) {
        PyErr_SetString(PyExc_ValueError, "too many sets, or nobody sits here");
        many = -1;
    }
    for (Py_ssize_t i = 0; i < many; i++) {
        Py_ssize_t index = PyLong_AsSsize_t(PySequence_Fast_GET_ITEM(items, i));
        if ((index == -1 && PyErr_Occurred())
            || !is_inside(self, index < 0 ? -1 : (Py_ssize_t)self->locks + index * 8, 8)) {
            many = -1;
            break;
        }
        words[i] = (Word *)(self->base + self->locks) + index;
    }
    Py_DECREF(items);
    return many;
}

/* lock(sets, patience): whether all are ours now. */
static PyObject *
segment_lock(Segment *self, PyObject *args)
{
    PyObject *sets;
    double patience;
    Word *words[MOST_SETS];
    if (!PyArg_ParseTuple(args, "Od", &sets, &patience))
        return NULL;
    Py_ssize_t many = words_of(self, sets, words), held = 0;
    if (many < 0)
        return NULL;
    /* Decisions in Python come one at a time (see `WorkersStore`), and one in C ends before it lets go
     * of the GIL: so a word of our own was left by one that was torn away. */
    for (Py_ssize_t i = 0; i < many; i++)
        free_lock(self, words[i]);
    while (held < many && try_lock(words[held], self->owner))
        held++;
    if (held < many) {
        self->waiting++;
        Py_BEGIN_ALLOW_THREADS
        double until = now() + patience;
        int looks = patience < 0.01 ? 0 : LOOKS;
        while (held < many && wait_for(self, words[held], until, looks))
            held++;
        Py_END_ALLOW_THREADS
        self->waiting--;
    }
    int all = held == many;
    while (!all && held > 0)
        free_lock(self, words[--held]);
    if (self->closed && self->waiting == 0)
        detach(self);
    return PyBool_FromLong(all);
}

static PyObject *
segment_unlock(Segment *self, PyObject *sets)
{
    Word *words[MOST_SETS];
    Py_ssize_t many = words_of(self, sets, words);
    if (many < 0)
        return NULL;
    while (many > 0)
        free_lock(self, words[--many]);
    Py_RETURN_NONE;
}

static PyObject *
segment_close(Segment *self, PyObject *none)
{
    self->closed = 1;
    if (self->waiting == 0 || self->pid != getpid()) /* a fork leaves no waiters */
        detach(self);
    Py_RETURN_NONE;
}

static void
segment_dealloc(Segment *self)
{
    detach(self);
    PyObject_Free(self);
}

static PyMethodDef segment_methods[] = {
    {"read", (PyCFunction)segment_read, METH_VARARGS, NULL},
    {"write", (PyCFunction)segment_write, METH_VARARGS, NULL},
    {"sit", (PyCFunction)segment_sit, METH_VARARGS, NULL},
    {"lock", (PyCFunction)segment_lock, METH_VARARGS, NULL},
    {"unlock", (PyCFunction)segment_unlock, METH_O, NULL},
    {"close", (PyCFunction)segment_close, METH_NOARGS, NULL},
    {NULL},
};

static PyMemberDef segment_members[] = {
    {"id", T_INT, offsetof(Segment, id), READONLY, NULL},
    {"look_at", T_DOUBLE, offsetof(Segment, look_at), 0, NULL},
    {NULL},
};

static PyTypeObject SegmentType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._shared.Segment",
    .tp_basicsize = sizeof(Segment),
    .tp_dealloc = (destructor)segment_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_methods = segment_methods,
    .tp_members = segment_members,
};

/* BLAKE2b (RFC 7693), with a digest of 16 bytes ------------------------------------------------ */

static const uint64_t IV[8] = {
    0x6a09e667f3bcc908u, 0xbb67ae8584caa73bu, 0x3c6ef372fe94f82bu, 0xa54ff53a5f1d36f1u,
    0x510e527fade682d1u, 0x9b05688c2b3e6c1fu, 0x1f83d9abfb41bd6bu, 0x5be0cd19137e2179u,
};
static const unsigned char SIGMA[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
    {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
    {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
    {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
    {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
};

static uint64_t
little(const unsigned char *at)
{
    uint64_t value = 0;
    for (int i = 7; i >= 0; i--)
        value = value << 8 | at[i];
    return value;
}

static uint64_t
turned(uint64_t value, int by)
{
    return value >> by | value << (64 - by);
}

static void
mix(uint64_t *v, int a, int b, int c, int d, uint64_t x, uint64_t y)
{
    v[a] += v[b] + x;
    v[d] = turned(v[d] ^ v[a], 32);
    v[c] += v[d];
    v[b] = turned(v[b] ^ v[c], 24);
    v[a] += v[b] + y;
    v[d] = turned(v[d] ^ v[a], 16);
    v[c] += v[d];
    v[b] = turned(v[b] ^ v[c], 63);
}

static void
compress(uint64_t h[8], const unsigned char *block, uint64_t done, int last)
{
    uint64_t m[16], v[16];
    for (int i = 0; i < 16; i++)
        m[i] = little(block + 8 * i);
    for (int i = 0; i < 8; i++) {
        v[i] = h[i];
        v[i + 8] = IV[i];
    }
    v[12] ^= done;
    if (last)
        v[14] = ~v[14];
    for (int round = 0; round < 12; round++) {
        const unsigned char *s = SIGMA[round % 10];
        mix(v, 0, 4, 8, 12, m[s[0]], m[s[1]]);
        mix(v, 1, 5, 9, 13, m[s[2]], m[s[3]]);
        mix(v, 2, 6, 10, 14, m[s[4]], m[s[5]]);
        mix(v, 3, 7, 11, 15, m[s[6]], m[s[7]]);
        mix(v, 0, 5, 10, 15, m[s[8]], m[s[9]]);
        mix(v, 1, 6, 11, 12, m[s[10]], m[s[11]]);
        mix(v, 2, 7, 8, 13, m[s[12]], m[s[13]]);
        mix(v, 3, 4, 9, 14, m[s[14]], m[s[15]]);
    }
    for (int i = 0; i < 8; i++)
        h[i] ^= v[i] ^ v[i + 8];
}

static void
hash(const uint64_t start[8], const char *text, size_t length, uint64_t name[2])
{
    uint64_t h[8], done = 0;
    memcpy(h, start, sizeof h);
    while (length - done > 128) {
        compress(h, (const unsigned char *)text + done, done + 128, 0);
        done += 128;
    }
    unsigned char rest[128] = {0};
    memcpy(rest, text + done, length - done);
    compress(h, rest, length, 1);
    unsigned char bytes[16];
    for (int i = 0; i < 16; i++)
        bytes[i] = (unsigned char)(h[i / 8] >> 8 * (i % 8));
    memcpy(name, bytes, 16);
}

/* A gate: one bucket of one rate at a time ----------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *otherwise; /* (key, cost) to an outcome, for all that is unusual */
    Segment *segment;    /* NULL: there is none */
    int kind;
    double amount, period, whole, interval;
    uint64_t start[8];   /* of the hash, salt and rate in it */
    uint64_t sets;
    size_t table;
} Gate;

typedef struct { /* layout.AHEAD and the state behind it */
    Word name[2];
    _Atomic uint8_t kind;
    uint8_t unused;
    _Atomic uint16_t share;
    _Atomic uint32_t number;
    _Atomic double expiry;
    union {
        struct {
            _Atomic int64_t window;
            _Atomic uint32_t count, before;
        };
        _Atomic double arrival;
        char rest[32];
    };
} Slot;

_Static_assert(sizeof(Slot) == SLOT, "layout.AHEAD and 32 bytes");

typedef struct {
    int allowed;
    long long left;
    double reset, wait;
} Outcome;

static double
at_least(double least, double value)
{
    return value > least ? value : least;
}

static double
at_most(double most, double value)
{
    return value < most ? value : most;
}

static void
tell(Slot *slot, double used, double expiry)
{
    atomic_store_explicit(&slot->share, (uint16_t)at_most(1000.0, at_least(0.0, used * 1000.0)),
                          memory_order_release);
    atomic_store_explicit(&slot->expiry, expiry, memory_order_release);
}

static Outcome
by_window(Gate *gate, Slot *slot, double at, long long cost)
{
    double period = gate->period, window = floor(at / period);
    double passed = at_most(period, at_least(0.0, at - window * period));
    int64_t current = (int64_t)window, late = current - atomic_load(&slot->window);
    uint64_t count = atomic_load(&slot->count), before = atomic_load(&slot->before);
    long long amount = (long long)gate->amount;
    if (gate->kind == FIXED) {
        count = late == 0 ? count : 0;
        long long used = (long long)count + cost;
        double left = period - passed;
        if (used > amount)
            return (Outcome){0, amount - (long long)count, left, left};
        atomic_store(&slot->window, current);
        atomic_store(&slot->count, (uint32_t)used);
        atomic_store(&slot->before, 0);
        tell(slot, (double)used / gate->amount, (window + 1.0) * period);
        return (Outcome){1, amount - used, left, 0.0};
    }
    count &= COUNT;
    before &= COUNT;
    if (late != 0) {
        before = late == 1 ? count : 0;
        count = 0;
    }
    double most = gate->amount + REQUESTS, estimate = (double)count;
    if (before)
        estimate = (double)count + (double)before * (1.0 - passed / period);
    double after = estimate + (double)cost;
    if (after > most) {
        long long left = (long long)(most - estimate), room = amount - cost - (long long)count;
        double wait;
        if (cost > amount)
            wait = period;
        else if (room >= 0)
            wait = at_least(SECONDS, period * (1.0 - (double)room / (double)before) - passed);
        else
            wait = period - passed
                   + period * at_least(0.0, 1.0 - (double)(amount - cost) / (double)count);
        return (Outcome){0, left > 0 ? left : 0, (count ? 2.0 : 1.0) * period - passed, wait};
    }
    count += (uint64_t)cost;
    atomic_store(&slot->window, current);
    atomic_store(&slot->count, (uint32_t)count);
    atomic_store(&slot->before, (uint32_t)before);
    double used = ((double)count + (double)before * (1.0 - passed / period)) / gate->amount;
    tell(slot, used, (window + 2.0) * period);
    return (Outcome){1, (long long)(most - after), 2.0 * period - passed, 0.0};
}

static Outcome
by_arrival(Gate *gate, Slot *slot, double at, long long cost)
{
    double whole = gate->whole, interval = gate->interval, arrival = atomic_load(&slot->arrival);
    if (!(arrival <= at + whole))
        arrival = at + whole;
    arrival = at_least(at, arrival);
    double debt = arrival - at + interval * (double)cost;
    if (debt > whole + SECONDS) {
        long long left = (long long)((whole - (arrival - at)) / interval + REQUESTS);
        return (Outcome){0, left, arrival - at, debt - whole};
    }
    double next = arrival + interval * (double)cost;
    atomic_store(&slot->arrival, next);
    tell(slot, at_most(1.0, at_least(0.0, next - at) / whole), next);
    return (Outcome){1, (long long)((whole - debt) / interval + REQUESTS), debt, 0.0};
}

/* The slot of that name; else one that is free, emptied and without a name; else NULL. */
static Slot *
slot_of(Gate *gate, Slot *set, const uint64_t name[2], double at, int *fresh)
{
    Slot *free = NULL;
    for (int i = 0; i < SLOTS; i++) {
        if (atomic_load(&set[i].name[0]) == name[0] && atomic_load(&set[i].name[1]) == name[1]) {
            *fresh = 0;
            return set + i;
        }
        if (free == NULL && !(atomic_load(&set[i].expiry) > at))
            free = set + i;
    }
    *fresh = 1;
    if (free == NULL)
        return NULL;
    atomic_store(&free->name[0], 0);
    atomic_store(&free->name[1], 0);
    atomic_store(&free->expiry, 0.0);
    atomic_store(&free->kind, (uint8_t)gate->kind);
    atomic_store(&free->number, 0);
    for (size_t i = 0; i < sizeof free->rest / 8; i++)
        atomic_store((Word *)free->rest + i, 0);
    return free;
}

static int
decide(Gate *gate, const char *text, size_t length, long long cost, double given, Outcome *outcome)
{
    Segment *segment = gate->segment;
    uint64_t name[2];
    hash(gate->start, text, length, name);
    uint32_t place;
    memcpy(&place, name, 4);
    uint64_t index = le32toh(place) % gate->sets;
    Word *word = (Word *)(segment->base + segment->locks) + index;
    int spins = 0;
    while (!try_lock(word, segment->owner)) {
        if (++spins > SPINS + YIELDS)
            return 0;
        if (spins > SPINS)
            sched_yield();
    }
    double at = isnan(given) ? now() : given;
    if (at >= segment->look_at) {
        free_lock(segment, word);
        return 0;
    }
    int fresh;
    Slot *slot = slot_of(gate, (Slot *)(segment->base + gate->table + index * SET), name, at, &fresh);
    if (slot != NULL) {
        *outcome = gate->kind == GCRA ? by_arrival(gate, slot, at, cost)
                                      : by_window(gate, slot, at, cost);
        if (fresh && outcome->allowed) {
            atomic_store(&slot->name[1], name[1]);
            atomic_store(&slot->name[0], name[0]);
        }
    }
    free_lock(segment, word);
    return slot != NULL;
}

static PyObject *
gate_decide(Gate *gate, PyObject *const *args, Py_ssize_t many, double given)
{
    Outcome outcome;
    Py_ssize_t length;
    const char *text;
    if (many < 2 || !PyUnicode_Check(args[0]) || !PyLong_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "a gate takes a key and a cost");
        return NULL;
    }
    long long cost = PyLong_AsLongLong(args[1]);
    if (cost == -1 && PyErr_Occurred())
        PyErr_Clear();
    Segment *segment = gate->segment;
    if (cost < 1 || cost > 1000000000 || segment == NULL || segment->base == NULL
        || segment->closed || segment->owner == 0)
        return PyObject_Vectorcall(gate->otherwise, args, 2, NULL);
    text = PyUnicode_AsUTF8AndSize(args[0], &length);
    if (text == NULL) /* half a surrogate pair */
        PyErr_Clear();
    if (text == NULL || !decide(gate, text, (size_t)length, cost, given, &outcome))
        return PyObject_Vectorcall(gate->otherwise, args, 2, NULL);
    PyObject *left = PyLong_FromLongLong(outcome.left > 0 ? outcome.left : 0);
    PyObject *reset = PyFloat_FromDouble(outcome.reset);
    PyObject *wait = PyFloat_FromDouble(outcome.wait);
    PyObject *found = left && reset && wait ? PyTuple_New(5) : NULL;
    if (found == NULL) {
        Py_XDECREF(left);
        Py_XDECREF(reset);
        Py_XDECREF(wait);
        return NULL;
    }
    PyTuple_SET_ITEM(found, 0, PyBool_FromLong(outcome.allowed));
    PyTuple_SET_ITEM(found, 1, Py_NewRef(Py_None));
    PyTuple_SET_ITEM(found, 2, left);
    PyTuple_SET_ITEM(found, 3, reset);
    PyTuple_SET_ITEM(found, 4, wait);
    return found;
}

static PyObject *
gate_call(PyObject *self, PyObject *const *args, size_t flags, PyObject *names)
{
    return gate_decide((Gate *)self, args, PyVectorcall_NARGS(flags), NAN);
}

/* at(key, cost, now): as the call, at that time. */
static PyObject *
gate_at(PyObject *self, PyObject *const *args, Py_ssize_t many)
{
    double given = many == 3 ? PyFloat_AsDouble(args[2]) : NAN;
    if (given == -1.0 && PyErr_Occurred())
        return NULL;
    return gate_decide((Gate *)self, args, many, given);
}

/* bind(segment, salt, quota, sets, table): decide here from now on. */
static PyObject *
gate_bind(Gate *self, PyObject *args)
{
    Segment *segment;
    const unsigned char *salt, *quota;
    Py_ssize_t salts, quotas, table;
    unsigned long long sets;
    if (!PyArg_ParseTuple(args, "O!y#y#Kn", &SegmentType, &segment, &salt, &salts, &quota, &quotas,
                          &sets, &table))
        return NULL;
    size_t size = segment->size;
    if (salts != 16 || quotas != 16 || sets == 0 || sets > size / SET || table < 0 || table % 8
        || (size_t)table > size - sets * SET || segment->locks > size - sets * 8) {
        PyErr_SetString(PyExc_ValueError, "a table does not lie like that");
        return NULL;
    }
    memcpy(self->start, IV, sizeof IV);
    self->start[0] ^= 16 | 1 << 16 | 1 << 24; /* digest, fanout and depth, RFC 7693, 2.5 */
    self->start[4] ^= little(salt);
    self->start[5] ^= little(salt + 8);
    self->start[6] ^= little(quota);
    self->start[7] ^= little(quota + 8);
    self->sets = sets;
    self->table = (size_t)table;
    Py_INCREF(segment);
    Py_XSETREF(self->segment, segment);
    Py_RETURN_NONE;
}

static PyObject *
gate_unbind(Gate *self, PyObject *none)
{
    Py_CLEAR(self->segment);
    Py_RETURN_NONE;
}

/* Gate(kind, amount, period, most, otherwise) */
static PyObject *
gate_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    int kind;
    double amount, period, most;
    PyObject *otherwise;
    if (!PyArg_ParseTuple(args, "idddO", &kind, &amount, &period, &most, &otherwise))
        return NULL;
    if (kind < FIXED || kind > GCRA || !(amount > 0) || !(period > 0) || !(most > 0)) {
        PyErr_SetString(PyExc_ValueError, "no such rate");
        return NULL;
    }
    Gate *self = PyObject_GC_New(Gate, type);
    if (self == NULL)
        return NULL;
    self->call = gate_call;
    self->otherwise = Py_NewRef(otherwise);
    self->segment = NULL;
    self->kind = kind;
    self->amount = amount;
    self->period = period;
    self->interval = period / amount;
    self->whole = self->interval * most;
    PyObject_GC_Track(self);
    return (PyObject *)self;
}

static int
gate_traverse(Gate *self, visitproc visit, void *arg)
{
    Py_VISIT(self->otherwise);
    return 0;
}

static int
gate_clear(Gate *self)
{
    Py_CLEAR(self->segment);
    return 0;
}

static void
gate_dealloc(Gate *self)
{
    PyObject_GC_UnTrack(self);
    Py_CLEAR(self->segment);
    Py_CLEAR(self->otherwise);
    PyObject_GC_Del(self);
}

static PyMethodDef gate_methods[] = {
    {"at", (PyCFunction)(void (*)(void))gate_at, METH_FASTCALL, NULL},
    {"bind", (PyCFunction)gate_bind, METH_VARARGS, NULL},
    {"unbind", (PyCFunction)gate_unbind, METH_NOARGS, NULL},
    {NULL},
};

static PyTypeObject GateType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._shared.Gate",
    .tp_basicsize = sizeof(Gate),
    .tp_new = gate_new,
    .tp_dealloc = (destructor)gate_dealloc,
    .tp_traverse = (traverseproc)gate_traverse,
    .tp_clear = (inquiry)gate_clear,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Gate, call),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_methods = gate_methods,
};

/* Mappings of files that somebody may cut short -------------------------------------------------- */

/* A page of a mapping whose file ends before it is SIGBUS when it is touched. For the mappings that a
 * Net holds, the handler puts an empty page of private memory in its place, and the process goes on;
 * every other SIGBUS goes to who handled it before. The table is written under the GIL only; the
 * handler may run at any moment, so a range counts from when its end is written.
 */
enum { NETS = 256 };
static struct { _Atomic uintptr_t start, end; } nets[NETS];
static struct sigaction before_us;
static uintptr_t page_size; /* 0: the handler is not installed yet */

static void
on_bus_error(int number, siginfo_t *info, void *context)
{
    uintptr_t at = (uintptr_t)info->si_addr;
    int error = errno;
    for (int i = 0; i < NETS && info->si_code == BUS_ADRERR; i++) {
        if (at < nets[i].start || at >= nets[i].end)
            continue;
        void *page = (void *)(at - at % page_size);
        if (mmap(page, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)
            == page) {
            errno = error;
            return;
        }
        break;
    }
    if (before_us.sa_flags & SA_SIGINFO)
        before_us.sa_sigaction(number, info, context);
    else if (before_us.sa_handler != SIG_DFL && before_us.sa_handler != SIG_IGN)
        before_us.sa_handler(number);
    else
        signal(number, SIG_DFL); /* the access is tried again, and ends the process as it would have */
    errno = error;
}

/* Keeps a mapping, and lets the process survive that its file is cut short. */
typedef struct {
    PyObject_HEAD
    Py_buffer view;
    int place;
} Net;

static PyObject *
net_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *mapping;
    static char *keys[] = {"mapping", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O", keys, &mapping))
        return NULL;
    int place = 0;
    while (place < NETS && nets[place].end)
        place++;
    if (place == NETS) {
        PyErr_SetString(PyExc_OSError, "too many mappings");
        return NULL;
    }
    if (!page_size) {
        struct sigaction ours = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK};
        sigemptyset(&ours.sa_mask);
        page_size = (uintptr_t)sysconf(_SC_PAGESIZE);
        if (sigaction(SIGBUS, &ours, &before_us) < 0) {
            page_size = 0;
            return PyErr_SetFromErrno(PyExc_OSError);
        }
    }
    Net *self = (Net *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->place = -1;
    if (PyObject_GetBuffer(mapping, &self->view, PyBUF_WRITABLE) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    self->place = place;
    nets[place].start = (uintptr_t)self->view.buf;
    nets[place].end = (uintptr_t)self->view.buf + (uintptr_t)self->view.len;
    return (PyObject *)self;
}

static void
net_dealloc(Net *self)
{
    if (self->place >= 0) {
        nets[self->place].end = 0;
        PyBuffer_Release(&self->view);
    }
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject NetType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._shared.Net",
    .tp_basicsize = sizeof(Net),
    .tp_new = net_new,
    .tp_dealloc = (destructor)net_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
};

/* The module ----------------------------------------------------------------------------------- */

static PyObject *
shared_now(PyObject *module, PyObject *none)
{
    return PyFloat_FromDouble(now());
}

static PyMethodDef shared_functions[] = {
    {"now", shared_now, METH_NOARGS, NULL},
    {"create", segment_create, METH_O, NULL},
    {"attach", segment_attach, METH_VARARGS, NULL},
    {NULL},
};

static int
shared_exec(PyObject *module)
{
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError, "the accelerator works in the main interpreter only");
        return -1;
    }
    if (PyType_Ready(&SegmentType) < 0)
        return -1;
    return PyModule_AddType(module, &GateType) < 0 ? -1 : PyModule_AddType(module, &NetType);
}

static PyModuleDef_Slot shared_slots[] = {
    {Py_mod_exec, shared_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef shared_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "opsguard._shared",
    .m_doc = "Memory that workers share, and limits in it; see `opsguard.limiter.memory`.",
    .m_methods = shared_functions,
    .m_slots = shared_slots,
};

PyMODINIT_FUNC
PyInit__shared(void)
{
    return PyModuleDef_Init(&shared_module);
}
