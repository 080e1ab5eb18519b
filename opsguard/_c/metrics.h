/* The numbers of a request, as `metrics.http`: RouteSeries and Recorder. */

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

COLLECTED(series, Series, method, outcomes)

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

/* Room for thousands of routes; few take but a line or two of it. One whose place is taken may have one of
 * those behind it.
 */
enum { KNOWN_BITS = 12, KNOWN = 1 << KNOWN_BITS, NEAR = 4 };

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
    Known known[KNOWN + NEAR];
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
    for (int i = 0; i < KNOWN + NEAR; i++)
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
    for (int i = 0; i < KNOWN + NEAR; i++) {
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
    PyObject *key = pair_of(method, endpoint);
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

/* A number for a text, that of no other if possible: the words of it mixed, the last one overlapping the
 * one before.
 */
ONE_COPY uint64_t
spread_of(const Py_UCS1 *text, size_t length)
{
    const uint64_t golden = 0x9e3779b97f4a7c15u; /* the ratio's, as is usual */
    uint64_t spread = length, word = 0;
    size_t at = 0;
    for (; at + sizeof word < length; at += sizeof word) {
        memcpy(&word, text + at, sizeof word);
        spread = (spread ^ word) * golden;
        spread ^= spread >> 32;
    }
    word = 0;
    if (length >= sizeof word)
        memcpy(&word, text + length - sizeof word, sizeof word);
    else
        for (; at < length; at++)
            word = word << 8 | text[at];
    return (spread ^ word) * golden >> (64 - KNOWN_BITS); /* the highest bits depend on all others */
}

/* Where in `known` to look. A route's template is mostly one text that has its hash already; one that is
 * made for each request need not be hashed.
 */
static inline size_t
place_of(PyObject *method, PyObject *endpoint)
{
    uint64_t spread = (uint64_t)((PyASCIIObject *)endpoint)->hash;
    if (((PyASCIIObject *)endpoint)->hash == -1)
        spread = spread_of(PyUnicode_1BYTE_DATA(endpoint), PyUnicode_GET_LENGTH(endpoint));
    return (spread ^ PyUnicode_1BYTE_DATA(method)[0]) % KNOWN;
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
    Known *first = &self->known[place_of(method, endpoint)], *known = first;
    for (; known < first + NEAR && known->series != NULL; known++)
        if (same(method, known->method) && same(endpoint, known->endpoint))
            return (Series *)Py_NewRef(known->series);
    return look_up_series(self, method, endpoint, known < first + NEAR ? known : first);
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

/* One observation of a histogram: its buckets from `first` on, and their sum behind them. */
typedef struct {
    Py_ssize_t first;
    const Buckets *buckets;
    double value;
} Observation;

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
    Observation seen[] = {
        {series->total, &self->seconds, x->ended - x->started},
        {series->first_byte, &self->seconds,
         (x->first_byte != 0.0 ? x->first_byte : x->ended) - x->started},
        {series->sent, &self->sizes, (double)x->sent},
        {series->received, &self->sizes, (double)x->received},
    };
    enum { SEEN = sizeof seen / sizeof *seen };
    Py_ssize_t requests = series->count, open = series->in_progress, all;
    Py_DECREF(series);
    double *cells = cells_of(self, &all);
    if (cells == NULL)
        return -1;
    int there = inside(all, requests, 0) && inside(all, open, 0);
    for (int i = 0; i < SEEN && there; i++) /* all or nothing */
        there = inside(all, seen[i].first, seen[i].buckets->count + 1);
    if (!there)
        return no_such_cell();
    cells[requests] += 1.0;
    for (int i = 0; i < SEEN; i++) {
        double *histogram = cells + seen[i].first;
        histogram[bisect_left(seen[i].buckets, seen[i].value)] += 1.0;
        histogram[seen[i].buckets->count + 1] += seen[i].value;
    }
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

static PyObject *
recorder_leave(Recorder *self, PyObject *exchange)
{
    Exchange *x = as_exchange(exchange);
    if (x == NULL)
        return NULL;
    if (x->series == NULL || !Py_IS_TYPE(x->series, &SeriesType)) /* its route was never entered */
        Py_RETURN_NONE;
    Py_ssize_t open = ((Series *)x->series)->in_progress, all;
    double *cells = cells_of(self, &all);
    if (cells == NULL)
        return NULL;
    if (!inside(all, open, 0)) {
        no_such_cell();
        return NULL;
    }
    cells[open] -= 1.0;
    free_place(self, cells, all, x);
    Py_RETURN_NONE;
}

static PyMethodDef recorder_methods[] = {
    {"begin", (PyCFunction)recorder_begin, METH_O, "As HttpMetrics.begin_with()."},
    {"record", (PyCFunction)recorder_record, METH_O, "As HttpMetrics.record_with()."},
    {"leave", (PyCFunction)recorder_leave, METH_O, "It is in progress no more, and not recorded."},
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
