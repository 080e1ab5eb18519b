/* The usual decision of a limit and the usual API key in C: an optional twin of `limiter.stages`,
 * `limiter.headers` and `admission`.
 *
 * The Python code is the reference and owns all data. What is here reads and writes the same
 * dictionaries for the usual request: a client whose bucket is in the window that runs, a credential
 * that was verified a short time ago. Everything else (a new bucket, a new window, a full store, a
 * refusal, a path or handler not seen before, a fault) goes to the Python function that was given
 * for it.
 *
 * No lock is taken. From the look at a bucket to the write no Python code runs and nothing is
 * allocated that the collector follows, so under the GIL it is one step to all other threads. A
 * thread that is in the middle of a decision in Python holds the store's lock, and who sees that goes
 * the same way and waits there. A fork happens between two such steps, never within.
 *
 * Where an Exchange keeps its fields is asked of its type, so this knows nothing of `_speed.c`.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <math.h>
#include <time.h>

#include "_c/tools.h"

#ifdef Py_GIL_DISABLED
#error "what is decided here relies on the GIL"
#endif

static PyTypeObject *exchange_type;
static struct {
    Py_ssize_t method, routed, client, endpoint, marked, credentials, identity, charged, extra, started;
} at;
static Py_ssize_t cells_at; /* of the memoryview in a Shelf */
static PyTypeObject *shelf_type;
static struct { PyObject *options, *charges; } names;
static PyObject *nothing; /* () */

#define FIELD(x, name) (*(PyObject **)((char *)(x) + at.name))

static PyTypeObject WindowType, LeaseType, TallyType, DeciderType, DecidedType, EdgeType, RouteType;

/* Small tools ---------------------------------------------------------------------------------- */

/* Whether it is an Exchange: of one of the few types that there are, of which two in a row are of the
 * same nearly always.
 */
static inline int
is_exchange(PyObject *x)
{
    static PyTypeObject *last; /* kept */
    if (Py_TYPE(x) == last)
        return 1;
    if (!PyType_IsSubtype(Py_TYPE(x), exchange_type))
        return 0;
    Py_INCREF(Py_TYPE(x));
    Py_XDECREF(last);
    last = Py_TYPE(x);
    return 1;
}

static double
clock_of(clockid_t which)
{
    struct timespec moment;
    clock_gettime(which, &moment);
    return (double)((long long)moment.tv_sec * 1000000000LL + moment.tv_nsec) / 1e9;
}

/* As time.time, of a moment that `now` gave a short time ago: from how far the clocks were apart within
 * the last second, as it may be set.
 */
static double
wall_at(double moment)
{
    static double apart, looked = -HUGE_VAL;
    if (!(moment - looked >= 0.0 && moment - looked < 1.0)) {
        apart = clock_of(CLOCK_REALTIME) - now();
        looked = moment;
    }
    return moment + apart;
}

/* What a clock of somebody else's says. 0, or -1 with an exception. */
static int
read_clock(PyObject *clock, double *moment)
{
    PyObject *said = PyObject_CallNoArgs(clock);
    if (said == NULL)
        return -1;
    *moment = PyFloat_AsDouble(said);
    Py_DECREF(said);
    return *moment == -1.0 && PyErr_Occurred() ? -1 : 0;
}

static inline int
is_ascii(PyObject *text)
{
    return PyUnicode_CheckExact(text) && PyUnicode_IS_COMPACT_ASCII(text);
}

#define VISIT(name) Py_VISIT(self->name);
#define CLEAR(name) Py_CLEAR(self->name);
#define KEEP(name) self->name = (void *)Py_NewRef(name);

/* Traverse, clear and dealloc of a type, from the list of the objects that it holds. */
#define HOLDS(Type, prefix, OBJECTS) \
    static int prefix##_traverse(Type *self, visitproc visit, void *arg) { OBJECTS(VISIT) return 0; } \
    static int prefix##_clear(Type *self) { OBJECTS(CLEAR) return 0; } \
    static void prefix##_dealloc(Type *self) \
    { \
        PyObject_GC_UnTrack(self); \
        prefix##_clear(self); \
        Py_TYPE(self)->tp_free((PyObject *)self); \
    }

/* Window: base of a table in Python, where its live buckets are ---------------------------------- */

typedef struct {
    PyObject_HEAD
    PyObject *live;
    double start;
} Window;

#define WINDOW_OBJECTS(X) X(live)
HOLDS(Window, window, WINDOW_OBJECTS)

static PyMemberDef window_members[] = {
    {"live", T_OBJECT_EX, offsetof(Window, live), 0, NULL},
    {"start", T_DOUBLE, offsetof(Window, start), 0, NULL},
    {NULL},
};

static PyTypeObject WindowType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._limits.Window",
    .tp_doc = "Base of a table: its live buckets, and when their window began.",
    .tp_basicsize = sizeof(Window),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)window_dealloc,
    .tp_traverse = (traverseproc)window_traverse,
    .tp_clear = (inquiry)window_clear,
    .tp_members = window_members,
};

/* Lease: base of what `limiter.leases` knows of a bucket ------------------------------------------ */

typedef struct {
    PyObject_HEAD
    long long tokens, size, remaining;
    double until, reset_at, due_at;
    char brief;
} Lease;

static PyMemberDef lease_members[] = {
    {"tokens", T_LONGLONG, offsetof(Lease, tokens), 0, NULL},
    {"size", T_LONGLONG, offsetof(Lease, size), 0, NULL},
    {"remaining", T_LONGLONG, offsetof(Lease, remaining), 0, NULL},
    {"until", T_DOUBLE, offsetof(Lease, until), 0, NULL},
    {"reset_at", T_DOUBLE, offsetof(Lease, reset_at), 0, NULL},
    {"due_at", T_DOUBLE, offsetof(Lease, due_at), 0, NULL},
    {"brief", T_BOOL, offsetof(Lease, brief), 0, NULL},
    {NULL},
};

static PyTypeObject LeaseType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._limits.Lease",
    .tp_doc = "Base of a lease: its tokens, and how long they are good.",
    .tp_basicsize = sizeof(Lease),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .tp_new = PyType_GenericNew,
    .tp_members = lease_members,
};

/* Tally: adds one to a counter's cell ------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *store; /* a Shelf */
    PyObject *cells; /* the memoryview that `view` was taken of */
    Py_buffer view;
    Py_ssize_t index;
} Tally;

/* Add one. The store's cells are others once it is opened, or adopted by a forked child. 0 or -1. */
static int
count_one(Tally *self)
{
    PyObject *cells = *(PyObject **)((char *)self->store + cells_at);
    if (cells != self->cells) {
        Py_buffer view;
        if (cells == NULL || PyObject_GetBuffer(cells, &view, PyBUF_WRITABLE | PyBUF_FORMAT | PyBUF_ND) < 0) {
            if (cells == NULL)
                PyErr_SetString(PyExc_AttributeError, "cells");
            return -1;
        }
        if (view.itemsize != sizeof(double) || view.format == NULL || strcmp(view.format, "d") != 0) {
            PyBuffer_Release(&view);
            PyErr_SetString(PyExc_TypeError, "cells are doubles");
            return -1;
        }
        PyObject *old = self->cells;
        Py_buffer old_view = self->view;
        self->cells = Py_NewRef(cells);
        self->view = view;
        if (old != NULL) {
            PyBuffer_Release(&old_view);
            Py_DECREF(old);
        }
    }
    if (self->index < 0 || self->index >= self->view.len / (Py_ssize_t)sizeof(double)) {
        PyErr_SetString(PyExc_IndexError, "no such cell");
        return -1;
    }
    ((double *)self->view.buf)[self->index] += 1.0;
    return 0;
}

static PyObject *
tally_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    if (PyVectorcall_NARGS(flags) != 0 || keywords != NULL) {
        PyErr_SetString(PyExc_TypeError, "a tally takes no arguments");
        return NULL;
    }
    if (count_one((Tally *)callable) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
tally_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"store", "index", NULL};
    PyObject *store;
    Py_ssize_t index;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!n", keys, shelf_type, &store, &index))
        return NULL;
    Tally *self = (Tally *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->call = tally_call;
    self->store = Py_NewRef(store);
    self->index = index;
    return (PyObject *)self;
}

static int
tally_traverse(Tally *self, visitproc visit, void *arg)
{
    Py_VISIT(self->store);
    Py_VISIT(self->cells);
    return 0;
}

static int
tally_clear(Tally *self)
{
    if (self->cells != NULL) {
        PyBuffer_Release(&self->view);
        Py_CLEAR(self->cells);
    }
    Py_CLEAR(self->store);
    return 0;
}

static void
tally_dealloc(Tally *self)
{
    PyObject_GC_UnTrack(self);
    tally_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject TallyType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._limits.Tally",
    .tp_doc = "Adds one to a counter's cell.",
    .tp_basicsize = sizeof(Tally),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = tally_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Tally, call),
    .tp_dealloc = (destructor)tally_dealloc,
    .tp_traverse = (traverseproc)tally_traverse,
    .tp_clear = (inquiry)tally_clear,
};

/* Count by whatever counts. 0 or -1. */
static int
counted(PyObject *count)
{
    if (Py_IS_TYPE(count, &TallyType))
        return count_one((Tally *)count);
    PyObject *done = PyObject_CallNoArgs(count);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* The strategies, as limiter.algorithms ----------------------------------------------------------- */

enum { FIXED, SLIDING, GCRA };
enum { COUNT_BITS = 30, LOW = 8 /* as in limiter.leases */ };
static const long long COUNT = (1LL << COUNT_BITS) - 1;
static const double REQUESTS = 1e-6, SECONDS = 1e-9;

typedef struct {
    int how;
    long long amount, cost;
    double period, interval, whole;
} Rate;

typedef struct {
    int allowed;
    long long remaining;
    double reset, wait;
} Outcome;

static void
decide_fixed(const Rate *rate, long long *count, double passed, Outcome *found)
{
    long long used = *count + rate->cost;
    double left = rate->period - passed;
    found->allowed = used <= rate->amount;
    found->reset = left;
    found->wait = found->allowed ? 0.0 : left;
    if (found->allowed)
        *count = used;
    found->remaining = rate->amount - *count;
}

static double
sliding_wait(const Rate *rate, long long before, long long count, double passed)
{
    double period = rate->period;
    long long room = rate->amount - rate->cost - count;
    if (rate->cost > rate->amount)
        return period;
    if (room >= 0)
        return fmax(period * (1.0 - (double)room / (double)before) - passed, SECONDS);
    return period - passed
           + period * fmax(1.0 - (double)(rate->amount - rate->cost) / (double)count, 0.0);
}

static void
decide_sliding(const Rate *rate, long long *state, double passed, Outcome *found)
{
    long long before = *state >> COUNT_BITS, count = *state & COUNT;
    double most = (double)rate->amount + REQUESTS, estimate = (double)count;
    if (before)
        estimate = (double)count + (double)before * (1.0 - passed / rate->period);
    double after = estimate + (double)rate->cost;
    found->allowed = !(after > most);
    if (found->allowed) {
        *state += rate->cost;
        found->remaining = (long long)(most - after);
        found->reset = 2.0 * rate->period - passed;
        found->wait = 0.0;
        return;
    }
    found->remaining = Py_MAX((long long)(most - estimate), 0);
    found->reset = (count ? 2.0 : 1.0) * rate->period - passed;
    found->wait = sliding_wait(rate, before, count, passed);
}

static void
decide_gcra(const Rate *rate, double *arrival, double moment, Outcome *found)
{
    double begun = *arrival < moment ? moment : *arrival;
    if (begun > moment + rate->whole)
        begun = moment + rate->whole;
    double asked = rate->interval * (double)rate->cost, debt = begun - moment + asked;
    found->allowed = !(debt > rate->whole + SECONDS);
    if (found->allowed) {
        found->remaining = (long long)((rate->whole - debt) / rate->interval + REQUESTS);
        found->reset = debt;
        found->wait = 0.0;
        *arrival = begun + asked;
        return;
    }
    found->remaining = (long long)((rate->whole - (begun - moment)) / rate->interval + REQUESTS);
    found->reset = begun - moment;
    found->wait = debt - rate->whole;
    *arrival = begun;
}

/* The state that follows, new reference; NULL without an exception for a state that is none, and for
 * one that stays. `found->allowed` is -1 for the first.
 */
static PyObject *
next_state(const Rate *rate, PyObject *state, double passed, double moment, Outcome *found)
{
    found->allowed = -1;
    if (rate->how == GCRA) {
        if (!PyFloat_CheckExact(state))
            return NULL;
        double before = PyFloat_AS_DOUBLE(state), arrival = before;
        decide_gcra(rate, &arrival, moment, found);
        return arrival == before ? NULL : PyFloat_FromDouble(arrival);
    }
    int overflow = 0;
    long long number = PyLong_CheckExact(state) ? PyLong_AsLongLongAndOverflow(state, &overflow) : -1;
    if (number < 0 || overflow)
        return NULL;
    long long before = number;
    if (rate->how == FIXED)
        decide_fixed(rate, &number, passed, found);
    else
        decide_sliding(rate, &number, passed, found);
    return number == before ? NULL : PyLong_FromLongLong(number);
}

/* Decider: Stage.decide for one rule with one rate -------------------------------------------------- */

enum { LIMIT, REMAINING, RESET, POLICY, BOTH, HEADERS };

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Window *table; /* None: only `take` has the buckets, and says None where it leaves a decision to others */
    PyObject *leases; /* of a store without a table: what it holds of buckets, by key, or None */
    PyObject *locked, *take, *clock, *wall; /* the clocks may be None: those of `clock` */
    PyObject *start, *by, *whose;           /* of a bucket's key; `by` is an attribute, True or None */
    PyObject *rule, *allowed, *refused;
    PyObject *titles, *limit, *policies, *both; /* texts of headers */
    PyObject *spell, *spelled;     /* whose names are in `spelled`, a tuple; NULL at first */
    PyObject *limit_pair, *policy_pair, *reset_pair; /* as spelled; the last is for `moment` */
    double moment, seconds, span;
    char tail[32]; /* for `seconds` */
    int tail_length;
    int bytes; /* values are bytes */
    Rate rate;
} Decider;

#define DECIDER_OBJECTS(X) \
    X(table) X(leases) X(locked) X(take) X(clock) X(wall) X(start) X(by) X(whose) X(rule) X(allowed) X(refused) \
    X(titles) X(limit) X(policies) X(both) X(spell) X(spelled) X(limit_pair) X(policy_pair) X(reset_pair)
HOLDS(Decider, decider, DECIDER_OBJECTS)

/* What was decided about a request that is let pass; stands for a Decision. It can be in no cycle
 * that the collector would have to find: it holds a text, and a Decider, which knows no requests.
 */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Decider *decider;
    PyObject *key;
    long long remaining;
    double moment, seconds; /* when the quota is whole, on the wall; and how long that is, rounded up */
} Decided;

static PyObject *decided_call(PyObject *, PyObject *const *, size_t, PyObject *);

/* start + "=" + name, new reference; NULL without an exception where it takes the function. */
static PyObject *
joined(PyObject *start, const char *between, PyObject *name, Py_ssize_t most)
{
    if (!is_ascii(name))
        return NULL;
    Py_ssize_t first = PyUnicode_GET_LENGTH(start), middle = *between != 0, last = PyUnicode_GET_LENGTH(name);
    const char *text = (const char *)PyUnicode_1BYTE_DATA(name);
    if (last == 0 || last > most || (!middle && memchr(text, ':', last) != NULL))
        return NULL;
    PyObject *key = PyUnicode_New(first + middle + last, 127);
    if (key == NULL)
        return NULL;
    char *out = (char *)PyUnicode_1BYTE_DATA(key);
    memcpy(out, PyUnicode_1BYTE_DATA(start), first);
    memcpy(out + first, between, middle);
    memcpy(out + first + middle, text, last);
    return key;
}

/* The key of the request's bucket; new reference. */
static PyObject *
key_for(Decider *self, PyObject *ask)
{
    PyObject *key = NULL;
    if (self->by != Py_None && is_exchange(ask)) {
        if (self->by == Py_True) {
            PyObject *client = FIELD(ask, client);
            key = is_set(client) ? joined(self->start, "", client, 39) : NULL;
        } else if (is_set(FIELD(ask, identity))) {
            PyObject *name = PyObject_GetAttr(FIELD(ask, identity), self->by);
            if (name == NULL)
                return NULL;
            key = joined(self->start, "=", name, 64);
            Py_DECREF(name);
        }
        if (key != NULL || PyErr_Occurred())
            return key;
    }
    PyObject *name = PyObject_CallOneArg(self->whose, ask);
    if (name == NULL)
        return NULL;
    if (!PyUnicode_Check(name))
        PyErr_SetString(PyExc_TypeError, "a client is a text");
    else
        key = PyUnicode_Concat(self->start, name);
    Py_DECREF(name);
    return key;
}

/* Whether nobody is in the middle of a decision in Python: 1, 0 or -1. */
static int
is_free(Decider *self)
{
    PyObject *held = PyObject_CallNoArgs(self->locked);
    Py_XDECREF(held); /* a bool */
    return held == NULL ? -1 : held == Py_False;
}

/* As LeaseStore.at_hand: 1, if there are tokens for it. 0: that is to be looked at there; or -1. */
static int
leased_here(Decider *self, PyObject *key, double moment, Outcome *found)
{
    int unlocked = is_free(self);
    PyObject *known = unlocked > 0 ? PyDict_GetItemWithError(self->leases, key) : NULL;
    if (known == NULL)
        return unlocked < 0 || PyErr_Occurred() ? -1 : 0;
    if (!PyObject_TypeCheck(known, &LeaseType))
        return 0;
    Lease *lease = (Lease *)known;
    long long tokens = lease->tokens - self->rate.cost;
    int low = !lease->brief && tokens * LOW <= lease->size && moment >= lease->due_at;
    if (!(lease->until > moment) || tokens < 0 || low)
        return 0;
    lease->tokens = tokens;
    *found = (Outcome){1, lease->remaining + tokens, fmax(lease->reset_at - moment, 0.0), 0.0};
    return 1;
}

/* Charge the bucket if it is there, and nobody is in the middle of a decision: 1. 0: not; or -1. */
static int
charged_here(Decider *self, PyObject *key, double moment, Outcome *found)
{
    if (self->leases != Py_None)
        return leased_here(self, key, moment, found);
    if ((PyObject *)self->table == Py_None)
        return 0;
    int unlocked = is_free(self);
    if (unlocked <= 0)
        return unlocked;
    double passed = moment - self->table->start;
    PyObject *live = self->table->live;
    if (!(passed >= 0.0 && passed < self->span) || live == NULL || !PyDict_CheckExact(live))
        return 0;
    PyObject *state = PyDict_GetItemWithError(live, key);
    if (state == NULL)
        return PyErr_Occurred() ? -1 : 0;
    PyObject *next = next_state(&self->rate, state, passed, moment, found);
    if (next == NULL)
        return PyErr_Occurred() ? -1 : found->allowed >= 0;
    int failed = PyDict_SetItem(live, key, next);
    Py_DECREF(next);
    return failed < 0 ? -1 : 1;
}

/* As charged_here, by the reference. */
static int
charged_there(Decider *self, PyObject *key, Outcome *found)
{
    PyObject *cost = PyLong_FromLongLong(self->rate.cost);
    PyObject *outcome = cost == NULL ? NULL : PyObject_CallFunctionObjArgs(self->take, key, cost, NULL);
    Py_XDECREF(cost);
    if (outcome == NULL)
        return -1;
    if (outcome == Py_None) {
        Py_DECREF(outcome);
        return 0;
    }
    PyObject *state;
    int fits = PyArg_ParseTuple(outcome, "pOLdd", &found->allowed, &state, &found->remaining, &found->reset,
                                &found->wait);
    Py_DECREF(outcome);
    return fits ? 1 : -1;
}

/* Stage.decide at this moment, if the clock is ours; or Stage.at_hand. New reference. */
static PyObject *
decide(Decider *self, PyObject *ask, double moment)
{
    Outcome found;
    double wall;
    if (self->clock != Py_None && read_clock(self->clock, &moment) < 0)
        return NULL;
    PyObject *key = key_for(self, ask);
    if (key == NULL)
        return NULL;
    int decided_it = charged_here(self, key, moment, &found);
    if (decided_it == 0)
        decided_it = charged_there(self, key, &found);
    if (decided_it < 0)
        goto failed;
    if (!decided_it) {
        Py_DECREF(key);
        Py_RETURN_NONE;
    }
    if (!found.allowed) {
        Py_DECREF(key);
        return PyObject_CallFunction(self->refused, "OLdd", ask, found.remaining, found.reset, found.wait);
    }
    if (counted(self->allowed) < 0)
        goto failed;
    if (self->wall == Py_None)
        wall = self->clock == Py_None ? wall_at(moment) : clock_of(CLOCK_REALTIME);
    else if (read_clock(self->wall, &wall) < 0)
        goto failed;
    Decided *decided = PyObject_New(Decided, &DecidedType);
    if (decided == NULL)
        goto failed;
    decided->call = decided_call;
    decided->decider = (Decider *)Py_NewRef(self);
    decided->key = key;
    decided->remaining = found.remaining;
    decided->moment = ceil(wall + found.reset);
    decided->seconds = ceil(found.reset);
    return (PyObject *)decided;
failed:
    Py_DECREF(key);
    return NULL;
}

static PyObject *
decider_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    if (PyVectorcall_NARGS(flags) != 1 || keywords != NULL) {
        PyErr_SetString(PyExc_TypeError, "a decision is about one request");
        return NULL;
    }
    return decide((Decider *)callable, args[0], now());
}

static PyObject *
decider_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"table", "leases", "locked", "take", "clock", "wall", "start", "by", "whose", "rule",
                           "allowed", "refused", "titles", "texts", "strategy", "amount", "most", "period",
                           "span", "cost", NULL};
    PyObject *table, *leases, *locked, *take, *clock, *wall, *start, *by, *whose, *rule, *allowed, *refused;
    PyObject *titles, *limit, *policies, *both;
    const char *strategy;
    long long amount, most, cost;
    double period, span;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OOOOOOUOOOOOO!(UUU)sLLddL", keys, &table, &leases,
                                     &locked, &take, &clock, &wall, &start, &by, &whose, &rule, &allowed,
                                     &refused, &PyTuple_Type, &titles, &limit, &policies, &both, &strategy,
                                     &amount, &most, &period, &span, &cost))
        return NULL;
    static const char *const strategies[] = {"fixed", "sliding", "gcra"};
    int how = 0;
    while (how <= GCRA && strcmp(strategy, strategies[how]) != 0)
        how++;
    if (table != Py_None && !PyObject_TypeCheck(table, &WindowType)) {
        PyErr_SetString(PyExc_TypeError, "a table is a Window or None");
        return NULL;
    }
    if (leases != Py_None && !PyDict_CheckExact(leases)) {
        PyErr_SetString(PyExc_TypeError, "leases are a dictionary or None");
        return NULL;
    }
    if (how > GCRA || !is_ascii(start) || !is_ascii(limit) || !is_ascii(policies) || !is_ascii(both)
        || PyTuple_GET_SIZE(titles) != HEADERS || amount < 1 || cost < 1 || !(period > 0.0)) {
        PyErr_SetString(PyExc_ValueError, "this is decided in Python");
        return NULL;
    }
    Decider *self = (Decider *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    PyObject *spell = NULL, *spelled = NULL, *limit_pair = NULL, *policy_pair = NULL, *reset_pair = NULL;
#define TAKE(name) self->name = (void *)Py_XNewRef(name);
    DECIDER_OBJECTS(TAKE)
    self->call = decider_call;
    self->moment = self->seconds = -1.0;
    self->span = span;
    double interval = period / (double)amount;
    self->rate = (Rate){how, amount, cost, period, interval, interval * (double)most};
    return (PyObject *)self;
}

static PyTypeObject DeciderType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._limits.Decider",
    .tp_doc = "Stage.decide for one rule with one rate.",
    .tp_basicsize = sizeof(Decider),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = decider_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Decider, call),
    .tp_dealloc = (destructor)decider_dealloc,
    .tp_traverse = (traverseproc)decider_traverse,
    .tp_clear = (inquiry)decider_clear,
};

/* Decided: its headers, as say_with makes them ------------------------------------------------------ */

static int
digits(long long number, char *text)
{
    char turned[24];
    int count = 0, length = 0;
    unsigned long long rest = number < 0 ? -(unsigned long long)number : (unsigned long long)number;
    do
        turned[count++] = (char)('0' + rest % 10);
    while (rest /= 10);
    if (number < 0)
        text[length++] = '-';
    while (count)
        text[length++] = turned[--count];
    return length;
}

/* A value as the protocol writes it, with room for its characters at *text; new reference. */
static inline PyObject *
value_for(Decider *self, Py_ssize_t length, char **text)
{
    PyObject *value = self->bytes ? PyBytes_FromStringAndSize(NULL, length) : PyUnicode_New(length, 127);
    if (value != NULL)
        *text = self->bytes ? PyBytes_AS_STRING(value) : (char *)PyUnicode_1BYTE_DATA(value);
    return value;
}

static inline PyObject *
value_of(Decider *self, const char *characters, Py_ssize_t length)
{
    char *text;
    PyObject *value = value_for(self, length, &text);
    if (value != NULL)
        memcpy(text, characters, length);
    return value;
}

/* (name, value); takes the reference of the value, which may be NULL with an exception. */
static inline PyObject *
pair_of(Decider *self, int header, PyObject *value)
{
    PyObject *pair = value == NULL ? NULL : PyTuple_New(2);
    if (pair == NULL) {
        Py_XDECREF(value);
        return NULL;
    }
    PyTuple_SET_ITEM(pair, 0, Py_NewRef(PyTuple_GET_ITEM(self->spelled, header)));
    PyTuple_SET_ITEM(pair, 1, value);
    return pair;
}

static PyObject *
text_pair(Decider *self, int header, PyObject *text)
{
    return pair_of(self, header, value_of(self, (char *)PyUnicode_1BYTE_DATA(text), PyUnicode_GET_LENGTH(text)));
}

/* Write names as `spell` does, or (None) as they are. They are known for one protocol at a time. */
static int
spell_by(Decider *self, PyObject *spell)
{
    PyObject *all = PyTuple_New(HEADERS);
    for (int i = 0; all != NULL && i < HEADERS; i++) {
        PyObject *title = PyTuple_GET_ITEM(self->titles, i);
        PyObject *name = spell == Py_None ? Py_NewRef(title) : PyObject_CallOneArg(spell, title);
        if (name == NULL)
            Py_CLEAR(all);
        else
            PyTuple_SET_ITEM(all, i, name);
    }
    if (all == NULL)
        return -1;
    Py_XSETREF(self->spelled, all);
    self->bytes = PyBytes_Check(PyTuple_GET_ITEM(all, 0));
    Py_XSETREF(self->limit_pair, text_pair(self, LIMIT, self->limit));
    Py_XSETREF(self->policy_pair, text_pair(self, POLICY, self->policies));
    self->moment = -1.0;
    Py_XSETREF(self->spell, Py_NewRef(spell));
    if (self->limit_pair != NULL && self->policy_pair != NULL)
        return 0;
    Py_CLEAR(self->spell);
    return -1;
}

/* The five headers; `out` gets new references. 0 or -1. */
static int
headers_of(Decided *decided, PyObject *spell, PyObject **out)
{
    Decider *self = decided->decider;
    if (self->spell != spell && spell_by(self, spell) < 0)
        return -1;
    /* The moment stays the same for as long as a window, and the seconds for one. */
    if (self->moment != decided->moment) {
        char number[400];
        int length = PyOS_snprintf(number, sizeof number, "%.0f", decided->moment);
        PyObject *pair = pair_of(self, RESET, value_of(self, number, length));
        if (pair == NULL)
            return -1;
        Py_XSETREF(self->reset_pair, pair);
        self->moment = decided->moment;
    }
    if (self->seconds != decided->seconds) {
        int length = PyOS_snprintf(self->tail, sizeof self->tail, ";t=%.0f", decided->seconds);
        self->tail_length = Py_MIN(length, (int)sizeof self->tail - 1);
        self->seconds = decided->seconds;
    }
    char left[24], *text;
    int length = digits(decided->remaining, left);
    Py_ssize_t first = PyUnicode_GET_LENGTH(self->both);
    PyObject *both = value_for(self, first + length + self->tail_length, &text);
    if (both == NULL)
        return -1;
    memcpy(text, PyUnicode_1BYTE_DATA(self->both), first);
    memcpy(text + first, left, length);
    memcpy(text + first + length, self->tail, self->tail_length);
    out[BOTH] = pair_of(self, BOTH, both);
    out[REMAINING] = out[BOTH] == NULL ? NULL : pair_of(self, REMAINING, value_of(self, left, length));
    if (out[REMAINING] == NULL) {
        Py_XDECREF(out[BOTH]);
        return -1;
    }
    out[LIMIT] = Py_NewRef(self->limit_pair);
    out[RESET] = Py_NewRef(self->reset_pair);
    out[POLICY] = Py_NewRef(self->policy_pair);
    return 0;
}

/* decided(list, spell): puts the headers behind those in the list. */
static PyObject *
decided_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    PyObject *pairs[HEADERS];
    if (PyVectorcall_NARGS(flags) != 2 || keywords != NULL || !PyList_CheckExact(args[0])) {
        PyErr_SetString(PyExc_TypeError, "headers go behind those in a list, spelled by a function");
        return NULL;
    }
    if (headers_of((Decided *)callable, args[1], pairs) < 0)
        return NULL;
    int failed = 0;
    for (int i = 0; i < HEADERS; i++) {
        failed = failed || PyList_Append(args[0], pairs[i]) < 0;
        Py_DECREF(pairs[i]);
    }
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
decided_headers(Decided *self, void *Py_UNUSED(closure))
{
    PyObject *pairs[HEADERS], *all = PyTuple_New(HEADERS);
    if (all != NULL && headers_of(self, Py_None, pairs) < 0)
        Py_CLEAR(all);
    for (int i = 0; all != NULL && i < HEADERS; i++)
        PyTuple_SET_ITEM(all, i, pairs[i]);
    return all;
}

static PyObject *
decided_iter(Decided *self)
{
    PyObject *all = decided_headers(self, NULL);
    PyObject *iterator = all == NULL ? NULL : PyObject_GetIter(all);
    Py_XDECREF(all);
    return iterator;
}

static PyObject *
client_of(Decided *self)
{
    Py_ssize_t start = PyUnicode_GET_LENGTH(self->decider->start);
    return PyUnicode_Substring(self->key, start, PyUnicode_GET_LENGTH(self->key));
}

static PyObject *
decided_taken(Decided *self, void *Py_UNUSED(closure))
{
    PyObject *client = client_of(self);
    if (client == NULL)
        return NULL;
    return Py_BuildValue("(ONL)", self->decider->rule, client, self->decider->rate.cost);
}

static PyObject *
decided_charges(Decided *self, void *Py_UNUSED(closure))
{
    PyObject *client = client_of(self), *cost = PyLong_FromLongLong(self->decider->rate.cost);
    PyObject *charges = NULL;
    if (client != NULL && cost != NULL)
        charges = PyObject_CallMethodObjArgs(self->decider->rule, names.charges, client, cost, NULL);
    Py_XDECREF(client);
    Py_XDECREF(cost);
    return charges;
}

static PyObject *
decided_constant(Decided *Py_UNUSED(self), void *constant)
{
    return Py_NewRef(constant == NULL ? nothing : (PyObject *)constant);
}

static PyMemberDef decided_members[] = {
    {"remaining", T_LONGLONG, offsetof(Decided, remaining), READONLY, NULL},
    {NULL},
};

static PyGetSetDef decided_getset[] = {
    {"allowed", (getter)decided_constant, NULL, NULL, Py_True},
    {"says", (getter)decided_constant, NULL, NULL, Py_True},
    {"response", (getter)decided_constant, NULL, NULL, Py_None},
    {"slots", (getter)decided_constant, NULL, NULL, NULL},
    {"headers", (getter)decided_headers, NULL, NULL, NULL},
    {"taken", (getter)decided_taken, NULL, NULL, NULL},
    {"charges", (getter)decided_charges, NULL, NULL, NULL},
    {NULL},
};

static void
decided_dealloc(Decided *self)
{
    Py_XDECREF(self->decider);
    Py_XDECREF(self->key);
    PyObject_Free(self);
}

static PyTypeObject DecidedType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._limits.Decided",
    .tp_doc = "As Decision, of a request that is let pass.",
    .tp_basicsize = sizeof(Decided),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Decided, call),
    .tp_iter = (getiterfunc)decided_iter,
    .tp_dealloc = (destructor)decided_dealloc,
    .tp_members = decided_members,
    .tp_getset = decided_getset,
};

/* What both steps do with a decision; takes its reference. None, or an answer to send instead. Where
 * there is no decision yet, it is for `other`.
 */
static PyObject *
settled(PyObject *x, PyObject *decision, PyObject *settle, PyObject *other)
{
    if (decision == NULL)
        return NULL;
    if (decision == Py_None) {
        Py_DECREF(decision);
        return PyObject_CallOneArg(other, x);
    }
    if (!Py_IS_TYPE(decision, &DecidedType) || FIELD(x, charged) != nothing) {
        PyObject *done = PyObject_CallFunctionObjArgs(settle, x, decision, NULL);
        Py_DECREF(decision);
        return done;
    }
    PyObject *charged = PyTuple_New(1);
    if (charged == NULL) {
        Py_DECREF(decision);
        return NULL;
    }
    put(&FIELD(x, extra), decision);
    PyTuple_SET_ITEM(charged, 0, decision);
    put(&FIELD(x, charged), charged);
    Py_DECREF(charged);
    Py_RETURN_NONE;
}

/* An Exception of ours, if one is set, is for `shut` to answer. */
static PyObject *
or_shut(PyObject *reply, PyObject *x, PyObject *shut)
{
    if (reply != NULL || !PyErr_ExceptionMatches(PyExc_Exception))
        return reply;
    PyObject *error = take_error();
    reply = PyObject_CallFunctionObjArgs(shut, x, error, NULL);
    Py_DECREF(error);
    return reply;
}

/* What is known of a request's like, new reference: looked up under `key`, else asked and kept. */
static PyObject *
known(PyObject *memory, PyObject *key, PyObject *find, PyObject *x, Py_ssize_t most)
{
    PyObject *found = PyDict_GetItemWithError(memory, key);
    if (found != NULL || PyErr_Occurred())
        return Py_XNewRef(found);
    found = PyObject_CallOneArg(find, x);
    if (found == NULL)
        return NULL;
    if (PyDict_GET_SIZE(memory) >= most)
        PyDict_Clear(memory);
    if (PyDict_SetItem(memory, key, found) < 0)
        Py_CLEAR(found);
    return found;
}

/* Who an Identity is: where its type keeps it. */
typedef struct {
    PyTypeObject *type;
    Py_ssize_t tier, master;
} Who;

/* The tier of somebody with a usual key, borrowed; NULL without an exception for any other. */
static PyObject *
tier_of(const Who *who, PyObject *identity)
{
    if (!Py_IS_TYPE(identity, who->type) || *(PyObject **)((char *)identity + who->master) != Py_False)
        return NULL;
    PyObject *tier = *(PyObject **)((char *)identity + who->tier);
    return tier != NULL && PyUnicode_CheckExact(tier) ? tier : NULL;
}

/* Where instances of a type keep what a member of it names; -1 with an exception. */
static Py_ssize_t
offset_of(PyTypeObject *type, const char *name, int kind)
{
    PyObject *found = PyObject_GetAttrString((PyObject *)type, name);
    if (found == NULL)
        return -1;
    Py_ssize_t offset = -1;
    if (Py_IS_TYPE(found, &PyMemberDescr_Type)) {
        PyMemberDef *member = ((PyMemberDescrObject *)found)->d_member;
        if (member->type == kind || (kind == T_OBJECT_EX && member->type == T_OBJECT))
            offset = member->offset;
    }
    if (offset < 0)
        PyErr_Format(PyExc_TypeError, "%s of %s is not what it was", name, type->tp_name);
    Py_DECREF(found);
    return offset;
}

static int
who_is(PyObject *type, Who *who)
{
    who->type = (PyTypeObject *)type;
    who->tier = offset_of(who->type, "tier", T_OBJECT_EX);
    who->master = who->tier < 0 ? -1 : offset_of(who->type, "master", T_OBJECT_EX);
    return who->master < 0 ? -1 : 0;
}

/* Edge: the step at the edge, as Admission.edge -------------------------------------------------- */

enum { PATHS = 1024, LONGEST_PATH = 256, HANDLERS = 4096, KINDS = 32, BEARER = 7 };

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *good, *accepted, *identity; /* `good` is None without keys */
    PyObject *paths, *find;               /* `paths` is None without limits by path */
    PyObject *whole, *limit, *settle, *shut;
    Who who;
    int requires;
} Edge;

#define EDGE_OBJECTS(X) \
    X(good) X(accepted) X(identity) X(paths) X(find) X(whole) X(limit) X(settle) X(shut)
HOLDS(Edge, edge, EDGE_OBJECTS)

/* The one credential of a request, new reference; NULL without an exception if that takes a look. */
static PyObject *
credential(PyObject *pair)
{
    if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2)
        return NULL;
    PyObject *key = PyTuple_GET_ITEM(pair, 0), *authorization = PyTuple_GET_ITEM(pair, 1);
    if (!is_ascii(key) || !is_ascii(authorization))
        return NULL;
    Py_ssize_t length = PyUnicode_GET_LENGTH(authorization);
    if (PyUnicode_GET_LENGTH(key))
        return length ? NULL : Py_NewRef(key);
    const char *text = (const char *)PyUnicode_1BYTE_DATA(authorization);
    if (length <= BEARER || PyOS_mystrnicmp(text, "bearer ", BEARER) != 0)
        return NULL;
    return PyUnicode_Substring(authorization, BEARER, length);
}

/* Whether the request comes with a key that was verified a short time ago: then it is counted, and
 * the exchange knows whose it is. Nothing here differs between credentials that are not known, and
 * what they lead to is the same function; see keys.verifier for what a look-up may tell. 1, 0 or -1.
 */
static int
recognised(Edge *self, PyObject *x, PyObject *pair, double moment)
{
    PyObject *token = credential(pair);
    if (token == NULL)
        return PyErr_Occurred() ? -1 : 0;
    PyObject *found = PyDict_GetItemWithError(self->good, token), *count = NULL;
    int known = 0;
    if (found != NULL && PyTuple_CheckExact(found) && PyTuple_GET_SIZE(found) == 2) {
        PyObject *identity = PyTuple_GET_ITEM(found, 0), *until = PyTuple_GET_ITEM(found, 1);
        PyObject *tier = tier_of(&self->who, identity);
        if (tier != NULL && PyFloat_CheckExact(until) && PyFloat_AS_DOUBLE(until) > moment
            && (count = PyDict_GetItemWithError(self->accepted, tier)) != NULL) {
            Py_INCREF(identity);
            Py_INCREF(count);
            known = counted(count) < 0 ? -1 : 1;
            if (known > 0)
                put(&FIELD(x, identity), identity);
            Py_DECREF(count);
            Py_DECREF(identity);
        }
    }
    Py_DECREF(token);
    return PyErr_Occurred() ? -1 : known;
}

static PyObject *
limited_by_path(Edge *self, PyObject *x, double moment)
{
    PyObject *routed = FIELD(x, routed), *method = FIELD(x, method);
    if (routed == NULL || method == NULL || !PyUnicode_CheckExact(routed) || !PyUnicode_CheckExact(method)
        || PyUnicode_GET_LENGTH(routed) > LONGEST_PATH || PyUnicode_Compare(method, names.options) == 0)
        return PyObject_CallOneArg(self->limit, x);
    Py_INCREF(routed);
    PyObject *found = known(self->paths, routed, self->find, x, PATHS);
    Py_DECREF(routed);
    if (found == NULL || found == Py_None)
        return found;
    PyObject *reply = Py_IS_TYPE(found, &DeciderType)
                          ? settled(x, decide((Decider *)found, x, moment), self->settle, self->limit)
                          : PyObject_CallOneArg(self->limit, x);
    Py_DECREF(found);
    return reply;
}

static PyObject *
edge_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Edge *self = (Edge *)callable;
    if (PyVectorcall_NARGS(flags) != 1 || keywords != NULL || !is_exchange(args[0]))
        return PyObject_Vectorcall(self->whole, args, flags, keywords);
    PyObject *x = args[0];
    double moment = *(double *)((char *)x + at.started); /* a moment ago: this is part of `open` */
    if (self->good != Py_None) {
        PyObject *pair = FIELD(x, credentials);
        int usual = is_set(pair) ? recognised(self, x, pair, moment) : !self->requires;
        if (usual < 0)
            return or_shut(NULL, x, self->shut);
        if (!usual)
            return PyObject_CallOneArg(self->whole, x);
    }
    if (self->paths == Py_None)
        Py_RETURN_NONE;
    return or_shut(limited_by_path(self, x, moment), x, self->shut);
}

static PyObject *
edge_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"good", "accepted", "identity", "requires", "paths", "find",
                           "whole", "limit", "settle", "shut", NULL};
    PyObject *good, *accepted, *identity, *paths, *find, *whole, *limit, *settle, *shut;
    int requires;
    Who who;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OO!O!pOOOOOO", keys, &good, &PyDict_Type, &accepted,
                                     &PyType_Type, &identity, &requires, &paths, &find, &whole, &limit,
                                     &settle, &shut)
        || who_is(identity, &who) < 0)
        return NULL;
    if ((good != Py_None && !PyDict_CheckExact(good)) || (paths != Py_None && !PyDict_CheckExact(paths))) {
        PyErr_SetString(PyExc_TypeError, "good and paths are dictionaries or None");
        return NULL;
    }
    Edge *self = (Edge *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    EDGE_OBJECTS(KEEP)
    self->call = edge_call;
    self->who = who;
    self->requires = requires;
    return (PyObject *)self;
}

static PyTypeObject EdgeType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._limits.Edge",
    .tp_doc = "As Admission.edge.",
    .tp_basicsize = sizeof(Edge),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = edge_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Edge, call),
    .tp_dealloc = (destructor)edge_dealloc,
    .tp_traverse = (traverseproc)edge_traverse,
    .tp_clear = (inquiry)edge_clear,
};

/* Route: the step at the route, as Admission.route ----------------------------------------------- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *handlers, *identity, *find, *whole, *settle, *shut;
    Who who;
    int known_pass; /* nothing is asked here of somebody with a key */
} Route;

#define ROUTE_OBJECTS(X) X(handlers) X(identity) X(find) X(whole) X(settle) X(shut)
HOLDS(Route, route, ROUTE_OBJECTS)

/* Whether two are the same text or both None. */
static inline int
alike(PyObject *one, PyObject *other)
{
    if (one == other)
        return 1;
    if (one == Py_None || other == Py_None || PyUnicode_GET_LENGTH(one) != PyUnicode_GET_LENGTH(other))
        return 0;
    return PyUnicode_KIND(one) == PyUnicode_KIND(other)
           && memcmp(PyUnicode_DATA(one), PyUnicode_DATA(other),
                     PyUnicode_GET_LENGTH(one) * PyUnicode_KIND(one)) == 0;
}

/* Remember (method, route, tier, what it comes to) of a handler; takes the reference. 0 or -1. */
static int
keep_kind(Route *self, PyObject *marked, PyObject *kind)
{
    if (kind == NULL)
        return -1;
    if (PyDict_GET_SIZE(self->handlers) >= HANDLERS)
        PyDict_Clear(self->handlers);
    PyObject *kinds = Py_XNewRef(PyDict_GetItemWithError(self->handlers, marked));
    int failed = 0;
    if (kinds == NULL || PyList_GET_SIZE(kinds) >= KINDS) {
        Py_XDECREF(kinds);
        kinds = PyErr_Occurred() ? NULL : PyList_New(0);
        failed = kinds == NULL ? -1 : PyDict_SetItem(self->handlers, marked, kinds);
    }
    failed = failed < 0 ? -1 : PyList_Append(kinds, kind);
    Py_XDECREF(kinds);
    Py_DECREF(kind);
    return failed;
}

/* What the step comes to, by handler, method, route and tier: new reference; NULL without an exception
 * where that has to be looked at anew. The hash of a handler that is no function may be anything.
 */
static PyObject *
known_route(Route *self, PyObject *x)
{
    PyObject *marked = is_set(FIELD(x, marked)) ? FIELD(x, marked) : Py_None, *tier = Py_None;
    PyObject *method = FIELD(x, method), *endpoint = FIELD(x, endpoint);
    if (!PyFunction_Check(marked) && marked != Py_None && !Py_IS_TYPE(marked, &PyType_Type))
        return NULL;
    if (method == NULL || endpoint == NULL || !PyUnicode_CheckExact(method) || !PyUnicode_CheckExact(endpoint)
        || PyUnicode_Compare(method, names.options) == 0)
        return NULL;
    if (is_set(FIELD(x, identity)) && (tier = tier_of(&self->who, FIELD(x, identity))) == NULL)
        return NULL;
    PyObject *kinds = PyDict_GetItemWithError(self->handlers, marked);
    if (kinds == NULL && PyErr_Occurred())
        return NULL;
    for (Py_ssize_t i = 0; kinds != NULL && i < PyList_GET_SIZE(kinds); i++) {
        PyObject **kind = ((PyTupleObject *)PyList_GET_ITEM(kinds, i))->ob_item;
        if (alike(kind[0], method) && alike(kind[1], endpoint) && alike(kind[2], tier))
            return Py_NewRef(kind[3]);
    }
    PyObject *found = PyObject_CallOneArg(self->find, x);
    if (found != NULL && keep_kind(self, marked, PyTuple_Pack(4, method, endpoint, tier, found)) < 0)
        Py_CLEAR(found);
    return found;
}

static PyObject *
route_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Route *self = (Route *)callable;
    if (PyVectorcall_NARGS(flags) != 1 || keywords != NULL || !is_exchange(args[0]))
        return PyObject_Vectorcall(self->whole, args, flags, keywords);
    PyObject *x = args[0];
    if (self->known_pass && is_set(FIELD(x, identity)))
        Py_RETURN_NONE;
    PyObject *found = known_route(self, x);
    if (found == Py_None)
        return found;
    if (found == NULL && PyErr_Occurred())
        return or_shut(NULL, x, self->shut);
    PyObject *reply = found != NULL && Py_IS_TYPE(found, &DeciderType)
                          ? or_shut(settled(x, decide((Decider *)found, x, now()), self->settle, self->whole), x,
                                    self->shut)
                          : PyObject_CallOneArg(self->whole, x);
    Py_XDECREF(found);
    return reply;
}

static PyObject *
route_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"identity", "find", "whole", "settle", "shut", "known_pass", NULL};
    PyObject *identity, *find, *whole, *settle, *shut;
    int known_pass;
    Who who;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$O!OOOOp", keys, &PyType_Type, &identity, &find, &whole,
                                     &settle, &shut, &known_pass)
        || who_is(identity, &who) < 0)
        return NULL;
    PyObject *handlers = PyDict_New();
    Route *self = handlers == NULL ? NULL : (Route *)type->tp_alloc(type, 0);
    if (self != NULL) {
        ROUTE_OBJECTS(KEEP)
        self->call = route_call;
        self->known_pass = known_pass;
        self->who = who;
    }
    Py_XDECREF(handlers);
    return (PyObject *)self;
}

static PyTypeObject RouteType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._limits.Route",
    .tp_doc = "As Admission.route.",
    .tp_basicsize = sizeof(Route),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = route_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Route, call),
    .tp_dealloc = (destructor)route_dealloc,
    .tp_traverse = (traverseproc)route_traverse,
    .tp_clear = (inquiry)route_clear,
};

/* Shortcut: through the wrapper of a marked handler ---------------------------------------------- */

static PyObject *current;           /* the context variable of the exchange */
static vectorcallfunc whole_wrapper; /* that of functions written in Python */

/* As `enforcing._wrapper` has them: the wrapper calls what it wraps, after a look whether its route's
 * hook has decided. This looks, and calls it at once, so that nothing stands between; if it has not,
 * the wrapper is called.
 */
static PyObject *
shortcut(PyObject *wrapper, PyObject *const *args, size_t flags, PyObject *keywords)
{
    PyObject *x, *closure = PyFunction_GET_CLOSURE(wrapper);
    if (PyContextVar_Get(current, NULL, &x) < 0)
        return NULL;
    int decided = x != NULL && is_exchange(x) && FIELD(x, marked) == wrapper;
    Py_XDECREF(x);
    PyObject *function = decided && closure != NULL ? PyCell_Get(PyTuple_GET_ITEM(closure, 0)) : NULL;
    if (function == NULL) /* or somebody has emptied its cell */
        return whole_wrapper(wrapper, args, flags, keywords);
    PyObject *result = PyObject_Vectorcall(function, args, flags, keywords);
    Py_DECREF(function);
    return result;
}

/* shorten(wrapper, current): calls of the wrapper take the shortcut. What it wraps is in the first cell
 * of its closure.
 */
static PyObject *
limits_shorten(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *wrapper, *variable, *closure;
    if (!PyArg_ParseTuple(args, "O!O!", &PyFunction_Type, &wrapper, &PyContextVar_Type, &variable))
        return NULL;
    closure = PyFunction_GET_CLOSURE(wrapper);
    if (closure == NULL || PyTuple_GET_SIZE(closure) < 1) {
        PyErr_SetString(PyExc_ValueError, "a wrapper has what it wraps in its closure");
        return NULL;
    }
    put(&current, variable);
    vectorcallfunc usual = ((PyFunctionObject *)wrapper)->vectorcall;
    if (usual == shortcut)
        Py_RETURN_NONE;
    whole_wrapper = usual;
#if PY_VERSION_HEX >= 0x030C0000
    PyFunction_SetVectorcall((PyFunctionObject *)wrapper, shortcut);
#else
    ((PyFunctionObject *)wrapper)->vectorcall = shortcut; /* as that does, since 3.12 */
#endif
    Py_RETURN_NONE;
}

static PyMethodDef limits_functions[] = {
    {"shorten", limits_shorten, METH_VARARGS, "Let calls of a marked handler's wrapper take the shortcut."},
    {NULL},
};

/* Module --------------------------------------------------------------------------------------- */

static int
look_up_fields(PyObject *speed)
{
    PyObject *fields = PyObject_GetAttrString(speed, "Fields");
    PyObject *shelf = fields == NULL ? NULL : PyObject_GetAttrString(speed, "Shelf");
    if (shelf == NULL || !PyType_Check(fields) || !PyType_Check(shelf)) {
        Py_XDECREF(fields);
        Py_XDECREF(shelf);
        return -1;
    }
    exchange_type = (PyTypeObject *)fields; /* both are kept, as everything static is */
    shelf_type = (PyTypeObject *)shelf;
    static const struct { Py_ssize_t *to; const char *name; } wanted[] = {
        {&at.method, "method"}, {&at.routed, "routed"}, {&at.client, "client"},
        {&at.endpoint, "endpoint"}, {&at.marked, "marked"}, {&at.credentials, "credentials"},
        {&at.identity, "identity"}, {&at.charged, "charged"}, {&at.extra, "extra"},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        if ((*wanted[i].to = offset_of(exchange_type, wanted[i].name, T_OBJECT_EX)) < 0)
            return -1;
    at.started = offset_of(exchange_type, "started", T_DOUBLE);
    cells_at = at.started < 0 ? -1 : offset_of(shelf_type, "cells", T_OBJECT_EX);
    return cells_at < 0 ? -1 : 0;
}

static int
set_up(void)
{
    PyObject *speed = PyImport_ImportModule("opsguard._speed");
    int failed = speed == NULL || look_up_fields(speed) < 0;
    Py_XDECREF(speed);
    if (failed)
        return -1;
    static const struct { PyObject **to; const char *text; } texts[] = {
        {&names.options, "OPTIONS"}, {&names.charges, "charges"},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if ((*texts[i].to = PyUnicode_InternFromString(texts[i].text)) == NULL)
            return -1;
    nothing = PyTuple_New(0);
    return nothing == NULL ? -1 : 0;
}

/* Runs for each interpreter that imports this, and each time: what is static is set up once. */
static int
limits_exec(PyObject *module)
{
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError, "the accelerator works in the main interpreter only");
        return -1;
    }
    if (nothing == NULL && set_up() < 0)
        return -1;
    static const struct { const char *name; PyTypeObject *type; } types[] = {
        {"Window", &WindowType},   {"Lease", &LeaseType}, {"Tally", &TallyType}, {"Decider", &DeciderType},
        {"Decided", &DecidedType}, {"Edge", &EdgeType},   {"Route", &RouteType},
    };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (PyType_Ready(types[i].type) < 0
            || PyModule_AddObjectRef(module, types[i].name, (PyObject *)types[i].type) < 0)
            return -1;
    return 0;
}

static PyModuleDef_Slot limits_slots[] = {
    {Py_mod_exec, limits_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef limits_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "opsguard._limits",
    .m_doc = "The usual limit and the usual key in C; see `opsguard.accelerator`.",
    .m_methods = limits_functions,
    .m_slots = limits_slots,
};

PyMODINIT_FUNC
PyInit__limits(void)
{
    return PyModuleDef_Init(&limits_module);
}
