/* The request path once more, in C: an optional twin of `plan`, `metrics.http`, `opsguard_asgi.edge`
 * and `opsguard_fastapi.routes`.
 *
 * The Python code is the reference. What is here does the same for the usual request and hands the
 * unusual one to the Python function that it was given: a header the app sets itself, a failure, an
 * answer of ours. It is used under the GIL only, and in the main interpreter only, so a function
 * that calls no Python code is one step to all other threads.
 *
 * References: a local holds what it borrowed from a structure only as long as nothing is called.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <math.h>
#include <pthread.h>
#include <sys/stat.h>
#include <time.h>

#include "_tools.h"

#ifdef Py_GIL_DISABLED
#error "the accelerator relies on the GIL"
#endif

static PyObject *zero, *nothing; /* 0 and () */
static struct {
    PyObject *type, *http, *method, *path, *root_path, *client, *headers, *status, *body, *more_body;
    PyObject *start, *body_kind, *pathsend, *throw, *close, *fastapi;
    PyObject *site_close, *site_enter, *site_open, *site_endpoint, *site_head;
    PyObject *authorization, *empty;
    PyObject *request_method, *path_info, *script_name, *remote_addr, *file_wrapper, *head, *fail;
    PyObject *meta, *routed, *input, *container, *store, *closers, *status_code, *lower, *match, *route;
    PyObject *identity, *request, *url_rule, *rule, *rule_endpoint;
} names;

static PyTypeObject ExchangeType, SeriesType, RecorderType, CoreType, DoorType, EdgeType, RespondType,
    WatchType, HookType, GateType, StartType, BodyType, CloserType;

/* Small tools ---------------------------------------------------------------------------------- */

/* Set it again; takes the reference. NULL: none. */
static void
give_error(PyObject *error)
{
    if (error == NULL)
        return;
#if PY_VERSION_HEX >= 0x030C0000
    PyErr_SetRaisedException(error);
#else
    PyErr_Restore(Py_NewRef(Py_TYPE(error)), error, PyException_GetTraceback(error));
#endif
}

/* The end of the chain of contexts, borrowed; of one that is a ring, any. */
static PyObject *
oldest(PyObject *error)
{
    PyObject *context;
    for (int i = 0; i < 1000 && (context = PyException_GetContext(error)) != NULL; i++) {
        Py_DECREF(context); /* the one before holds it */
        error = context;
    }
    return error;
}

/* Set it again, or, where another one was raised meanwhile, leave it as the context of that, as an
 * `except` block does. Takes the reference.
 */
static void
go_on_with(PyObject *error)
{
    PyObject *newer = take_error();
    if (newer == NULL) {
        give_error(error);
        return;
    }
    PyObject *last = oldest(newer);
    if (last != oldest(error)) /* else they have met already, and would make a ring */
        PyException_SetContext(last, Py_NewRef(error));
    Py_DECREF(error);
    give_error(newer);
}

/* mapping[key], new reference; NULL without an exception if there is none. */
static PyObject *
item(PyObject *mapping, PyObject *key)
{
    PyObject *found;
    if (PyDict_CheckExact(mapping)) {
        found = PyDict_GetItemWithError(mapping, key);
        return Py_XNewRef(found);
    }
    found = PyObject_GetItem(mapping, key);
    if (found == NULL && PyErr_ExceptionMatches(PyExc_KeyError))
        PyErr_Clear();
    return found;
}

/* As `item`, but what is not there is a KeyError. */
static PyObject *
needed(PyObject *mapping, PyObject *key)
{
    PyObject *found = item(mapping, key);
    if (found == NULL && !PyErr_Occurred())
        PyErr_SetObject(PyExc_KeyError, key);
    return found;
}

/* An attribute that need not be there: 1 and a new reference, 0, or -1 with an exception. */
static inline int
optional(PyObject *object, PyObject *name, PyObject **found)
{
#if PY_VERSION_HEX >= 0x030D0000
    return PyObject_GetOptionalAttr(object, name, found);
#else
    return _PyObject_LookupAttr(object, name, found);
#endif
}

static inline int
is_ascii(PyObject *object)
{
    return PyUnicode_CheckExact(object) && PyUnicode_IS_COMPACT_ASCII(object);
}

/* Whether two texts of ASCII are the same; for short ones, of which most differ in length. */
static int
same_ascii(PyObject *text, PyObject *other)
{
    Py_ssize_t left = PyUnicode_GET_LENGTH(text);
    if (left != PyUnicode_GET_LENGTH(other))
        return 0;
    const Py_UCS1 *a = PyUnicode_1BYTE_DATA(text), *b = PyUnicode_1BYTE_DATA(other);
    uint64_t word, with;
    for (; left >= 8; left -= 8, a += 8, b += 8) {
        memcpy(&word, a, 8);
        memcpy(&with, b, 8);
        if (word != with)
            return 0;
    }
    while (left-- > 0)
        if (*a++ != *b++)
            return 0;
    return 1;
}

/* text == other; -1 with an exception. */
static inline int
same(PyObject *text, PyObject *other)
{
    if (text == other)
        return 1;
    return is_ascii(text) && is_ascii(other) ? same_ascii(text, other)
                                             : PyObject_RichCompareBool(text, other, Py_EQ);
}

/* Ids ------------------------------------------------------------------------------------------ */

enum { ID_BYTES = 16, POOL = 128 };
static unsigned char pool[POOL * ID_BYTES];
static int pooled; /* ids left in the pool */
static PyObject *urandom;

static void
forget_pool(void)
{
    pooled = 0; /* a forked child must not repeat the parent's ids */
}

static PyObject *
fresh(void)
{
    static const char digits[] = "0123456789abcdef";
    if (pooled == 0) {
        PyObject *bytes = PyObject_CallFunction(urandom, "i", POOL * ID_BYTES);
        if (bytes == NULL)
            return NULL;
        if (!PyBytes_Check(bytes) || PyBytes_GET_SIZE(bytes) != POOL * ID_BYTES) {
            Py_DECREF(bytes);
            PyErr_SetString(PyExc_OSError, "os.urandom gave too little");
            return NULL;
        }
        memcpy(pool, PyBytes_AS_STRING(bytes), sizeof pool);
        pooled = POOL;
        Py_DECREF(bytes);
    }
    PyObject *text = PyUnicode_New(2 * ID_BYTES, 127);
    if (text == NULL)
        return NULL;
    Py_UCS1 *out = PyUnicode_1BYTE_DATA(text);
    const unsigned char *in = pool + --pooled * ID_BYTES;
    for (int i = 0; i < ID_BYTES; i++) {
        *out++ = digits[in[i] >> 4];
        *out++ = digits[in[i] & 15];
    }
    return text;
}

/* Exchange ------------------------------------------------------------------------------------- */

typedef struct Core Core;

typedef struct {
    PyObject_HEAD
    PyObject *client, *correlation_id, *method, *path, *plan, *request_id, *routed, *source, *status;
    PyObject *charged;
    PyObject *endpoint, *error, *fields, *reply, *series, *work; /* from here on NULL stands for None */
    PyObject *credentials, *extra, *held, *identity, *marked;
    Core *core; /* of a request that was opened here; a websocket has none. The last of the objects */
    double started, first_byte, ended;
    long long received, sent;
    Py_ssize_t place; /* see Recorder */
    char closed, correlated, left, uploads;
} Exchange;

#define OBJECT(name) {#name, T_OBJECT_EX, offsetof(Exchange, name), 0, NULL}
#define OPTIONAL(name) {#name, T_OBJECT, offsetof(Exchange, name), 0, NULL}
static PyMemberDef exchange_members[] = {
    OBJECT(client), OBJECT(correlation_id), OBJECT(method), OBJECT(path), OBJECT(plan),
    OBJECT(request_id), OBJECT(routed), OBJECT(source), OBJECT(status), OBJECT(charged),
    OPTIONAL(endpoint), OPTIONAL(error), OPTIONAL(fields), OPTIONAL(reply), OPTIONAL(series),
    OPTIONAL(work), OPTIONAL(credentials), OPTIONAL(extra), OPTIONAL(held), OPTIONAL(identity),
    OPTIONAL(marked),
    {"started", T_DOUBLE, offsetof(Exchange, started), 0, NULL},
    {"first_byte", T_DOUBLE, offsetof(Exchange, first_byte), 0, NULL},
    {"ended", T_DOUBLE, offsetof(Exchange, ended), 0, NULL},
    {"place", T_PYSSIZET, offsetof(Exchange, place), 0, NULL},
    {"received", T_LONGLONG, offsetof(Exchange, received), 0, NULL},
    {"sent", T_LONGLONG, offsetof(Exchange, sent), 0, NULL},
    {"closed", T_BOOL, offsetof(Exchange, closed), 0, NULL},
    {"correlated", T_BOOL, offsetof(Exchange, correlated), 0, NULL},
    {"left", T_BOOL, offsetof(Exchange, left), 0, NULL},
    {"uploads", T_BOOL, offsetof(Exchange, uploads), 0, NULL},
    {NULL},
};

/* Its objects lie side by side, and are gone through in a loop: that is one line of code in the cache
 * instead of ten.
 */
#define FIRST_OBJECT(x) (&(x)->client)
#define LAST_OBJECT(x) ((PyObject **)&(x)->core)
_Static_assert((offsetof(Exchange, core) - offsetof(Exchange, client)) / sizeof(PyObject *) == 21,
               "an object of Exchange is not between the first and the last, or counted wrong");

#define VISIT(name) Py_VISIT(self->name);
#define CLEAR(name) Py_CLEAR(self->name);

static int
exchange_traverse(Exchange *self, visitproc visit, void *arg)
{
    for (PyObject **object = FIRST_OBJECT(self); object <= LAST_OBJECT(self); object++)
        Py_VISIT(*object);
    return 0;
}

static int
exchange_clear(Exchange *self)
{
    for (PyObject **object = FIRST_OBJECT(self); object <= LAST_OBJECT(self); object++)
        Py_CLEAR(*object);
    return 0;
}

static void
exchange_dealloc(Exchange *self)
{
    PyObject_GC_UnTrack(self);
    exchange_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* As above, for a class in Python that adds no attributes: what Python has for classes looks through
 * all of its bases for some. It also bounds the recursion of a chain and looks for a `__del__` that
 * came later: an exchange holds others through dicts, tuples and exceptions at most, which bound it,
 * and has none.
 */
static void
plain_dealloc(Exchange *self)
{
    PyTypeObject *type = Py_TYPE(self);
    exchange_dealloc(self);
    Py_DECREF(type);
}

static PyMethodDef exchange_methods[4];

static PyTypeObject ExchangeType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Fields",
    .tp_doc = "The attributes of an Exchange.",
    .tp_basicsize = sizeof(Exchange),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)exchange_dealloc,
    .tp_traverse = (traverseproc)exchange_traverse,
    .tp_clear = (inquiry)exchange_clear,
    .tp_members = exchange_members,
    .tp_methods = exchange_methods,
};

/* Shelf and Hinge: the one attribute that is read here on each request, of a class in Python --------
 *
 * A look-up by name walks the class and its bases whenever Python's cache has lost it, which on a
 * page of some size is always.
 */

typedef struct {
    PyObject_HEAD
    PyObject *held;
} Holder;

static int
holder_traverse(Holder *self, visitproc visit, void *arg)
{
    Py_VISIT(self->held);
    return 0;
}

static int
holder_clear(Holder *self)
{
    Py_CLEAR(self->held);
    return 0;
}

static void
holder_dealloc(Holder *self)
{
    PyObject_GC_UnTrack(self);
    holder_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

#define HOLDER(Name, attribute, text) \
    static PyMemberDef Name##_members[] = { \
        {attribute, T_OBJECT_EX, offsetof(Holder, held), 0, NULL}, \
        {NULL}, \
    }; \
    static PyTypeObject Name##Type = { \
        PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed." #Name, \
        .tp_doc = text, \
        .tp_basicsize = sizeof(Holder), \
        .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, \
        .tp_new = PyType_GenericNew, \
        .tp_dealloc = (destructor)holder_dealloc, \
        .tp_traverse = (traverseproc)holder_traverse, \
        .tp_clear = (inquiry)holder_clear, \
        .tp_members = Name##_members, \
    };

HOLDER(Shelf, "cells", "Base of a store: where its cells are now.")
HOLDER(Hinge, "door", "Base of a port: its door now.")

/* Front: what serves is held as above, and a call is nothing but a call of that ----------------------
 *
 * Its classes say so in Python, by a `__call__` that servers look at and that can be overridden or
 * patched. A frame of it on each request is saved by `straight`.
 */

static PyObject *
front_call(Holder *self, PyObject *args, PyObject *kwargs)
{
    if (self->held == NULL) {
        PyErr_SetString(PyExc_AttributeError, "_serve");
        return NULL;
    }
    PyObject *serve = Py_NewRef(self->held), *result; /* it may put another in its place */
    if (kwargs == NULL || PyDict_GET_SIZE(kwargs) == 0)
        result = PyObject_Vectorcall(serve, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), NULL);
    else
        result = PyObject_Call(serve, args, kwargs);
    Py_DECREF(serve);
    return result;
}

HOLDER(Front, "_serve", "Base of what is called for each request: what serves now.")

/* Sets the slot of this class only. A class below it, and a `__call__` that is put into it later, get
 * Python's own again, and are called.
 */
static PyObject *
front_straight(PyObject *Py_UNUSED(module), PyObject *class)
{
    if (!PyType_Check(class) || class == (PyObject *)&FrontType
        || !PyType_IsSubtype((PyTypeObject *)class, &FrontType)) {
        PyErr_SetString(PyExc_TypeError, "straight() takes a class below Front");
        return NULL;
    }
    ((PyTypeObject *)class)->tp_call = (ternaryfunc)front_call;
    return Py_NewRef(class);
}

static Exchange *
as_exchange(PyObject *object)
{
    if (PyObject_TypeCheck(object, &ExchangeType))
        return (Exchange *)object;
    PyErr_Format(PyExc_TypeError, "an Exchange is needed, not %s", Py_TYPE(object)->tp_name);
    return NULL;
}

/* The status as a number; -1 with an exception. 0: none yet. */
static long
status_of(Exchange *x)
{
    return x->status == NULL ? 0 : PyLong_AsLong(x->status);
}

/* RouteSeries ---------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    PyObject *method, *endpoint, *outcomes;
    Py_ssize_t in_progress, first_byte, received, sent;
    Py_ssize_t count, total; /* what `outcomes` has for the last status; -1: there was none yet */
    long status;
} Series;

static PyMemberDef series_members[] = {
    {"method", T_OBJECT_EX, offsetof(Series, method), 0, NULL},
    {"endpoint", T_OBJECT_EX, offsetof(Series, endpoint), 0, NULL},
    {"outcomes", T_OBJECT_EX, offsetof(Series, outcomes), READONLY, NULL},
    {"in_progress", T_PYSSIZET, offsetof(Series, in_progress), 0, NULL},
    {"first_byte", T_PYSSIZET, offsetof(Series, first_byte), 0, NULL},
    {"received", T_PYSSIZET, offsetof(Series, received), 0, NULL},
    {"sent", T_PYSSIZET, offsetof(Series, sent), 0, NULL},
    {NULL},
};

static PyObject *
series_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"method", "endpoint", "in_progress", "first_byte", "received", "sent", NULL};
    PyObject *method, *endpoint;
    Py_ssize_t in_progress, first_byte, received, sent;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOnnnn", keys, &method, &endpoint, &in_progress,
                                     &first_byte, &received, &sent))
        return NULL;
    Series *self = (Series *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->method = Py_NewRef(method);
    self->endpoint = Py_NewRef(endpoint);
    self->in_progress = in_progress;
    self->first_byte = first_byte;
    self->received = received;
    self->sent = sent;
    self->count = -1;
    self->outcomes = PyDict_New();
    if (self->outcomes == NULL)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static int
series_traverse(Series *self, visitproc visit, void *arg)
{
    Py_VISIT(self->method);
    Py_VISIT(self->endpoint);
    Py_VISIT(self->outcomes);
    return 0;
}

static int
series_clear(Series *self)
{
    Py_CLEAR(self->method);
    Py_CLEAR(self->endpoint);
    Py_CLEAR(self->outcomes);
    return 0;
}

static void
series_dealloc(Series *self)
{
    PyObject_GC_UnTrack(self);
    series_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject SeriesType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.RouteSeries",
    .tp_doc = "The cells of one (method, endpoint).",
    .tp_basicsize = sizeof(Series),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = series_new,
    .tp_dealloc = (destructor)series_dealloc,
    .tp_traverse = (traverseproc)series_traverse,
    .tp_clear = (inquiry)series_clear,
    .tp_members = series_members,
};

/* Recorder: begin and record of HttpMetrics ----------------------------------------------------- */

/* As in `metrics.inflight`: places of ten cells, when, which cell, 64 bytes of the request's id. */
enum { PLACES = 256, PLACE_CELLS = 10, PLACE_ID = 64 };

typedef struct {
    Py_ssize_t count;
    double *edges;
} Buckets;

/* Series that were found before, by the texts they were found with: what a key for the dictionary of
 * all costs is a tuple, its hash and three comparisons.
 */
typedef struct {
    PyObject *method, *endpoint;
    Series *series; /* NULL: this one is empty */
} Known;

enum { KNOWN = 64 };

typedef struct {
    PyObject_HEAD
    Holder *store; /* a Shelf */
    PyObject *routes, *resolve, *outcome, *unmatched;
    PyObject *cells; /* the memoryview that `view` was taken of */
    Py_buffer view;
    Buckets seconds, sizes;
    Py_ssize_t table; /* the first cell of the store's table of what is in flight */
    int vacant;       /* places of it that are free */
    unsigned char free[PLACES];
    Known known[KNOWN];
} Recorder;

static int
buckets_of(PyObject *edges, Buckets *buckets)
{
    PyObject *tuple = PySequence_Tuple(edges);
    if (tuple == NULL)
        return -1;
    buckets->count = PyTuple_GET_SIZE(tuple);
    buckets->edges = PyMem_New(double, buckets->count + 1);
    if (buckets->edges == NULL) {
        Py_DECREF(tuple);
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < buckets->count; i++)
        buckets->edges[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, i));
    Py_DECREF(tuple);
    return PyErr_Occurred() ? -1 : 0;
}

static inline Py_ssize_t
bisect_left(const Buckets *buckets, double value)
{
    Py_ssize_t low = 0, high = buckets->count;
    while (low < high) {
        Py_ssize_t middle = (low + high) / 2;
        if (buckets->edges[middle] < value)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static PyObject *
recorder_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"store",     "routes", "resolve", "outcome",
                           "unmatched", "table",  "seconds", "sizes",   NULL};
    PyObject *store, *routes, *resolve, *outcome, *unmatched, *seconds, *sizes;
    Py_ssize_t table;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!OOUnOO", keys, &ShelfType, &store, &PyDict_Type,
                                     &routes, &resolve, &outcome, &unmatched, &table, &seconds, &sizes))
        return NULL;
    Recorder *self = (Recorder *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->store = (Holder *)Py_NewRef(store);
    self->routes = Py_NewRef(routes);
    self->resolve = Py_NewRef(resolve);
    self->outcome = Py_NewRef(outcome);
    self->unmatched = Py_NewRef(unmatched);
    self->table = table;
    if (buckets_of(seconds, &self->seconds) < 0 || buckets_of(sizes, &self->sizes) < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static int
recorder_traverse(Recorder *self, visitproc visit, void *arg)
{
    Py_VISIT(self->store);
    Py_VISIT(self->routes);
    Py_VISIT(self->resolve);
    Py_VISIT(self->outcome);
    Py_VISIT(self->cells);
    for (int i = 0; i < KNOWN; i++)
        Py_VISIT(self->known[i].series);
    return 0;
}

static int
recorder_clear(Recorder *self)
{
    if (self->cells != NULL) {
        PyBuffer_Release(&self->view);
        Py_CLEAR(self->cells);
    }
    Py_CLEAR(self->store);
    Py_CLEAR(self->routes);
    Py_CLEAR(self->resolve);
    Py_CLEAR(self->outcome);
    Py_CLEAR(self->unmatched);
    for (int i = 0; i < KNOWN; i++) {
        Py_CLEAR(self->known[i].series);
        Py_CLEAR(self->known[i].method);
        Py_CLEAR(self->known[i].endpoint);
    }
    return 0;
}

static void
recorder_dealloc(Recorder *self)
{
    PyObject_GC_UnTrack(self);
    recorder_clear(self);
    PyMem_Free(self->seconds.edges);
    PyMem_Free(self->sizes.edges);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* The store's cells as they are now, and how many; NULL with an exception. Valid until Python code
 * runs: a store that is opened, or adopted by a forked child, has other cells.
 */
static double *
cells_of(Recorder *self, Py_ssize_t *count)
{
    PyObject *cells = self->store->held;
    if (cells == NULL) {
        PyErr_SetString(PyExc_AttributeError, "cells");
        return NULL;
    }
    if (cells != self->cells) {
        Py_buffer view;
        Py_INCREF(cells);
        if (PyObject_GetBuffer(cells, &view, PyBUF_WRITABLE | PyBUF_FORMAT | PyBUF_ND) < 0) {
            Py_DECREF(cells);
            return NULL;
        }
        if (view.itemsize != sizeof(double) || view.format == NULL || strcmp(view.format, "d") != 0) {
            PyBuffer_Release(&view);
            Py_DECREF(cells);
            PyErr_SetString(PyExc_TypeError, "cells are doubles");
            return NULL;
        }
        PyObject *old = self->cells;
        Py_buffer old_view = self->view;
        self->cells = cells;
        self->view = view;
        for (self->vacant = 0; self->vacant < PLACES; self->vacant++)
            self->free[self->vacant] = (unsigned char)self->vacant;
        if (old != NULL) {
            PyBuffer_Release(&old_view);
            Py_DECREF(old);
        }
    }
    *count = self->view.len / (Py_ssize_t)sizeof(double);
    return self->view.buf;
}

/* Whether there are cells from `first` to `last` behind it. */
static inline int
inside(Py_ssize_t count, Py_ssize_t first, Py_ssize_t last)
{
    return first >= 0 && first < count - last;
}

static int
no_such_cell(void)
{
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_IndexError, "no such cell");
    return -1;
}

/* Say in the table that the request is being served. With all places taken it is only counted. */
static inline void
take_place(Recorder *self, double *cells, Py_ssize_t count, Exchange *x, Py_ssize_t cell)
{
    x->place = 0;
    if (self->vacant == 0 || !inside(count, self->table, PLACES * PLACE_CELLS - 1))
        return;
    Py_ssize_t at = self->table + PLACE_CELLS * self->free[--self->vacant];
    double *place = cells + at;
    char *id = (char *)(place + 2);
    Py_ssize_t length = 0;
    if (x->request_id != NULL && PyUnicode_CheckExact(x->request_id) && PyUnicode_IS_COMPACT_ASCII(x->request_id)) {
        length = PyUnicode_GET_LENGTH(x->request_id);
        length = length < PLACE_ID ? length : PLACE_ID;
        memcpy(id, PyUnicode_1BYTE_DATA(x->request_id), length);
    }
    memset(id + length, 0, PLACE_ID - length);
    place[1] = (double)cell;
    place[0] = x->started > 0.0 ? x->started : 1e-9; /* 0.0 is a free place */
    x->place = at;
}

/* Give the place back, unless it is one of the parent of this process: those cells are zeros here. */
static inline void
free_place(Recorder *self, double *cells, Py_ssize_t count, Exchange *x)
{
    Py_ssize_t at = x->place, place = (at - self->table) / PLACE_CELLS;
    x->place = 0;
    if (at < self->table || place >= PLACES || !inside(count, at, PLACE_CELLS - 1) || cells[at] == 0.0
        || self->vacant >= PLACES)
        return;
    cells[at] = 0.0;
    self->free[self->vacant++] = (unsigned char)place;
}

/* The series of (method, endpoint) as the dictionary of all has it, or as it is made; new reference. What
 * is made is not put into `known`: one beyond the limit is not kept, so that each request is counted.
 */
static Series *
look_up_series(Recorder *self, PyObject *method, PyObject *endpoint, Known *known)
{
    PyObject *key = PyTuple_Pack(2, method, endpoint);
    if (key == NULL)
        return NULL;
    PyObject *found = Py_XNewRef(PyDict_GetItemWithError(self->routes, key));
    if (found == NULL && !PyErr_Occurred())
        found = PyObject_Call(self->resolve, key, NULL);
    else if (found != NULL && known != NULL && Py_IS_TYPE(found, &SeriesType)) {
        put(&known->method, method);
        put(&known->endpoint, endpoint);
        put((PyObject **)&known->series, found);
    }
    Py_DECREF(key);
    if (found != NULL && !Py_IS_TYPE(found, &SeriesType)) {
        PyErr_SetString(PyExc_TypeError, "a RouteSeries is needed");
        Py_CLEAR(found);
    }
    return (Series *)found;
}

/* The series of (method, endpoint), new reference. */
static Series *
series_for(Recorder *self, Exchange *x)
{
    PyObject *endpoint = x->endpoint;
    if (!is_set(endpoint) || (is_ascii(endpoint) && PyUnicode_GET_LENGTH(endpoint) == 0))
        endpoint = self->unmatched;
    PyObject *method = x->method == NULL ? Py_None : x->method;
    if (!is_ascii(endpoint) || !is_ascii(method))
        return look_up_series(self, method, endpoint, NULL);
    /* A template has its hash already; a text that has none yet shares a place with those. */
    size_t place = (size_t)((PyASCIIObject *)endpoint)->hash ^ PyUnicode_1BYTE_DATA(method)[0];
    Known *known = &self->known[place % KNOWN];
    if (known->series != NULL && same(method, known->method) && same(endpoint, known->endpoint))
        return (Series *)Py_NewRef(known->series);
    return look_up_series(self, method, endpoint, known);
}

static int
begin(Recorder *self, Exchange *x)
{
    Series *series = series_for(self, x);
    if (series == NULL)
        return -1;
    Py_ssize_t count;
    double *cells = cells_of(self, &count);
    if (cells == NULL || !inside(count, series->in_progress, 0)) {
        Py_DECREF(series);
        return no_such_cell();
    }
    cells[series->in_progress] += 1.0;
    take_place(self, cells, count, x, series->in_progress);
    put(&x->series, (PyObject *)series);
    Py_DECREF(series);
    return 0;
}

/* Where the requests of a series with this status are counted, and its durations: kept as those of its
 * last status. 0 or -1.
 */
static int
find_outcome(Recorder *self, Series *series, PyObject *status, long number)
{
    PyObject *found = Py_XNewRef(PyDict_GetItemWithError(series->outcomes, status));
    if (found == NULL && !PyErr_Occurred())
        found = PyObject_CallFunctionObjArgs(self->outcome, (PyObject *)series, status, NULL);
    if (found != NULL && (!PyTuple_CheckExact(found) || PyTuple_GET_SIZE(found) != 2)) {
        PyErr_SetString(PyExc_TypeError, "an outcome is a pair of cells");
        Py_CLEAR(found);
    }
    Py_ssize_t count = found == NULL ? -1 : PyLong_AsSsize_t(PyTuple_GET_ITEM(found, 0));
    Py_ssize_t total = found == NULL ? -1 : PyLong_AsSsize_t(PyTuple_GET_ITEM(found, 1));
    Py_XDECREF(found);
    if (count < 0 || total < 0)
        return no_such_cell();
    series->count = count;
    series->total = total;
    series->status = number;
    return 0;
}

/* One observation of a histogram: `size` buckets from `first` on, and their sum behind them. */
static inline void
observe(double *cells, Py_ssize_t first, const Buckets *buckets, double value)
{
    cells[first + bisect_left(buckets, value)] += 1.0;
    cells[first + buckets->count + 1] += value;
}

static int
record(Recorder *self, Exchange *x, long number)
{
    Series *series;
    double begun = 1.0;
    if (x->series != NULL && Py_IS_TYPE(x->series, &SeriesType))
        series = (Series *)Py_NewRef(x->series);
    else { /* its route was never entered */
        series = series_for(self, x);
        begun = 0.0;
        if (series == NULL)
            return -1;
    }
    if (series->count < 0 || series->status != number) {
        PyObject *status = Py_NewRef(x->status == NULL ? zero : x->status);
        int failed = find_outcome(self, series, status, number);
        Py_DECREF(status);
        if (failed) {
            Py_DECREF(series);
            return -1;
        }
    }
    Py_ssize_t count = series->count, total = series->total;
    double duration = x->ended - x->started;
    double first_byte = (x->first_byte != 0.0 ? x->first_byte : x->ended) - x->started;
    double sent = (double)x->sent, received = (double)x->received;
    Py_ssize_t last = self->seconds.count + 1, size_last = self->sizes.count + 1;
    Py_ssize_t early = series->first_byte, body = series->sent, upload = series->received;
    Py_ssize_t open = series->in_progress, all;
    Py_DECREF(series);
    double *cells = cells_of(self, &all);
    if (cells == NULL)
        return -1;
    if (!inside(all, count, 0) || !inside(all, total, last) || !inside(all, early, last)
        || !inside(all, body, size_last) || !inside(all, upload, size_last) || !inside(all, open, 0))
        return no_such_cell();
    cells[count] += 1.0;
    observe(cells, total, &self->seconds, duration);
    observe(cells, early, &self->seconds, first_byte);
    observe(cells, body, &self->sizes, sent);
    observe(cells, upload, &self->sizes, received);
    cells[open] -= begun;
    if (begun != 0.0)
        free_place(self, cells, all, x);
    return 0;
}

static PyObject *
recorder_begin(Recorder *self, PyObject *exchange)
{
    Exchange *x = as_exchange(exchange);
    if (x == NULL || begin(self, x) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
recorder_record(Recorder *self, PyObject *exchange)
{
    Exchange *x = as_exchange(exchange);
    long number = x == NULL ? -1 : status_of(x);
    if (x == NULL || (number == -1 && PyErr_Occurred()) || record(self, x, number) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef recorder_methods[] = {
    {"begin", (PyCFunction)recorder_begin, METH_O, "As HttpMetrics.begin_with()."},
    {"record", (PyCFunction)recorder_record, METH_O, "As HttpMetrics.record_with()."},
    {NULL},
};

static PyTypeObject RecorderType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Recorder",
    .tp_basicsize = sizeof(Recorder),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = recorder_new,
    .tp_dealloc = (destructor)recorder_dealloc,
    .tp_traverse = (traverseproc)recorder_traverse,
    .tp_clear = (inquiry)recorder_clear,
    .tp_methods = recorder_methods,
};

/* Queue: the finished exchanges that have no line yet --------------------------------------------
 *
 * What AccessLog needs of collections.deque, whose methods would be looked up and called here.
 */

typedef struct {
    PyObject_HEAD
    PyObject **items; /* a ring: `count` of them from `first` on */
    Py_ssize_t room, first, count;
} Queue;

enum { ROOM = 128 }; /* a power of two, and so are its doubles */

/* Twice the room, or the first. 0 or -1. */
static int
make_room(Queue *self)
{
    Py_ssize_t room = self->room ? 2 * self->room : ROOM;
    PyObject **items = PyMem_New(PyObject *, room);
    if (items == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < self->count; i++)
        items[i] = self->items[(self->first + i) & (self->room - 1)];
    PyMem_Free(self->items);
    self->items = items;
    self->room = room;
    self->first = 0;
    return 0;
}

static inline int
push(Queue *self, PyObject *item)
{
    if (self->count == self->room && make_room(self) < 0)
        return -1;
    self->items[(self->first + self->count++) & (self->room - 1)] = Py_NewRef(item);
    return 0;
}

/* The oldest, with its reference; NULL without an exception: there is none. */
static inline PyObject *
pull(Queue *self)
{
    if (self->count == 0)
        return NULL;
    PyObject *item = self->items[self->first];
    self->first = (self->first + 1) & (self->room - 1);
    self->count--;
    return item;
}

static PyObject *
queue_append(Queue *self, PyObject *item)
{
    if (push(self, item) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
queue_popleft(Queue *self, PyObject *Py_UNUSED(nothing))
{
    PyObject *item = pull(self);
    if (item == NULL)
        PyErr_SetString(PyExc_IndexError, "the queue is empty");
    return item;
}

/* What it has now: what a finalizer of one of them puts in is not waited for. */
static int
queue_clear(Queue *self)
{
    PyObject *item;
    for (Py_ssize_t left = self->count; left > 0 && (item = pull(self)) != NULL; left--)
        Py_DECREF(item);
    return 0;
}

static PyObject *
queue_clear_method(Queue *self, PyObject *Py_UNUSED(nothing))
{
    queue_clear(self);
    Py_RETURN_NONE;
}

static Py_ssize_t
queue_length(Queue *self)
{
    return self->count;
}

static int
queue_traverse(Queue *self, visitproc visit, void *arg)
{
    for (Py_ssize_t i = 0; i < self->count; i++)
        Py_VISIT(self->items[(self->first + i) & (self->room - 1)]);
    return 0;
}

static void
queue_dealloc(Queue *self)
{
    PyObject_GC_UnTrack(self);
    queue_clear(self); /* nobody can put anything in any more */
    PyMem_Free(self->items);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef queue_methods[] = {
    {"append", (PyCFunction)queue_append, METH_O, "Put one at the end."},
    {"popleft", (PyCFunction)queue_popleft, METH_NOARGS, "Take the first; IndexError: there is none."},
    {"clear", (PyCFunction)queue_clear_method, METH_NOARGS, "Take all that it has."},
    {NULL},
};

static PySequenceMethods queue_sequence = {.sq_length = (lenfunc)queue_length};

static PyTypeObject QueueType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Queue",
    .tp_basicsize = sizeof(Queue),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)queue_dealloc,
    .tp_traverse = (traverseproc)queue_traverse,
    .tp_clear = (inquiry)queue_clear,
    .tp_methods = queue_methods,
    .tp_as_sequence = &queue_sequence,
};

/* Core: enter and close of a Plan --------------------------------------------------------------- */

struct Core {
    PyObject_HEAD
    PyObject *plan, *current, *endpoints, *edge, *identify, *resolve, *route, *begin, *record;
    PyObject *queue; /* a Queue, or None */
    PyObject *drain, *nudge, *muted, *count_error, *release, *report;
    PyObject *key_header; /* that API keys come in, beside Authorization; None: no keys */
    Recorder *recorder; /* what `begin` and `record` belong to; NULL: they are called */
    unsigned long long hushed; /* bit n: one of `muted` has this mark_of() */
    Py_ssize_t most;
};

#define CORE_OBJECTS(X) \
    X(plan) X(current) X(endpoints) X(edge) X(identify) X(resolve) X(route) X(begin) X(record) \
    X(queue) X(drain) X(nudge) X(muted) X(count_error) X(release) \
    X(report) X(key_header)

/* The recorder whose method this is, or NULL: then it is to be called as any function. */
static Recorder *
recorder_of(PyObject *method, PyCFunction expected)
{
    if (!PyCFunction_CheckExact(method) || PyCFunction_GET_FUNCTION(method) != expected)
        return NULL;
    return (Recorder *)PyCFunction_GET_SELF(method);
}

/* A mark that few endpoints share: a number below 64. All that are no ASCII text share 0. */
static inline int
mark_of(PyObject *endpoint)
{
    if (!is_ascii(endpoint) || PyUnicode_GET_LENGTH(endpoint) == 0)
        return 0;
    Py_ssize_t length = PyUnicode_GET_LENGTH(endpoint);
    return (int)((7 * length + PyUnicode_1BYTE_DATA(endpoint)[length - 1]) & 63);
}

/* The marks of a set; 0 with an exception. The lowest bit is always set. */
static unsigned long long
marks_of(PyObject *set)
{
    PyObject *each = PyObject_GetIter(set), *endpoint;
    if (each == NULL)
        return 0;
    unsigned long long marks = 1;
    while ((endpoint = PyIter_Next(each)) != NULL) {
        marks |= 1ULL << mark_of(endpoint);
        Py_DECREF(endpoint);
    }
    Py_DECREF(each);
    return PyErr_Occurred() ? 0 : marks;
}

static PyObject *
core_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"plan",   "current", "endpoints", "edge",  "identify",    "resolve",
                           "route",  "begin",   "record",    "queue", "most",        "drain",
                           "nudge",  "muted",   "count_error", "release", "report", "key_header", NULL};
    PyObject *plan, *current, *endpoints, *edge, *identify, *resolve, *route, *begin, *record, *queue;
    PyObject *drain, *nudge, *muted, *count_error, *release, *report, *key_header;
    Py_ssize_t most;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OO!O!OOOOOOOnOOO!OOOO", keys, &plan,
                                     &PyContextVar_Type, &current, &PyDict_Type, &endpoints, &edge,
                                     &identify, &resolve, &route, &begin, &record, &queue, &most, &drain,
                                     &nudge, &PyFrozenSet_Type, &muted, &count_error, &release,
                                     &report, &key_header))
        return NULL;
    if (queue != Py_None && !Py_IS_TYPE(queue, &QueueType)) {
        PyErr_SetString(PyExc_TypeError, "a Queue is needed");
        return NULL;
    }
    unsigned long long hushed = marks_of(muted);
    Core *self = hushed == 0 ? NULL : (Core *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
#define KEEP(name) self->name = (void *)Py_NewRef(name);
    CORE_OBJECTS(KEEP)
    self->hushed = hushed;
    Recorder *recorder = recorder_of(begin, (PyCFunction)recorder_begin);
    if (recorder != NULL && recorder == recorder_of(record, (PyCFunction)recorder_record))
        self->recorder = recorder; /* `begin` keeps it alive */
    self->most = most;
    return (PyObject *)self;
}

static int
core_traverse(Core *self, visitproc visit, void *arg)
{
    CORE_OBJECTS(VISIT)
    return 0;
}

static int
core_clear(Core *self)
{
    CORE_OBJECTS(CLEAR)
    return 0;
}

static void
core_dealloc(Core *self)
{
    PyObject_GC_UnTrack(self);
    core_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* Report the exception that is set, if it is an Exception; else leave it. 0 or -1. */
static int
reported(Core *self, PyObject *site)
{
    if (!PyErr_ExceptionMatches(PyExc_Exception))
        return -1;
    PyObject *error = take_error();
    PyObject *done = PyObject_CallFunctionObjArgs(self->report, site, error, NULL);
    Py_DECREF(error);
    if (done == NULL)
        return -1;
    Py_DECREF(done);
    return 0;
}

/* The route is known: None, or an answer to send instead; new reference. */
static PyObject *
enter(Core *self, Exchange *x)
{
    if (self->recorder != NULL) {
        if (begin(self->recorder, x) < 0 && reported(self, names.site_enter) < 0)
            return NULL;
    } else if (self->begin != Py_None) {
        PyObject *done = PyObject_CallOneArg(self->begin, (PyObject *)x);
        if (done == NULL && reported(self, names.site_enter) < 0)
            return NULL;
        Py_XDECREF(done);
    }
    if (self->route == Py_None)
        Py_RETURN_NONE;
    return PyObject_CallOneArg(self->route, (PyObject *)x);
}

static int
queue_up(Core *self, Exchange *x, long status)
{
    if (self->queue == Py_None)
        return 0;
    PyObject *endpoint = x->endpoint == NULL ? Py_None : x->endpoint;
    if (status < 400 && self->hushed >> mark_of(endpoint) & 1) {
        int quiet = PySet_Contains(self->muted, endpoint);
        if (quiet)
            return quiet < 0 ? -1 : 0;
    }
    Queue *queue = (Queue *)self->queue;
    if (push(queue, (PyObject *)x) < 0)
        return -1;
    Py_ssize_t waiting = queue->count;
    PyObject *next = waiting >= self->most || status >= 500 ? self->drain
                     : waiting == 1                         ? self->nudge
                                                            : NULL;
    if (next == NULL)
        return 0;
    PyObject *done = PyObject_CallNoArgs(next);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

enum { CLIENT_LEFT = 499 };

static int
close_it(Core *self, Exchange *x)
{
    if (is_set(x->held)) {
        PyObject *done = PyObject_CallOneArg(self->release, (PyObject *)x);
        if (done == NULL)
            return -1;
        Py_DECREF(done);
    }
    long status = status_of(x);
    if (status == -1 && PyErr_Occurred())
        return -1;
    if (x->ended == 0.0 || status == 0 || x->left) {
        if (x->ended == 0.0)
            x->ended = now();
        if (x->left || (!is_set(x->error) && status != 0))
            status = CLIENT_LEFT;
        else if (status == 0)
            status = 500;
        PyObject *number = PyLong_FromLong(status);
        if (number == NULL)
            return -1;
        put(&x->status, number);
        Py_DECREF(number);
    }
    if (self->recorder != NULL) {
        if (record(self->recorder, x, status) < 0)
            return -1;
    } else if (self->record != Py_None) {
        PyObject *done = PyObject_CallOneArg(self->record, (PyObject *)x);
        if (done == NULL)
            return -1;
        Py_DECREF(done);
    }
    if (self->record != Py_None && (status >= 500 || is_set(x->error))) {
        PyObject *done = PyObject_CallOneArg(self->count_error, (PyObject *)x);
        if (done == NULL)
            return -1;
        Py_DECREF(done);
    }
    return queue_up(self, x, status);
}

/* The request is over. Our own failures are reported. */
static int
close_exchange(Core *self, Exchange *x)
{
    x->closed = 1;
    put(&x->source, Py_None);
    return close_it(self, x) < 0 ? reported(self, names.site_close) : 0;
}

/* The last byte is out, as Exchange.finish. */
static int
finish_exchange(Core *self, Exchange *x)
{
    if (x->closed)
        return 0;
    x->ended = now();
    long status = status_of(x);
    if (status == -1 && PyErr_Occurred())
        return -1;
    return status < 500 ? close_exchange(self, x) : 0;
}

/* The core of a request; NULL with an exception for a websocket, which has none. */
static Core *
core_of(Exchange *x)
{
    if (x->core == NULL)
        PyErr_SetString(PyExc_TypeError, "this is for requests that an edge has opened");
    return x->core;
}

static PyObject *
exchange_enter(Exchange *x, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    PyObject *endpoint = count > 0 ? args[0] : NULL, *marked = count > 1 ? args[1] : NULL;
    Py_ssize_t named = keywords == NULL ? 0 : PyTuple_GET_SIZE(keywords);
    int wrong = count > 2;
    for (Py_ssize_t i = 0; i < named && !wrong; i++) {
        PyObject *name = PyTuple_GET_ITEM(keywords, i);
        PyObject **at = PyUnicode_CompareWithASCIIString(name, "endpoint") == 0 ? &endpoint
                        : PyUnicode_CompareWithASCIIString(name, "marked") == 0 ? &marked
                                                                                : NULL;
        wrong = at == NULL || *at != NULL;
        if (!wrong)
            *at = args[count + i];
    }
    if (wrong || endpoint == NULL) {
        PyErr_SetString(PyExc_TypeError, "enter(endpoint, marked=None)");
        return NULL;
    }
    if (core_of(x) == NULL)
        return NULL;
    if (is_set(x->endpoint) || x->closed)
        Py_RETURN_NONE;
    put(&x->endpoint, endpoint);
    put(&x->marked, marked == NULL ? Py_None : marked);
    return enter(x->core, x);
}

static PyObject *
exchange_finish(Exchange *x, PyObject *Py_UNUSED(nothing))
{
    if (core_of(x) == NULL || finish_exchange(x->core, x) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
exchange_close(Exchange *x, PyObject *Py_UNUSED(nothing))
{
    if (core_of(x) == NULL || (!x->closed && close_exchange(x->core, x) < 0))
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef exchange_methods[4] = {
    {"enter", (PyCFunction)(void (*)(void))exchange_enter, METH_FASTCALL | METH_KEYWORDS,
     "As Exchange.enter."},
    {"finish", (PyCFunction)exchange_finish, METH_NOARGS, "As Exchange.finish."},
    {"close", (PyCFunction)exchange_close, METH_NOARGS, "As Exchange.close."},
    {NULL},
};

/* Ask the user's function for the route's template: text, or None; new reference. It may raise. */
static PyObject *
ask(Core *self, PyObject *label, PyObject *request)
{
    PyObject *template = PyObject_CallOneArg(label, request);
    if (template != NULL)
        return template;
    return reported(self, names.site_endpoint) < 0 ? NULL : Py_NewRef(Py_None);
}

/* As Exchange.enter_by. 0 or -1. */
static int
enter_by(Core *self, Exchange *x, PyObject *label, PyObject *request)
{
    if (is_set(x->reply) || is_set(x->work))
        return 0;
    PyObject *template = ask(self, label, request);
    if (template == NULL)
        return -1;
    PyObject *reply = NULL;
    int entered = template != Py_None && !is_set(x->endpoint) && !x->closed;
    if (entered) {
        put(&x->endpoint, template);
        put(&x->marked, Py_None);
        reply = enter(self, x);
        if (reply != NULL)
            put(&x->reply, reply);
    }
    Py_DECREF(template);
    Py_XDECREF(reply);
    return entered && reply == NULL ? -1 : 0;
}

/* As Exchange.name_by. 0 or -1. */
static int
name_by(Core *self, Exchange *x, PyObject *label, PyObject *request)
{
    PyObject *template = ask(self, label, request);
    if (template == NULL)
        return -1;
    if (template != Py_None && !is_set(x->endpoint))
        put(&x->endpoint, template);
    Py_DECREF(template);
    return 0;
}

static PyObject *
core_enter(Core *self, PyObject *exchange)
{
    Exchange *x = as_exchange(exchange);
    return x == NULL ? NULL : enter(self, x);
}

static PyObject *
core_close(Core *self, PyObject *exchange)
{
    Exchange *x = as_exchange(exchange);
    if (x == NULL || close_exchange(self, x) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef core_methods[] = {
    {"enter", (PyCFunction)core_enter, METH_O, "As Plan.enter."},
    {"close", (PyCFunction)core_close, METH_O, "As Plan.close."},
    {NULL},
};

static PyTypeObject CoreType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Core",
    .tp_basicsize = sizeof(Core),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = core_new,
    .tp_dealloc = (destructor)core_dealloc,
    .tp_traverse = (traverseproc)core_traverse,
    .tp_clear = (inquiry)core_clear,
    .tp_methods = core_methods,
};

/* Door: open and head of a Port ----------------------------------------------------------------- */

enum { WANTED = 16 };

typedef struct {
    PyObject_HEAD
    Core *core;
    PyTypeObject *exchange;
    PyObject *request, *correlation; /* our headers' names; the second may be None */
    PyObject *slow_head, *wanted;
    PyObject *spell, *spelled; /* a header's name as the protocol writes it; those asked so far */
    unsigned long long lengths; /* bit n: a wanted name has n characters */
    PyObject *names[WANTED][2]; /* of `wanted`, as the protocol writes them and ours; borrowed */
    int named;                  /* how many; -1: too many, or no bytes */
    int requests;               /* its exchanges are requests, not websockets */
    int always;                 /* every answer carries the second header */
} Door;

#define DOOR_OBJECTS(X) X(core) X(exchange) X(request) X(correlation) X(slow_head) X(wanted) X(spell) \
    X(spelled)

/* Let instances of this class go by plain_dealloc, if they are nothing but an Exchange. */
static void
let_go_plainly(PyTypeObject *class)
{
    if (PyType_HasFeature(class, Py_TPFLAGS_HEAPTYPE) && class->tp_basicsize == ExchangeType.tp_basicsize
        && class->tp_dictoffset == 0 && class->tp_weaklistoffset == 0 && class->tp_finalize == NULL
        && class->tp_del == NULL)
        class->tp_dealloc = (destructor)plain_dealloc;
}

static PyObject *
door_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"core", "exchange", "requests", "request", "correlation", "spell", "always",
                           "head", "wanted", NULL};
    PyObject *core, *exchange, *request, *correlation, *spell, *slow_head, *wanted;
    int requests, always;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$O!O!pOOOpOO!", keys, &CoreType, &core, &PyType_Type,
                                     &exchange, &requests, &request, &correlation, &spell, &always,
                                     &slow_head,
                                     &PyDict_Type, &wanted))
        return NULL;
    if (!PyType_IsSubtype((PyTypeObject *)exchange, &ExchangeType)) {
        PyErr_SetString(PyExc_TypeError, "a type of Exchange is needed");
        return NULL;
    }
    Door *self = (Door *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    let_go_plainly((PyTypeObject *)exchange);
    self->core = (Core *)Py_NewRef(core);
    self->exchange = (PyTypeObject *)Py_NewRef(exchange);
    self->request = Py_NewRef(request);
    self->correlation = Py_NewRef(correlation);
    self->slow_head = Py_NewRef(slow_head);
    self->wanted = Py_NewRef(wanted);
    self->spell = Py_NewRef(spell);
    self->spelled = PyDict_New();
    if (self->spelled == NULL) {
        Py_DECREF(self);
        return NULL;
    }
    self->requests = requests;
    self->always = always;
    PyObject *name, *ours;
    Py_ssize_t at = 0;
    while (PyDict_Next(wanted, &at, &name, &ours)) {
        if (self->named == WANTED || !PyBytes_CheckExact(name))
            self->named = -1;
        if (self->named >= 0) {
            self->names[self->named][0] = name;
            self->names[self->named++][1] = ours;
        }
        Py_ssize_t length = PyObject_Size(name);
        if (length < 0) {
            Py_DECREF(self);
            return NULL;
        }
        self->lengths |= 1ULL << (length & 63);
    }
    return (PyObject *)self;
}

static int
door_traverse(Door *self, visitproc visit, void *arg)
{
    DOOR_OBJECTS(VISIT)
    return 0;
}

static int
door_clear(Door *self)
{
    DOOR_OBJECTS(CLEAR)
    return 0;
}

static void
door_dealloc(Door *self)
{
    PyObject_GC_UnTrack(self);
    door_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* As Plan._identify for wanted headers of which each is a credential: 1. 0: there are others; or -1.
 * The ids are fresh then, and there is no body.
 */
static int
identified(Core *core, Exchange *x, PyObject *headers)
{
    PyObject *key = NULL, *authorization = NULL;
    if (PyTuple_CheckExact(headers) && PyTuple_GET_SIZE(headers) == 2) { /* see as_headers */
        key = PyTuple_GET_ITEM(headers, 0);
        authorization = PyTuple_GET_ITEM(headers, 1);
    } else {
        if (core->key_header == Py_None || !PyDict_CheckExact(headers))
            return 0;
        if ((key = PyDict_GetItemWithError(headers, core->key_header)) == NULL && PyErr_Occurred())
            return -1;
        authorization = PyDict_GetItemWithError(headers, names.authorization);
        if (authorization == NULL && PyErr_Occurred())
            return -1;
        if (PyDict_GET_SIZE(headers) != (key != NULL) + (authorization != NULL))
            return 0;
        key = key == NULL ? names.empty : key;
        authorization = authorization == NULL ? names.empty : authorization;
    }
    if (!PyUnicode_CheckExact(key) || !PyUnicode_CheckExact(authorization))
        return 0;
    if (PyUnicode_GET_LENGTH(key) || PyUnicode_GET_LENGTH(authorization)) {
        x->credentials = PyTuple_CheckExact(headers) ? Py_NewRef(headers)
                                                     : PyTuple_Pack(2, key, authorization);
        if (x->credentials == NULL)
            return -1;
    }
    x->request_id = fresh();
    if (x->request_id == NULL)
        return -1;
    x->correlation_id = Py_NewRef(x->request_id);
    return 1;
}

/* As the function of Plan.open_with; new reference. */
static Exchange *
open_exchange(Door *self, PyObject *method, PyObject *path, PyObject *routed, PyObject *peer,
              PyObject *headers, PyObject *source)
{
    Core *core = self->core;
    Exchange *x = (Exchange *)self->exchange->tp_alloc(self->exchange, 0);
    if (x == NULL)
        return NULL;
    x->started = now();
    x->plan = Py_NewRef(core->plan);
    x->method = Py_NewRef(method);
    x->path = Py_NewRef(path);
    x->routed = Py_NewRef(routed);
    x->client = Py_NewRef(peer);
    x->source = Py_NewRef(source);
    x->status = Py_NewRef(zero);
    x->charged = Py_NewRef(nothing);
    if (self->requests)
        x->core = (Core *)Py_NewRef(core);
    if (headers == Py_None) {
        x->request_id = fresh();
        if (x->request_id == NULL)
            goto failed;
        x->correlation_id = Py_NewRef(x->request_id);
    } else {
        int usual = identified(core, x, headers);
        PyObject *done = usual ? NULL : PyObject_CallFunctionObjArgs(core->identify, (PyObject *)x, headers, NULL);
        if (usual < 0 || (!usual && done == NULL))
            goto failed;
        Py_XDECREF(done);
    }
    if (core->resolve != Py_None) {
        PyObject *client = PyObject_CallFunctionObjArgs(core->resolve, peer, headers, NULL);
        if (client == NULL)
            goto failed;
        put(&x->client, client);
        Py_DECREF(client);
    }
    PyObject *token = PyContextVar_Set(core->current, (PyObject *)x);
    if (token == NULL)
        goto failed;
    Py_DECREF(token);
    PyObject *work = PyDict_GetItemWithError(core->endpoints, routed);
    if (work != NULL) {
        put(&x->work, work);
        put(&x->endpoint, routed);
    } else if (PyErr_Occurred())
        goto failed;
    else if (core->edge != Py_None) {
        PyObject *reply = PyObject_CallOneArg(core->edge, (PyObject *)x);
        if (reply == NULL)
            goto failed;
        put(&x->reply, reply);
        Py_DECREF(reply);
    }
    return x;
failed:
    Py_DECREF(x);
    return NULL;
}

static PyObject *
door_open(Door *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 6) {
        PyErr_SetString(PyExc_TypeError, "open() takes six arguments");
        return NULL;
    }
    return (PyObject *)open_exchange(self, args[0], args[1], args[2], args[3], args[4], args[5]);
}

/* The characters of a name, bytes or ASCII text; NULL for anything else. */
static const char *
characters(PyObject *name, Py_ssize_t *length)
{
    if (PyBytes_CheckExact(name)) {
        *length = PyBytes_GET_SIZE(name);
        return PyBytes_AS_STRING(name);
    }
    if (PyUnicode_CheckExact(name) && PyUnicode_IS_COMPACT_ASCII(name)) {
        *length = PyUnicode_GET_LENGTH(name);
        return (const char *)PyUnicode_1BYTE_DATA(name);
    }
    return NULL;
}

/* Whether a name may be `ours`, whatever its case. */
static int
like(const char *text, Py_ssize_t length, PyObject *ours)
{
    Py_ssize_t expected = 0;
    const char *wanted = ours == Py_None ? NULL : characters(ours, &expected);
    if (wanted == NULL || expected != length)
        return 0;
    for (Py_ssize_t i = 0; i < length; i++)
        if (Py_TOLOWER(text[i]) != Py_TOLOWER(wanted[i]))
            return 0;
    return 1;
}

/* A list of these headers with room for two more, or NULL without an exception where the function in
 * Python has to look closer.
 */
static PyObject *
copied(Door *self, PyObject *headers, Py_ssize_t extra)
{
    if (!PyList_CheckExact(headers) && !PyTuple_CheckExact(headers))
        return NULL;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(headers);
    PyObject **pairs = PySequence_Fast_ITEMS(headers);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *pair = pairs[i];
        if ((!PyTuple_CheckExact(pair) && !PyList_CheckExact(pair)) || PySequence_Fast_GET_SIZE(pair) != 2)
            return NULL;
        Py_ssize_t length = 0;
        const char *text = characters(PySequence_Fast_ITEMS(pair)[0], &length);
        if (text == NULL || like(text, length, self->request) || like(text, length, self->correlation))
            return NULL;
    }
    PyObject *list = PyList_New(count + extra);
    if (list == NULL)
        return NULL;
    if (PySequence_Fast_GET_SIZE(headers) != count) { /* the collector ran, and somebody's finalizer */
        Py_DECREF(list);
        return NULL;
    }
    pairs = PySequence_Fast_ITEMS(headers);
    for (Py_ssize_t i = 0; i < count; i++)
        PyList_SET_ITEM(list, i, Py_NewRef(pairs[i]));
    return list;
}

/* An id as the protocol writes it; new reference. */
static PyObject *
value_of(Door *self, PyObject *id)
{
    if (!PyBytes_CheckExact(self->request))
        return PyObject_Str(id); /* the same object, if it is a text already */
    return is_ascii(id) ? PyBytes_FromStringAndSize((const char *)PyUnicode_1BYTE_DATA(id),
                                                    PyUnicode_GET_LENGTH(id))
                        : PyUnicode_AsUTF8String(id);
}

enum { SPELLINGS = 256 };

/* A header's name as the protocol writes it; new reference. */
static PyObject *
spelled(Door *self, PyObject *name)
{
    PyObject *known = PyDict_GetItemWithError(self->spelled, name);
    if (known != NULL || PyErr_Occurred())
        return Py_XNewRef(known);
    known = PyObject_CallOneArg(self->spell, name);
    if (known != NULL && PyDict_GET_SIZE(self->spelled) < SPELLINGS
        && PyDict_SetItem(self->spelled, name, known) < 0)
        Py_CLEAR(known);
    return known;
}

/* Put these (name, text) pairs behind the headers. 0 or -1. */
static int
add_extra(Door *self, PyObject *list, PyObject *extra)
{
    if (!PyTuple_CheckExact(extra)) { /* it puts them there itself: see _limits.c */
        PyObject *args[] = {list, self->spell};
        PyObject *done = PyObject_Vectorcall(extra, args, 2, NULL);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(extra); i++) {
        PyObject *given = PyTuple_GET_ITEM(extra, i);
        if (!PyTuple_CheckExact(given) || PyTuple_GET_SIZE(given) != 2
            || !PyUnicode_Check(PyTuple_GET_ITEM(given, 1))) {
            PyErr_SetString(PyExc_TypeError, "an extra header is a pair of texts");
            return -1;
        }
        PyObject *name = spelled(self, PyTuple_GET_ITEM(given, 0));
        PyObject *value = name == NULL ? NULL : value_of(self, PyTuple_GET_ITEM(given, 1));
        PyObject *pair = value == NULL ? NULL : PyTuple_Pack(2, name, value);
        int failed = pair == NULL ? -1 : PyList_Append(list, pair);
        Py_XDECREF(name);
        Py_XDECREF(value);
        Py_XDECREF(pair);
        if (failed < 0)
            return -1;
    }
    return 0;
}

/* Whether it may stand in a header as it is. Ours do; an app may have set its own. */
static int
sound(PyObject *id)
{
    if (id == NULL || !is_ascii(id) || PyUnicode_GET_LENGTH(id) == 0)
        return 0;
    const Py_UCS1 *text = PyUnicode_1BYTE_DATA(id), *end = text + PyUnicode_GET_LENGTH(id);
    while (text < end && *text > ' ' && *text < 127)
        text++;
    return text == end;
}

/* Whether the answer to this request carries both ids. */
static inline int
with_both(Door *self, Exchange *x)
{
    return self->correlation != Py_None && (self->always || x->correlated);
}

/* The answer starts: a copy of its headers with room for `extra` more, new reference. NULL without an
 * exception where the function in Python has to look closer.
 */
static PyObject *
started(Door *self, Exchange *x, PyObject *status, PyObject *headers, Py_ssize_t extra)
{
    PyObject *list = copied(self, headers, extra);
    if (list == NULL || x->request_id == NULL || x->correlation_id == NULL) {
        Py_XDECREF(list);
        return NULL;
    }
    put(&x->status, status);
    x->first_byte = now();
    return list;
}

/* As the function of Plan.head_with; new reference. */
static PyObject *
head(Door *self, Exchange *x, PyObject *status, PyObject *headers)
{
    int both = with_both(self, x);
    PyObject *list = started(self, x, status, headers, 1 + both);
    if (list == NULL) {
        if (PyErr_Occurred())
            return NULL;
        return PyObject_CallFunctionObjArgs(self->slow_head, (PyObject *)x, status, headers, NULL);
    }
    Py_ssize_t at = PyList_GET_SIZE(list) - 1 - both;
    PyObject *value = value_of(self, x->request_id);
    PyObject *pair = value == NULL ? NULL : PyTuple_Pack(2, self->request, value);
    if (pair == NULL)
        goto failed;
    PyList_SET_ITEM(list, at, pair);
    if (both) {
        if (x->correlation_id != x->request_id) {
            Py_DECREF(value);
            value = value_of(self, x->correlation_id);
        }
        pair = value == NULL ? NULL : PyTuple_Pack(2, self->correlation, value);
        if (pair == NULL)
            goto failed;
        PyList_SET_ITEM(list, at + 1, pair);
    }
    if (is_set(x->extra)) {
        PyObject *extra = Py_NewRef(x->extra);
        int failed = add_extra(self, list, extra);
        Py_DECREF(extra);
        if (failed < 0)
            goto failed;
    }
    Py_DECREF(value);
    return list;
failed:
    Py_XDECREF(value);
    Py_DECREF(list);
    return NULL;
}

static PyObject *
door_head(Door *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "head() takes three arguments");
        return NULL;
    }
    Exchange *x = as_exchange(args[0]);
    return x == NULL ? NULL : head(self, x, args[1], args[2]);
}

/* The wanted request headers of an environ as open() takes them: a dict or None; new reference. */
static PyObject *
gather(Door *door, PyObject *environ)
{
    PyObject *found = NULL, *key, *name;
    Py_ssize_t at = 0;
    while (PyDict_Next(door->wanted, &at, &key, &name)) {
        PyObject *value = Py_XNewRef(PyDict_GetItemWithError(environ, key));
        int there = value == NULL ? 0 : PyObject_IsTrue(value);
        if (value == NULL && PyErr_Occurred())
            there = -1;
        if (there > 0 && found == NULL)
            there = (found = PyDict_New()) == NULL ? -1 : 1;
        if (there > 0)
            there = PyDict_SetItem(found, name, value);
        Py_XDECREF(value);
        if (there < 0) {
            Py_XDECREF(found);
            return NULL;
        }
    }
    return found == NULL ? Py_NewRef(Py_None) : found;
}

static PyObject *
door_gather(Door *self, PyObject *environ)
{
    if (PyDict_Check(environ))
        return gather(self, environ);
    PyErr_SetString(PyExc_TypeError, "an environ is a dict");
    return NULL;
}

static PyMethodDef door_methods[] = {
    {"open", (PyCFunction)(void (*)(void))door_open, METH_FASTCALL, "As Plan.open_with()."},
    {"head", (PyCFunction)(void (*)(void))door_head, METH_FASTCALL, "As Plan.head_with()."},
    {"gather", (PyCFunction)door_gather, METH_O, "As Port.gather."},
    {NULL},
};

static PyTypeObject DoorType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Door",
    .tp_basicsize = sizeof(Door),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = door_new,
    .tp_dealloc = (destructor)door_dealloc,
    .tp_traverse = (traverseproc)door_traverse,
    .tp_clear = (inquiry)door_clear,
    .tp_methods = door_methods,
};

/* The ASGI edge --------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Holder *port; /* a Hinge */
    PyObject *app, *http, *key, *endpoint, *label, *reply, *failed, *observed, *collect, *alone;
    PyObject *sender; /* the type whose method `send` was the last time, and what `alone` said of it */
    int sender_alone;
} Edge;

#define EDGE_OBJECTS(X) \
    X(app) X(port) X(http) X(key) X(endpoint) X(label) X(reply) X(failed) X(observed) X(collect) \
    X(alone)

/* What an app is given for `send`. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Edge *edge;
    Door *door;
    Exchange *exchange;
    PyObject *scope, *send;
} Respond;

#define RESPOND_OBJECTS(X) X(edge) X(door) X(exchange) X(scope) X(send)

/* An awaitable around another: a request, or the last message of its answer. Stands for the
 * coroutines `http` and `_last` of opsguard_asgi.edge.
 */
typedef struct {
    PyObject_HEAD
    PyObject *inner; /* what is awaited now */
    Edge *edge;      /* NULL: this is the last message */
    Exchange *exchange;
    PyObject *scope, *receive, *send, *respond, *message;
    PyObject *error; /* what the app raised, while `_failed` runs */
    char state, running;
} Watch;

enum { NEW, BEGUN, DONE };

#define WATCH_OBJECTS(X) \
    X(inner) X(edge) X(exchange) X(scope) X(receive) X(send) X(respond) X(message) X(error)

/* What `await` would drive; takes the reference, which may be NULL with an exception. */
static PyObject *
driven(PyObject *awaitable)
{
    if (awaitable == NULL || PyCoro_CheckExact(awaitable) || PyGen_CheckExact(awaitable))
        return awaitable;
    PyAsyncMethods *methods = Py_TYPE(awaitable)->tp_as_async;
    PyObject *iterator = NULL;
    if (methods != NULL && methods->am_await != NULL)
        iterator = methods->am_await(awaitable);
    else
        PyErr_Format(PyExc_TypeError, "object %.100s can't be used in 'await' expression",
                     Py_TYPE(awaitable)->tp_name);
    if (iterator != NULL && !PyIter_Check(iterator)) {
        PyErr_Format(PyExc_TypeError, "__await__() returned non-iterator of type '%.100s'",
                     Py_TYPE(iterator)->tp_name);
        Py_CLEAR(iterator);
    }
    Py_DECREF(awaitable);
    return iterator;
}

/* The wanted headers of a request: the two of an API key apart, as most have no other. */
typedef struct {
    PyObject *key, *authorization, *others; /* texts, and a dict */
} Wanted;

/* Our name of a header that is wanted, borrowed; NULL for any other. A handful is looked through
 * sooner than a name is hashed.
 */
static PyObject *
wanted_name(Door *door, PyObject *header)
{
    Py_ssize_t length = PyBytes_GET_SIZE(header);
    if (!(door->lengths >> (length & 63) & 1))
        return NULL;
    for (int i = 0; i < door->named; i++)
        if (PyBytes_GET_SIZE(door->names[i][0]) == length
            && memcmp(PyBytes_AS_STRING(door->names[i][0]), PyBytes_AS_STRING(header), length) == 0)
            return door->names[i][1];
    return NULL;
}

/* The value of a header as text, new reference: nearly all are ASCII. */
static PyObject *
as_text(const char *value, Py_ssize_t length)
{
    uint64_t high = 0, word;
    Py_ssize_t i = 0;
    for (; i + 8 <= length; i += 8) {
        memcpy(&word, value + i, 8);
        high |= word;
    }
    for (; i < length; i++)
        high |= (unsigned char)value[i];
    if (length < 2 || high & 0x8080808080808080u)
        return PyUnicode_DecodeLatin1(value, length, NULL);
    PyObject *text = PyUnicode_New(length, 127);
    if (text != NULL)
        memcpy(PyUnicode_1BYTE_DATA(text), value, length);
    return text;
}

/* The header of a pair goes into *found if it is wanted: 1. 0: it takes a closer look; or -1. */
static int
collected(Door *door, PyObject *pair, Wanted *found)
{
    if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2)
        return 0;
    PyObject *header = PyTuple_GET_ITEM(pair, 0), *value = PyTuple_GET_ITEM(pair, 1);
    if (!PyBytes_CheckExact(header))
        return 0;
    PyObject *name = wanted_name(door, header), *key = door->core->key_header;
    if (name == NULL)
        return 1;
    PyObject **place = name == key                                          ? &found->key
                       : key != Py_None && name == names.authorization ? &found->authorization
                                                                            : NULL;
    int twice = place != NULL           ? *place != NULL
                : found->others != NULL ? PyDict_Contains(found->others, name)
                                        : 0;
    if (twice || !PyBytes_CheckExact(value))
        return twice < 0 ? -1 : 0;
    PyObject *text = as_text(PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value));
    if (place != NULL) {
        *place = text;
        return text == NULL ? -1 : 1;
    }
    int failed = text == NULL || (found->others == NULL && (found->others = PyDict_New()) == NULL)
                 || PyDict_SetItem(found->others, name, text) < 0;
    Py_XDECREF(text);
    return failed ? -1 : 1;
}

/* As open_exchange takes them: a dict, None, or the pair that Exchange.credentials is; new reference. */
static PyObject *
as_headers(Door *door, Wanted *found)
{
    if (found->others == NULL && found->key == NULL && found->authorization == NULL)
        Py_RETURN_NONE;
    if (found->others == NULL && door->core->resolve == Py_None)
        return PyTuple_Pack(2, found->key == NULL ? names.empty : found->key,
                            found->authorization == NULL ? names.empty : found->authorization);
    PyObject *all = found->others == NULL ? PyDict_New() : Py_NewRef(found->others);
    if (all == NULL
        || (found->key != NULL && PyDict_SetItem(all, door->core->key_header, found->key) < 0)
        || (found->authorization != NULL
            && PyDict_SetItem(all, names.authorization, found->authorization) < 0))
        Py_CLEAR(all);
    return all;
}

/* The wanted request headers as open_exchange takes them; new reference. */
static PyObject *
wanted_headers(Edge *edge, Door *door, PyObject *pairs)
{
    Wanted found = {NULL, NULL, NULL};
    int plain = door->named >= 0 && (PyList_CheckExact(pairs) || PyTuple_CheckExact(pairs));
    for (Py_ssize_t i = 0; plain > 0 && i < PySequence_Fast_GET_SIZE(pairs); i++) {
        PyObject *pair = Py_NewRef(PySequence_Fast_ITEMS(pairs)[i]);
        plain = collected(door, pair, &found);
        Py_DECREF(pair);
    }
    PyObject *usual = plain > 0 ? as_headers(door, &found) : NULL;
    Py_XDECREF(found.key);
    Py_XDECREF(found.authorization);
    Py_XDECREF(found.others);
    if (plain)
        return usual;
    PyObject *headers = PyObject_CallFunctionObjArgs(edge->collect, door->wanted, pairs, NULL);
    if (headers != NULL && PyDict_CheckExact(headers) && PyDict_GET_SIZE(headers) == 0) {
        Py_DECREF(headers);
        Py_RETURN_NONE;
    }
    return headers;
}

/* As open_exchange of opsguard_asgi.types; new reference. */
static Exchange *
open_scope(Edge *edge, Door *door, PyObject *scope)
{
    Exchange *x = NULL;
    PyObject *method = NULL, *path = NULL, *routed = NULL, *root = NULL, *client = NULL;
    PyObject *peer = NULL, *pairs = NULL, *headers = NULL;
    int there;
    if ((method = needed(scope, names.method)) == NULL || (pairs = needed(scope, names.headers)) == NULL
        || (headers = wanted_headers(edge, door, pairs)) == NULL
        || (path = needed(scope, names.path)) == NULL)
        goto done;
    routed = Py_NewRef(path);
    root = item(scope, names.root_path);
    if (root == NULL && PyErr_Occurred())
        goto done;
    if (root != NULL && PyUnicode_Check(root) && PyUnicode_GET_LENGTH(root) && PyUnicode_Check(path)) {
        Py_ssize_t length = PyUnicode_GET_LENGTH(root), all = PyUnicode_GET_LENGTH(path);
        there = (int)PyUnicode_Tailmatch(path, root, 0, all, -1);
        if (there < 0)
            goto done;
        if (there) {
            Py_SETREF(routed, PyUnicode_Substring(path, length, all));
            if (routed == NULL)
                goto done;
        }
    }
    client = item(scope, names.client);
    if (client == NULL && PyErr_Occurred())
        goto done;
    there = client == NULL ? 0 : PyObject_IsTrue(client);
    if (there < 0)
        goto done;
    peer = there ? PySequence_GetItem(client, 0) : Py_NewRef(Py_None);
    if (peer == NULL)
        goto done;
    there = PyObject_IsTrue(peer);
    if (there < 0)
        goto done;
    if (!there)
        Py_SETREF(peer, Py_NewRef(Py_None));
    x = open_exchange(door, method, path, routed, peer, headers, scope);
    if (x != NULL && PyDict_SetItem(scope, edge->key, (PyObject *)x) < 0)
        Py_CLEAR(x);
done:
    Py_XDECREF(method);
    Py_XDECREF(path);
    Py_XDECREF(routed);
    Py_XDECREF(root);
    Py_XDECREF(client);
    Py_XDECREF(peer);
    Py_XDECREF(pairs);
    Py_XDECREF(headers);
    return x;
}

static Watch *
watch_new(Edge *edge, PyObject *send)
{
    Watch *self = PyObject_GC_New(Watch, &WatchType);
    if (self == NULL)
        return NULL;
    self->inner = self->scope = self->receive = self->respond = self->message = self->error = NULL;
    self->exchange = NULL;
    self->edge = (Edge *)Py_XNewRef(edge);
    self->send = Py_NewRef(send);
    self->state = NEW;
    self->running = 0;
    return self;
}

/* Respond */

static PyObject *
start_answer(Respond *self, PyObject *message)
{
    Exchange *x = self->exchange;
    if (self->edge->label != Py_None && !is_set(x->endpoint)
        && name_by(x->core, x, self->edge->label, self->scope) < 0)
        return NULL;
    PyObject *answer = NULL, *ours = NULL, *headers = NULL, *sent = NULL;
    PyObject *status = needed(message, names.status);
    if (status == NULL)
        return NULL;
    headers = item(message, names.headers);
    if (headers == NULL && (PyErr_Occurred() || (headers = PyTuple_New(0)) == NULL))
        goto done;
    ours = head(self->door, x, status, headers);
    if (ours == NULL)
        goto done;
    if (PyDict_CheckExact(message))
        answer = PyDict_Copy(message);
    else if ((answer = PyDict_New()) != NULL && PyDict_Update(answer, message) < 0)
        Py_CLEAR(answer);
    if (answer != NULL && PyDict_SetItem(answer, names.headers, ours) == 0)
        sent = PyObject_CallOneArg(self->send, answer);
done:
    Py_DECREF(status);
    Py_XDECREF(headers);
    Py_XDECREF(ours);
    Py_XDECREF(answer);
    return sent;
}

static PyObject *
last_message(Respond *self, PyObject *message)
{
    Watch *last = watch_new(NULL, self->send);
    if (last == NULL)
        return NULL;
    last->exchange = (Exchange *)Py_NewRef(self->exchange);
    last->message = Py_NewRef(message);
    PyObject_GC_Track(last);
    return (PyObject *)last;
}

static PyObject *
send_body(Respond *self, PyObject *message)
{
    PyObject *body = item(message, names.body);
    if (body != NULL) {
        Py_ssize_t size = PyObject_Size(body);
        Py_DECREF(body);
        if (size < 0)
            return NULL;
        self->exchange->sent += size;
    } else if (PyErr_Occurred())
        return NULL;
    PyObject *more = item(message, names.more_body);
    if (more == NULL && PyErr_Occurred())
        return NULL;
    int goes_on = more == NULL ? 0 : PyObject_IsTrue(more);
    Py_XDECREF(more);
    if (goes_on < 0)
        return NULL;
    return goes_on ? PyObject_CallOneArg(self->send, message) : last_message(self, message);
}

/* http.response.pathsend: the server sends a file by itself, and that is all of the body. */
static PyObject *
send_path(Respond *self, PyObject *message)
{
    PyObject *path = item(message, names.path), *encoded = NULL;
    struct stat found;
    if (path == NULL && PyErr_Occurred())
        return NULL;
    if (path != NULL && PyUnicode_FSConverter(path, &encoded)) {
        int failed;
        Py_BEGIN_ALLOW_THREADS
        failed = stat(PyBytes_AS_STRING(encoded), &found);
        Py_END_ALLOW_THREADS
        if (!failed)
            self->exchange->sent += found.st_size;
        Py_DECREF(encoded);
    }
    Py_XDECREF(path);
    PyErr_Clear(); /* an odd path is for the server to refuse */
    return last_message(self, message);
}

static PyObject *
respond_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Respond *self = (Respond *)callable;
    if (PyVectorcall_NARGS(flags) + (keywords == NULL ? 0 : PyTuple_GET_SIZE(keywords)) != 1) {
        PyErr_SetString(PyExc_TypeError, "send() takes one argument, the message");
        return NULL;
    }
    PyObject *message = args[0];
    PyObject *kind = needed(message, names.type);
    if (kind == NULL)
        return NULL;
    int found;
    PyObject *(*how)(Respond *, PyObject *) = NULL;
    if ((found = same(kind, names.body_kind)) > 0)
        how = send_body;
    else if (found == 0 && (found = same(kind, names.start)) > 0)
        how = start_answer;
    else if (found == 0 && (found = same(kind, names.pathsend)) > 0)
        how = send_path;
    Py_DECREF(kind);
    if (found < 0)
        return NULL;
    return how == NULL ? PyObject_CallOneArg(self->send, message) : how(self, message);
}

static int
respond_traverse(Respond *self, visitproc visit, void *arg)
{
    RESPOND_OBJECTS(VISIT)
    return 0;
}

static int
respond_clear(Respond *self)
{
    RESPOND_OBJECTS(CLEAR)
    return 0;
}

static void
respond_dealloc(Respond *self)
{
    PyObject_GC_UnTrack(self);
    respond_clear(self);
    PyObject_GC_Del(self);
}

static PyTypeObject RespondType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Respond",
    .tp_basicsize = sizeof(Respond),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL
                | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Respond, call),
    .tp_dealloc = (destructor)respond_dealloc,
    .tp_traverse = (traverseproc)respond_traverse,
    .tp_clear = (inquiry)respond_clear,
};

/* Watch */

/* The request is opened, and the app, or our own answer, called: what to await; new reference.
 * If it could not be opened, the app goes on without us.
 */
static PyObject *
call_app(Watch *self, Door *door)
{
    Edge *edge = self->edge;
    Exchange *x = open_scope(edge, door, self->scope);
    if (x == NULL) {
        if (reported(door->core, names.site_open) < 0)
            return NULL;
        PyObject *args[] = {self->scope, self->receive, self->send};
        return PyObject_Vectorcall(edge->app, args, 3, NULL);
    }
    self->exchange = x;
    Respond *respond = PyObject_GC_New(Respond, &RespondType);
    if (respond == NULL)
        return NULL;
    respond->call = respond_call;
    respond->edge = (Edge *)Py_NewRef(edge);
    respond->door = (Door *)Py_NewRef(door);
    respond->exchange = (Exchange *)Py_NewRef(x);
    respond->scope = Py_NewRef(self->scope);
    respond->send = Py_NewRef(self->send);
    PyObject_GC_Track(respond);
    self->respond = (PyObject *)respond;
    if (edge->endpoint != Py_None && enter_by(x->core, x, edge->endpoint, self->scope) < 0)
        return NULL;
    if (is_set(x->work) || is_set(x->reply)) {
        PyObject *args[] = {(PyObject *)x, self->scope, self->receive, self->respond};
        return PyObject_Vectorcall(edge->reply, args, 4, NULL);
    }
    PyObject *heard = self->receive;
    if (x->uploads) {
        heard = PyObject_CallFunctionObjArgs(edge->observed, (PyObject *)x, heard, NULL);
        if (heard == NULL)
            return NULL;
    } else
        Py_INCREF(heard);
    PyObject *args[] = {self->scope, heard, self->respond};
    PyObject *awaitable = PyObject_Vectorcall(edge->app, args, 3, NULL);
    Py_DECREF(heard);
    return awaitable;
}

/* As alone() of opsguard_asgi.edge; -1 with an exception. A server's requests all have `send` from one
 * type, so it is asked once.
 */
static int
is_alone(Edge *edge, PyObject *send)
{
    PyObject *type = PyMethod_Check(send) ? (PyObject *)Py_TYPE(PyMethod_GET_SELF(send)) : NULL;
    if (type == NULL || type == edge->sender)
        return type != NULL && edge->sender_alone;
    PyObject *said = PyObject_CallOneArg(edge->alone, send);
    int alone = said == NULL ? -1 : said == Py_True;
    Py_XDECREF(said);
    if (alone >= 0) {
        edge->sender_alone = alone; /* first: a finalizer may run when the other type goes */
        put(&edge->sender, type);
    }
    return alone;
}

/* Whatever happened, this is over: as the `finally` blocks. 0, or -1 if that failed too. */
static int
leave(Watch *self)
{
    Exchange *x = self->exchange;
    Core *core = x == NULL ? NULL : x->core;
    self->state = DONE;
    if (core == NULL)
        return 0;
    PyObject *error = take_error();
    int failed;
    if (self->edge == NULL) {
        if (error != NULL && PyErr_GivenExceptionMatches(error, PyExc_OSError))
            x->left = 1;
        failed = finish_exchange(core, x);
    } else {
        failed = x->closed ? 0 : close_exchange(core, x);
        int alone = failed ? 1 : is_alone(self->edge, self->send);
        PyObject *token = alone ? NULL : PyContextVar_Set(core->current, Py_None);
        if (alone < 0 || (alone == 0 && token == NULL))
            failed = -1;
        Py_XDECREF(token);
    }
    if (failed < 0) {
        Py_XDECREF(error);
        return -1;
    }
    give_error(error);
    return 0;
}

/* What the inner awaitable gave, and what comes of it. Always finishes with None. */
static PySendResult
settle(Watch *self, PySendResult got, PyObject **result)
{
    while (got != PYGEN_NEXT) {
        Py_CLEAR(self->inner);
        int dealt = got == PYGEN_RETURN && *result == Py_True;
        if (got == PYGEN_RETURN)
            Py_CLEAR(*result);
        if (self->error != NULL && dealt)
            Py_CLEAR(self->error); /* `_failed` has answered for it */
        if (self->error != NULL) { /* `_failed` has run: the app's exception goes on */
            PyObject *error = self->error;
            self->error = NULL;
            go_on_with(error); /* as the context of what `_failed` raised, if it did */
            leave(self);
            return PYGEN_ERROR;
        }
        if (got == PYGEN_ERROR && self->edge != NULL && self->respond != NULL) {
            self->error = take_error();
            self->inner = driven(PyObject_CallFunctionObjArgs(
                self->edge->failed, (PyObject *)self->exchange, self->error, self->send, self->respond,
                NULL));
            got = self->inner == NULL ? PYGEN_ERROR : PyIter_Send(self->inner, Py_None, result);
            continue;
        }
        if (leave(self) < 0)
            got = PYGEN_ERROR;
        if (got == PYGEN_RETURN)
            *result = Py_NewRef(Py_None);
        return got;
    }
    return got;
}

static PySendResult
watch_send(Watch *self, PyObject *value, PyObject **result)
{
    PySendResult got;
    *result = NULL;
    if (self->running) {
        PyErr_SetString(PyExc_ValueError, "coroutine already executing");
        return PYGEN_ERROR;
    }
    if (self->state == DONE) {
        PyErr_SetString(PyExc_RuntimeError, "cannot reuse already awaited coroutine");
        return PYGEN_ERROR;
    }
    self->running = 1;
    if (self->state == NEW) {
        PyObject *awaitable = NULL;
        self->state = BEGUN;
        if (value != Py_None)
            PyErr_SetString(PyExc_TypeError, "can't send non-None value to a just-started coroutine");
        else if (self->edge == NULL)
            awaitable = PyObject_CallOneArg(self->send, self->message);
        else {
            PyObject *door = Py_XNewRef(self->edge->port->held);
            if (door != NULL && Py_IS_TYPE(door, &DoorType))
                awaitable = call_app(self, (Door *)door);
            else
                PyErr_SetString(PyExc_TypeError, "a port's door is needed");
            Py_XDECREF(door);
        }
        self->inner = driven(awaitable);
    }
    got = self->inner == NULL ? PYGEN_ERROR : PyIter_Send(self->inner, value, result);
    if (got != PYGEN_NEXT)
        got = settle(self, got, result);
    self->running = 0;
    return got;
}

static PyObject *
watch_next(Watch *self)
{
    PyObject *result;
    if (watch_send(self, Py_None, &result) == PYGEN_RETURN)
        Py_CLEAR(result); /* NULL without an exception is StopIteration(None) */
    return result;
}

/* As watch_next, for callers in Python. */
static PyObject *
finished(PySendResult got, PyObject *result)
{
    if (got != PYGEN_RETURN)
        return result;
    Py_DECREF(result);
    PyErr_SetNone(PyExc_StopIteration);
    return NULL;
}

static PyObject *
watch_send_method(Watch *self, PyObject *value)
{
    PyObject *result;
    PySendResult got = watch_send(self, value, &result);
    return finished(got, result);
}

static int
raise_given(PyObject *const *args, Py_ssize_t count)
{
    PyObject *type = args[0], *value = count > 1 ? args[1] : NULL, *trace = count > 2 ? args[2] : NULL;
    if (trace == Py_None)
        trace = NULL;
    if (trace != NULL && !PyTraceBack_Check(trace)) {
        PyErr_SetString(PyExc_TypeError, "throw() third argument must be a traceback object");
        return -1;
    }
    if (PyExceptionInstance_Check(type)) {
        value = type;
        type = (PyObject *)Py_TYPE(value);
        if (trace == NULL) {
            PyErr_Restore(Py_NewRef(type), Py_NewRef(value), PyException_GetTraceback(value));
            return 0;
        }
    } else if (!PyExceptionClass_Check(type)) {
        PyErr_SetString(PyExc_TypeError, "exceptions must be classes or instances deriving from "
                                         "BaseException");
        return -1;
    }
    PyErr_Restore(Py_NewRef(type), Py_XNewRef(value), Py_XNewRef(trace));
    return 0;
}

/* Throw into what is awaited. */
static PySendResult
pass_on(Watch *self, PyObject *const *args, Py_ssize_t count, PyObject **result)
{
    PyObject *leaving = PyErr_GivenExceptionMatches(args[0], PyExc_GeneratorExit) ? names.close
                                                                                    : names.throw;
    PyObject *method = PyObject_GetAttr(self->inner, leaving);
    if (method == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError))
            return PYGEN_ERROR;
        PyErr_Clear();
        raise_given(args, count);
        return PYGEN_ERROR;
    }
    if (leaving == names.close) {
        PyObject *closed = PyObject_CallNoArgs(method);
        Py_DECREF(method);
        if (closed == NULL)
            return PYGEN_ERROR;
        Py_DECREF(closed);
        raise_given(args, count);
        return PYGEN_ERROR;
    }
    *result = PyObject_Vectorcall(method, args, count, NULL);
    Py_DECREF(method);
    if (*result != NULL)
        return PYGEN_NEXT;
    if (!PyErr_ExceptionMatches(PyExc_StopIteration))
        return PYGEN_ERROR;
    PyObject *stop = take_error(), *value = ((PyStopIterationObject *)stop)->value;
    *result = Py_NewRef(value == NULL ? Py_None : value);
    Py_DECREF(stop);
    return PYGEN_RETURN;
}

static PyObject *
watch_throw(Watch *self, PyObject *const *args, Py_ssize_t count)
{
    if (count < 1 || count > 3) {
        PyErr_SetString(PyExc_TypeError, "throw() takes one to three arguments");
        return NULL;
    }
    if (self->running) {
        PyErr_SetString(PyExc_ValueError, "coroutine already executing");
        return NULL;
    }
    if (self->state == DONE) {
        PyErr_SetString(PyExc_RuntimeError, "cannot reuse already awaited coroutine");
        return NULL;
    }
    if (self->state == NEW) {
        self->state = DONE;
        raise_given(args, count);
        return NULL;
    }
    PyObject *result = NULL;
    self->running = 1;
    PySendResult got = settle(self, pass_on(self, args, count, &result), &result);
    self->running = 0;
    return finished(got, result);
}

static PyObject *
watch_close(Watch *self, PyObject *Py_UNUSED(nothing))
{
    if (self->state != BEGUN || self->running) {
        if (self->running) {
            PyErr_SetString(PyExc_ValueError, "coroutine already executing");
            return NULL;
        }
        self->state = DONE;
        Py_RETURN_NONE;
    }
    PyObject *args[] = {PyExc_GeneratorExit};
    PyObject *result = watch_throw(self, args, 1);
    if (result != NULL) {
        Py_DECREF(result);
        PyErr_SetString(PyExc_RuntimeError, "coroutine ignored GeneratorExit");
        return NULL;
    }
    if (!PyErr_ExceptionMatches(PyExc_GeneratorExit) && !PyErr_ExceptionMatches(PyExc_StopIteration))
        return NULL;
    PyErr_Clear();
    Py_RETURN_NONE;
}

static PyObject *
watch_await(PyObject *self)
{
    return Py_NewRef(self);
}

static void
watch_finalize(PyObject *object)
{
    Watch *self = (Watch *)object;
    if (self->state != BEGUN || self->running)
        return;
    PyObject *error = take_error();
    PyObject *done = watch_close(self, NULL);
    if (done == NULL)
        PyErr_WriteUnraisable(object);
    Py_XDECREF(done);
    give_error(error);
}

static int
watch_traverse(Watch *self, visitproc visit, void *arg)
{
    WATCH_OBJECTS(VISIT)
    return 0;
}

static int
watch_clear(Watch *self)
{
    WATCH_OBJECTS(CLEAR)
    return 0;
}

static void
watch_dealloc(Watch *self)
{
    if (self->state == BEGUN && PyObject_CallFinalizerFromDealloc((PyObject *)self) < 0)
        return;
    PyObject_GC_UnTrack(self);
    watch_clear(self);
    PyObject_GC_Del(self);
}

static PyMethodDef watch_methods[] = {
    {"send", (PyCFunction)watch_send_method, METH_O, NULL},
    {"throw", (PyCFunction)(void (*)(void))watch_throw, METH_FASTCALL, NULL},
    {"close", (PyCFunction)watch_close, METH_NOARGS, NULL},
    {NULL},
};

/* What `inspect` and event loops ask a coroutine for: without these, a library that insists on one
 * takes no request for a task. There is no frame, so one that is not begun has the state of a closed
 * one, which is as well not to be cancelled.
 */

static PyObject *
watch_class(PyObject *Py_UNUSED(self), void *Py_UNUSED(unused))
{
    return Py_NewRef(&PyCoro_Type);
}

static PyObject *
watch_name(PyObject *Py_UNUSED(self), void *Py_UNUSED(unused))
{
    return PyUnicode_FromString("opsguard");
}

static PyObject *
watch_frame(PyObject *Py_UNUSED(self), void *Py_UNUSED(unused))
{
    Py_RETURN_NONE;
}

static PyObject *
watch_running(Watch *self, void *Py_UNUSED(unused))
{
    return PyBool_FromLong(self->running);
}

static PyObject *
watch_suspended(Watch *self, void *Py_UNUSED(unused))
{
    return PyBool_FromLong(self->state == BEGUN && !self->running);
}

static PyGetSetDef watch_attributes[] = {
    {"__class__", watch_class},
    {"__name__", watch_name},
    {"__qualname__", watch_name},
    {"cr_frame", watch_frame},
    {"cr_running", (getter)watch_running},
    {"cr_suspended", (getter)watch_suspended},
    {NULL},
};

static PyMemberDef watch_members[] = {
    {"cr_await", T_OBJECT, offsetof(Watch, inner), READONLY, NULL},
    {NULL},
};

static PyAsyncMethods watch_async = {.am_await = watch_await, .am_send = (sendfunc)watch_send};

static PyTypeObject WatchType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Watch",
    .tp_basicsize = sizeof(Watch),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_as_async = &watch_async,
    .tp_iter = PyObject_SelfIter, /* for `yield from call.__await__()` */
    .tp_iternext = (iternextfunc)watch_next,
    .tp_finalize = watch_finalize,
    .tp_dealloc = (destructor)watch_dealloc,
    .tp_traverse = (traverseproc)watch_traverse,
    .tp_clear = (inquiry)watch_clear,
    .tp_methods = watch_methods,
    .tp_getset = watch_attributes,
    .tp_members = watch_members,
};

/* Edge */

static PyObject *
edge_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Edge *self = (Edge *)callable;
    if (PyVectorcall_NARGS(flags) != 3 || keywords != NULL || !PyDict_CheckExact(args[0]))
        return PyObject_Vectorcall(self->http, args, flags, keywords);
    PyObject *scope = args[0];
    PyObject *kind = item(scope, names.type);
    if (kind == NULL && PyErr_Occurred())
        return NULL;
    int usual = kind == NULL ? 0 : same(kind, names.http);
    Py_XDECREF(kind);
    int nested = usual <= 0 ? 0 : PyDict_Contains(scope, self->key);
    if (usual < 0 || nested < 0)
        return NULL;
    if (!usual || nested)
        return PyObject_Vectorcall(self->http, args, flags, keywords);
    Watch *watch = watch_new(self, args[2]);
    if (watch == NULL)
        return NULL;
    watch->scope = Py_NewRef(scope);
    watch->receive = Py_NewRef(args[1]);
    PyObject_GC_Track(watch);
    return (PyObject *)watch;
}

static PyObject *
edge_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"app",   "port",  "http",   "key",      "endpoint",
                           "label", "reply", "failed", "observed", "collect", "alone", NULL};
    PyObject *app, *port, *http, *key, *endpoint, *label, *reply, *failed, *observed, *collect, *alone;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OO!OUOOOOOOO", keys, &app, &HingeType, &port,
                                     &http, &key, &endpoint, &label, &reply, &failed, &observed,
                                     &collect, &alone))
        return NULL;
    Edge *self = (Edge *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->call = edge_call;
    EDGE_OBJECTS(KEEP)
    return (PyObject *)self;
}

static int
edge_traverse(Edge *self, visitproc visit, void *arg)
{
    EDGE_OBJECTS(VISIT)
    Py_VISIT(self->sender);
    return 0;
}

static int
edge_clear(Edge *self)
{
    EDGE_OBJECTS(CLEAR)
    Py_CLEAR(self->sender);
    return 0;
}

static void
edge_dealloc(Edge *self)
{
    PyObject_GC_UnTrack(self);
    edge_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject EdgeType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Edge",
    .tp_basicsize = sizeof(Edge),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = edge_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Edge, call),
    .tp_dealloc = (destructor)edge_dealloc,
    .tp_traverse = (traverseproc)edge_traverse,
    .tp_clear = (inquiry)edge_clear,
};

/* The WSGI edge ---------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Holder *port; /* a Hinge */
    PyObject *app, *guarded, *key, *root, *endpoint, *text, *counted, *refuse, *other, *failed, *answer;
    PyObject *keeps;
    PyObject *keeper, *keeping; /* type and function that `keeps` was asked about last */
    char kept;                  /* what it said */
} Gate;

#define GATE_OBJECTS(X) \
    X(port) X(app) X(guarded) X(key) X(root) X(endpoint) X(text) X(counted) X(refuse) X(other) \
    X(failed) X(answer) X(keeps)

/* `start_response` as the app sees it; as Start of opsguard_wsgi.edge. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Door *door;
    Exchange *exchange;
    PyObject *server, *status, *headers, *write;
    PyObject *id, *other; /* what `headers` is without; NULL: nothing, the second: no such */
    char asked;
    char kept; /* the server keeps the headers in a list, which ours can be put into */
} Start;

#define START_OBJECTS(X) X(door) X(exchange) X(server) X(status) X(headers) X(write) X(id) X(other)

/* A body that is made while it is sent; as Body of opsguard_wsgi.edge. */
typedef struct {
    PyObject_HEAD
    Exchange *exchange;
    PyObject *body, *parts, *first;
} Body;

#define BODY_OBJECTS(X) X(exchange) X(body) X(parts) X(first)

/* Whatever happened, this request is over. An exception that is set stays; 0, or -1 for a new one. */
static int
part(Exchange *x)
{
    Core *core = x->core;
    PyObject *error = take_error();
    int failed = x->closed ? 0 : close_exchange(core, x);
    PyObject *token = failed < 0 ? NULL : PyContextVar_Set(core->current, Py_None);
    if (token == NULL) {
        Py_XDECREF(error);
        return -1;
    }
    Py_DECREF(token);
    give_error(error);
    return 0;
}

/* Start */

/* As keeps_headers() of opsguard_wsgi.edge; -1 with an exception. */
static int
keeps_headers(Gate *gate, PyObject *server)
{
    if (!PyMethod_Check(server))
        return 0;
    PyObject *type = (PyObject *)Py_TYPE(PyMethod_GET_SELF(server));
    PyObject *function = PyMethod_GET_FUNCTION(server);
    if (type == gate->keeper && function == gate->keeping)
        return gate->kept;
    PyObject *said = PyObject_CallOneArg(gate->keeps, server);
    if (said == NULL)
        return -1;
    PyObject *before = gate->keeper, *with = gate->keeping;
    gate->keeper = Py_NewRef(type); /* all of it, before a finalizer of those may run */
    gate->keeping = Py_NewRef(function);
    int keeps = gate->kept = said == Py_True;
    Py_DECREF(said);
    Py_XDECREF(before);
    Py_XDECREF(with);
    return keeps;
}

/* Put (name, id) into the list. 0 or -1. */
static int
add_id(PyObject *list, PyObject *name, PyObject *id)
{
    PyObject *pair = PyTuple_Pack(2, name, id);
    int failed = pair == NULL ? -1 : PyList_Append(list, pair);
    Py_XDECREF(pair);
    return failed;
}

/* Put ours behind the headers that the server has taken. 0 or -1. */
static int
hand_over(Start *self)
{
    PyObject *kept = PyObject_GetAttr(PyMethod_GET_SELF(self->server), names.headers);
    int failed = -1;
    if (kept != NULL && PyList_CheckExact(kept))
        failed = add_id(kept, self->door->request, self->id);
    else if (kept != NULL)
        PyErr_SetString(PyExc_TypeError, "the server's headers are no list any more");
    if (!failed && self->other != NULL)
        failed = add_id(kept, self->door->correlation, self->other);
    Py_XDECREF(kept);
    return failed < 0 ? reported(self->door->core, names.site_head) : 0;
}

/* There is something to send now, or nothing at all: the server hears of the start. 0 or -1. */
static int
start_go(Start *self)
{
    if (self->status == NULL)
        return 0;
    PyObject *status = self->status, *headers = self->headers;
    self->status = self->headers = NULL;
    self->asked = 1;
    PyObject *args[] = {status, headers};
    Py_XSETREF(self->write, PyObject_Vectorcall(self->server, args, 2, NULL));
    Py_DECREF(status);
    Py_DECREF(headers);
    if (self->write != NULL && (self->id == NULL || hand_over(self) == 0))
        return 0;
    if (PyErr_ExceptionMatches(PyExc_Exception)) { /* it refuses the headers, and answers for that */
        PyObject *error = take_error(), *code = PyLong_FromLong(500);
        if (code != NULL)
            put(&self->exchange->status, code);
        Py_XDECREF(code);
        PyErr_Clear();
        give_error(error);
    }
    return -1;
}

static PyObject *
start_write(Start *self, PyObject *data)
{
    if (start_go(self) < 0)
        return NULL;
    Py_ssize_t size = PyObject_Size(data);
    if (size < 0)
        return NULL;
    self->exchange->sent += size;
    if (self->write == NULL) {
        PyErr_SetString(PyExc_AssertionError, "write() before start_response()");
        return NULL;
    }
    return PyObject_CallOneArg(self->write, data);
}

static PyObject *
start_go_method(Start *self, PyObject *Py_UNUSED(nothing))
{
    if (start_go(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef start_methods[] = {
    {"write", (PyCFunction)start_write, METH_O, "What PEP 3333 calls the write() callable."},
    {"go", (PyCFunction)start_go_method, METH_NOARGS, "There is something to send now."},
    {NULL},
};

/* The number of a status line, as int(status[:3]); new reference. */
static PyObject *
code_of(PyObject *status)
{
    if (is_ascii(status) && PyUnicode_GET_LENGTH(status) >= 3) {
        const Py_UCS1 *text = PyUnicode_1BYTE_DATA(status);
        if (Py_ISDIGIT(text[0]) && Py_ISDIGIT(text[1]) && Py_ISDIGIT(text[2]))
            return PyLong_FromLong(100 * (text[0] - '0') + 10 * (text[1] - '0') + text[2] - '0');
    }
    PyObject *digits = PySequence_GetSlice(status, 0, 3);
    if (digits == NULL)
        return NULL;
    PyObject *code = PyNumber_Long(digits);
    Py_DECREF(digits);
    return code;
}

static PyObject *
start_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Start *self = (Start *)callable;
    Py_ssize_t given = PyVectorcall_NARGS(flags), named = keywords == NULL ? 0 : PyTuple_GET_SIZE(keywords);
    PyObject *failure = given + named == 3 ? args[2] : Py_None;
    if (given < 2 || given + named > 3
        || (named && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(keywords, 0), "exc_info") != 0)) {
        PyErr_SetString(PyExc_TypeError, "start_response(status, headers, exc_info=None)");
        return NULL;
    }
    PyObject *status = args[0], *headers = args[1];
    if (self->asked) { /* too late for another: the server says so in its own way */
        int failed = PyObject_IsTrue(failure);
        if (failed < 0)
            return NULL;
        return PyObject_CallFunctionObjArgs(self->server, status, headers, failed ? failure : NULL, NULL);
    }
    if (self->status != NULL && failure == Py_None) {
        PyErr_SetString(PyExc_AssertionError, "start_response() was called twice");
        return NULL;
    }
    Exchange *x = self->exchange;
    PyObject *code = code_of(status), *ours = NULL;
    if (code == NULL)
        return NULL;
    int both = with_both(self->door, x);
    int owed = self->kept && !is_set(x->extra) && sound(x->request_id)
               && (!both || sound(x->correlation_id));
    PyObject *id = owed ? Py_NewRef(x->request_id) : NULL;
    PyObject *other = owed && both ? Py_NewRef(x->correlation_id) : NULL;
    if (owed)
        ours = started(self->door, x, code, headers, 0);
    if (ours == NULL) {
        Py_CLEAR(id);
        Py_CLEAR(other);
        if (!PyErr_Occurred())
            ours = head(self->door, x, code, headers);
    }
    Py_DECREF(code);
    if (ours == NULL)
        return NULL;
    Py_XSETREF(self->id, id);
    Py_XSETREF(self->other, other);
    Py_XSETREF(self->status, Py_NewRef(status));
    Py_XSETREF(self->headers, ours);
    return PyCFunction_New(&start_methods[0], callable);
}

static PyMemberDef start_members[] = {
    {"asked", T_BOOL, offsetof(Start, asked), READONLY, "The server has heard of a start."},
    {NULL},
};

static int
start_traverse(Start *self, visitproc visit, void *arg)
{
    START_OBJECTS(VISIT)
    return 0;
}

static int
start_clear(Start *self)
{
    START_OBJECTS(CLEAR)
    return 0;
}

static void
start_dealloc(Start *self)
{
    PyObject_GC_UnTrack(self);
    start_clear(self);
    PyObject_GC_Del(self);
}

static PyTypeObject StartType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Start",
    .tp_basicsize = sizeof(Start),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL
                | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Start, call),
    .tp_dealloc = (destructor)start_dealloc,
    .tp_traverse = (traverseproc)start_traverse,
    .tp_clear = (inquiry)start_clear,
    .tp_methods = start_methods,
    .tp_members = start_members,
};

/* Body */

/* Tell the exchange of the exception that is set, if it is an Exception; it stays set. */
static void
tell(Exchange *x)
{
    if (!PyErr_ExceptionMatches(PyExc_Exception))
        return;
    PyObject *error = take_error();
    PyObject *done = PyObject_CallMethodOneArg((PyObject *)x, names.fail, error);
    if (done == NULL)
        PyErr_Clear(); /* the app's own exception counts */
    Py_XDECREF(done);
    give_error(error);
}

static PyObject *
body_next(Body *self)
{
    PyObject *data = self->first;
    if (data != NULL)
        self->first = NULL;
    else if (self->parts == NULL || (data = PyIter_Next(self->parts)) == NULL) {
        if (PyErr_Occurred())
            tell(self->exchange);
        else
            finish_exchange(self->exchange->core, self->exchange);
        return NULL;
    }
    Py_ssize_t size = PyObject_Size(data);
    if (size < 0) {
        Py_DECREF(data);
        return NULL;
    }
    self->exchange->sent += size;
    return data;
}

/* The server is done, at the end or before it: then the client has left. 0 or -1. */
static int
body_end(Body *self)
{
    Exchange *x = self->exchange;
    PyObject *close = NULL, *done = NULL;
    if (optional(self->body, names.close, &close) > 0) {
        done = PyObject_CallNoArgs(close);
        Py_DECREF(close);
        Py_XDECREF(done);
    }
    PyObject *error = take_error();
    int head_only = x->method != NULL && same(x->method, names.head) > 0 && !is_set(x->error);
    if (head_only) /* some servers do not ask for a body they will not send */
        finish_exchange(x->core, x);
    if (error != NULL)
        PyErr_Clear();
    give_error(error);
    if (part(x) < 0)
        return -1;
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *
body_close(Body *self, PyObject *Py_UNUSED(nothing))
{
    if (body_end(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static int
body_traverse(Body *self, visitproc visit, void *arg)
{
    BODY_OBJECTS(VISIT)
    return 0;
}

static int
body_clear(Body *self)
{
    BODY_OBJECTS(CLEAR)
    return 0;
}

static void
body_dealloc(Body *self)
{
    PyObject_GC_UnTrack(self);
    body_clear(self);
    PyObject_GC_Del(self);
}

static PyMethodDef body_methods[] = {
    {"close", (PyCFunction)body_close, METH_NOARGS, "The server is done with the body."},
    {NULL},
};

static PyTypeObject BodyType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Body",
    .tp_basicsize = sizeof(Body),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)body_dealloc,
    .tp_traverse = (traverseproc)body_traverse,
    .tp_clear = (inquiry)body_clear,
    .tp_iter = PyObject_SelfIter,
    .tp_iternext = (iternextfunc)body_next,
    .tp_methods = body_methods,
};

/* Gate */

/* As _whole of opsguard_wsgi.edge; takes the reference of the body and gives it back. */
static PyObject *
whole(Exchange *x, PyObject *body, Start *start)
{
    if (start_go(start) < 0)
        goto failed;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(body); i++) {
        Py_ssize_t size = PyObject_Size(PySequence_Fast_GET_ITEM(body, i));
        if (size < 0)
            goto failed;
        x->sent += size;
    }
    if (finish_exchange(x->core, x) < 0 || part(x) < 0)
        goto failed;
    return body;
failed:
    Py_DECREF(body);
    return NULL;
}

/* As _streamed of opsguard_wsgi.edge; takes the reference of the body. */
static PyObject *
streamed(Gate *gate, Exchange *x, PyObject *body, Start *start)
{
    Body *self = PyObject_GC_New(Body, &BodyType);
    if (self == NULL) {
        Py_DECREF(body);
        return NULL;
    }
    self->exchange = (Exchange *)Py_NewRef(x);
    self->body = body;
    self->first = NULL;
    self->parts = PyObject_GetIter(body);
    PyObject_GC_Track(self);
    if (self->parts != NULL)
        self->first = PyIter_Next(self->parts);
    if (PyErr_Occurred()) { /* the app failed: nothing was sent, so it can be answered for */
        if (!PyErr_ExceptionMatches(PyExc_Exception))
            goto failed;
        PyObject *error = take_error();
        Py_XSETREF(self->parts, PyObject_CallFunctionObjArgs(gate->answer, (PyObject *)x, error,
                                                             (PyObject *)start, NULL));
        Py_DECREF(error);
        if (self->parts == NULL)
            goto failed;
        if (!start->asked && (self->first = PyIter_Next(self->parts)) == NULL && PyErr_Occurred())
            goto failed;
    }
    if (start_go(start) == 0)
        return (PyObject *)self;
failed:
    if (PyErr_ExceptionMatches(PyExc_Exception)) {
        tell(x);
        PyObject *error = take_error(); /* nothing may be called while it is set */
        body_end(self);
        go_on_with(error);
    }
    Py_DECREF(self);
    return NULL;
}

/* A path of the environ as the text it stands for; new reference. NULL without an exception: none. */
static PyObject *
path_text(Gate *gate, PyObject *environ, PyObject *key)
{
    PyObject *text = PyDict_GetItemWithError(environ, key);
    if (text == NULL)
        return NULL;
    if (PyUnicode_CheckExact(text) && PyUnicode_IS_COMPACT_ASCII(text))
        return PyUnicode_GET_LENGTH(text) ? Py_NewRef(text) : NULL;
    Py_INCREF(text);
    int there = PyObject_IsTrue(text);
    PyObject *plain = there > 0 ? PyObject_CallOneArg(gate->text, text) : NULL;
    Py_DECREF(text);
    return plain;
}

/* As open_exchange of opsguard_wsgi.types; new reference. */
static Exchange *
open_environ(Gate *gate, Door *door, PyObject *environ)
{
    Exchange *x = NULL;
    PyObject *method = NULL, *path = NULL, *routed = NULL, *root = NULL, *peer = NULL, *headers = NULL;
    PyObject *mounted = NULL;
    if ((method = needed(environ, names.request_method)) == NULL
        || (headers = gather(door, environ)) == NULL)
        goto done;
    if ((routed = path_text(gate, environ, names.path_info)) == NULL
        && (PyErr_Occurred() || (routed = PyUnicode_New(0, 0)) == NULL))
        goto done;
    root = path_text(gate, environ, names.script_name);
    if (root == NULL && PyErr_Occurred())
        goto done;
    path = root == NULL ? Py_NewRef(routed) : PyUnicode_Concat(root, routed);
    if (path == NULL)
        goto done;
    peer = item(environ, names.remote_addr);
    if (peer == NULL && PyErr_Occurred())
        goto done;
    int there = peer == NULL ? 0 : PyObject_IsTrue(peer);
    if (there < 0)
        goto done;
    x = open_exchange(door, method, path, routed, there ? peer : Py_None, headers, environ);
    if (x == NULL)
        goto done;
    mounted = item(environ, names.script_name); /* as it is written there */
    if (mounted == NULL || !PyUnicode_Check(mounted))
        Py_XSETREF(mounted, PyErr_Occurred() ? NULL : PyUnicode_New(0, 0));
    if (mounted == NULL || PyDict_SetItem(environ, gate->key, (PyObject *)x) < 0
        || PyDict_SetItem(environ, gate->root, mounted) < 0)
        Py_CLEAR(x);
done:
    Py_XDECREF(method);
    Py_XDECREF(path);
    Py_XDECREF(routed);
    Py_XDECREF(root);
    Py_XDECREF(peer);
    Py_XDECREF(headers);
    Py_XDECREF(mounted);
    return x;
}

/* The app's answer, or ours instead of it; new reference. */
static PyObject *
answered(Gate *gate, Exchange *x, PyObject *environ, Start *start)
{
    if (gate->endpoint != Py_None && enter_by(x->core, x, gate->endpoint, environ) < 0)
        return NULL;
    PyObject *body = NULL;
    if (is_set(x->work) || is_set(x->reply)) {
        body = PyObject_CallFunctionObjArgs(gate->refuse, (PyObject *)x, environ, (PyObject *)start, NULL);
        if (body == NULL)
            return NULL;
        if (body == Py_None) /* it took a look outside, and the app is to answer */
            Py_CLEAR(body);
    }
    if (body == NULL) {
        if (x->uploads && x->received == 0) {
            PyObject *done = PyObject_CallFunctionObjArgs(gate->counted, environ, (PyObject *)x, NULL);
            if (done == NULL)
                return NULL;
            Py_DECREF(done);
        }
        PyObject *args[] = {environ, (PyObject *)start};
        body = PyObject_Vectorcall(gate->app, args, 2, NULL);
        if (body == NULL)
            return NULL;
    }
    if (PyList_Check(body) || PyTuple_Check(body))
        return whole(x, body, start);
    PyObject *wrapper = PyDict_GetItemWithError(environ, names.file_wrapper);
    if (wrapper != NULL && PyType_Check(wrapper) && PyObject_TypeCheck(body, (PyTypeObject *)wrapper)) {
        PyObject *file = PyObject_CallFunctionObjArgs(gate->other, (PyObject *)x, body, environ,
                                                      (PyObject *)start, NULL);
        Py_DECREF(body);
        return file;
    }
    return streamed(gate, x, body, start);
}

static PyObject *
gate_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Gate *self = (Gate *)callable;
    PyObject *held = self->port->held;
    if (PyVectorcall_NARGS(flags) != 2 || keywords != NULL || !PyDict_CheckExact(args[0]) || held == NULL
        || !Py_IS_TYPE(held, &DoorType))
        return PyObject_Vectorcall(self->guarded, args, flags, keywords);
    PyObject *environ = args[0];
    Door *door = (Door *)Py_NewRef(held); /* `override` may exchange it from here on */
    int nested = PyDict_Contains(environ, self->key);
    if (nested) {
        Py_DECREF(door);
        return nested < 0 ? NULL : PyObject_Vectorcall(self->app, args, flags, NULL);
    }
    int kept = keeps_headers(self, args[1]);
    if (kept < 0 && reported(door->core, names.site_head) < 0) {
        Py_DECREF(door);
        return NULL;
    }
    Exchange *x = open_environ(self, door, environ);
    if (x == NULL) {
        int failed = reported(door->core, names.site_open);
        Py_DECREF(door);
        return failed < 0 ? NULL : PyObject_Vectorcall(self->app, args, flags, NULL);
    }
    Start *start = PyObject_GC_New(Start, &StartType);
    if (start == NULL) {
        Py_DECREF(door);
        Py_DECREF(x);
        return NULL;
    }
    start->call = start_call;
    start->door = door;
    start->exchange = x;
    start->server = Py_NewRef(args[1]);
    start->status = start->headers = start->write = start->id = start->other = NULL;
    start->asked = 0;
    start->kept = kept > 0;
    PyObject_GC_Track(start);
    PyObject *body = answered(self, x, environ, start);
    if (body == NULL) {
        PyObject *error = take_error();
        body = PyObject_CallFunctionObjArgs(self->failed, (PyObject *)x, error, (PyObject *)start, NULL);
        if (body == Py_None) /* it goes on to the server */
            Py_CLEAR(body);
        if (body == NULL)
            go_on_with(error);
        else
            Py_DECREF(error);
    }
    Py_DECREF(start);
    return body;
}

static PyObject *
gate_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"app", "port", "guarded", "key", "root", "endpoint", "text", "counted",
                           "refuse", "other", "failed", "answer", "keeps", NULL};
    PyObject *app, *port, *guarded, *key, *root, *endpoint, *text, *counted, *refuse, *other;
    PyObject *failed, *answer, *keeps;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OO!OUUOOOOOOOO", keys, &app, &HingeType, &port,
                                     &guarded, &key, &root, &endpoint, &text, &counted, &refuse, &other,
                                     &failed, &answer, &keeps))
        return NULL;
    Gate *self = (Gate *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->call = gate_call;
    GATE_OBJECTS(KEEP)
    return (PyObject *)self;
}

static int
gate_traverse(Gate *self, visitproc visit, void *arg)
{
    GATE_OBJECTS(VISIT)
    Py_VISIT(self->keeper);
    Py_VISIT(self->keeping);
    return 0;
}

static int
gate_clear(Gate *self)
{
    GATE_OBJECTS(CLEAR)
    Py_CLEAR(self->keeper);
    Py_CLEAR(self->keeping);
    return 0;
}

static void
gate_dealloc(Gate *self)
{
    PyObject_GC_UnTrack(self);
    gate_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject GateType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Gate",
    .tp_basicsize = sizeof(Gate),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = gate_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Gate, call),
    .tp_dealloc = (destructor)gate_dealloc,
    .tp_traverse = (traverseproc)gate_traverse,
    .tp_clear = (inquiry)gate_clear,
};

/* Closer: called by a framework when it closes an answer, as the one of opsguard_django -------------- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Exchange *exchange;
    int whole;
} Closer;

static PyObject *
closer_call(PyObject *callable, PyObject *const *Py_UNUSED(args), size_t flags, PyObject *keywords)
{
    Closer *self = (Closer *)callable;
    Exchange *x = self->exchange;
    if (PyVectorcall_NARGS(flags) || keywords != NULL) {
        PyErr_SetString(PyExc_TypeError, "it takes no arguments");
        return NULL;
    }
    if (self->whole && finish_exchange(x->core, x) < 0)
        return NULL;
    if (part(x) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
make_closer(Exchange *x, int whole)
{
    Closer *self = (Closer *)CloserType.tp_alloc(&CloserType, 0);
    if (self == NULL)
        return NULL;
    self->call = closer_call;
    self->exchange = (Exchange *)Py_NewRef(x);
    self->whole = whole;
    return (PyObject *)self;
}

static PyObject *
closer_new(PyTypeObject *Py_UNUSED(type), PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    PyObject *exchange;
    int whole;
    if (!PyArg_ParseTuple(args, "Op", &exchange, &whole))
        return NULL;
    Exchange *x = as_exchange(exchange);
    return x == NULL || core_of(x) == NULL ? NULL : make_closer(x, whole);
}

static int
closer_traverse(Closer *self, visitproc visit, void *arg)
{
    Py_VISIT(self->exchange);
    return 0;
}

static int
closer_clear(Closer *self)
{
    Py_CLEAR(self->exchange);
    return 0;
}

/* Dropped without a call, as Django's ASGI handler does when sending fails: the end is heard here. */
static void
closer_finalize(Closer *self)
{
    Exchange *x = self->exchange;
    if (x == NULL || x->closed)
        return;
    PyObject *error = take_error();
    if (close_exchange(x->core, x) < 0)
        PyErr_WriteUnraisable((PyObject *)self);
    give_error(error);
}

static void
closer_dealloc(Closer *self)
{
    if (PyObject_CallFinalizerFromDealloc((PyObject *)self) < 0)
        return;
    PyObject_GC_UnTrack(self);
    closer_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject CloserType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Closer",
    .tp_basicsize = sizeof(Closer),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = closer_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Closer, call),
    .tp_dealloc = (destructor)closer_dealloc,
    .tp_finalize = (destructor)closer_finalize,
    .tp_traverse = (traverseproc)closer_traverse,
    .tp_clear = (inquiry)closer_clear,
};

/* Django's middleware, for sync projects under WSGI ---------------------------------------------- */

/* As OpsGuardMiddleware._serve; what is not usual is left to that (`served`) and to _go_on and
 * _finish of the same class.
 */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Holder *port; /* a Hinge */
    PyObject *get_response, *served, *go_on, *finish, *failed, *key, *plain;
    PyObject *lowered; /* lower-case names of response headers, by name: few, as they are ours */
} Middle;

#define MIDDLE_OBJECTS(X) \
    X(port) X(get_response) X(served) X(go_on) X(finish) X(failed) X(key) X(plain)

enum { LOWERED = 64 };

/* The exchange of a usual request; NULL without an exception: it is not one. */
static Exchange *
open_request(Middle *self, Door *door, PyObject *request, PyObject *meta)
{
    Exchange *x = NULL;
    PyObject *path = NULL, *routed = NULL, *headers = NULL;
    PyObject *method = PyDict_GetItemWithError(meta, names.request_method);
    if (method == NULL)
        return NULL;
    PyObject *peer = PyDict_GetItemWithError(meta, names.remote_addr);
    if (peer == NULL && PyErr_Occurred())
        return NULL;
    Py_INCREF(method);
    peer = peer == NULL || !PyUnicode_Check(peer) || PyUnicode_GET_LENGTH(peer) == 0 ? Py_None : peer;
    Py_INCREF(peer);
    if ((path = PyObject_GetAttr(request, names.path)) == NULL
        || (routed = PyObject_GetAttr(request, names.routed)) == NULL
        || (headers = gather(door, meta)) == NULL)
        goto done;
    x = open_exchange(door, method, path, routed, peer, headers, meta);
    if (x != NULL && PyDict_SetItem(meta, self->key, (PyObject *)x) < 0)
        Py_CLEAR(x);
done:
    Py_DECREF(method);
    Py_DECREF(peer);
    Py_XDECREF(path);
    Py_XDECREF(routed);
    Py_XDECREF(headers);
    return x;
}

/* The bytes of a plain answer, which are all there: -1 without an exception for any other answer. */
static Py_ssize_t
size_of(Middle *self, PyObject *response)
{
    if (!PyObject_TypeCheck(response, (PyTypeObject *)self->plain))
        return -1;
    PyObject *parts;
    if (optional(response, names.container, &parts) <= 0)
        return -1;
    Py_ssize_t size = PyList_CheckExact(parts) ? 0 : -1;
    for (Py_ssize_t i = 0; size >= 0 && i < PyList_GET_SIZE(parts); i++) {
        PyObject *one = PyList_GET_ITEM(parts, i);
        size = PyBytes_CheckExact(one) ? size + PyBytes_GET_SIZE(one) : -1;
    }
    Py_DECREF(parts);
    return size;
}

/* The dictionary in which Django keeps an answer's headers; NULL: it has none that we know. */
static PyObject *
header_store(PyObject *response)
{
    PyObject *headers, *store;
    if (optional(response, names.headers, &headers) <= 0)
        return NULL;
    int found = optional(headers, names.store, &store);
    Py_DECREF(headers);
    if (found <= 0)
        return NULL;
    if (!PyDict_CheckExact(store))
        Py_CLEAR(store);
    return store;
}

static PyObject *
lower_name(Middle *self, PyObject *name)
{
    PyObject *lower = Py_XNewRef(PyDict_GetItemWithError(self->lowered, name));
    if (lower != NULL || PyErr_Occurred())
        return lower;
    lower = PyObject_CallMethodNoArgs(name, names.lower);
    if (lower != NULL && PyDict_GET_SIZE(self->lowered) < LOWERED
        && PyDict_SetItem(self->lowered, name, lower) < 0)
        Py_CLEAR(lower);
    return lower;
}

/* Our headers, where the app has not set them itself. 0 or -1. */
static int
add_headers(Middle *self, Door *door, Exchange *x, PyObject *response, PyObject *store)
{
    PyObject *status = PyObject_GetAttr(response, names.status_code);
    PyObject *ours = status == NULL ? NULL : head(door, x, status, nothing);
    int failed = ours == NULL ? -1 : 0;
    for (Py_ssize_t i = 0; failed == 0 && i < PyList_GET_SIZE(ours); i++) {
        PyObject *pair = PyList_GET_ITEM(ours, i);
        PyObject *lower = lower_name(self, PyTuple_GET_ITEM(pair, 0));
        failed = lower == NULL || PyDict_SetDefault(store, lower, pair) == NULL ? -1 : 0;
        Py_XDECREF(lower);
    }
    Py_XDECREF(status);
    Py_XDECREF(ours);
    return failed;
}

/* As _finish; takes the reference of the answer. */
static PyObject *
finish_response(Middle *self, Door *door, Exchange *x, PyObject *response)
{
    PyObject *closers = NULL, *closer = NULL, *store = NULL;
    Py_ssize_t size = size_of(self, response);
    if (size >= 0 && optional(response, names.closers, &closers) > 0 && PyList_CheckExact(closers))
        store = header_store(response);
    if (store == NULL) {
        Py_XDECREF(closers);
        PyObject *args[] = {(PyObject *)x, response};
        PyObject *finished = PyErr_Occurred() ? NULL : PyObject_Vectorcall(self->finish, args, 2, NULL);
        Py_DECREF(response);
        return finished;
    }
    x->sent = size;
    int failed = add_headers(self, door, x, response, store);
    if (failed == 0)
        closer = make_closer(x, 1);
    if (closer == NULL || PyList_Append(closers, closer) < 0)
        Py_CLEAR(response);
    Py_XDECREF(closer);
    Py_DECREF(closers);
    Py_DECREF(store);
    return response;
}

static PyObject *
middle_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Middle *self = (Middle *)callable;
    PyObject *held = self->port->held;
    if (PyVectorcall_NARGS(flags) != 1 || keywords != NULL || held == NULL || !Py_IS_TYPE(held, &DoorType))
        return PyObject_Vectorcall(self->served, args, flags, keywords);
    Door *door = (Door *)Py_NewRef(held); /* `override` may exchange it from here on */
    PyObject *request = args[0], *meta;
    int usual = optional(request, names.meta, &meta), nested = 0;
    if (usual > 0)
        usual = PyDict_CheckExact(meta) ? PyDict_Contains(meta, names.input) : 0;
    if (usual > 0)
        nested = PyDict_Contains(meta, self->key);
    if (usual <= 0 || nested) {
        Py_XDECREF(meta);
        Py_DECREF(door);
        return usual < 0 || nested < 0 ? NULL : PyObject_Vectorcall(self->served, args, flags, NULL);
    }
    PyObject *response = NULL;
    Exchange *x = open_request(self, door, request, meta);
    Py_DECREF(meta);
    if (x == NULL) {
        if (!PyErr_Occurred())
            response = PyObject_Vectorcall(self->served, args, flags, NULL);
        goto done;
    }
    if (is_set(x->work) || is_set(x->reply)) {
        PyObject *more[] = {(PyObject *)x, request};
        response = PyObject_Vectorcall(self->go_on, more, 2, NULL);
        goto done;
    }
    response = PyObject_Vectorcall(self->get_response, args, 1, NULL);
    if (response != NULL) {
        response = finish_response(self, door, x, response);
        goto done;
    }
    PyObject *error = take_error();
    PyObject *more[] = {(PyObject *)x, error};
    Py_XDECREF(PyObject_Vectorcall(self->failed, more, 2, NULL));
    go_on_with(error);
done:
    Py_XDECREF(x);
    Py_DECREF(door);
    return response;
}

static PyObject *
middle_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"port", "get_response", "served", "go_on", "finish", "failed", "key",
                           "plain", NULL};
    PyObject *port, *get_response, *served, *go_on, *finish, *failed, *key, *plain;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$O!OOOOOUO!", keys, &HingeType, &port, &get_response,
                                     &served, &go_on, &finish, &failed, &key, &PyType_Type, &plain))
        return NULL;
    Middle *self = (Middle *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->call = middle_call;
    MIDDLE_OBJECTS(KEEP)
    if ((self->lowered = PyDict_New()) == NULL)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static int
middle_traverse(Middle *self, visitproc visit, void *arg)
{
    MIDDLE_OBJECTS(VISIT)
    Py_VISIT(self->lowered);
    return 0;
}

static int
middle_clear(Middle *self)
{
    MIDDLE_OBJECTS(CLEAR)
    Py_CLEAR(self->lowered);
    return 0;
}

static void
middle_dealloc(Middle *self)
{
    PyObject_GC_UnTrack(self);
    middle_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject MiddleType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Middle",
    .tp_basicsize = sizeof(Middle),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = middle_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Middle, call),
    .tp_dealloc = (destructor)middle_dealloc,
    .tp_traverse = (traverseproc)middle_traverse,
    .tp_clear = (inquiry)middle_clear,
};

/* As OpsGuardMiddleware._enter, the first `process_view`. `templates` gives the endpoint of a route
 * that was seen before; `slow` does the rest.
 */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *slow, *template, *answer, *key, *templates;
} Entry;

#define ENTRY_OBJECTS(X) X(slow) X(template) X(answer) X(key)

enum { TEMPLATES = 4096 };

/* A route of a framework in the common form: as `templates` remembers it, or as the function says. */
static PyObject *
known_template(PyObject *templates, PyObject *template, PyObject *route)
{
    PyObject *known = Py_XNewRef(PyDict_GetItemWithError(templates, route));
    if (known != NULL || PyErr_Occurred())
        return known;
    known = PyObject_CallOneArg(template, route);
    if (known != NULL && PyDict_GET_SIZE(templates) < TEMPLATES
        && PyDict_SetItem(templates, route, known) < 0)
        Py_CLEAR(known);
    return known;
}

/* The endpoint of the route that Django has found; NULL without an exception: none is. */
static PyObject *
endpoint_of(Entry *self, PyObject *request)
{
    PyObject *match, *route, *endpoint = NULL;
    if (optional(request, names.match, &match) <= 0)
        return NULL;
    int found = match == Py_None ? 0 : optional(match, names.route, &route);
    Py_DECREF(match);
    if (found <= 0)
        return NULL;
    if (PyUnicode_CheckExact(route))
        endpoint = known_template(self->templates, self->template, route);
    Py_DECREF(route);
    return endpoint;
}

static PyObject *
entry_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Entry *self = (Entry *)callable;
    PyObject *meta, *found = NULL, *endpoint = NULL, *result = NULL;
    if (PyVectorcall_NARGS(flags) != 4 || keywords != NULL || optional(args[0], names.meta, &meta) <= 0)
        return PyErr_Occurred() ? NULL : PyObject_Vectorcall(self->slow, args, flags, keywords);
    if (PyDict_CheckExact(meta))
        found = Py_XNewRef(PyDict_GetItemWithError(meta, self->key));
    Py_DECREF(meta);
    Exchange *x = found != NULL && PyObject_TypeCheck(found, &ExchangeType) ? (Exchange *)found : NULL;
    if (x != NULL && x->core != NULL && !PyErr_Occurred())
        endpoint = endpoint_of(self, args[0]);
    if (endpoint == NULL) {
        Py_XDECREF(found);
        return PyErr_Occurred() ? NULL : PyObject_Vectorcall(self->slow, args, flags, NULL);
    }
    PyObject *identity = x->identity == NULL ? Py_None : x->identity;
    if (PyObject_SetAttr(args[0], names.identity, identity) == 0) {
        PyObject *known[] = {endpoint, args[1]};
        result = exchange_enter(x, known, 2, NULL);
    }
    if (result != NULL && result != Py_None)
        Py_SETREF(result, PyObject_CallOneArg(self->answer, result));
    Py_DECREF(endpoint);
    Py_DECREF(found);
    return result;
}

static PyObject *
entry_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"slow", "template", "answer", "key", NULL};
    PyObject *slow, *template, *answer, *key;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OOOU", keys, &slow, &template, &answer, &key))
        return NULL;
    Entry *self = (Entry *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->call = entry_call;
    ENTRY_OBJECTS(KEEP)
    if ((self->templates = PyDict_New()) == NULL)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static int
entry_traverse(Entry *self, visitproc visit, void *arg)
{
    ENTRY_OBJECTS(VISIT)
    Py_VISIT(self->templates);
    return 0;
}

static int
entry_clear(Entry *self)
{
    ENTRY_OBJECTS(CLEAR)
    Py_CLEAR(self->templates);
    return 0;
}

static void
entry_dealloc(Entry *self)
{
    PyObject_GC_UnTrack(self);
    entry_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject EntryType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Entry",
    .tp_basicsize = sizeof(Entry),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = entry_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Entry, call),
    .tp_dealloc = (destructor)entry_dealloc,
    .tp_traverse = (traverseproc)entry_traverse,
    .tp_clear = (inquiry)entry_clear,
};

/* As `enter` of opsguard_flask, in the place of `preprocess_request`, which it goes on to. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *current, *slow, *preprocess, *template, *answer, *views, *root, *templates;
} Turn;

#define TURN_OBJECTS(X) X(current) X(slow) X(preprocess) X(template) X(answer) X(views) X(root)

/* Whether the app is where the server put it: nothing in between has moved SCRIPT_NAME. */
static int
unmounted(Turn *self, PyObject *environ)
{
    PyObject *mounted = PyDict_GetItemWithError(environ, names.script_name);
    PyObject *root = mounted == NULL ? NULL : PyDict_GetItemWithError(environ, self->root);
    return root == NULL ? (PyErr_Occurred() ? -1 : 0) : same(mounted, root);
}

/* What Flask has found: the template of the rule and its view, or nothing. 1, 0, or -1. */
static int
matched(Turn *self, PyObject *environ, PyObject **endpoint, PyObject **view)
{
    PyObject *request = PyDict_GetItemWithError(environ, names.request), *rule, *text, *name;
    if (request == NULL || optional(request, names.url_rule, &rule) <= 0)
        return PyErr_Occurred() ? -1 : 0;
    if (rule == Py_None) {
        Py_DECREF(rule);
        return 0;
    }
    text = PyObject_GetAttr(rule, names.rule);
    name = text == NULL ? NULL : PyObject_GetAttr(rule, names.rule_endpoint);
    Py_DECREF(rule);
    if (name != NULL && PyUnicode_CheckExact(text)) {
        PyObject *found = PyDict_GetItemWithError(self->views, name);
        if (found != NULL || !PyErr_Occurred()) {
            *view = Py_NewRef(found == NULL ? Py_None : found);
            *endpoint = known_template(self->templates, self->template, text);
        }
    }
    Py_XDECREF(text);
    Py_XDECREF(name);
    if (*endpoint != NULL && !PyErr_Occurred())
        return 1;
    Py_CLEAR(*endpoint);
    Py_CLEAR(*view);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *
turn_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Turn *self = (Turn *)callable;
    PyObject *found, *endpoint = NULL, *view = NULL;
    if (PyContextVar_Get(self->current, Py_None, &found) < 0)
        return NULL;
    Exchange *x = PyObject_TypeCheck(found, &ExchangeType) ? (Exchange *)found : NULL;
    int usual = x != NULL && x->core != NULL && !is_set(x->endpoint) && x->source != NULL
                && PyDict_CheckExact(x->source);
    PyObject *environ = usual ? Py_NewRef(x->source) : NULL;
    if (usual)
        usual = unmounted(self, environ);
    if (usual > 0)
        usual = matched(self, environ, &endpoint, &view);
    Py_XDECREF(environ);
    PyObject *reply = NULL;
    if (usual > 0) {
        PyObject *known[] = {endpoint, view};
        reply = exchange_enter(x, known, 2, NULL);
    }
    Py_XDECREF(endpoint);
    Py_XDECREF(view);
    Py_DECREF(found);
    if (usual <= 0)
        return usual < 0 ? NULL : PyObject_Vectorcall(self->slow, args, flags, keywords);
    if (reply == Py_None) {
        Py_DECREF(reply);
        return PyObject_Vectorcall(self->preprocess, args, flags, keywords);
    }
    if (reply == NULL)
        return NULL;
    PyObject *told = PyObject_CallOneArg(self->answer, reply);
    Py_DECREF(reply);
    if (told != Py_None)
        return told;
    Py_DECREF(told); /* it took a look outside, and the app is to answer */
    return PyObject_Vectorcall(self->preprocess, args, flags, keywords);
}

static PyObject *
turn_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"current", "slow", "preprocess", "template", "answer", "views", "root", NULL};
    PyObject *current, *slow, *preprocess, *template, *answer, *views, *root;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$O!OOOOO!U", keys, &PyContextVar_Type, &current,
                                     &slow, &preprocess, &template, &answer, &PyDict_Type, &views, &root))
        return NULL;
    Turn *self = (Turn *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->call = turn_call;
    TURN_OBJECTS(KEEP)
    if ((self->templates = PyDict_New()) == NULL)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static int
turn_traverse(Turn *self, visitproc visit, void *arg)
{
    TURN_OBJECTS(VISIT)
    Py_VISIT(self->templates);
    return 0;
}

static int
turn_clear(Turn *self)
{
    TURN_OBJECTS(CLEAR)
    Py_CLEAR(self->templates);
    return 0;
}

static void
turn_dealloc(Turn *self)
{
    PyObject_GC_UnTrack(self);
    turn_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject TurnType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Turn",
    .tp_basicsize = sizeof(Turn),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = turn_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Turn, call),
    .tp_dealloc = (destructor)turn_dealloc,
    .tp_traverse = (traverseproc)turn_traverse,
    .tp_clear = (inquiry)turn_clear,
};

/* Hook: the `handle` of a Starlette route -------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *handle, *hooked, *methods, *template, *endpoint, *key, *prefix, *refuse;
    PyObject *hooks; /* the route, set from outside */
} Hook;

#define HOOK_OBJECTS(X) \
    X(handle) X(hooked) X(methods) X(template) X(endpoint) X(key) X(prefix) X(refuse)

static PyObject *
hook_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Hook *self = (Hook *)callable;
    if (PyVectorcall_NARGS(flags) != 3 || keywords != NULL || !PyDict_CheckExact(args[0]))
        return PyObject_Vectorcall(self->hooked, args, flags, keywords);
    PyObject *scope = args[0];
    PyObject *found = PyDict_GetItemWithError(scope, self->key);
    if (found == NULL && PyErr_Occurred())
        return NULL;
    Exchange *x = (Exchange *)found;
    if (found == NULL || !PyObject_TypeCheck(found, &ExchangeType) || x->core == NULL
        || x->method == NULL || is_set(x->endpoint) || x->closed)
        return PyObject_Vectorcall(self->hooked, args, flags, keywords);
    Py_INCREF(x);
    int unusual = PyDict_Contains(scope, self->prefix);
    if (unusual == 0)
        unusual = PyDict_Contains(scope, names.fastapi);
    if (unusual == 0 && self->methods != Py_None) {
        int allowed = PySet_Contains(self->methods, x->method);
        unusual = allowed < 0 ? -1 : !allowed;
    }
    if (unusual) {
        Py_DECREF(x);
        return unusual < 0 ? NULL : PyObject_Vectorcall(self->hooked, args, flags, keywords);
    }
    put(&x->endpoint, self->template);
    put(&x->marked, self->endpoint);
    PyObject *reply = enter(x->core, x);
    Py_DECREF(x);
    if (reply == NULL)
        return NULL;
    PyObject *result;
    if (reply == Py_None)
        result = PyObject_Vectorcall(self->handle, args, flags, NULL);
    else
        result = PyObject_CallFunctionObjArgs(self->refuse, reply, self->handle, scope, args[1], args[2],
                                              NULL);
    Py_DECREF(reply);
    return result;
}

static PyObject *
hook_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"handle", "hooked", "methods", "template", "endpoint", "key",
                           "prefix", "refuse", NULL};
    PyObject *handle, *hooked, *methods, *template, *endpoint, *key, *prefix, *refuse;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OOOUOUUO", keys, &handle, &hooked, &methods,
                                     &template, &endpoint, &key, &prefix, &refuse))
        return NULL;
    if (methods != Py_None && !PyAnySet_Check(methods)) {
        PyErr_SetString(PyExc_TypeError, "methods are a set or None");
        return NULL;
    }
    Hook *self = (Hook *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->call = hook_call;
    HOOK_OBJECTS(KEEP)
    return (PyObject *)self;
}

static int
hook_traverse(Hook *self, visitproc visit, void *arg)
{
    HOOK_OBJECTS(VISIT)
    Py_VISIT(self->hooks);
    return 0;
}

static int
hook_clear(Hook *self)
{
    HOOK_OBJECTS(CLEAR)
    Py_CLEAR(self->hooks);
    return 0;
}

static void
hook_dealloc(Hook *self)
{
    PyObject_GC_UnTrack(self);
    hook_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMemberDef hook_members[] = {
    {"hooks", T_OBJECT_EX, offsetof(Hook, hooks), 0, NULL},
    {NULL},
};

static PyTypeObject HookType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Hook",
    .tp_basicsize = sizeof(Hook),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = hook_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Hook, call),
    .tp_dealloc = (destructor)hook_dealloc,
    .tp_traverse = (traverseproc)hook_traverse,
    .tp_clear = (inquiry)hook_clear,
    .tp_members = hook_members,
};

/* Access lines ---------------------------------------------------------------------------------- */

enum { LINE = 4096, NUMBERS = 128, FIELDS = 10 };

/* What all lines with one status share: the text before each field, and behind the last. */
typedef struct {
    PyObject *template; /* what it was made of, borrowed; NULL: nothing yet */
    Py_ssize_t length;
    const char *ends[FIELDS + 1];
    char text[LINE];
} Form;

/* Where lines are put together. */
typedef struct {
    Form form;
    double second; /* of the last line, and the text of it up to its point */
    size_t moment_length;
    char moment[NUMBERS];
    char *at;
    char text[LINE];
} Line;

static inline void
add(Line *line, const char *text, size_t length)
{
    memcpy(line->at, text, length);
    line->at += length;
}

static inline void
add_quoted(Line *line, const char *text, size_t length)
{
    *line->at++ = '"';
    add(line, text, length);
    *line->at++ = '"';
}

/* A number, with zeros before it up to `digits`. */
static void
add_number(Line *line, unsigned long long number, int digits)
{
    char text[NUMBERS], *at = text + sizeof text;
    do
        *--at = (char)('0' + number % 10);
    while (number /= 10, --digits > 0 || number);
    add(line, at, text + sizeof text - at);
}

/* Whether one of eight bytes of ASCII is below a space, a quote, a backslash or DEL. */
static inline int
any_special(uint64_t word)
{
    const uint64_t ones = 0x0101010101010101u, tops = 0x8080808080808080u;
#define ZERO(bytes) (((bytes) - ones) & ~(bytes))
    return (((word - ones * ' ') | ZERO(word ^ ones * '"') | ZERO(word ^ ones * '\\')
             | ZERO(word ^ ones * 0x7f)) & tops) != 0;
#undef ZERO
}

/* The characters of a text that JSON writes as they are; NULL for any other. */
static const char *
plain_text(PyObject *object, Py_ssize_t *length)
{
    if (object == NULL || !is_ascii(object))
        return NULL;
    const char *text = (const char *)PyUnicode_1BYTE_DATA(object);
    *length = PyUnicode_GET_LENGTH(object);
    uint64_t word;
    Py_ssize_t left = *length;
    for (; left >= 8; text += 8, left -= 8) {
        memcpy(&word, text, 8);
        if (any_special(word))
            return NULL;
    }
    for (; left > 0; text++, left--)
        if (*text < ' ' || *text > '~' || *text == '"' || *text == '\\')
            return NULL;
    return text - *length;
}

/* The form of a %-template, whose fields are those of `access_template` in its order. 1, or 0: it is
 * another, or too long.
 */
static int
form_of(Form *form, PyObject *template)
{
    form->template = NULL;
    if (!PyUnicode_IS_COMPACT_ASCII(template) || PyUnicode_GET_LENGTH(template) > LINE)
        return 0;
    const char *from = (const char *)PyUnicode_1BYTE_DATA(template); /* with a NUL behind its end */
    char *to = form->text;
    int field = 0;
    for (; *from; from++) {
        if (*from != '%' || *++from == '%') {
            *to++ = *from; /* an escaped one, too */
            continue;
        }
        from += strcspn(from, "sd");
        if (!*from || field == FIELDS)
            return 0;
        form->ends[field++] = to;
    }
    form->ends[field] = to;
    form->length = to - form->text;
    if (field == FIELDS)
        form->template = template;
    return field == FIELDS;
}

/* The second of a moment as its text begins. 1, or 0: it is none that has one. */
static int
moment_of(Line *line, double at)
{
    struct tm parts;
    if (!(at >= 0.0 && at < 2e11))
        return 0;
    time_t whole = (time_t)at;
    if (gmtime_r(&whole, &parts) == NULL)
        return 0;
    line->moment_length = (size_t)snprintf(line->moment, NUMBERS, "%04d-%02d-%02dT%02d:%02d:%02d.",
                                           parts.tm_year + 1900, parts.tm_mon + 1, parts.tm_mday,
                                           parts.tm_hour, parts.tm_min, parts.tm_sec);
    line->second = (double)whole;
    return 1;
}

/* The line of an exchange, new reference. NULL without an exception where it takes the function in
 * Python.
 */
static PyObject *
line_of(Exchange *x, PyObject *template, double offset, Line *line)
{
    Py_ssize_t id_length, path_length, method_length, endpoint_length, client_length = 0;
    const char *id = plain_text(x->request_id, &id_length), *path = plain_text(x->path, &path_length);
    const char *method = plain_text(x->method, &method_length);
    const char *endpoint = plain_text(x->endpoint, &endpoint_length);
    const char *client = x->client == Py_None ? "" : plain_text(x->client, &client_length);
    if (id == NULL || path == NULL || method == NULL || endpoint == NULL || endpoint_length == 0
        || client == NULL || x->correlation_id != x->request_id || is_set(x->fields))
        return NULL;
    const Form *form = &line->form;
    if (form->template != template && !form_of(&line->form, template))
        return NULL;
    if (id_length > LINE || path_length > LINE || method_length > LINE || endpoint_length > LINE
        || client_length > LINE
        || form->length + id_length + path_length + method_length + endpoint_length + client_length
               + NUMBERS > LINE)
        return NULL;
    double at = offset + x->ended, fraction = at - line->second, duration = x->ended - x->started;
    if (!(duration >= 0.0 && duration < 1e9) || x->sent < 0)
        return NULL;
    if (!(fraction >= 0.0 && fraction < 1.0)) {
        if (!moment_of(line, at))
            return NULL;
        fraction = at - line->second;
    }
    unsigned long long micros = (unsigned long long)(duration * 1e6 + 0.5);
    const char *from = form->text;
    line->at = line->text;
    for (int field = 0; field < FIELDS; field++) {
        add(line, from, form->ends[field] - from);
        from = form->ends[field];
        switch (field) {
        case 0: add(line, line->moment, line->moment_length); break;
        case 1: add_number(line, (unsigned long long)(fraction * 1000.0), 3); break;
        case 2: add(line, id, id_length); break;
        case 3: add_quoted(line, method, method_length); break;
        case 4: add_quoted(line, path, path_length); break;
        case 5: add_quoted(line, endpoint, endpoint_length); break;
        case 6: add_number(line, micros / 1000, 1); break;
        case 7: add_number(line, micros % 1000, 3); break;
        case 8: add_number(line, (unsigned long long)x->sent, 1); break;
        case 9:
            if (x->client == Py_None)
                add(line, "null", 4);
            else
                add_quoted(line, client, client_length);
        }
    }
    add(line, from, form->ends[FIELDS] - from);
    PyObject *made = PyUnicode_New(line->at - line->text, 127);
    if (made != NULL)
        memcpy(PyUnicode_1BYTE_DATA(made), line->text, line->at - line->text);
    return made;
}

/* take_lines(queue, templates, offset, lines): takes from the queue what it has and appends the lines
 * of it to `lines`, as long as these are usual exchanges; then None, else the first that is not usual.
 */
static PyObject *
speed_take_lines(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (count != 4 || !Py_IS_TYPE(args[0], &QueueType) || !PyDict_CheckExact(args[1])
        || !PyList_CheckExact(args[3])) {
        PyErr_SetString(PyExc_TypeError, "take_lines(queue, templates, offset, lines)");
        return NULL;
    }
    double offset = PyFloat_AsDouble(args[2]);
    if (offset == -1.0 && PyErr_Occurred())
        return NULL;
    Line line;
    line.form.template = NULL;
    line.second = -HUGE_VAL;
    PyObject *taken;
    while ((taken = pull((Queue *)args[0])) != NULL) {
        Exchange *x = (Exchange *)taken;
        if (!PyObject_TypeCheck(taken, &ExchangeType) || x->method == NULL || x->endpoint == NULL
            || x->status == NULL)
            return taken;
        PyObject *found = PyDict_GetItemWithError(args[1], x->status);
        PyObject *made = NULL;
        Py_XINCREF(found);
        if (found != NULL && PyTuple_CheckExact(found) && PyTuple_GET_SIZE(found) == 2
            && PyUnicode_CheckExact(PyTuple_GET_ITEM(found, 0))
            && PyTuple_GET_ITEM(found, 1) == Py_False)
            made = line_of(x, PyTuple_GET_ITEM(found, 0), offset, &line);
        Py_XDECREF(found);
        if (made == NULL) {
            if (!PyErr_Occurred())
                return taken;
            Py_DECREF(taken);
            return NULL;
        }
        int failed = PyList_Append(args[3], made);
        Py_DECREF(made);
        Py_DECREF(taken);
        if (failed)
            return NULL;
    }
    Py_RETURN_NONE;
}

/* Module --------------------------------------------------------------------------------------- */

static PyObject *
speed_fresh(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(nothing))
{
    return fresh();
}

static PyObject *
speed_now(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(nothing))
{
    return PyFloat_FromDouble(now());
}

static PyMethodDef speed_functions[] = {
    {"now", speed_now, METH_NOARGS, "The clock that is read here; it must be clock.elapsed."},
    {"fresh", speed_fresh, METH_NOARGS, "As ids.fresh."},
    {"take_lines", (PyCFunction)(void (*)(void))speed_take_lines, METH_FASTCALL,
     "The usual lines of AccessLog.drain."},
    {"straight", front_straight, METH_O, "As calls.straight."},
    {NULL},
};

static int
set_up(void)
{
    static const struct { PyObject **at; const char *text; } texts[] = {
        {&names.type, "type"}, {&names.http, "http"}, {&names.method, "method"}, {&names.path, "path"},
        {&names.root_path, "root_path"}, {&names.client, "client"}, {&names.headers, "headers"},
        {&names.status, "status"}, {&names.body, "body"}, {&names.more_body, "more_body"},
        {&names.start, "http.response.start"}, {&names.body_kind, "http.response.body"},
        {&names.pathsend, "http.response.pathsend"},
        {&names.throw, "throw"}, {&names.close, "close"}, {&names.fastapi, "fastapi"},
        {&names.site_close, "close"}, {&names.site_enter, "enter"},
        {&names.site_open, "open"}, {&names.site_endpoint, "endpoint"}, {&names.site_head, "head"},
        {&names.authorization, "authorization"}, {&names.empty, ""},
        {&names.request_method, "REQUEST_METHOD"}, {&names.path_info, "PATH_INFO"},
        {&names.script_name, "SCRIPT_NAME"}, {&names.remote_addr, "REMOTE_ADDR"},
        {&names.file_wrapper, "wsgi.file_wrapper"}, {&names.head, "HEAD"}, {&names.fail, "fail"},
        {&names.meta, "META"}, {&names.routed, "path_info"}, {&names.input, "wsgi.input"},
        {&names.container, "_container"}, {&names.store, "_store"},
        {&names.closers, "_resource_closers"}, {&names.status_code, "status_code"},
        {&names.lower, "lower"}, {&names.match, "resolver_match"}, {&names.route, "route"},
        {&names.identity, "opsguard_identity"}, {&names.request, "werkzeug.request"},
        {&names.url_rule, "url_rule"}, {&names.rule, "rule"}, {&names.rule_endpoint, "endpoint"},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if ((*texts[i].at = PyUnicode_InternFromString(texts[i].text)) == NULL)
            return -1;
    zero = PyLong_FromLong(0);
    nothing = PyTuple_New(0);
    if (nothing == NULL)
        return -1;
    PyObject *os = zero == NULL ? NULL : PyImport_ImportModule("os");
    if (os == NULL)
        return -1;
    urandom = PyObject_GetAttrString(os, "urandom");
    Py_DECREF(os);
    if (urandom == NULL)
        return -1;
    if (pthread_atfork(NULL, NULL, forget_pool) != 0) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

/* Runs for each interpreter that imports this, and each time: what is static is set up once. */
static int
speed_exec(PyObject *module)
{
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError, "the accelerator works in the main interpreter only");
        return -1;
    }
    if (urandom == NULL && set_up() < 0)
        return -1;
    static const struct { const char *name; PyTypeObject *type; } types[] = {
        {"Fields", &ExchangeType}, {"RouteSeries", &SeriesType}, {"Recorder", &RecorderType},
        {"Core", &CoreType},       {"Door", &DoorType},          {"Edge", &EdgeType},
        {"Hook", &HookType},       {"Respond", &RespondType},    {"Watch", &WatchType},
        {"Shelf", &ShelfType},     {"Hinge", &HingeType},        {"Gate", &GateType},
        {"Front", &FrontType},
        {"Start", &StartType},     {"Body", &BodyType},          {"Closer", &CloserType},
        {"Middle", &MiddleType},   {"Entry", &EntryType},
        {"Turn", &TurnType},       {"Queue", &QueueType},
    };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (PyType_Ready(types[i].type) < 0
            || PyModule_AddObjectRef(module, types[i].name, (PyObject *)types[i].type) < 0)
            return -1;
#ifndef TRAINED
#define TRAINED 0
#endif
    if (PyModule_AddObjectRef(module, "trained", TRAINED ? Py_True : Py_False) < 0)
        return -1;
    /* As the class in Python has it, which is where `copy` and `pickle` learn of such attributes. */
    PyObject *slots = Py_BuildValue("(s)", "_serve");
    int failed = slots == NULL ? -1 : PyDict_SetItemString(FrontType.tp_dict, "__slots__", slots);
    Py_XDECREF(slots);
    return failed;
}

static PyModuleDef_Slot speed_slots[] = {
    {Py_mod_exec, speed_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef speed_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "opsguard._speed",
    .m_doc = "The request path in C; see `opsguard.accelerator`.",
    .m_methods = speed_functions,
    .m_slots = speed_slots,
};

PyMODINIT_FUNC
PyInit__speed(void)
{
    return PyModuleDef_Init(&speed_module);
}
