/* The core, as `plan`: Queue (what waits for its line) and Core (a request's route becomes known, its
 * end).
 */

/* Queue: the finished exchanges that have no line yet --------------------------------------------
 *
 * As Waiting of logging.batches, whose methods would be looked up and called here. Of an exchange it
 * keeps no more than its line will say: one that waited for the batch would leave the next request to
 * find other memory, which is in no cache.
 */

/* What a line says of an exchange, as it was when that was put in; or any other item. */
typedef struct {
    PyObject *other; /* else NULL, and these are as in the exchange */
    PyObject *request_id, *correlation_id, *method, *path, *client, *endpoint, *status, *fields;
    double started, ended;
    long long sent;
} Brief;

typedef struct {
    PyObject_HEAD
    Brief *briefs; /* a ring: `count` of them from `first` on */
    Py_ssize_t room, first, count;
    double since; /* when the exchange ended that found it empty */
} Queue;

enum { ROOM = 128 }; /* a power of two, and so are its doubles */

/* Twice the room, or the first. 0 or -1. */
static int
make_room(Queue *self)
{
    Py_ssize_t room = self->room ? 2 * self->room : ROOM;
    Brief *briefs = PyMem_New(Brief, room);
    if (briefs == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < self->count; i++)
        briefs[i] = self->briefs[(self->first + i) & (self->room - 1)];
    PyMem_Free(self->briefs);
    self->briefs = briefs;
    self->room = room;
    self->first = 0;
    return 0;
}

/* The place behind the last, to be filled in before anything is called; NULL with an exception. */
static inline Brief *
next_place(Queue *self)
{
    if (self->count == self->room && make_room(self) < 0)
        return NULL;
    return &self->briefs[(self->first + self->count++) & (self->room - 1)];
}

/* 0 or -1. */
static int
push(Queue *self, PyObject *item)
{
    Brief *brief = next_place(self);
    if (brief == NULL)
        return -1;
    memset(brief, 0, sizeof *brief);
    brief->other = Py_NewRef(item);
    return 0;
}

/* 0 or -1. */
static int
push_exchange(Queue *self, Exchange *x)
{
    Brief *brief = next_place(self);
    if (brief == NULL)
        return -1;
    brief->other = NULL;
    brief->request_id = Py_XNewRef(x->request_id);
    brief->correlation_id = Py_XNewRef(x->correlation_id);
    brief->method = Py_XNewRef(x->method);
    brief->path = Py_XNewRef(x->path);
    brief->client = Py_XNewRef(x->client);
    brief->endpoint = Py_XNewRef(x->endpoint);
    brief->status = Py_XNewRef(x->status);
    brief->fields = Py_XNewRef(x->fields);
    brief->started = x->started;
    brief->ended = x->ended;
    brief->sent = x->sent;
    if (self->count == 1)
        self->since = x->ended;
    return 0;
}

/* Take the oldest, with its references. 1, or 0: there is none. */
static inline int
pull(Queue *self, Brief *oldest)
{
    if (self->count == 0)
        return 0;
    *oldest = self->briefs[self->first];
    self->first = (self->first + 1) & (self->room - 1);
    self->count--;
    return 1;
}

static void
let_go(Brief *brief)
{
    clear_objects(&brief->other, &brief->fields);
}

/* The item, or the exchange as far as it is known; takes the references of the brief. */
static PyObject *
restored(Brief *brief)
{
    if (brief->other != NULL)
        return brief->other;
    Exchange *x = (Exchange *)ExchangeType.tp_alloc(&ExchangeType, 0);
    if (x == NULL) {
        let_go(brief);
        return NULL;
    }
    x->request_id = brief->request_id;
    x->correlation_id = brief->correlation_id;
    x->method = brief->method;
    x->path = brief->path;
    x->client = brief->client;
    x->endpoint = brief->endpoint;
    x->status = brief->status;
    x->fields = brief->fields;
    x->started = brief->started;
    x->ended = brief->ended;
    x->sent = brief->sent;
    x->closed = 1;
    return (PyObject *)x;
}

static PyObject *
queue_append(Queue *self, PyObject *item)
{
    int failed = PyObject_TypeCheck(item, &ExchangeType) ? push_exchange(self, (Exchange *)item)
                                                         : push(self, item);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
queue_popleft(Queue *self, PyObject *Py_UNUSED(nothing))
{
    Brief oldest;
    if (pull(self, &oldest))
        return restored(&oldest);
    PyErr_SetString(PyExc_IndexError, "the queue is empty");
    return NULL;
}

/* What it has now: what a finalizer of one of them puts in is not waited for. */
static int
queue_clear(Queue *self)
{
    Brief oldest;
    for (Py_ssize_t left = self->count; left > 0 && pull(self, &oldest); left--)
        let_go(&oldest);
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
    for (Py_ssize_t i = 0; i < self->count; i++) {
        Brief *brief = &self->briefs[(self->first + i) & (self->room - 1)];
        int stop = visit_objects(&brief->other, &brief->fields, visit, arg);
        if (stop)
            return stop;
    }
    return 0;
}

static void
queue_dealloc(Queue *self)
{
    PyObject_GC_UnTrack(self);
    queue_clear(self); /* nobody can put anything in any more */
    PyMem_Free(self->briefs);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef queue_methods[] = {
    {"append", (PyCFunction)queue_append, METH_O, "Put one at the end."},
    {"popleft", (PyCFunction)queue_popleft, METH_NOARGS,
     "Take the first, or what is kept of it; IndexError: there is none."},
    {"clear", (PyCFunction)queue_clear_method, METH_NOARGS, "Take all that it has."},
    {NULL},
};

static PyMemberDef queue_members[] = {
    {"since", T_DOUBLE, offsetof(Queue, since), READONLY, NULL},
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
    .tp_members = queue_members,
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
    unsigned long long hushed, served; /* bit n: one of `muted`, of `endpoints` has this mark_of() */
    Py_ssize_t most;
    double longest; /* so many in the queue, or so many seconds since its first, are a batch */
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

/* The marks of a set or of the keys of a dict; 0 with an exception. The lowest bit is always set. */
static unsigned long long
marks_of(PyObject *endpoints)
{
    PyObject *each = PyObject_GetIter(endpoints), *endpoint;
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
                           "route",  "begin",   "record",    "queue", "most",        "longest",
                           "drain",  "nudge",   "muted",     "count_error", "release", "report",
                           "key_header", NULL};
    PyObject *plan, *current, *endpoints, *edge, *identify, *resolve, *route, *begin, *record, *queue;
    PyObject *drain, *nudge, *muted, *count_error, *release, *report, *key_header;
    Py_ssize_t most;
    double longest;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OO!O!OOOOOOOndOOO!OOOO", keys, &plan,
                                     &PyContextVar_Type, &current, &PyDict_Type, &endpoints, &edge,
                                     &identify, &resolve, &route, &begin, &record, &queue, &most,
                                     &longest, &drain, &nudge, &PyFrozenSet_Type, &muted, &count_error,
                                     &release, &report, &key_header))
        return NULL;
    if (queue != Py_None && !Py_IS_TYPE(queue, &QueueType)) {
        PyErr_SetString(PyExc_TypeError, "a Queue is needed");
        return NULL;
    }
    unsigned long long hushed = marks_of(muted), served = hushed ? marks_of(endpoints) : 0;
    Core *self = served == 0 ? NULL : (Core *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    CORE_OBJECTS(KEEP)
    self->hushed = hushed;
    self->served = served;
    Recorder *recorder = recorder_of(begin, (PyCFunction)recorder_begin);
    if (recorder != NULL && recorder == recorder_of(record, (PyCFunction)recorder_record))
        self->recorder = recorder; /* `begin` keeps it alive */
    self->most = most;
    self->longest = longest;
    return (PyObject *)self;
}

COLLECTED(core, Core, plan, key_header)

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
        PyObject *done = call_one(self->begin, (PyObject *)x);
        if (done == NULL && reported(self, names.site_enter) < 0)
            return NULL;
        Py_XDECREF(done);
    }
    if (self->route == Py_None)
        Py_RETURN_NONE;
    return call_one(self->route, (PyObject *)x);
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
    if (push_exchange(queue, x) < 0)
        return -1;
    Py_ssize_t waiting = queue->count;
    int late = x->ended - queue->since > self->longest;
    PyObject *next = late || waiting >= self->most || status >= 500 ? self->drain
                     : waiting == 1                                 ? self->nudge
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
        PyObject *done = call_one(self->release, (PyObject *)x);
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
        PyObject *done = call_one(self->record, (PyObject *)x);
        if (done == NULL)
            return -1;
        Py_DECREF(done);
    }
    if (self->record != Py_None && (status >= 500 || is_set(x->error))) {
        PyObject *done = call_one(self->count_error, (PyObject *)x);
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

/* Whether this is a request within which another one may be served, as Exchange.goes_on. */
static inline int
goes_on(PyObject *outer)
{
    if (outer == Py_None || !PyObject_TypeCheck(outer, &ExchangeType))
        return 0;
    Exchange *x = (Exchange *)outer;
    return !x->closed && x->ended == 0.0 && !is_set(x->error);
}

/* What the request was served within is current again, as leave() of opsguard.context. 0 or -1. */
static int
set_back(Core *self, Exchange *x)
{
    if (x->outer != NULL && !goes_on(x->outer))
        Py_CLEAR(x->outer);
    PyObject *token = PyContextVar_Set(self->current, x->outer == NULL ? Py_None : x->outer);
    Py_XDECREF(token);
    return token == NULL ? -1 : 0;
}

/* What was to tell the end of a request is dropped without: its end is heard here. For finalizers. */
static void
end_unheard(PyObject *self, Exchange *x)
{
    if (x == NULL || x->closed)
        return;
    PyObject *error = take_error();
    if (close_exchange(x->core, x) < 0)
        PyErr_WriteUnraisable(self);
    give_error(error);
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
    PyObject *template = call_one(label, request);
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

enum { TEMPLATES = 4096 };

/* A route of a framework in the common form: as `templates` remembers it, or as the function says. */
static PyObject *
known_template(PyObject *templates, PyObject *template, PyObject *route)
{
    PyObject *known = Py_XNewRef(PyDict_GetItemWithError(templates, route));
    if (known != NULL || PyErr_Occurred())
        return known;
    known = call_one(template, route);
    if (known != NULL && PyDict_GET_SIZE(templates) < TEMPLATES
        && PyDict_SetItem(templates, route, known) < 0)
        Py_CLEAR(known);
    return known;
}
